"""Speed as ratios that hold on a noisy machine: contestants take turns in one run, and each round gives one ratio.

python train/benchmark_speed.py --out speed.json

1. A training step (forward, backward, optimizer) against transformers' `ViTMAEForPreTraining` of the same widths,
   depths, patches, mask ratio and batch; the attack's time per image apart.
2. `purify` on native images: arithmetic per second as a share of what a large matrix product reaches here.
3. `purify` on one larger image.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from maep_hf import MAEPConfig, MAEPModel
from maep_hf.attacks import AttackParameters, perturb
from maep_hf.checkpoints import CheckpointError
from maep_hf.classifier import PixelClassifier
from maep_hf.configuration_cifar_resnet import CifarResNetConfig
from maep_hf.modeling_cifar_resnet import CifarResNetForImageClassification
from maep_hf.records import describe_environment, write_json
from maep_hf.training import LoopArguments, parse_arguments
from maep_hf.training.loop import build_optimizer
from maep_hf.training.samples import collate
from maep_hf.training.stages import AttackArguments, load_surrogates

MASK_RATIO = 0.5


@dataclass
class BenchmarkArguments:
    size: str = field(default="tiny", metadata={"help": "purifier: tiny, small or base"})
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
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cpu or cuda"})
    out: str | None = field(default=None, metadata={"help": "JSON file for the result"})

    def __post_init__(self) -> None:
        for name in ("batch_size", "purify_batch_size", "large_image", "matmul_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.clock not in ("wall", "cpu"):
            raise ValueError(f"clock={self.clock!r}: must be wall or cpu")
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
        synchronise(device)
        started = clock()
        for _ in range(calls):
            contestant.run()
        synchronise(device)
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


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training_step(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """One step on a fixed batch, with the optimizer of the training scripts."""
    optimizer = build_optimizer(model.train(), LoopArguments())

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def training_contestants(config: MAEPConfig, batch_size: int, device: torch.device) -> list[Contestant]:
    """transformers' masked autoencoder first, then the purifier as the paper has it, then with its local branch."""
    shape = (batch_size, config.num_channels, config.image_size, config.image_size)
    x, clean = torch.rand(shape, device=device), torch.rand(shape, device=device)
    noise = torch.rand(batch_size, config.num_patches, device=device)
    same = [f"{p}{n}" for p in ("", "decoder_") for n in ("hidden_size", "num_hidden_layers", "num_attention_heads",
            "intermediate_size")]  # fmt: skip
    same += ["image_size", "patch_size", "num_channels", "hidden_act", "qkv_bias", "layer_norm_eps"]
    vit_config = ViTMAEConfig(mask_ratio=MASK_RATIO, **{name: getattr(config, name) for name in same})
    contestants = [("ViTMAEForPreTraining", ViTMAEForPreTraining(vit_config), {"pixel_values": x, "noise": noise})]
    inputs = {"pixel_values": x, "clean_pixel_values": clean, "noise": noise}
    pure = type(config)(**{**config.to_diff_dict(), "local_branch_layers": 0, "mask_ratio": MASK_RATIO})
    contestants.append(("MAEP, pure form", MAEPModel(pure), inputs))
    if config.local_branch_layers:
        contestants.append(("MAEP, with local branch", MAEPModel(config), inputs))
    made = []
    for name, model, batch in contestants:
        if isinstance(model, MAEPModel):  # as the training loop does
            model.to(memory_format=torch.channels_last)
        made.append(Contestant(name, training_step(model.to(device), batch), batch_size))
    return made


def attack_contestant(classifier: PixelClassifier, config: MAEPConfig, batch_size: int) -> Contestant:
    """The mixture of training attacks with its default shares, on images of the purifier's size."""
    mixture = AttackArguments().mixture(1)
    shape = (config.num_channels, config.image_size, config.image_size)
    device = next(classifier.parameters()).device
    batch = collate([mixture.draw(np.random.default_rng((0, i)), shape) for i in range(batch_size)])
    parameters = AttackParameters.from_batch({key: value.to(device) for key, value in batch.items()})
    images = torch.rand(batch_size, *shape, device=device)
    return Contestant("attack", lambda: perturb([classifier], images, None, parameters), batch_size)


def load_attacked(name: str) -> tuple[PixelClassifier, str]:
    try:
        return load_surrogates([name])[0], name
    except (OSError, CheckpointError):
        model = CifarResNetForImageClassification(CifarResNetConfig(depth=20)).fold_batch_norm()
        return PixelClassifier(model.requires_grad_(False), image_mean=0.5, image_std=0.25), "random CIFAR ResNet-20"


def purify_contestants(
    model: MAEPModel, args: BenchmarkArguments, device: torch.device
) -> tuple[list[Contestant], dict[str, str]]:
    """The matrix product first, then `purify` eager, compiled, and on the large image; and what failed, with why."""
    config = model.config
    matrix = torch.rand(args.matmul_size, args.matmul_size, device=device)
    native = torch.rand(
        args.purify_batch_size, config.num_channels, config.image_size, config.image_size, device=device
    )
    large = torch.rand(1, config.num_channels, args.large_image, args.large_image, device=device)
    flops = count_flops(model.purify, native)
    contestants = [
        Contestant("matrix product", lambda: matrix @ matrix, flops=2 * args.matmul_size**3),
        Contestant("purify, eager", lambda: model.purify(native), len(native), flops),
    ]
    failed = {}
    if args.torch_compile:
        compiled = torch.compile(model.purify, dynamic=False)
        try:
            compiled(native)
            contestants.append(Contestant("purify, compiled", lambda: compiled(native), len(native), flops))
        except Exception as error:  # a machine without a compiler is no reason to measure nothing
            failed["purify, compiled"] = str(error).strip().splitlines()[0]
    contestants.append(
        Contestant("purify, large image", lambda: model.purify(large), 1, count_flops(model.purify, large))
    )
    return contestants, failed


