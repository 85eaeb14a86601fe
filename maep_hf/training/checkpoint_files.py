"""The files of a checkpoint: written so that a power cut leaves all of it or none, and checked before they are used."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

CHECKPOINT_PREFIX = "step-"
MANIFEST = "files.json"
WEIGHTS = "model.safetensors"
_NAME = re.compile(re.escape(CHECKPOINT_PREFIX) + r"(\d+)")
_NEEDED = (WEIGHTS, "optimizer.bin")


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's name; `None` for any other folder, such as a copy with a name of its own."""
    named = _NAME.fullmatch(path.name)
    return int(named[1]) if named else None


def numbered(folder: Path) -> list[Path]:
    """The folders with a checkpoint's name, by step; whole or not."""
    found = [path for path in folder.glob(f"{CHECKPOINT_PREFIX}*") if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=step_of)


def seal(checkpoint: Path) -> None:
    """Bring all files to the disk, and last of all the manifest of their names and sizes.

    Raises:
        OSError: the disk is full or fails.
    """
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    for path in files:
        _sync(path)
    manifest = checkpoint / MANIFEST
    manifest.write_text(json.dumps({"files": sizes}, indent=2) + "\n")
    _sync(manifest)
    sync_folder(checkpoint)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # nor do all network file systems know this of one
        pass
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def damage(checkpoint: Path, processes: int = 1) -> str | None:
    """What is wrong with a checkpoint, in a few words; `None` where nothing is.

    Without a manifest it is an older version's, whose files must be there and end where they say themselves.

    Args:
        checkpoint: its folder.
        processes: number of processes whose random states it must hold.
    """
    needed = [*_NEEDED, *(f"random_states_{index}.pkl" for index in range(processes))]
    for name in needed:  # without random states Accelerate would go on with others, and not say so
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    if (checkpoint / MANIFEST).is_file():
        return _unlike_manifest(checkpoint)
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and not _ends_well(path):
            return f"{path.name} is not whole"
    return None


def _unlike_manifest(checkpoint: Path) -> str | None:
    try:
        sizes = dict(json.loads((checkpoint / MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is not whole"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return None


def unreadable(checkpoint: Path) -> str | None:
    """Which file of a checkpoint cannot be read by itself, in a few words; `None` where the fault is elsewhere.

    Files of `torch.save` are read whole against their checksums, and nothing in them is run or kept in memory.

    Raises:
        OSError: a file that may not be read, or that the disk fails to give.
    """
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        with path.open("rb"):  # that it may not be read is no fault of its content
            pass
        if not _ends_well(path):
            return f"{path.name} is not whole"
        if zipfile.is_zipfile(path):
            try:
                with zipfile.ZipFile(path) as archive:
                    wrong = archive.testzip()
            except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
                return f"{path.name}: {error}"
            if wrong is not None:
                return f"{path.name}: its part {wrong} is not what was written"
    return None


def _ends_well(path: Path) -> bool:
    """Whether a file of safetensors or of `torch.save` has its end; any other has."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return True
        except (SafetensorError, OSError):
            return False
    return path.suffix not in (".bin", ".pkl", ".pt") or zipfile.is_zipfile(path)
