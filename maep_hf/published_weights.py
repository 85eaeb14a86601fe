"""Weights as their authors published them: safetensors, or what `torch.save` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_published_weights(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name, without the `module.` that `DataParallel` puts before them.

    Args:
        file: `.safetensors`; anything else is read as what `torch.save` wrote, of tensors alone: a state dict, or one
            under the key `state_dict`. Code in such a file is not run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"There is no weight file {file}.")
    if file.suffix == ".safetensors":
        try:
            state = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read as safetensors: {error}") from error
    else:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # bytes that are no checkpoint raise anything, depending on what they spell
            raise ValueError(f"{file} is no checkpoint of torch: {type(error).__name__}: {error}") from error
        state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping):
        raise ValueError(f"{file} holds a {type(state).__name__}, not tensors by name")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{file} holds a {type(tensor).__name__} under {name!r}, not only tensors by name")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