def count_flops(function: Callable[[torch.Tensor], Any], images: torch.Tensor) -> int:
    """Two operations for every multiply-add of matrix products, convolutions and attention; nothing else counts."""
    # Written out, because the counter has no formula for the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(images)
    return counter.get_total_flops()


def ratios(results: dict[str, list[float]], one: str, other: str, scale: float = 1.0) -> list[float]:
    """Round by round: how many times as fast `one` is as `other`."""
    return [scale * b / a for a, b in zip(results[one], results[other], strict=True)]


def measure(args: BenchmarkArguments) -> dict[str, Any]:
    """All measurements; times in ms, arithmetic in GFLOP/s, ratios one a round."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    config = getattr(MAEPConfig, args.size)(mask_ratio=MASK_RATIO)
    training = training_contestants(config, args.batch_size, device)
    classifier, classifier_name = load_attacked(args.classifier)
    attack = attack_contestant(classifier.to(device, memory_format=torch.channels_last), config, args.batch_size)
    times = compete([*training, attack], args, device)
    reference = training[0].name
    rows = []
    for contestant in training:
        rows.append(
            {
                "name": contestant.name,
                "ms_per_image": 1e3 * statistics.median(times[contestant.name]) / contestant.images,
                "ratio": ratios(times, contestant.name, reference),
            }
        )
    attack_ms = 1e3 * statistics.median(times["attack"]) / attack.images
    result: dict[str, Any] = {
        "training_step": rows,
        "attack": {"classifier": classifier_name, "ms_per_image": attack_ms},
    }

    model = MAEPModel(config).eval().requires_grad_(False).to(device)
    with torch.no_grad():
        contestants, failed = purify_contestants(model, args, device)
        times = compete(contestants, args, device)
    mark = contestants[0]
    result["purify"] = [
        {
            "name": contestant.name,
            "gflop": contestant.flops / 1e9,
            "ms_per_call": 1e3 * statistics.median(times[contestant.name]),
            "ms_per_image": 1e3 * statistics.median(times[contestant.name]) / contestant.images,
            "gflop_per_second": contestant.flops / 1e9 / statistics.median(times[contestant.name]),
            "best_gflop_per_second": contestant.flops / 1e9 / min(times[contestant.name]),
            "share_of_matrix_product": ratios(times, contestant.name, mark.name, contestant.flops / mark.flops),
            "share_best_to_best": contestant.flops / mark.flops * min(times[mark.name]) / min(times[contestant.name]),
        }
        for contestant in contestants
    ]
    result["failed"] = failed
    return result


def show(result: dict[str, Any], args: BenchmarkArguments, console: Console) -> None:
    """Print the tables; a ratio is the median of the rounds, with the least and the greatest."""

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    table = Table(title=f"Training step, batch {args.batch_size}, mask ratio {MASK_RATIO}")
    for column in ("", "ms per image", "images/s", "times as fast"):
        table.add_column(column, justify="left" if not column else "right")
    for row in result["training_step"]:
        table.add_row(
            row["name"], f"{row['ms_per_image']:.3f}", f"{1e3 / row['ms_per_image']:.0f}", spread(row["ratio"])
        )
    attack = result["attack"]
    table.add_row(f"attack on {attack['classifier']}", f"{attack['ms_per_image']:.3f}",
                  f"{1e3 / attack['ms_per_image']:.0f}", "")  # fmt: skip
    console.print(table)
    table = Table(title=f"purify: batch {args.purify_batch_size}; large image {args.large_image} x {args.large_image}")
    for column in ("", "ms per image", "GFLOP/s", "share of the matrix product"):
        table.add_column(column, justify="left" if not column else "right")
    for row in result["purify"]:
        is_mark = row is result["purify"][0]
        table.add_row(row["name"], "" if is_mark else f"{row['ms_per_image']:.3f}", f"{row['gflop_per_second']:.1f}",
                      "" if is_mark else spread(row["share_of_matrix_product"]))  # fmt: skip
    for name, reason in result["failed"].items():
        table.add_row(name, "", "", f"not measured: {reason}")
    console.print(table)


def processor_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (args,) = parse_arguments(BenchmarkArguments, argv=argv)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(args.cpu_threads or cores)
    machine = {
        "processor": processor_name(torch.device(args.device)),
        "cpu_threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    result = {"arguments": asdict(args), "machine": machine, **measure(args), **describe_environment()}
    console = Console()
    show(result, args, console)
    load = machine["load_average_before"]
    console.print(f"{machine['processor']}, {machine['cpu_threads']} threads, load before: {load}, {args.clock} clock")
    console.print(f"Ratios are medians (least to greatest) of {args.rounds} rounds.")
    if args.out:
        write_json(Path(args.out), result)
        console.print(f"wrote {args.out}")
    return result


if __name__ == "__main__":
    main()
