"""Where and in which precision models run, by names on the command line; and waiting for them."""

from __future__ import annotations

import os

import torch


def pick_device(name: str) -> torch.device:
    """`auto` is cuda, mps or cpu, the first there is; anything else as torch spells it.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def available_cores() -> int:
    """Processor cores that this process may use, where the system tells; else all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it, so that a clock read now is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def pick_precision(name: str, device: torch.device) -> str:
    """The precision of training, as Accelerate spells it: `auto` is bf16 where the device multiplies in it, else no.

    Among processors those are the ones with AMX; others emulate bf16, many times slower than float32.

    Args:
        name: auto, no, bf16 or fp16.
        device: where the training runs.

    Raises:
        ValueError: fp16 without a GPU.
    """
    if name == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision='fp16' needs a GPU; use bf16, auto or no")
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_amx_tile_supported()  # no public name in torch 2.6
    return "bf16" if fast else "no"
