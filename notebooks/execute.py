"""Run the notebooks from top to bottom with this interpreter and store their outputs.

python notebooks/execute.py                                            # both
python notebooks/execute.py notebooks/01_purify_and_evaluate.ipynb     # one

A notebook is stored only when it ran without an error and its outputs say nothing of the machine.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
NOTEBOOKS = ("01_purify_and_evaluate.ipynb", "02_lora_adaptation.ipynb")
LARGEST_BYTES = 1_500_000
# An absolute path of POSIX or Windows, at the start of a word; `8/255` and `a/b` are none.
ABSOLUTE_PATH = re.compile(r"""(?:^|[\s'"=(\[:,])(?:/(?:[\w.+-]+/)+[\w.+-]*|~/\S+|[A-Za-z]:\\\S+)""", re.MULTILINE)
ADDRESS = re.compile(r"\w+://|\b(?:\d{1,3}\.){3}\d{1,3}\b|\blocalhost\b")


def execute(notebook: NotebookNode, folder: Path, timeout: int = 1800) -> NotebookNode:
    """Run every cell in a new kernel of this interpreter; an installed kernelspec is never looked at.

    Args:
        notebook: changed in place: outputs, execution counts, metadata.
        folder: working directory of the kernel.
        timeout: seconds for one cell.

    Returns:
        The notebook.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    kernel = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))  # leaves ipykernel's own
    client = NotebookClient(
        notebook,
        km=kernel,
        timeout=timeout,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    with tempfile.TemporaryDirectory() as own:  # nor at the start-up files of the user; nothing is left behind
        client.execute(env=os.environ | {"IPYTHONDIR": own, "TMPDIR": own}, cleanup_kc=True)
    # The versions of one machine are no part of a tutorial.
    notebook.metadata = NotebookNode(
        kernelspec=NotebookNode(display_name="Python 3", language="python", name="python3"),
        language_info=NotebookNode(name="python"),
    )
    return notebook


def faults(notebook: NotebookNode) -> list[str]:
    """What a stored notebook must not have: cells that were not run in order, errors, noise, traces of a machine."""
    found = []
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        found.append(f"not run from top to bottom: execution counts {counts}")
    for number, cell in enumerate(cells, 1):
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"cell {number}: error {output.ename}")
            if output.get("name") == "stderr":
                found.append(f"cell {number}: stderr: {output.text[:200]!r}")
        for text in texts(cell):
            found += [f"cell {number}: path {match[0].strip()!r}" for match in ABSOLUTE_PATH.finditer(text)]
            found += [f"cell {number}: address {match[0]!r}" for match in ADDRESS.finditer(text)]
    found += [
        f"path {match[0].strip()!r} in {cell.source[:40]!r}"
        for cell in notebook.cells
        for match in ABSOLUTE_PATH.finditer(cell.source)
    ]
    size = len(nbformat.writes(notebook).encode())
    if size > LARGEST_BYTES:
        found.append(f"{size} bytes, more than {LARGEST_BYTES}")
    return found


def texts(cell: NotebookNode) -> Iterator[str]:
    """Everything readable that a code cell put out, without markup."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output.text
        for kind, value in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield re.sub(r"<[^>]*>", " ", value)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run notebooks and store their outputs.")
    parser.add_argument("notebooks", nargs="*", type=Path, default=[FOLDER / name for name in NOTEBOOKS])
    for path in parser.parse_args(argv).notebooks:
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder))
        if found := faults(notebook):
            sys.exit(f"{path.name} is not stored:\n  " + "\n  ".join(found))
        temporary = path.with_name(path.name + ".tmp")
        nbformat.write(notebook, temporary)
        os.replace(temporary, path)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
