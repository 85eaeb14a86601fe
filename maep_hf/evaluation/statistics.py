"""Figures that results are stated in: shares with intervals, PSNR, the direction of a correction."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

PSNR_LIMIT = 100.0  # dB, what identical images count as


def psnr_of_each(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (N,), for (N, C, H, W) in [0, 1]; at most 100."""
    error = (images.float() - reference.float()).square().flatten(1).mean(1)
    return -10 * error.clamp_min(10 ** (-PSNR_LIMIT / 10)).log10()


def psnr(images: Tensor, reference: Tensor) -> float:
    """The mean of [`psnr_of_each`] over the images."""
    return psnr_of_each(images, reference).mean().item()


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share, as fractions; 95 % by default (Wilson 1927)."""
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"correct: {correct} of n = {n} is no share")
    share, spread = correct / n, z * z / n
    center = share + spread / 2
    half = z * sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, (center - half) / (1 + spread)), min(1.0, (center + half) / (1 + spread))


def share(hits: Tensor) -> dict:
    """How many of (N,) are hits: `correct`, `n`, `percent` and the 95 % Wilson interval in percent.

    Args:
        hits: booleans, or averages over passes in [0, 1]; `correct` is then rounded, and the interval that of N images.
    """
    total, n = float(hits.sum()), len(hits)
    correct = round(total)
    interval = [100 * bound for bound in wilson_interval(correct, n)]
    return {"correct": correct, "n": n, "percent": 100 * total / n, "interval_95": interval}


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """Mean over images of the cosine between two (N, C, H, W) changes (paper, Fig. 2)."""
    return torch.cosine_similarity(a.float().flatten(1), b.float().flatten(1), dim=1).mean().item()
