"""Modules that a callable closes over or keeps in a list: `eval()` does not reach them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .fingerprint import PUT_THERE, names_in, of_a_library

_CONTAINERS = (list, tuple, set, frozenset)


def expect_eval(argument: str, model: Any) -> None:
    """That no batch normalisation that a model reaches is in training mode, where images influence each other.

    Raises:
        ValueError: one is.
    """
    for module in reached_modules(model):
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"{argument}: a {type(module).__name__} that it uses is in training mode, where images influence each "
                "other, and out of reach of its eval(): call eval() on the module it belongs to, or register that one"
            )


def reached_modules(model: Any) -> Iterator[nn.Module]:
    """All modules of a model, also those in closures, attributes, containers and what its functions name."""
    seen: dict[int, Any] = {}
    waiting = [model]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value  # kept, so that nothing else gets its id
        if isinstance(value, nn.Module):
            yield value
        waiting += _inside(value)


def _inside(value: Any) -> list[Any]:
    """What a value holds that may be a module or lead to one."""
    if isinstance(value, nn.Module):
        own = [entry for name, entry in vars(value).items() if name not in PUT_THERE]
        return [*value.children(), *own, *_methods(type(value))]
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, _CONTAINERS):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        if of_a_library(value.__module__):
            return [*cells, *defaults]
        named = names_in(value.__code__) & value.__globals__.keys()
        return [*cells, *defaults, *(value.__globals__[name] for name in named)]
    library = of_a_library(type(value).__module__) and not isinstance(value, SimpleNamespace)
    if library or isinstance(value, type):
        return []
    return [*getattr(value, "__dict__", {}).values(), *_methods(type(value))]


def _methods(kind: type) -> list[FunctionType]:
    """Of a class that is no library's, for the global values that they name."""
    bases = [base for base in kind.__mro__ if not of_a_library(base.__module__)]
    return [method for base in bases for method in vars(base).values() if isinstance(method, FunctionType)]


def _is_empty(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return True
    return False
