"""A second device in software, for machines without an accelerator: its tensors compute on the CPU, and an operation
that mixes them with the CPU's own is an error, as it is on a GPU, and so is float64, as on Apple's. Unlike a GPU it
draws the CPU's random numbers (though it refuses the CPU's generators), has the CPU's kernels and precision, and is
done when a call returns.

PyTorch lets a program bring such a device (`PrivateUse1`) once in a process and for good: importing this does, so
whoever does is a process of its own.
"""

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "npu"  # one that Accelerate, transformers and `torch.device` know
backend_registration._setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)
aten = torch.ops.aten
CROSSING = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
FILLING = {aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}
OF_THE_MEMORY = (torch.Tensor.untyped_storage, torch.Tensor.data_ptr, torch.Tensor.__reduce_ex__)


class MixedDevicesError(RuntimeError):
    """An operation was given tensors of both devices."""


class NoFloat64Error(TypeError):
    """An operation would have made a tensor that Apple's GPUs cannot hold."""


class DeviceTensor(torch.Tensor):
    """A tensor on the second device, around the one on the CPU that it computes with."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    __module__ = "torch"  # foolbox knows a tensor by it

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        about = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=DEVICE, **about)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})

    def __repr__(self):
        return f"DeviceTensor({tuple(self.shape)})"

    def __format__(self, spec):
        return format(self.item() if self.dim() == 0 else repr(self), spec)


operations = 0
"""How many have been computed on the device."""


def _call(function, args: tuple, kwargs: dict) -> Any:
    global operations
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    there = [each for each in tensors if isinstance(each, DeviceTensor)]
    operations += bool(there)
    if there and function not in CROSSING:
        here = [each for each in tensors if not isinstance(each, DeviceTensor)]
        if function in INDEXING and isinstance(args[0], DeviceTensor):  # indices may come from the CPU, values may not
            here = [each for each in args[2:3] if not isinstance(each, DeviceTensor)]
        elif torch.Tag.pointwise in function.tags or function in FILLING:  # a single number may too, but not be written
            written = args[0] if function._schema.is_mutable else None
            here = [each for each in here if each.dim() or each is written]
        if here:
            raise MixedDevicesError(f"{function}: {[tuple(each.shape) for each in here]} are not on {NAME}")
    result_there = bool(there) and function is not aten._local_scalar_dense.default
    if function in (aten.copy_.default, aten._copy_from.default):
        result_there = isinstance(args[0], DeviceTensor)
    if kwargs.get("device") is not None:
        result_there = torch.device(kwargs["device"]).type == NAME
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        kwargs["device"] = torch.device("cpu") if result_there else kwargs["device"]
    if result_there and kwargs.get("generator") is not None:
        raise MixedDevicesError(f"{function}: the generator is not on {NAME}")
    args, kwargs = tree_map_only(DeviceTensor, lambda each: each.inner, (args, kwargs))
    result = function(*args, **kwargs)
    if not result_there:
        return result
    if any(isinstance(each, torch.Tensor) and each.dtype == torch.float64 for each in tree_leaves(result)):
        raise NoFloat64Error(f"{function}: {NAME} has no float64")
    known = {id(each.inner): each for each in there}  # what an operation in place gives back

    def there_again(each: torch.Tensor) -> torch.Tensor:
        return known[id(each)] if id(each) in known else DeviceTensor(each)

    return tree_map_only(torch.Tensor, there_again, result)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What PyTorch does in C++ before an operation is dispatched."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if function in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == NAME:
            return function(*args, **kwargs | {"device": "cpu"}).to(device)
        if args and isinstance(args[0], DeviceTensor):
            if function is torch.Tensor.tolist:
                return args[0].inner.tolist()
            if function is torch.Tensor.numpy:
                raise TypeError(f"can't convert a tensor on {NAME} to numpy")
            if function in OF_THE_MEMORY:
                return function(args[0].inner, *args[1:], **kwargs)
        return function(*args, **kwargs)


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    source, inner = (each.inner if isinstance(each, DeviceTensor) else each for each in (source, target))
    inner.copy_(source)
    return target


def _empty(size, *args, dtype=None, **kwargs) -> DeviceTensor:
    return DeviceTensor(torch.empty(size, dtype=dtype))


def _empty_strided(size, stride, *args, dtype=None, **kwargs) -> DeviceTensor:
    return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype))


def _swap(swap, old: torch.Tensor, new: torch.Tensor) -> None:
    """PyTorch swaps none that autograd has met, but where nothing moves there is nothing to swap."""
    if isinstance(old, DeviceTensor) and isinstance(new, DeviceTensor) and old.dtype == new.dtype:
        old.inner = new.inner
    else:
        swap(old, new)


@contextmanager
def second_device():
    """Inside, `"npu"` is a device for tensors and modules."""
    library = torch.library.Library("aten", "IMPL")
    brought = {"_copy_from": _copy_from, "empty.memory_format": _empty, "empty_strided": _empty_strided}
    for name, function in brought.items():
        library.impl(name, function, "PrivateUse1")
    torch.__future__.set_swap_module_params_on_conversion(True)  # a module keeps its parameters, as on a GPU
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.utils, "swap_tensors", partial(_swap, torch.utils.swap_tensors)))
        stack.enter_context(_Operations())
        stack.enter_context(_Functions())
        try:
            yield DEVICE
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
