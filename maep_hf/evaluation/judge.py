"""What happens after the attack: classify clean and attacked images, bare and purified, and sum the figures up."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isnan
from statistics import fmean
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from ..classifier import PurifiedClassifier
from ..devices import synchronize
from ..random_states import seeded
from .statistics import psnr_of_each, share

CHANGED = 0.5 / 255  # a pixel that differs by less is the same when stored as 8 bits
SSIM_WINDOW = 11


def timed(function: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """The result and the seconds that one call took, with the device's work done."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return result, time.perf_counter() - start


@dataclass
class Rise:
    """How far the memory in use rose, in bytes; `nan` where it cannot be told."""

    risen: float = float("nan")


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Rise]:
    """Most memory held inside, above what was held at the start: of the GPU, or of the process.

    The operating system keeps one peak for a whole process: where an earlier one was higher, nothing is known.
    """
    rise = Rise()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield rise
        rise.risen = torch.cuda.max_memory_allocated(device) - before
        return
    now, peak = psutil.Process().memory_info().rss, _peak_rss()
    yield rise
    if _peak_rss() > peak > 0:
        rise.risen = _peak_rss() - now


def _peak_rss() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.no_grad()
def judge_batch(
    classifier: nn.Module,
    defended: PurifiedClassifier,
    clean: Tensor,
    attacked: Tensor,
    labels: Tensor,
    passes: int,
    seed: int,
    about: dict[str, float],
    start: int,
    bare_passes: int = 1,
) -> list[dict[str, Any]]:
    """One row of figures for each image of a batch.

    Args:
        clean, attacked: (B, 3, H, W) in [0, 1].
        passes: of the purifier over the attacked and the clean images.
        seed: of a randomised purifier's draws; those of the final passes are not those the attack saw.
        about: what was noted when the batch was attacked.
        start: index of its first image.
        bare_passes: of the classifier alone, averaged as those.
    """
    device, count = clean.device, len(clean)
    with seeded(seed + 104729 * (start + 1)):
        bare = [_right(classifier, batch, labels) for _ in range(bare_passes) for batch in (clean, attacked)]
    right_clean, right_attacked = (torch.stack(bare[which::2]).float().mean(0) for which in range(2))
    columns: dict[str, Tensor | None] = {
        "right_clean": right_clean,
        "right_attacked": right_attacked,
        "psnr_attacked": psnr_of_each(attacked, clean),
        "ssim_attacked": _ssim(attacked, clean),
    }
    delta = (attacked - clean).float().flatten(1)
    columns |= {
        "linf_255": 255 * delta.abs().amax(1),
        "l2": delta.norm(dim=1),
        "l1": delta.abs().sum(1),
        "changed_percent": 100 * (delta.abs() > CHANGED).float().mean(1),
    }
    _, classify_seconds = timed(lambda: classifier(clean), device)
    seconds = {"ms_attack": about["attack_seconds"], "ms_classify": classify_seconds}
    if defended.purifier is None:
        columns["right_purified_attacked"] = columns["right_attacked"]
    else:
        rights: dict[str, list[Tensor]] = {"purified_clean": [], "purified_attacked": []}
        with seeded(seed + 7919 * (start + 1)):
            for index in range(passes):
                purified, purify_seconds = timed(lambda: defended.purify(attacked), device)
                purified_clean = defended.purify(clean)
                for name, batch in (("purified_attacked", purified), ("purified_clean", purified_clean)):
                    rights[name].append(_right(classifier, batch, labels))
                if index:
                    continue
                seconds["ms_purify"] = purify_seconds
                for name, batch in (("purified_attacked", purified), ("purified_clean", purified_clean)):
                    columns[f"psnr_{name}"] = psnr_of_each(batch, clean)
                    columns[f"ssim_{name}"] = _ssim(batch, clean)
                correction = (purified - attacked).float().flatten(1)
                # paper, Fig. 2: is what the purifier changes the way back? Zero where there is nothing to undo.
                columns["cosine_true_direction"] = torch.cosine_similarity(correction, -delta)
                columns["undone"] = (correction * -delta).sum(1) / delta.square().sum(1).clamp_min(1e-12)
        for name, passed in rights.items():
            stacked = torch.stack(passed).float()
            columns[f"right_{name}"] = stacked.mean(0)
            columns[f"always_right_{name}"] = stacked.amin(0)
    values = {name: column.float().tolist() for name, column in columns.items() if column is not None}
    shared = {name: 1000 * value / count for name, value in seconds.items()}
    shared["memory_bytes_per_image"] = about["memory_bytes_per_image"]
    return [
        {"index": start + i, **{name: column[i] for name, column in values.items()}, **shared} for i in range(count)
    ]


