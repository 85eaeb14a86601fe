"""Records that runs and evaluations leave: JSON written whole or not at all, and the environment they were made in."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from .locks import locked
from .paths import without_paths

PACKAGES = ("maep-hf", "torch", "transformers", "accelerate", "datasets", "peft", "numpy", "pillow")


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    # one name whoever writes: what an interrupted run left is then known, and replaced by the next
    _replace(path, json.dumps(value, indent=2, sort_keys=False, default=str) + "\n", path.name + ".tmp")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees the old file or the new one, whichever of several processes wrote it."""
    _replace(path, text, f"{path.name}.{os.getpid()}.tmp")


def _replace(path: Path, text: str, temporary_name: str) -> None:
    temporary = path.with_name(temporary_name)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; none where there is no file.

    Raises:
        ValueError: a line that is not a JSON object, with its number.
    """
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number} is not a JSON object: {line.strip()}")
            records.append(record)
    return records


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Add a record to a JSON-lines file, in place of one with the same `key`; readers see the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unguarded, advice = f"{path} cannot be locked", "let no other evaluation write into its folder now"
    with locked(path.with_name(f".{path.name}.lock"), unguarded, advice):  # two may write into one folder
        records = [known for known in read_jsonl(path) if known.get("key") != record.get("key")] + [record]
        _replace(path, as_jsonl(records), path.name + ".tmp")


def as_jsonl(records: Iterable[Mapping[str, Any]]) -> str:
    """The text of a JSON-lines file."""
    return "".join(json.dumps(record, default=str) + "\n" for record in records)


def describe_environment() -> dict[str, Any]:
    """Versions, git revision and machine, for the record of a run."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "command": [Path(sys.argv[0]).name, *without_paths(sys.argv[1:])],
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **_revision(),
    }


def _revision() -> dict[str, Any]:
    """Of the repository that this package is of, and not of one that it happens to be installed inside."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != Path(__file__).resolve().parents[1]:
        return {"git_revision": None, "git_dirty": False}
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {"git_revision": _git("rev-parse", "HEAD"), "git_dirty": bool(changed)}


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
