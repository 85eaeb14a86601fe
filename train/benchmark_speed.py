"""Speed as ratios that hold on a noisy machine: contestants take turns in one run, and each round gives one ratio.

python train/benchmark_speed.py --out speed.json
python train/benchmark_speed.py --part peers --out peers.json     # against diffusion and DISCO; see benchmark_peers.py

1. A training step (forward, backward, optimizer) against transformers' `ViTMAEForPreTraining` of the same widths,
   depths, patches, mask ratio and batch; the attack's time per image apart.
2. `purify` on native images: arithmetic per second as a share of what a large matrix product reaches here.
3. `purify` on one larger image.
"""

import os
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import benchmark_peers
import numpy as np
import torch
from benchmark_timing import BenchmarkArguments, Contestant, compete, count_flops, processor_name, ratios
from rich.console import Console
from rich.table import Table
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from maep_hf import MAEPConfig, MAEPModel
from maep_hf.attacks import AttackParameters, perturb
from maep_hf.checkpoints import CheckpointError
from maep_hf.classifier import PixelClassifier
from maep_hf.configuration_cifar_resnet import CifarResNetConfig
from maep_hf.devices import available_cores, pick_device
from maep_hf.folding import fold_batch_norm
from maep_hf.modeling_cifar_resnet import CifarResNetForImageClassification
from maep_hf.records import describe_environment, write_json
from maep_hf.training import LoopArguments, parse_arguments, run_script
from maep_hf.training.loop import build_optimizer
from maep_hf.training.samples import collate
from maep_hf.training.stages import AttackArguments, load_surrogates

MASK_RATIO = 0.5


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
        model = CifarResNetForImageClassification(CifarResNetConfig(depth=20)).eval()
        fold_batch_norm(model)
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


def measure(args: BenchmarkArguments) -> dict[str, Any]:
    """All measurements; times in ms, arithmetic in GFLOP/s, ratios one a round."""
    device = pick_device(args.device)
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


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (args,) = parse_arguments(BenchmarkArguments, argv=argv)
    device = pick_device(args.device)
    torch.set_num_threads(args.cpu_threads or available_cores())
    machine = {
        "processor": processor_name(device),
        "cpu_threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    console = Console()
    if args.part == "peers":
        measured = benchmark_peers.measure(args)
    else:
        measured = measure(args)
    result = {"arguments": asdict(args), "machine": machine, **measured, **describe_environment()}
    if args.part == "peers":
        console.print(benchmark_peers.markdown(result), highlight=False, soft_wrap=True, markup=False)
    else:
        show(result, args, console)
    load = machine["load_average_before"]
    console.print(f"{machine['processor']}, {machine['cpu_threads']} threads, load before: {load}, {args.clock} clock")
    console.print(f"Ratios are medians (least to greatest) of {args.rounds} rounds.")
    if args.out:
        write_json(Path(args.out), result)
        written = [Path(args.out)]
        if args.part == "peers":
            written += benchmark_peers.write_beside(result, Path(args.out))
        console.print(f"wrote {', '.join(map(str, written))}")
    return result


if __name__ == "__main__":
    run_script(main)
