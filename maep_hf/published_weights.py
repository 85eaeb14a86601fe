"""Weights as their authors published them: safetensors, or what `torch.save` wrote."""

from __future__ import annotations

import pickle
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
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            raise ValueError(f"{file} is no checkpoint of torch: {error}") from error
        state = state.get("state_dict", state) if isinstance(state, dict) else {}
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