def summarise(rows: list[dict[str, Any]], purified: bool, passes: int) -> dict[str, Any]:
    """Accuracy with its interval, picture quality, cosines, size of the perturbation and times, over all images.

    What says how far attacked images are from the clean ones is of those that the attack changed: most attacks leave
    alone what the model has wrong already.
    """
    rows = sorted(rows, key=lambda row: row["index"])
    moved = [row for row in rows if row["linf_255"] > 0]
    changed = moved or rows

    def mean(name: str, among: list[dict[str, Any]] = rows) -> float | None:
        values = [row[name] for row in among if name in row]
        return fmean(values) if values else None

    def spread(name: str) -> dict[str, float]:
        return {"mean": mean(name, changed), "max": max(row[name] for row in rows)}

    variants = ("purified_clean", "attacked", "purified_attacked")
    accuracy: dict[str, Any] = {"clean": _share(rows, "right_clean"), "purified_clean": None}
    accuracy |= {"attacked": _share(rows, "right_attacked"), "purified_attacked": None}
    record: dict[str, Any] = {"accuracy": accuracy}
    if purified:
        accuracy["purified_clean"] = _share(rows, "right_purified_clean")
        accuracy["purified_attacked"] = _share(rows, "right_purified_attacked")
        if passes > 1:  # the average is the headline, an image that any pass gets wrong is the strict reading
            accuracy["purified_attacked_every_pass"] = _share(rows, "always_right_purified_attacked")
    for quality, key in (("psnr", "psnr_db"), ("ssim", "ssim")):
        record[key] = {name: mean(f"{quality}_{name}", changed if name == "attacked" else rows) for name in variants}
    if purified and moved:
        cosine = fmean(row["cosine_true_direction"] for row in moved)
        # x_a = x + d_a, so the way back to x is minus the perturbation and the paper's two cosines are one number
        record["cosine"] = {
            "true_direction": cosine,
            "minus_perturbation": cosine,
            "undone_share": fmean(row["undone"] for row in moved),
            "images": len(moved),
        }
    else:
        record["cosine"] = None
    record["perturbation"] = {name: spread(name) for name in ("linf_255", "l2", "l1")}
    record["perturbation"]["changed_percent"] = mean("changed_percent", changed)
    kept = [row["right_purified_attacked"] for row in rows if not row["linf_255"] > 0]
    record["perturbation"] |= {"images": len(moved), "right_of_the_others": sum(kept)}
    record["ms_per_image"] = {name: mean(f"ms_{name}") for name in ("attack", "purify", "classify")}
    memory = [row["memory_bytes_per_image"] for row in rows if not isnan(row["memory_bytes_per_image"])]
    record["memory_mb_per_image"] = max(memory) / 2**20 if memory else None
    return record


def _share(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return share(torch.tensor([row[name] for row in rows]))


def _right(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    logits = model(pixels)
    if not torch.isfinite(logits).all():
        raise ValueError("classifier: its logits are not finite (NaN or inf) on images of the evaluation")
    return logits.argmax(-1) == labels


def _ssim(images: Tensor, reference: Tensor) -> Tensor | None:
    if min(images.shape[-2:]) < SSIM_WINDOW:
        return None  # there is no window to compare
    return ssim(images.float(), reference.float(), data_range=1.0, reduction="none").reshape(len(images))
