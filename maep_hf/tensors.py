"""Tensors as bytes, for the hashes by which records know weights and images."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


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
