"""Names in a run's records: which of them mean something on the Hub, and which only on the machine of the run."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

# Folders that this package's commands write to and read from: `data/cifar10` has the form of a Hub id and is none.
_LOCAL = ("adapter", "checkpoints", "data", "datasets", "models", "outputs", "runs")
_PUBLISHED = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "imagenet-1k": "ILSVRC/imagenet-1k",
}  # datasets that people keep in a folder of this name

# An absolute path inside a text, also after a colon (`python:/home/...`); not the path of a URL, not a fraction.
_PATH = re.compile(r"""(?<![\w./\\~-])(?:file://)?(?:~|[A-Za-z]:(?=[\\/]))?(?:[\\/][^\s\\/"'<>|:,;()\[\]]+){2,}""")


def hub_id(name: str | None) -> str | None:
    """The name itself where it is a Hub id of the form OWNER/NAME, and nothing for a local path."""
    if not name or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if name.split("/")[0].lower() in _LOCAL else name


def dataset_id(name: str | None) -> str | None:
    """The Hub id of a dataset, also of a well-known one that lies in a folder of its name, such as `data/cifar10`."""
    found = hub_id(name)
    if found is None and name:
        found = _PUBLISHED.get(PurePath(name).name.lower().removeprefix("embedded:"))
    return found


def short(name: str) -> str:
    """The last part of a path or Hub id."""
    return PurePath(name.replace("\\", "/")).name


def without_paths(value: Any) -> Any:
    """JSON values whose absolute paths are cut down to their last part: the rest says nothing elsewhere, and perhaps
    too much of the machine it was written on."""
    if isinstance(value, dict):
        return {name: without_paths(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if PurePath(value).is_absolute() or re.match(r"~[/\\]|[A-Za-z]:[/\\]", value):
        return short(value)
    return _PATH.sub(lambda found: short(found[0]), value)
