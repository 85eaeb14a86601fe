"""Fingerprints of models, so that a record says what it measured and a resumed run knows its own."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import operator
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path, PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule
from transformers import PreTrainedConfig, PreTrainedModel

from ..preprocessing import PixelPreprocessing, PreprocessingSpec
from ..tensors import tensor_bytes

_BY_REPR = (Enum, bytes, complex, range, slice, re.Pattern, torch.layout, torch.memory_format)
_SAYS_NOTHING = (torch.device, PurePath, logging.Logger)
"""Of the output: where a model lies or runs is not what it is."""
Seen = tuple[int, ...]
"""What is being read already, by `id`: an object may hold itself."""
_NOT_SETTINGS = ("training", "name_or_path", "warnings_issued", "peft_config")
PUT_THERE = frozenset(dir(nn.Module())) | {"_hf_hook", "_old_forward", "_is_hf_initialized"}
"""Private attributes that torch, accelerate and transformers give any module."""
_UNSAID = (
    "custom_pipelines",
    "_name_or_path",
    "transformers_version",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
)
_LATER = {"purify_strength": 1.0}
"""Fields that configurations had not when records were made, with the value that changes nothing."""
_OWN_PACKAGE = __name__.partition(".")[0]
_FROM_THE_HUB = "transformers_modules"
"""Where transformers puts code that comes with weights: it is of their revision."""


class Opaque(ValueError):
    """A callable whose behaviour cannot be read off it, so that nothing tells it from another one."""


def fingerprint(model: Any) -> str:
    """Hash of what decides a model's output: weights, buffers, layers and their settings, configuration.

    The same wherever the model lies and whatever device it is on. A function is known by its code, what it closes over
    and, unless it is a library's, the global values and functions that it names, also in modules that it imports; a
    class that is no library's, by its methods likewise: who edits `forward` has another model. A module of such a class
    is known by its private attributes too, and any by the hooks that are no library's and by a `forward` or `purify` of
    its own; a program of TorchScript or torch.fx by its code and constants.

    Raises:
        Opaque: something inside the model decides its output and cannot be read, such as a generator or a handle.
    """
    return _fingerprint(model, ())


def _fingerprint(model: Any, seen: Seen) -> str:
    digest = hashlib.sha256(_kind(type(model), seen).encode())
    if isinstance(model, nn.Module):
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor_bytes(tensor))
        for name, module in model.named_modules():
            digest.update(f"{name}:{_settings(module, (*seen, id(model)))}".encode())
    else:
        digest.update(_code(model, seen).encode())
    return digest.hexdigest()[:16]


def _settings(module: nn.Module, seen: Seen) -> str:
    """What decides a module's output beside its weights."""
    parts = [_kind(type(module), seen), _said(module) if not isinstance(module, PreTrainedModel) else ""]
    if callable(getattr(module, "record", None)):
        parts.append(json.dumps(module.record(), sort_keys=True, default=str))
    config = getattr(module, "config", None)
    if hasattr(config, "to_diff_dict"):  # without the folder and the library's version, which say nothing of the output
        told = config.to_diff_dict().items()
        kept = {key: value for key, value in told if key not in _UNSAID and (key, value) not in _LATER.items()}
        parts.append(json.dumps(kept, sort_keys=True, default=str))
    spec = getattr(getattr(module, "preprocessing", None), "spec", None)
    if spec is not None:
        parts.append(repr(spec))
    for name in ("active_adapters", "disable_adapters", "merged"):  # of PEFT's layers
        value = getattr(module, name, None) if hasattr(module, "lora_A") else None
        if value is not None:
            parts.append(f"{name}={value}")
    parts += [f"hook={_code(hook, seen)}" for hook in _own_hooks(module)]
    if isinstance(module, torch.jit.ScriptModule):
        parts.append(_script(module, seen))
    elif isinstance(module, GraphModule):
        parts.append(_graph(module, seen))
    own = not all(of_a_library(base.__module__) for base in type(module).__mro__)
    if isinstance(module, PreTrainedModel) and not own:
        parts += [f"{name}={_code(value, seen)}" for name, value in _put_over_methods(module)]
    elif not isinstance(module, torch.jit.ScriptModule):
        not_settings = {*_NOT_SETTINGS, *(_of_transformers() if isinstance(module, PreTrainedModel) else ())}
        for name in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers[name]
            if buffer is not None and not isinstance(module, PixelPreprocessing):  # whose follow from its spec
                parts.append(f"{name}={_value(buffer, seen)}")
        for name, value in sorted(vars(module).items()):
            if name in not_settings or name.startswith("_") and (not own or name in PUT_THERE):
                continue
            plain = _plain(value)
            if plain is not None:
                parts.append(f"{name}={plain}")
            elif callable(value) and not isinstance(value, nn.Module | type):
                parts.append(f"{name}={_code(value, seen)}")
            elif not isinstance(value, nn.Module | PreprocessingSpec) and not hasattr(value, "to_diff_dict"):
                parts.append(f"{name}={_value(value, seen)}")
    return "|".join(parts)


