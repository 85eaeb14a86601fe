"""Virtual environments made offline of what is installed here: exactly the named packages and what those require.

The packages are linked, not copied; nothing else can be imported, as if pip had installed them and no more.
"""

import importlib.metadata
import os
import sys
import venv
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SCRIPT = """#!{python}
import sys
from {module} import {function}
sys.exit({function}())
"""


def required(*lines: str) -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions that these requirements bring, with all that those require."""
    found: dict[str, importlib.metadata.Distribution] = {}
    todo, seen = [Requirement(line) for line in lines], set()
    while todo:
        wanted = todo.pop()
        name, extras = canonicalize_name(wanted.name), sorted(wanted.extras)
        if (name, *extras) in seen:
            continue
        seen.add((name, *extras))
        found[name] = importlib.metadata.distribution(name)
        for each in map(Requirement, found[name].requires or []):
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ["", *extras]):
                todo.append(each)
    return found


def make_environment(folder: Path, distributions: dict) -> Path:
    """Make the environment in a new folder and return its python; commands of the packages lie beside it."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for distribution in distributions.values():
        parts = {file.parts[0] for file in distribution.files or []}
        for part in parts - {"..", "__pycache__"}:
            link, target = site / part, Path(str(distribution.locate_file(part))).resolve()
            if target.exists() and not link.exists():
                os.symlink(target, link)
        for entry in distribution.entry_points.select(group="console_scripts"):
            script = folder / "bin" / entry.name
            module, _, function = entry.value.partition(":")
            script.write_text(
                SCRIPT.format(python=folder / "bin" / "python", module=module, function=function.split("[")[0].strip())
            )
            script.chmod(0o755)
    return folder / "bin" / "python"


def clean_variables(**more: str) -> dict[str, str]:
    """The environment's variables without what would bring other packages in."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "HF_"))}
    return kept | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | more
