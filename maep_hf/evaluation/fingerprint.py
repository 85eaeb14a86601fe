"""Fingerprints of models, so that a record says which weights it measured and a resumed run knows its own."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn


def fingerprint(model: Any) -> str:
    """Hash of a model's weights, buffers and configuration; of a callable without weights, its name and settings.

    The same wherever the model lies and whatever device it is on.
    """
    digest = hashlib.sha256(type(model).__qualname__.encode())
    if isinstance(model, nn.Module):
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
        for module in model.modules():
            digest.update(_settings(module).encode())
    else:
        digest.update(getattr(model, "__qualname__", "").encode())
        digest.update(_settings(model).encode())
    return digest.hexdigest()[:16]


def _settings(model: Any) -> str:
    """What decides a model's output beside its weights: its own record, its configuration, its preprocessing."""
    parts = [type(model).__qualname__]
    if callable(getattr(model, "record", None)):
        parts.append(json.dumps(model.record(), sort_keys=True, default=str))
    config = getattr(model, "config", None)
    if hasattr(config, "to_diff_dict"):  # without the folder and the library version, which say nothing of the output
        skipped = ("_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype")
        kept = {key: value for key, value in config.to_diff_dict().items() if key not in skipped}
        parts.append(json.dumps(kept, sort_keys=True, default=str))
    spec = getattr(getattr(model, "preprocessing", None), "spec", None)
    if spec is not None:
        parts.append(repr(spec))
    if getattr(model, "purify_kwargs", None):
        parts.append(repr(sorted(model.purify_kwargs.items())))
    return "|".join(parts)
