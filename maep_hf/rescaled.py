"""Purification at another scale than the image's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import call_purifier, placement
from .defences import check_purifier
from .preprocessing import check_pixels, check_range


class RescaledPurifier(nn.Module):
    """Purify the image shrunk or enlarged, and add the correction, resized back, to the image as it came.

    Details that the smaller image lacks are so kept. A purifier trained on small pictures sees a large one at the scale
    of its own; whether that helps is to be measured. Both resizes are bicubic and antialiased. Differentiable.

    Args:
        purifier: a `MAEPModel`, or any module or callable from images to images.
        scale: of height and width, positive; 1 is the purifier itself.

    Raises:
        TypeError: the purifier cannot be called.
        ValueError: `scale` is not a positive number.
    """

    def __init__(self, purifier: Any, scale: float):
        super().__init__()
        check_purifier(purifier)
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale={scale} must be a positive number.")
        self.purifier, self.scale = purifier, float(scale)
        self.eval()

    @property
    def config(self) -> Any:
        """The purifier's configuration, or None."""
        return getattr(self.purifier, "config", None)

    def purify(self, pixel_values: Tensor, **purify_kwargs: Any) -> Tensor:
        """The purified images: (B, C, H, W) in [0, 1], of the shape and dtype of `pixel_values`.

        Args:
            pixel_values: (B, C, H, W) in [0, 1], any size; the resized image has at least one pixel a side.
            **purify_kwargs: arguments of the purifier's `purify`.

        Raises:
            TypeError, ValueError: see `call_purifier` and the purifier.
        """
        if self.scale == 1:
            return call_purifier(self.purifier, pixel_values, **purify_kwargs)
        check_pixels(pixel_values)
        if not pixel_values.numel():
            return pixel_values.clone()
        check_range(pixel_values)  # the resized image is clamped
        pixel_values = pixel_values.to(placement(self.purifier)[0])
        size = tuple(pixel_values.shape[2:])
        resized = _resize(pixel_values, tuple(max(1, round(side * self.scale)) for side in size)).clamp(0, 1)
        correction = call_purifier(self.purifier, resized, **purify_kwargs) - resized
        return (pixel_values + _resize(correction, size)).clamp(0, 1)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """As `purify`."""
        return self.purify(pixel_values, **kwargs)

    def record(self) -> dict[str, Any]:
        """Its parameter, JSON, with the purifier's own where it has some."""
        inner = getattr(self.purifier, "record", None)
        return (inner() if callable(inner) else {}) | {"scale": self.scale}

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"


def _resize(images: Tensor, size: tuple[int, ...]) -> Tensor:
    wide = torch.promote_types(images.dtype, torch.float32)
    return F.interpolate(images.to(wide), size=size, mode="bicubic", antialias=True).to(images.dtype)