def _own_hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks on a module's passes that somebody may edit; a library's are of what it put there."""
    forward = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    backward = (*module._backward_pre_hooks.values(), *module._backward_hooks.values())  # an attack's way
    yield from (hook for hook in (*forward, *backward) if _is_own(hook))


def _is_own(function: Any) -> bool:
    """Whether somebody may edit a function; a partial one is what it calls."""
    while isinstance(function, functools.partial):
        function = function.func
    return not of_a_library(getattr(function, "__module__", None))


def _put_over_methods(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What somebody put on this instance in place of a method that a model is used by.

    Accelerate puts a `forward` of its own around one that it keeps.
    """
    there = vars(module)
    for name, value in (("forward", there.get("_old_forward", there.get("forward"))), ("purify", there.get("purify"))):
        if callable(value) and _is_own(value):
            yield name, value


@functools.cache
def _of_transformers() -> frozenset[str]:
    """Attributes that transformers gives any model of its own."""
    return frozenset(vars(PreTrainedModel(PreTrainedConfig()))) | {"_weight_conversions", "_use_kernels"}


def _script(module: torch.jit.ScriptModule, seen: Seen) -> str:
    """What a module of TorchScript computes: its code, the constants in it, and what it keeps beside tensors."""
    program, tensors, parts = module._c, module.state_dict().keys(), []
    for name in sorted(program._method_names()):
        method = program._get_method(name)
        code, constants = method.code_with_constants
        graph = re.sub(r" *#.*$", "", str(method.inlined_graph), flags=re.MULTILINE)  # where the code stood
        kept = sorted({word for word in re.findall(r"\.(\w+)", code) if program.hasattr(word)} - tensors)
        found = {word: program.getattr(word) for word in kept}
        held = {word: value for word, value in found.items() if not isinstance(value, torch._C.ScriptModule)}
        text = re.sub(r"___torch_mangle_\d+\.|, device=[\w:]+|device=[\w:]+, ", "", code + graph)
        parts.append(f"{name}={text} {_value(dict(constants), seen)} {_value(held, seen)}")
    return "|".join(parts)


def _graph(module: GraphModule, seen: Seen) -> str:
    """What a program of torch.fx computes: its code, the functions that it calls, and tensors that are no weights."""
    parts, tensors = [module.code], module.state_dict().keys()
    for node in module.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, FunctionType) and _is_own(node.target):
            parts.append(_code(node.target, seen))
        elif node.op == "get_attr" and node.target not in tensors:
            parts.append(f"{node.target}={_value(operator.attrgetter(node.target)(module), seen)}")
    return "|".join(parts)


def _said(module: nn.Module) -> str:
    """What a module says of itself, in the words of a newer torch too."""
    text = module.extra_repr()
    if isinstance(module, nn.LayerNorm) and "bias=" not in text:  # torch 2.6 does not say it
        text += f", bias={module.bias is not None}"
    return text


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


def _code(function: Any, seen: Seen) -> str:
    """A function by its code, constants, defaults and what it closes over."""
    if isinstance(function, nn.Module):
        return _fingerprint(function, seen)
    if isinstance(function, functools.partial):
        parts = [function.func, *function.args, *(function.keywords[name] for name in sorted(function.keywords))]
        return f"partial({', '.join(_value(part, seen) for part in parts)}, {sorted(function.keywords)})"
    if isinstance(function, MethodType):
        return f"{_code(function.__func__, seen)} of {_value(function.__self__, seen)}"
    if isinstance(function, FunctionType):
        names = names_in(function.__code__)
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        cells = [_outside(cell, names, seen) if _is_own_module(cell) else _value(cell, seen) for cell in cells]
        defaults = [_value(value, seen) for value in function.__defaults__ or ()]
        defaults += [_value(value, seen) for value in (function.__kwdefaults__ or {}).values()]
        known = _instructions(function.__code__)
        named = {} if of_a_library(function.__module__) else _globals(function, (*seen, id(function)))
        return repr((function.__qualname__, known, cells, defaults, named))
    if isinstance(function, BuiltinFunctionType):
        return f"{function.__module__}.{function.__qualname__}"
    if callable(getattr(function, "record", None)):
        return f"{type(function).__qualname__} {json.dumps(function.record(), sort_keys=True, default=str)}"
    raise Opaque(f"{type(function).__name__} cannot be told from another of its kind; give it a method record()")


