"""Tensors as bytes and what is done to pixels as text, by which records know weights, images and classifiers."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from .preprocessing import PixelPreprocessing


def tensor_bytes(tensor: Tensor) -> bytes:
    """The values of a tensor of any dtype, wherever it lies, as they are stored."""
    return tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of a model's weights and buffers by name: one that was trained on in between has another."""
    digest = hashlib.sha256()
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:16]


def preprocessing_text(model: nn.Module) -> str | None:
    """What a classifier does to its pixels first, which its weights do not tell; `None` where nothing says it."""
    found = [module for module in model.modules() if isinstance(module, PixelPreprocessing)]
    return "; ".join(f"{each.spec!r}{', always resized' if each.always_resize else ''}" for each in found) or None
