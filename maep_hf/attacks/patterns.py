"""Perturbations that need no classifier: what the Square attack's search is made of."""

from __future__ import annotations

import numpy as np

SQUARES = 40  # fewer than so many
MIN_SIDE = 2
LARGEST_SHARE = 0.8  # of the image's area: the first square of AutoAttack's Square


def stripes_and_squares(rng: np.random.Generator, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Vertical stripes under random squares, every value -1 or 1: where the Square attack is after some queries.

    It starts from stripes of one sign a column and channel, and lays squares of one sign a channel over them, smaller
    and smaller ones (Andriushchenko et al. 2020, algorithms 1 and 2). Here all are laid down, whatever a classifier
    would say of them; their number is drawn log-uniformly from 1 to 39, or there are none (one draw in eight).

    Args:
        rng: draws everything.
        image_shape: (C, H, W).

    Returns:
        float32 array of `image_shape`.
    """
    channels, height, width = image_shape
    pattern = np.broadcast_to(_signs(rng, (channels, 1, width)), image_shape).copy()
    count = 0 if rng.random() < 1 / 8 else int(SQUARES ** rng.random())
    largest = max(MIN_SIDE, int((LARGEST_SHARE * height * width) ** 0.5))
    sides = np.sort(MIN_SIDE * (largest / MIN_SIDE) ** rng.random(count))[::-1].astype(int)
    for side in np.minimum(sides, min(height, width)):
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        pattern[:, top : top + side, left : left + side] = _signs(rng, (channels, 1, 1))
    return pattern


def _signs(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (2 * rng.integers(2, size=shape) - 1).astype(np.float32)
