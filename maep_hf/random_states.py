"""The global random states: seeded for a while, and as they were afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the global random states of PyTorch on every device in use, of NumPy and of Python."""
    # Not torch.manual_seed: that would also set what CUDA starts from once it is initialised.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    np.random.seed(seed % 2**32)  # all that it takes
    random.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Every random state (PyTorch on all devices, NumPy, Python) seeded inside, and as it was outside."""
    with random_states_kept():
        seed_everything(seed)
        yield


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the global random states of PyTorch on every device in use, of NumPy and of Python."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with ExitStack() as stack:
        cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        stack.enter_context(torch.random.fork_rng(devices=list(cuda)))
        if torch.backends.mps.is_available():
            stack.enter_context(torch.random.fork_rng(devices=[torch.device("mps")], device_type="mps"))
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
