"""Speed of purification against that of the peers, in one run on one machine: a diffusion network and DISCO.

The diffusion network is `diffusers`' UNet of the size of google/ddpm-cifar10-32 with random weights (time does not
depend on them). DiffPure (Nie et al. 2022) evaluates its network, a larger one, 100 times an image on CIFAR-10; here a
few evaluations are timed and multiplied. DISCO is the published network of `train/baselines/disco.py`, and the same
without the predictions that have weight zero. All networks run eagerly, in one precision.
"""

import statistics
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from benchmark_timing import BenchmarkArguments, Contestant, compete, count_flops
from torch import Tensor

from maep_hf import MAEPConfig, MAEPModel
from maep_hf.evaluation.run import python_purifier
from maep_hf.figures import new_figure, save_figure
from maep_hf.records import write_text

IMAGE_SIZE = 32
EVALUATIONS = 100  # DiffPure, CIFAR-10: t* = 0.1 in steps of 0.001
CPU_DIFFUSION_BATCH = 16  # larger ones are no faster an image there
MARK = "matrix product"
DIFFUSION = "DDPM UNet, 100 evaluations"
DISCO = {
    "DISCO": "python:train.baselines.disco:untrained:true",
    "DISCO without zero weights": "python:train.baselines.disco:untrained:false",
}
# Published configuration of google/ddpm-cifar10-32 (Ho et al. 2020): 35.7 million weights.
DDPM_CIFAR10 = {
    "sample_size": IMAGE_SIZE, "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None, "act_fn": "silu", "norm_eps": 1e-6, "norm_num_groups": 32, "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "center_input_sample": False, "mid_block_scale_factor": 1,
    "time_embedding_type": "positional",
}  # fmt: skip
# Issue 4: how many times as fast as each peer, and the share of the matrix product, at the larger batch.
TARGETS = {DIFFUSION: 300.0, "DISCO": 5.0, MARK: 0.5}
_COLORS = {"MAEP": "#009e73", "DISCO": "#0072b2", "DDPM": "#d55e00"}


def diffusion_network() -> torch.nn.Module:
    """The UNet with random weights.

    Raises:
        ImportError: `diffusers` is not installed; the message has the command.
    """
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError(
            "--part peers compares with a diffusion network of the library diffusers, which is not installed: "
            f"pip install 'maep-hf[peers]' (or 'diffusers>=0.42,<1') ({error})"
        ) from error
    return UNet2DModel(**DDPM_CIFAR10)


