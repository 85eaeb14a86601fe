"""Fingerprints of models, so that a record says what it measured and a resumed run knows its own."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_NOT_SETTINGS = ("training", "name_or_path", "warnings_issued")
_UNSAID = (
    "custom_pipelines",
    "_name_or_path",
    "transformers_version",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
)


class Opaque(ValueError):
    """A callable whose behaviour cannot be read off it, so that nothing tells it from another one."""


def fingerprint(model: Any) -> str:
    """Hash of what decides a model's output: weights, buffers, layers and their settings, configuration.

    The same wherever the model lies and whatever device it is on. A function is known by its code and what it closes
    over.

    Raises:
        Opaque: a callable, or one inside the model, that is neither a module nor a plain function.
    """
    digest = hashlib.sha256(type(model).__qualname__.encode())
    if isinstance(model, nn.Module):
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
        for name, module in model.named_modules():
            digest.update(f"{name}:{_settings(module)}".encode())
    else:
        digest.update(_code(model).encode())
    return digest.hexdigest()[:16]


def _settings(module: nn.Module) -> str:
    """What decides a module's output beside its weights."""
    parts = [type(module).__qualname__, module.extra_repr() if not isinstance(module, PreTrainedModel) else ""]
    if callable(getattr(module, "record", None)):
        parts.append(json.dumps(module.record(), sort_keys=True, default=str))
    config = getattr(module, "config", None)
    if hasattr(config, "to_diff_dict"):  # without the folder and the library's version, which say nothing of the output
        kept = {key: value for key, value in config.to_diff_dict().items() if key not in _UNSAID}
        parts.append(json.dumps(kept, sort_keys=True, default=str))
    spec = getattr(getattr(module, "preprocessing", None), "spec", None)
    if spec is not None:
        parts.append(repr(spec))
    for name in ("active_adapters", "disable_adapters", "merged"):  # of PEFT's layers
        value = getattr(module, name, None) if hasattr(module, "lora_A") else None
        if value is not None:
            parts.append(f"{name}={value}")
    if not isinstance(module, PreTrainedModel):
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or name in _NOT_SETTINGS:
                continue
            plain = _plain(value)
            if plain is not None:
                parts.append(f"{name}={plain}")
            elif callable(value) and not isinstance(value, nn.Module | type):
                parts.append(f"{name}={_code(value)}")
    return "|".join(parts)


def _plain(value: Any) -> str | None:
    """Text of numbers, strings and containers of such; `None` for anything else."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return repr(value)
    if isinstance(value, Mapping):
        entries = [(_plain(key), _plain(entry)) for key, entry in value.items()]
        return None if any(None in entry for entry in entries) else repr(sorted(entries))
    if isinstance(value, tuple | list | set | frozenset):
        entries = [_plain(entry) for entry in value]
        return None if None in entries else repr(sorted(entries) if isinstance(value, set | frozenset) else entries)
    return None


def _code(function: Any) -> str:
    """A function by its code, constants, defaults and what it closes over."""
    if isinstance(function, nn.Module):
        return fingerprint(function)
    if isinstance(function, functools.partial):
        parts = [function.func, *function.args, *(function.keywords[name] for name in sorted(function.keywords))]
        return f"partial({', '.join(_value(part) for part in parts)}, {sorted(function.keywords)})"
    if isinstance(function, MethodType):
        return f"{_code(function.__func__)} of {_value(function.__self__)}"
    if isinstance(function, FunctionType):
        code = function.__code__
        cells = [_value(cell.cell_contents) for cell in function.__closure__ or ()]
        defaults = [_value(value) for value in function.__defaults__ or ()]
        defaults += [_value(value) for value in (function.__kwdefaults__ or {}).values()]
        constants = [repr(value) for value in code.co_consts if not hasattr(value, "co_code")]
        inner = [value.co_code.hex() for value in code.co_consts if hasattr(value, "co_code")]
        return repr((function.__qualname__, code.co_code.hex(), code.co_names, constants, inner, cells, defaults))
    if isinstance(function, BuiltinFunctionType):
        return f"{function.__module__}.{function.__qualname__}"
    if callable(getattr(function, "record", None)):
        return f"{type(function).__qualname__} {json.dumps(function.record(), sort_keys=True, default=str)}"
    raise Opaque(f"{type(function).__name__} cannot be told from another of its kind; give it a method record()")


def _value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(data).hexdigest()
    plain = _plain(value)
    return _code(value) if plain is None else plain
