"""The processes that share an evaluation, as `accelerate launch` started them; one where it did not."""

from __future__ import annotations

from datetime import timedelta

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """Accelerate's state; on the CPU where `ACCELERATE_USE_CPU` asks for that, as its `Accelerator` does it."""
    # one process runs the checks, or a longer batch, while the others wait
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(hours=12))
