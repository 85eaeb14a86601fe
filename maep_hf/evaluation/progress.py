"""A bar over the batches of an evaluation that moves while a single one is attacked for minutes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from tqdm import tqdm

EVERY_SECONDS = 1.0


@contextmanager
def counted_calls(model: nn.Module, bar: tqdm, shown: dict[str, object]) -> Iterator[None]:
    """Inside, the bar shows how often the model has been called.

    Args:
        model: what is attacked.
        bar: shown anew about every second.
        shown: what stands behind the bar beside the calls.
    """
    calls, last = 0, time.monotonic()

    def count(*_: object) -> None:
        nonlocal calls, last
        calls += 1
        if time.monotonic() - last >= EVERY_SECONDS:
            last = time.monotonic()
            bar.set_postfix(shown | {"calls": calls})

    hook = model.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()
