"""The gray-box threat model: the attack differentiates the classifier alone, then the purifier is put in front."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..attacks import LinfPGD
from .statistics import PSNR_LIMIT, mean_cosine, psnr, share

if TYPE_CHECKING:
    from ..modeling_maep import MAEPModel

THREAT_MODEL = "gray-box"
VARIANTS = ("clean", "purified_clean", "attacked", "purified_attacked")


@dataclass
class GrayBoxResult:
    """Protocol and results on one set of images, and the images in [0, 1] that a picture shows."""

    record: dict
    images: dict[str, Tensor]
    predictions: dict[str, Tensor]
    reference: Tensor


@torch.no_grad()
def evaluate_gray_box(
    classifier: nn.Module,
    purifier: MAEPModel,
    pixels: Tensor,
    labels: Tensor | None,
    attack: LinfPGD,
    batch_size: int = 20,
    progress: bool = False,
) -> GrayBoxResult:
    """Attack, purify and classify; accuracy with its interval, PSNR and time of every variant.

    Args:
        pixels: (N, 3, H, W) in [0, 1].
        labels: (N,), or `None` to hold predictions against the classifier's own on the clean images.
        attack: differentiates the classifier alone.
        batch_size: images attacked and classified at once.
        progress: show a bar while attacking.
    """
    reference = predict(classifier, pixels, batch_size) if labels is None else labels
    with torch.enable_grad():
        attacked = attack(classifier, pixels, reference, batch_size, progress)
    purified, seconds = _timed(purifier.purify, attacked)
    images = {
        "clean": pixels,
        "purified_clean": purifier.purify(pixels),
        "attacked": attacked,
        "purified_attacked": purified,
    }
    predictions = {name: predict(classifier, batch, batch_size) for name, batch in images.items()}
    record = {
        "n": len(pixels),
        "size": list(pixels.shape[-2:]),
        "accuracy": {name: share(predictions[name] == reference) for name in VARIANTS},
        "psnr_db": {name: psnr(images[name], pixels) for name in VARIANTS[1:]},
        # cosine between what the purifier changes and what would undo the attack, 1 at best
        "direction": mean_cosine(purified - attacked, pixels - attacked),
        "purify_ms_per_image": 1000 * seconds / len(pixels),
    }
    return GrayBoxResult(record, images, predictions, reference)


@torch.no_grad()
def predict(classifier: nn.Module, pixels: Tensor, batch_size: int = 20) -> Tensor:
    """Predicted classes (N,) of (N, 3, H, W) pixels in [0, 1]."""
    return torch.cat([classifier(batch).argmax(-1) for batch in pixels.split(batch_size)])


def print_table(console: Console, part: GrayBoxResult, title: str, measured: str) -> None:
    """Print a part's results: share and 95 % interval, PSNR against the clean image, the purifier's time."""
    record = part.record
    table = Table(title=f"{title} (n = {record['n']})", title_style="bold", title_justify="left")
    for heading in ("images", measured, "of n", "95 % interval", "PSNR"):
        table.add_column(heading, justify="left" if heading == "images" else "right")
    names = {"clean": "clean", "purified_clean": "clean, purified", "attacked": "attacked"}
    for variant in VARIANTS:
        share = record["accuracy"][variant]
        decibel = record["psnr_db"].get(variant)
        table.add_row(
            names.get(variant, "attacked, purified"),
            f"{share['percent']:.0f} %",
            f"{share['correct']}/{share['n']}",
            "{:.0f} to {:.0f} %".format(*share["interval_95"]),
            "" if decibel is None else "identical" if decibel >= PSNR_LIMIT else f"{decibel:.1f} dB",
            style="bold" if variant == "purified_attacked" else "",
        )
    console.print()
    console.print(table)
    console.print(
        f"purifier: {record['purify_ms_per_image']:.2f} ms per image\n"
        f"cosine of its correction with the one that undoes the attack: {record['direction']:.2f}",
        highlight=False,
    )


def _timed(function, pixels: Tensor) -> tuple[Tensor, float]:
    """The result and the seconds of one call after a warm-up."""
    function(pixels[:1])
    _synchronize(pixels.device)
    start = time.perf_counter()
    result = function(pixels)
    _synchronize(pixels.device)
    return result, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
