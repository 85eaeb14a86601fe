"""The mixture of attacks that training pairs are drawn from (one attack in training leaves holes)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .patterns import stripes_and_squares

KINDS = ("clean", "fgsm", "fgsm_rs", "mi_fgsm", "pgd", "square", "pgd_l2")
VIEWED = 0.5  # share of the steps of a diverse attack that see the image shrunk (p of Xie et al. 2019)
SMALLEST_VIEW = 0.75
SMOOTHING = (0.5, 1.5)  # standard deviation, pixels


@dataclass
class AttackMixture:
    """Shares of attack kinds and the ranges their parameters are drawn from, one draw a sample.

    Args:
        clean: share of samples left clean, so that clean accuracy is kept.
        fgsm, fgsm_rs, mi_fgsm, pgd: shares of the attacks (FGSM, FGSM with random start, momentum FGSM, PGD).
        square: share of random stripes and squares, as the Square attack lays them, without its queries.
        pgd_l2: share of PGD in the L2 norm.
        pgd_random_start: share of the PGD samples that start at a random point; the others start at the clean image
            (BIM); of `pgd_l2` too.
        eps_min, eps_max: L-infinity radius drawn uniformly between, units of 1/255, up to 1.5 times the nominal 8.
        l2_eps_min, l2_eps_max: L2 radius drawn uniformly between, lengths of images with pixels in [0, 1] (0.5 is
            usual for 32 x 32 pixels).
        max_steps: largest number of steps of MI-FGSM and PGD (drawn from 2 and 1).
        input_diversity: share of the gradient attacks whose gradient, at half of the steps, is that of the image shrunk
            to 0.75 to 1 of its size and laid on black at random (DI-FGSM, Xie et al. 2019). Such patterns hold for more
            classifiers than the surrogate.
        smoothed_gradient: share of the gradient attacks whose gradient is smoothed by a Gaussian of 0.5 to 1.5 pixels
            (TI-FGSM, Dong et al. 2019): patterns of longer waves.
        num_surrogates: classifiers that samples are spread over.

    Raises:
        ValueError: negative shares or none at all, another share outside [0, 1], an empty eps range, no steps.
    """

    clean: float = 0.15
    fgsm: float = 0.2
    fgsm_rs: float = 0.15
    mi_fgsm: float = 0.15
    pgd: float = 0.35
    square: float = 0.0
    pgd_l2: float = 0.0
    pgd_random_start: float = 1.0
    eps_min: float = 2.0
    eps_max: float = 12.0
    l2_eps_min: float = 0.1
    l2_eps_max: float = 0.75
    max_steps: int = 10
    input_diversity: float = 0.0
    smoothed_gradient: float = 0.0
    num_surrogates: int = 1

    def __post_init__(self) -> None:
        shares = self.shares
        if min(shares) < 0 or sum(shares) <= 0:
            raise ValueError(f"attack shares must be >= 0 and not all 0, got {dict(zip(KINDS, shares, strict=True))}")
        for name in ("pgd_random_start", "input_diversity", "smoothed_gradient"):
            if not 0 <= getattr(self, name) <= 1:
                of = "PGD samples" if name == "pgd_random_start" else "samples of the gradient attacks"
                raise ValueError(f"{name}={getattr(self, name)}: a share of the {of}, from 0 to 1")
        if not 0 < self.eps_min <= self.eps_max:
            raise ValueError(
                f"0 < eps_min <= eps_max is needed (units of 1/255), got {self.eps_min} and {self.eps_max}"
            )
        if self.eps_max < 1:
            raise ValueError(
                f"eps_max={self.eps_max} is below one grey level: eps is in units of 1/255, so 8, not 8/255"
            )
        if not 0 < self.l2_eps_min <= self.l2_eps_max:
            raise ValueError(
                f"0 < l2_eps_min <= l2_eps_max is needed (pixels in [0, 1]), got {self.l2_eps_min} and "
                f"{self.l2_eps_max}"
            )
        if self.max_steps < 2:
            raise ValueError(f"max_steps={self.max_steps}: at least 2 are needed for the iterated attacks")
        if self.num_surrogates < 1:
            raise ValueError("num_surrogates: at least one classifier is needed to attack")

    @property
    def shares(self) -> tuple[float, ...]:
        return tuple(getattr(self, kind) for kind in KINDS)

    def draw(self, rng: np.random.Generator, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """One sample's attack: `attack_` and a field of [`AttackParameters`] as keys, and `attack_kind`."""
        shares = np.asarray(self.shares)
        kind = KINDS[rng.choice(len(KINDS), p=shares / shares.sum())]
        eps = rng.uniform(self.eps_min, self.eps_max) / 255
        relative_step = rng.uniform(0.5, 2.0)  # random step size, drawn for every kind to keep the draws aligned
        steps = int(rng.integers(1, self.max_steps + 1))
        start = rng.random(image_shape, dtype=np.float32) * 2 - 1
        surrogate = int(rng.integers(self.num_surrogates))
        momentum = 0.0
        if kind == "clean":
            steps, step_size, start = 0, 0.0, np.zeros_like(start)
        elif kind == "fgsm":
            steps, step_size, start = 1, eps, np.zeros_like(start)
        elif kind == "fgsm_rs":
            steps, step_size = 1, 1.25 * eps  # Wong et al. 2020
        elif kind == "mi_fgsm":
            steps = max(2, steps)
            step_size, momentum, start = eps / steps, 1.0, np.zeros_like(start)
        elif kind == "square":
            steps, step_size, start = 0, 0.0, stripes_and_squares(rng, image_shape)
        else:  # steps x step size covers the ball at least once whatever was drawn
            if kind == "pgd_l2":
                eps = rng.uniform(self.l2_eps_min, self.l2_eps_max)
                start *= rng.random() / np.linalg.norm(start)
            step_size = eps * min(1.0, relative_step * 2 / steps)
            if self.pgd_random_start < 1 and rng.random() >= self.pgd_random_start:
                start = np.zeros_like(start)
        smoothing, views = 0.0, np.ones((self.max_steps if self.input_diversity else 0, 3), dtype=np.float32)
        if steps:  # it follows gradients
            if self.smoothed_gradient and rng.random() < self.smoothed_gradient:
                smoothing = rng.uniform(*SMOOTHING)
            if self.input_diversity and rng.random() < self.input_diversity:
                views = _draw_views(rng, self.max_steps)
        values = {"eps": eps, "step_size": step_size, "momentum": momentum, "smoothing": smoothing}
        drawn = {f"attack_{key}": torch.tensor(value, dtype=torch.float32) for key, value in values.items()}
        drawn["attack_steps"] = torch.tensor(steps)
        drawn["attack_l2"] = torch.tensor(kind == "pgd_l2")
        drawn["attack_surrogate"] = torch.tensor(surrogate)
        drawn["attack_kind"] = torch.tensor(KINDS.index(kind))
        drawn["attack_start"] = torch.from_numpy(start)
        drawn["attack_views"] = torch.from_numpy(views)
        return drawn


def _draw_views(rng: np.random.Generator, steps: int) -> np.ndarray:
    """(steps, 3): the scale of the image at each step, and where it lies in the room left, -1 to 1 each way."""
    scale = np.where(rng.random(steps) < VIEWED, rng.uniform(SMALLEST_VIEW, 1.0, steps), 1.0)
    return np.concatenate([scale[:, None], rng.uniform(-1.0, 1.0, (steps, 2))], axis=1).astype(np.float32)
