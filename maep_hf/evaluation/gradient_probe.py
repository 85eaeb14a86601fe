"""Whether attacked classifiers give the pixels a gradient: without one, an attack fails and anything looks robust."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from ..attacks.gradient import input_gradient
from ..attacks.guard import Watched, isolated
from .checks import margin_gradient

PARTS = 16  # far less memory than an attack takes, whose peak the record tells


def gradient_probe(
    model: nn.Module, pixels: Tensor, labels: Tensor, *, name: str, seed: int, required: bool = True
) -> dict[str, int]:
    """For how many clean images an attack sees nothing but zeros as the gradient of the cross-entropy at the pixels.

    Nothing is left behind: no random state, gradient or `requires_grad` is another one afterwards.

    Args:
        model: as an attack is given it.
        pixels: (B, C, H, W) in [0, 1].
        labels: (B,).
        name: what the error calls the model.
        seed: of a randomised model's draws.
        required: refuse a model that gives none.

    Returns:
        `images`, how many there are, and `zero`, how many of them have no gradient, be it zero or not finite.

    Raises:
        ValueError: one is required and none of them has it, of the logits' margin neither, which does not saturate as
            the cross-entropy does; or as an attack on this model.
    """
    size = -(-len(pixels) // PARTS)
    batches = list(zip(pixels.split(size), labels.split(size), strict=True))
    with isolated(model, seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the attack says so itself
        watched = Watched(model, labels)
        zero = sum(_without(input_gradient(watched, *batch)) for batch in batches)
        if required and zero == len(pixels) == sum(_without(margin_gradient(watched, *batch)) for batch in batches):
            raise ValueError(
                f"{name} gives the pixels no gradient, so that an attack that follows one fails and the figure says "
                "nothing: use an attack that needs none, such as square, or give it a forward that can be "
                "differentiated, without no_grad, detach and rounding"
            )
    return {"images": len(pixels), "zero": zero}


def _without(gradient: Tensor) -> int:
    """Number of images whose gradient is zero everywhere."""
    return int((gradient == 0).flatten(1).all(1).sum())
