"""Tensors as bytes, for the hashes by which records know weights and images."""

from __future__ import annotations

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> bytes:
    """The values of a tensor of any dtype, wherever it lies, as they are stored."""
    return tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
