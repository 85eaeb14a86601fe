"""Names in a run's records: which of them mean something on the Hub, and which only on the machine of the run."""

from __future__ import annotations

from pathlib import Path, PurePath

from huggingface_hub.utils import HFValidationError, validate_repo_id

# Folders that this package's commands write to and read from: `data/cifar10` has the form of a Hub id and is none.
_LOCAL = ("adapter", "checkpoints", "data", "datasets", "models", "outputs", "runs")
PUBLISHED = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "imagenet-1k": "ILSVRC/imagenet-1k",
}  # datasets that people keep in a folder of this name


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
        found = PUBLISHED.get(PurePath(name).name.lower().removeprefix("embedded:"))
    return found
