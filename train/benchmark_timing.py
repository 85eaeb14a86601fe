"""Timing of contestants that take turns, and the arithmetic they do: what both parts of the speed benchmark share."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maep_hf.devices import synchronize
from maep_hf.training.stages import SIZES


@dataclass
class BenchmarkArguments:
    part: str = field(
        default="own", metadata={"help": "own: training step and purify; peers: against diffusion and DISCO"}
    )
    size: str = field(default="tiny", metadata={"help": "purifier: tiny, small or base"})
    sizes: list[str] = field(
        default_factory=lambda: ["tiny", "small"], metadata={"help": "part peers: purifiers to compare"}
    )
    batch_size: int = field(default=64, metadata={"help": "images of a training step"})
    purify_batch_size: int = field(default=256, metadata={"help": "images purified at once"})
    large_image: int = field(default=1024, metadata={"help": "side of the larger image, pixels"})
    matmul_size: int = field(default=2048, metadata={"help": "side of the matrices that set the mark"})
    rounds: int = field(default=9, metadata={"help": "turns of every contestant"})
    seconds: float = field(default=1.0, metadata={"help": "least duration of one turn"})
    classifier: str = field(
        default="checkpoints/resnet20-cifar10",
        metadata={"help": "classifier that is attacked; one with random weights where it cannot be loaded"},
    )
    torch_compile: bool = field(default=True, metadata={"help": "also measure the compiled purifier"})
    clock: str = field(
        default="wall", metadata={"help": "wall, or cpu: processor time, for a busy machine with --cpu_threads 1"}
    )
    cpu_threads: int = field(default=0, metadata={"help": "threads; 0 takes all cores"})
    dtype: str = field(default="float32", metadata={"help": "part peers: float32 or bfloat16, for all networks"})
    diffusion_batch_size: int = field(
        default=0, metadata={"help": "part peers: images a diffusion step takes at once; 0 is 16 on a CPU, else all"}
    )
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cpu or cuda"})
    out: str | None = field(
        default=None, metadata={"help": "JSON file for the result; part peers writes a table and a picture beside it"}
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "purify_batch_size", "large_image", "matmul_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        choices = {"clock": ("wall", "cpu"), "part": ("own", "peers"), "dtype": ("float32", "bfloat16")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {' or '.join(allowed)}")
        if wrong := [size for size in (self.size, *self.sizes) if size not in SIZES]:
            raise ValueError(f"sizes: {', '.join(wrong)} is not one of {', '.join(SIZES)}")
        if self.diffusion_batch_size < 0:
            raise ValueError(f"diffusion_batch_size={self.diffusion_batch_size}: must not be negative")
        if self.out is not None and not Path(self.out).resolve().parent.is_dir():
            raise ValueError(f"out={self.out!r}: its folder does not exist")


@dataclass
class Contestant:
    """Something to time: `run()` works on `images` images with `flops` floating-point operations."""

    name: str
    run: Callable[[], Any]
    images: int = 1
    flops: int = 0


def compete(contestants: list[Contestant], args: BenchmarkArguments, device: torch.device) -> dict[str, list[float]]:
    """Seconds per call of every contestant, one figure a round; a turn lasts `args.seconds`, or one call if longer."""
    clock = time.process_time if args.clock == "cpu" else time.perf_counter

    def timed(contestant: Contestant, calls: int) -> float:
        synchronize(device)
        started = clock()
        for _ in range(calls):
            contestant.run()
        synchronize(device)
        return (clock() - started) / calls

    calls = {}
    for contestant in contestants:
        timed(contestant, 2)  # warm-up: allocations, algorithm choice
        calls[contestant.name] = max(1, round(args.seconds / timed(contestant, 1)))
    results: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for turn in range(args.rounds):
        for contestant in contestants[
            :: 1 if turn % 2 == 0 else -1
        ]:  # both orders, so that no one profits from a drift
            results[contestant.name].append(timed(contestant, calls[contestant.name]))
    return results


def count_flops(function: Callable[[torch.Tensor], Any], images: torch.Tensor) -> int:
    """Two operations for every multiply-add of matrix products, convolutions and attention; nothing else counts."""
    # Written out, because the counter has no formula for the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(images)
    return counter.get_total_flops()


def ratios(results: dict[str, list[float]], one: str, other: str, scale: float = 1.0) -> list[float]:
    """Round by round: how many times as fast `one` is as `other`."""
    return [scale * b / a for a, b in zip(results[one], results[other], strict=True)]


def processor_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
