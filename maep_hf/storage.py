"""Tensors on disk: files that are there whole or not at all, and weights in 16 bits, half of the download for the same
computation in float32."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

STORED_DTYPES = ("float32", "float16", "bfloat16")


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: Mapping[str, str] | None = None, mode: int | None = None
) -> None:
    """Write a safetensors file so that a reader sees the old one or the new one, never half of it.

    Args:
        mode: of the file; `None` leaves that of safetensors, which is private.

    Raises:
        OSError: it cannot be written, on a full disk for one.
    """
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=None if metadata is None else dict(metadata))
        if mode is not None:
            temporary.chmod(mode)
        os.replace(temporary, path)
    except SafetensorError as error:  # the library's own word for an error of the operating system
        raise OSError(f"{path}: it cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def store_weights(folder: str | os.PathLike, dtype: str) -> None:
    """Round the weights of a saved model, classifier or adapter to a number type.

    `config.json` goes on naming the type to compute in (that of the weights when they were saved), so that
    `from_pretrained` gives float32 weights of the rounded values. Records know weights by their values: measure after
    this, not before.

    Args:
        folder: what `save_pretrained` wrote; its `.safetensors` files are replaced whole, in folders below none.
        dtype: float32, float16 or bfloat16, for the floating-point tensors; the others stay.

    Raises:
        ValueError: another `dtype`, no weights in `folder`, a `config.json` without a number type, or a value that
            float16 cannot hold (beyond 65504).
        OSError: a file cannot be written; the old one stays.
    """
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(STORED_DTYPES)}")
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"folder={os.fspath(folder)!r}: there is no .safetensors file in it")
    for path in files:
        config = path.with_name("config.json")
        if config.is_file() and not json.loads(config.read_text()).get("dtype"):
            raise ValueError(f"{config} does not say its dtype, so that the model would compute in that of the file")
    for path in files:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata(), list(file.keys())
            tensors = {name: _rounded(file.get_tensor(name), dtype, f"{path}: {name}") for name in names}
        write_tensors(path, tensors, metadata, path.stat().st_mode)


def _rounded(tensor: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(getattr(torch, dtype))
    if tensor.isfinite().all() and not rounded.isfinite().all():
        raise ValueError(f"{name}: {tensor.abs().max().item():.3g} is beyond float16; store it as bfloat16")
    return rounded.contiguous()