def _pieces(code: CodeType) -> Iterator[CodeType]:
    """A piece of code and those inside it, such as lambdas and comprehensions."""
    yield code
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _pieces(value)


def names_in(code: CodeType) -> set[str]:
    """What a piece of code and those inside it ask for by name: globals and attributes."""
    return {name for piece in _pieces(code) for name in piece.co_names}


def _instructions(code: CodeType) -> list[tuple]:
    """What a piece of code does, with the pieces inside it; not where it stands."""
    return [
        (
            piece.co_code.hex(),
            piece.co_names,
            [_plain(value) or repr(value) for value in piece.co_consts if not isinstance(value, CodeType)],
        )
        for piece in _pieces(code)
    ]


def _globals(function: FunctionType, seen: Seen) -> dict[str, str]:
    """The values that a function finds outside itself, by name, where they can be read."""
    names = names_in(function.__code__)
    return {
        name: _outside(function.__globals__[name], names, seen) for name in sorted(names & function.__globals__.keys())
    }


def _outside(value: Any, names: set[str], seen: Seen) -> str:
    """What code finds outside itself; of a module that somebody may edit, what of `names` is in it."""
    try:
        if _is_own_module(value) and id(value) not in seen:
            inside, there = (*seen, id(value)), vars(value)
            found = {name: _outside(there[name], names, inside) for name in sorted(names & there.keys())}
            return f"{value.__name__} {found}"
        return _kind(value, seen) if isinstance(value, type) else _value(value, seen)
    except Opaque:  # a logger's or a cache's handle; the model's own are read where it holds them
        return type(value).__qualname__


def _is_own_module(value: Any) -> bool:
    """Whether a value is a Python module of nobody's library, such as a script's own `helpers`."""
    if not isinstance(value, ModuleType):
        return False
    return not (of_a_library(value.__name__) or of_a_library(value.__name__.partition(".")[0]))


def _kind(kind: type, seen: Seen) -> str:
    """A class by its name; one that somebody may edit, also by its methods and settings."""
    if id(kind) in seen:
        return kind.__qualname__
    inside = (*seen, id(kind))
    parts = [kind.__qualname__]
    for base in kind.__mro__:
        for name, value in () if of_a_library(base.__module__) else sorted(vars(base).items()):
            wrapped = getattr(value, "__func__", None) or getattr(value, "fget", None) or getattr(value, "func", None)
            value = wrapped if isinstance(wrapped, FunctionType) else value  # class and static methods, properties
            dunder = name.startswith("__") and name.endswith("__")
            if isinstance(value, FunctionType):
                parts.append(f"{name}={_readable_code(value, inside)}")
            elif not dunder and _plain(value) is not None:
                parts.append(f"{name}={_plain(value)}")
    return "|".join(parts)


def _readable_code(function: FunctionType, seen: Seen) -> str:
    try:
        return _code(function, seen)
    except Opaque:  # it closes over something that cannot be read
        return repr(_instructions(function.__code__))


@functools.cache
def of_a_library(module: str | None) -> bool:
    """Whether what a module defines is known by its name: of Python, installed, of this package, or from the Hub."""
    top = (module or "").partition(".")[0]
    if top in (_OWN_PACKAGE, _FROM_THE_HUB) or top in sys.builtin_module_names:
        return True
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if file is None:
        return False
    path = Path(file).resolve()
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return bool(installed) or path.is_relative_to(Path(sysconfig.get_path("stdlib")).resolve())


def _value(value: Any, seen: Seen) -> str:
    """Anything that a model or a function may hold; an object by its kind and its attributes."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(tensor_bytes(value)).hexdigest()
    plain = _plain(value)
    if plain is not None:
        return plain
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return hashlib.sha256(f"{value.dtype}{value.shape}".encode() + value.tobytes()).hexdigest()
    if isinstance(value, ModuleType | type):
        return value.__name__
    if id(value) in seen:
        return "itself"
    inside = (*seen, id(value))
    if isinstance(value, Mapping):
        return str(sorted((_value(key, inside), _value(entry, inside)) for key, entry in value.items()))
    if isinstance(value, tuple | list | set | frozenset):
        entries = [_value(entry, inside) for entry in value]
        return str(sorted(entries) if isinstance(value, set | frozenset) else entries)
    if isinstance(value, _BY_REPR):
        return repr(value)
    if isinstance(value, _SAYS_NOTHING):
        return type(value).__name__
    slots = {field.name: getattr(value, field.name) for field in fields(value)} if is_dataclass(value) else None
    attributes = getattr(value, "__dict__", slots)
    if callable(value) or attributes is None:
        return _code(value, inside)
    return f"{_kind(type(value), inside)} {_value(attributes, inside)}"