def purifiers(args: BenchmarkArguments) -> dict[str, Callable[[Tensor], Any]]:
    """What is timed, by name: MAEP of each size, DISCO in both forms, one evaluation of the diffusion network."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)

    def placed(network: torch.nn.Module) -> torch.nn.Module:
        network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        return network if args.dtype == "float32" else network.to(dtype)

    diffusion = placed(diffusion_network())

    def step(pixels: Tensor) -> Tensor:
        return diffusion(pixels, torch.full((len(pixels),), 50, device=device)).sample

    root = str(Path(__file__).resolve().parent.parent)
    sys.path.insert(0, root)  # the baselines are found from any working directory
    try:
        peers = {name: placed(python_purifier(spec)).purify for name, spec in DISCO.items()}
    finally:
        sys.path.remove(root)
    own = {f"MAEP {size}": placed(MAEPModel(getattr(MAEPConfig, size)())).purify for size in args.sizes}
    return own | peers | {DIFFUSION: step}


def parameters_of(function: Callable) -> int:
    """Weights of the network behind a bound method or a function that closes over it."""
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    owner = getattr(function, "__self__", None)
    network = next(each for each in (owner, *cells) if isinstance(each, torch.nn.Module))
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def measure(args: BenchmarkArguments) -> dict[str, Any]:
    """Times, ratios and shares at the batch of `args` and at one image; the targets at the former.

    Raises:
        ImportError: `diffusers` is not installed.
    """
    torch.manual_seed(0)
    functions = purifiers(args)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    matrix = torch.rand(args.matmul_size, args.matmul_size, device=device, dtype=dtype)
    one = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=device, dtype=dtype)
    flops = {name: count_flops(function, one) for name, function in functions.items()}
    result: dict[str, Any] = {"peers": [], "how": how(args), "diffusers": _version("diffusers")}
    for batch in dict.fromkeys((args.purify_batch_size, 1)):
        contestants = [Contestant(MARK, lambda: matrix @ matrix, flops=2 * args.matmul_size**3)]
        for name, function in functions.items():
            images = min(batch, diffusion_batch(args)) if name == DIFFUSION else batch
            pixels = one.repeat(images, 1, 1, 1)
            call = _call(function, pixels)
            contestants.append(Contestant(name, call, images, images * flops[name]))
        times = compete(contestants, args, device)
        rows = [_row(contestant, times, contestants[0]) for contestant in contestants[1:]]
        for row in rows:
            row["parameters"] = parameters_of(functions[row["name"]])
            row["maep_times_as_fast"] = {
                own["name"]: [theirs / ours for theirs, ours in zip(row["seconds"], own["seconds"], strict=True)]
                for own in rows
                if own["name"].startswith("MAEP") and own is not row
            }
        result["peers"].append({"batch_size": batch, "rows": rows})
    result["targets"] = targets(result["peers"][0]["rows"])
    return result


def diffusion_batch(args: BenchmarkArguments) -> int:
    """Images that one call of the diffusion network takes."""
    if args.diffusion_batch_size:
        return args.diffusion_batch_size
    return CPU_DIFFUSION_BATCH if args.device == "cpu" else args.purify_batch_size


def how(args: BenchmarkArguments) -> str:
    """What was timed, in words, for the record and the table."""
    return (
        f"Images of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, {args.dtype}, eager, contestants in turns, medians of "
        f"{args.rounds} rounds ({args.clock} clock). Diffusion: single evaluations of a UNet of the size of "
        f"google/ddpm-cifar10-32 (random weights), at most {diffusion_batch(args)} images at once, timed and "
        f"multiplied by DiffPure's {EVALUATIONS}; DiffPure's own network is larger. DISCO: the published network, "
        "written anew; in the second form the three of its four predictions of a pixel that have weight zero (but in "
        "the last row and column) are left out."
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _call(function: Callable[[Tensor], Any], pixels: Tensor) -> Callable[[], Any]:
    return lambda: function(pixels)


def _row(contestant: Contestant, times: Mapping[str, list[float]], mark: Contestant) -> dict[str, Any]:
    """One network: seconds an image in every round, all evaluations counted, and its share of the matrix product."""
    evaluations = EVALUATIONS if contestant.name == DIFFUSION else 1
    seconds = [evaluations * time / contestant.images for time in times[contestant.name]]
    return {
        "name": contestant.name,
        "evaluations": evaluations,
        "images_at_once": contestant.images,
        "ms_per_image": 1e3 * statistics.median(seconds),
        "gflop_per_image": evaluations * contestant.flops / contestant.images / 1e9,
        "share_of_matrix_product": [
            contestant.flops / mark.flops * reference / time
            for time, reference in zip(times[contestant.name], times[mark.name], strict=True)
        ],
        "seconds": seconds,
    }


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target of issue 4 for each MAEP: what was measured, the target, and whether it is met."""
    found = []
    for own in (row for row in rows if row["name"].startswith("MAEP")):
        for against, target in TARGETS.items():
            if against == MARK:
                value = statistics.median(own["share_of_matrix_product"])
            else:
                peer = next(row for row in rows if row["name"] == against)
                value = statistics.median(peer["maep_times_as_fast"][own["name"]])
            found.append({"what": f"{own['name']} against {against}", "measured": value, "target": target,
                          "met": value >= target})  # fmt: skip
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """The table of a record, with what was timed above it and the targets below."""
    own = [row["name"] for row in result["peers"][0]["rows"] if row["name"].startswith("MAEP")]
    lines = [result["how"], ""]
    for part in result["peers"]:
        titles = [f"batch {part['batch_size']}", "million weights", "GFLOP an image", "ms an image",
                  *(f"{name}: times as fast" for name in own), "share of the matrix product"]  # fmt: skip
        lines += [f"| {' | '.join(titles)} |", "| --- |" + " ---: |" * (len(titles) - 1)]
        for row in part["rows"]:
            cells = [row["name"], f"{row['parameters'] / 1e6:.2f}", _number(row["gflop_per_image"]),
                     _number(row["ms_per_image"])]  # fmt: skip
            cells += [_spread(row["maep_times_as_fast"].get(name)) for name in own]
            lines.append(f"| {' | '.join([*cells, _spread(row['share_of_matrix_product'])])} |")
        lines.append("")
    for target in result["targets"]:
        verdict = "met" if target["met"] else "missed"
        lines.append(f"- {target['what']}: {_number(target['measured'])}, target {target['target']:g}: {verdict}")
    return "\n".join(lines) + "\n"


def _spread(values: list[float] | None) -> str:
    if not values:
        return ""
    return f"{_number(statistics.median(values))} ({_number(min(values))} to {_number(max(values))})"


def _number(value: float) -> str:
    """Three significant digits, and never an exponent for large numbers."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def bar_chart(result: Mapping[str, Any], path: Path) -> Path:
    """Bars of the time an image on a logarithmic scale, one panel a batch size; written whole or not at all."""
    parts = result["peers"]
    count = max(len(part["rows"]) for part in parts)
    figure = new_figure(9, 1.1 + 0.42 * count * len(parts), dpi=130, layout="constrained")
    axes = figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0]
    for axis, part in zip(axes, parts, strict=True):
        rows = part["rows"]
        values = [row["ms_per_image"] for row in rows]
        colors = [_COLORS[row["name"].split()[0]] for row in rows]
        axis.barh(range(len(rows)), values, color=colors, height=0.65)
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=9)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlim(min(values) / 3, max(values) * 6)
        for index, value in enumerate(values):
            axis.text(value * 1.12, index, f"{_number(value)} ms", va="center", fontsize=9)
        images = "one image" if part["batch_size"] == 1 else f"batches of {part['batch_size']} images"
        axis.set_title(f"Purifying {images}, time an image", fontsize=10, loc="left")
        axis.grid(axis="x", color="#e2e5e9", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(f"ms (logarithmic), {result['machine']['processor']}, "
                        f"{result['machine']['cpu_threads']} threads")  # fmt: skip
    return save_figure(figure, path)


def write_beside(result: Mapping[str, Any], out: Path) -> list[Path]:
    """Write the table (`.md`) and the picture (`.png`) beside the JSON record `out`, each whole or not at all."""
    table = out.with_suffix(".md")
    write_text(table, markdown(result))
    return [table, bar_chart(result, out.with_suffix(".png"))]
