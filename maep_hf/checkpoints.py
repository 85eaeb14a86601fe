"""The weights that come with the repository, and loading models by folder or Hub id with errors in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

    from .modeling_maep import MAEPModel

PURIFIER = "maep-tiny-cifar10"
CLASSIFIER = "resnet20-cifar10"
ADAPTER_CONFIG = "adapter_config.json"
BASE_RECORD = "base_model.json"  # beside an adapter: which weights it was trained on


class CheckpointError(ValueError):
    """A model that cannot be found or is of the wrong kind; the message says which and what to do."""


def released_checkpoint(name: str) -> Path:
    """The folder of a checkpoint that the repository carries under `checkpoints/`.

    Of the repository that this package lies in, or else, as for an installed package, of the working directory.

    Raises:
        CheckpointError: there is none of that name, as in an installation without the repository.
    """
    folder = Path(__file__).resolve().parent.parent / "checkpoints"
    found = (place / name for place in (folder, Path.cwd() / "checkpoints") if (place / name / "config.json").is_file())
    path = next(found, None)
    if path is None:
        others = sorted(entry.parent.name for entry in folder.glob("*/config.json"))
        has = f"it has {', '.join(others)}" if others else "it is not part of this installation"
        raise CheckpointError(
            f"no released checkpoint {name!r} in {folder} ({has}); run from a clone of the repository, "
            "or name a model folder or Hub id"
        )
    return path


def expanded(name_or_path: str | os.PathLike) -> str:
    """A folder in the user's home by its whole path: no shell expands the `~` of `--model=~/purifier`."""
    return os.path.expanduser(os.fspath(name_or_path))


def expanded_path(path: Path | None) -> Path | None:
    """The same for a path on the command line, as a callback of typer."""
    return None if path is None else path.expanduser()


def load_purifier(
    name_or_path: str | os.PathLike | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> MAEPModel:
    """Load a purifier in eval mode, its parameters without gradients.

    Args:
        name_or_path: folder or Hub id, also of a LoRA adapter, which is merged into its base: the one that its
            configuration names, by Hub id (and revision) or by a path from here, from the adapter's folder, or of a
            released checkpoint. `None` is the released checkpoint `maep-tiny-cifar10`.
        device: where its weights go.
        dtype: type of its weights; `None` keeps the stored one.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        CheckpointError: no such model, or it is not a purifier; of an adapter, its base. A folder that holds a whole
            model and an adapter, or weights that are cut off.
        ValueError: an adapter that does not say its base, or does not fit it; a revision of a folder.
    """
    source = expanded(released_checkpoint(PURIFIER) if name_or_path is None else name_or_path)
    if revision is not None and Path(source).is_dir():
        raise ValueError(f"revision={revision!r}: {source} is a folder and has none; leave it out, or name a Hub id")
    if (Path(source) / ADAPTER_CONFIG).is_file():
        whole = next(Path(source).glob("model*.safetensors"), None)
        if whole is not None:
            raise CheckpointError(
                f"{source} holds a whole model ({whole.name}) and an adapter ({ADAPTER_CONFIG}), and which of them is "
                "meant cannot be told; save them in folders of their own"
            )
        return _load_adapted(source, _adapter_config(source, revision), revision).to(device=device, dtype=dtype)
    try:
        return _load_whole(source, dtype, revision).to(device)
    except CheckpointError:
        if Path(source).exists():
            raise
        config = None
        with suppress(ValueError, OSError):  # a Hub repository may hold an adapter instead
            config = _adapter_config(source, revision)
        if config is None:
            raise
    return _load_adapted(source, config, revision).to(device=device, dtype=dtype)


def _adapter_config(source: str, revision: str | None) -> PeftConfig:
    from peft import PeftConfig

    return PeftConfig.from_pretrained(source, **({"revision": revision} if revision else {}))


def _load_adapted(source: str, config: PeftConfig, revision: str | None) -> MAEPModel:
    from .adaptation import base_dtype, load_adapter, merge_adapter

    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"purifier: the adapter in {source} does not say its base model (base_model_name_or_path)")
    folder = base_folder(source, base)
    pinned = None if folder else config.revision  # of the base's repository; a folder has none
    whole = _load_whole(folder or base, base_dtype(source, revision), pinned)
    adapted = load_adapter(whole, source, revision=revision)
    return merge_adapter(adapted).eval().requires_grad_(False)


def base_folder(adapter: str | os.PathLike, base: str) -> str | None:
    """The folder of an adapter's base: by a path from here, from the adapter's folder, or of a released checkpoint."""
    places = (Path(base), Path(adapter) / base, Path(__file__).resolve().parent.parent / base)
    return next((os.fspath(path) for path in places if path.is_dir()), None)


def _load_whole(source: str, dtype: torch.dtype | None, revision: str | None) -> MAEPModel:
    options = {} if dtype is None else {"dtype": dtype}
    return read_model(source, revision, **options).eval().requires_grad_(False)


def read_model(source: str, revision: str | None = None, **options: Any) -> MAEPModel:
    """A whole purifier, as `MAEPModel.from_pretrained` leaves it.

    Args:
        source: folder or Hub id.
        revision: branch, tag or commit of a Hub repository.
        options: of `from_pretrained`.

    Raises:
        CheckpointError: no such model, it is not a purifier, or its weights are cut off.
    """
    from .modeling_maep import MAEPModel

    check_model(source, model_type="maep", kind="a purifier", revision=revision)
    at = {} if revision is None else {"revision": revision}
    with readable_weights(source):
        return MAEPModel.from_pretrained(source, **at, **options)


def is_other_base(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two records of an adapter's base are of other weights; in another dtype the same ones have another
    fingerprint, so that nothing is known."""
    return one.get("dtype") == other.get("dtype") and one.get("fingerprint") != other.get("fingerprint")


@contextmanager
def readable_weights(source: str) -> Iterator[None]:
    """Name the folder or Hub id of weights that safetensors cannot read.

    Raises:
        CheckpointError: they are cut off or none.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(
            f"{source}: its weights cannot be read ({error}); the file is incomplete, or a pointer of git-lfs: "
            "download it again, or run git lfs pull"
        ) from error


def check_model(
    name_or_path: str | os.PathLike,
    *,
    model_type: str | None = None,
    kind: str = "a model",
    revision: str | None = None,
) -> None:
    """Check that a folder or Hub repository has a model's `config.json`, of `model_type` where that is given.

    Raises:
        CheckpointError: it has not.
    """
    from transformers import PreTrainedConfig

    source = expanded(name_or_path)
    path = Path(source)
    looks_local = path.is_absolute() or source.startswith(".") or source.count("/") != 1
    if path.is_file():
        raise CheckpointError(f"{source} is a file; name the folder that holds config.json and model.safetensors")
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(f"{source} holds no config.json: it is not the folder of {kind}")
    if looks_local and not path.is_dir():
        raise CheckpointError(f"{source}: no such folder, and not a Hub id of the form OWNER/NAME")
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, **({"revision": revision} if revision else {}))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{source}: no such folder, and not found on the Hub ({reason})") from error
    found = config.get("model_type")
    if model_type is not None and found != model_type:
        raise CheckpointError(f"{source} is not {kind}: its config.json has model_type {found!r}, not {model_type!r}")
