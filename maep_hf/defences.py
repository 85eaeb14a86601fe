"""Classical defences from image to image, as baselines beside a purifier, and the BPDA wrapper around any of them.

All take and return (B, C, H, W) pixels in [0, 1]. The work is done by Pillow, SciPy and scikit-image. What passes
through these has no gradient: the result is detached, and an attack that needs one takes it through `BPDA`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .classifier import call_purifier, find_purify
from .preprocessing import check_pixels, check_range

SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
BLUR_TRUNCATE = 4.0  # standard deviations, as scipy.ndimage.gaussian_filter cuts its kernel


class Defence(nn.Module):
    """Base of the classical defences; each is a dataclass whose fields are its options.

    Attributes:
        name: its name in `DEFENCES`.
        library: the distribution that does the work.
        randomised: whether two calls on one image differ; draws come from PyTorch's global CPU generator.
        differentiable: whether gradients pass; otherwise the result is detached from the graph.
    """

    name: ClassVar[str]
    library: ClassVar[str] = "torch"
    randomised: ClassVar[bool] = False
    differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__init__()
        self.check()

    def check(self) -> None:
        """Refuse options out of range (`ValueError`) and a library that is not installed (`ImportError`)."""

    def transform(self, pixels: Tensor) -> Tensor:
        """The defence itself, on checked images, at least one."""
        raise NotImplementedError

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The defended images, of the shape, dtype and device given, in [0, 1].

        Args:
            pixel_values: (B, C, H, W) in [0, 1], floating point; B may be 0.

        Raises:
            TypeError: not a floating-point tensor.
            ValueError: another shape, values out of [0, 1], NaN, or an image that the defence cannot take.
        """
        check_pixels(pixel_values)
        if not pixel_values.numel():
            return pixel_values.clone()
        check_range(pixel_values)
        pixels = pixel_values if self.differentiable else pixel_values.detach()
        return self.transform(pixels.clamp(0, 1)).clamp(0, 1).to(pixel_values)

    def record(self) -> dict[str, Any]:
        """Everything needed to repeat it, JSON: name, options, library with version, what it does to gradients."""
        return {
            "name": self.name,
            "options": {field.name: getattr(self, field.name) for field in fields(self)},
            "library": self.library,
            "version": version(self.library).partition("+")[0],  # the same on machines with and without CUDA
            "randomised": self.randomised,
            "differentiable": self.differentiable,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))


@dataclass(eq=False, repr=False)
class JPEG(Defence):
    """JPEG compression and decompression by Pillow (Dziugaite et al. 2016, arXiv 1608.00853; Guo et al. 2018).

    Pixels are rounded to 8 bits before. For images of one or three channels.

    Args:
        quality: 1 to 100.
        subsampling: of the colour channels, "4:4:4", "4:2:2" or "4:2:0" (Pillow's own default).
    """

    quality: int = 75
    subsampling: str = "4:2:0"

    name: ClassVar[str] = "jpeg"
    library: ClassVar[str] = "pillow"

    def check(self) -> None:
        _check_integer("quality", self.quality, 1, 100)
        if self.subsampling not in SUBSAMPLINGS:
            raise ValueError(f"subsampling={self.subsampling!r} must be one of {', '.join(SUBSAMPLINGS)}.")

    def transform(self, pixels: Tensor) -> Tensor:
        if pixels.shape[1] not in (1, 3):
            raise ValueError(
                f"`pixel_values` has {pixels.shape[1]} channels, but JPEG stores grey (1) or RGB (3) images: "
                f"its shape is {tuple(pixels.shape)}."
            )
        images = (pixels.float() * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
        decoded = []
        for image in images:
            with io.BytesIO() as file:
                picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
                picture.save(file, format="JPEG", quality=self.quality, subsampling=self.subsampling)
                decoded.append(np.asarray(Image.open(file)).reshape(image.shape))
        return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(pixels.device).float() / 255


@dataclass(eq=False, repr=False)
class BitDepth(Defence):
    """Rounding to 2**bits values a channel (feature squeezing, Xu et al. 2018, arXiv 1704.01155).

    Args:
        bits: 1 to 8. At 4 and fewer, half a level is more than 8/255 and a perturbation of that size can vanish.
    """

    bits: int = 4

    name: ClassVar[str] = "bit-depth"

    def check(self) -> None:
        _check_integer("bits", self.bits, 1, 8)

    def transform(self, pixels: Tensor) -> Tensor:
        levels = 2**self.bits - 1
        return (_at_least_float32(pixels) * levels).round() / levels


@dataclass(eq=False, repr=False)
class Median(Defence):
    """Median of each pixel's neighbourhood, channel by channel, by SciPy (feature squeezing, Xu et al. 2018).

    Args:
        size: height and width of the neighbourhood in pixels, 2 or more; the image is reflected at its edges.
    """

    size: int = 3

    name: ClassVar[str] = "median"
    library: ClassVar[str] = "scipy"

    def check(self) -> None:
        _check_integer("size", self.size, 2)
        _library("scipy.ndimage", self.library)

    def transform(self, pixels: Tensor) -> Tensor:
        ndimage = _library("scipy.ndimage", self.library)
        return _with_numpy(pixels, lambda x: ndimage.median_filter(x, size=(1, 1, self.size, self.size)))


@dataclass(eq=False, repr=False)
class TotalVariation(Defence):
    """Total-variation denoising, channel by channel, by scikit-image (Chambolle 2004).

    It is not the total-variation minimisation of Guo et al. (2018), which also drops pixels at random.

    Args:
        weight: positive; greater is smoother. For [0, 1] pixels; scikit-image's own default, 0.1, smooths 32-pixel
            images so far that a classifier no longer knows many of them.
        max_iterations: at most so many steps.
        tolerance: relative change of the cost at which it stops.
    """

    weight: float = 0.05
    max_iterations: int = 200
    tolerance: float = 2e-4

    name: ClassVar[str] = "total-variation"
    library: ClassVar[str] = "scikit-image"

    def check(self) -> None:
        _check_positive("weight", self.weight)
        _check_positive("tolerance", self.tolerance)
        _check_integer("max_iterations", self.max_iterations, 1)
        _library("skimage.restoration", self.library)

    def transform(self, pixels: Tensor) -> Tensor:
        restoration = _library("skimage.restoration", self.library)

        def denoise(images: np.ndarray) -> np.ndarray:
            # scikit-image takes one channel after the other, so those of all images may stand in one axis.
            planes = images.reshape(-1, *images.shape[2:])
            return restoration.denoise_tv_chambolle(
                planes, self.weight, eps=self.tolerance, max_num_iter=self.max_iterations, channel_axis=0
            ).reshape(images.shape)

        return _with_numpy(pixels, denoise)


@dataclass(eq=False, repr=False)
class GaussianBlur(Defence):
    """Gaussian blur; linear, so its gradient is exact. The same values as SciPy's `gaussian_filter(mode="mirror")`.

    Args:
        sigma: standard deviation in pixels, positive; the kernel ends at four of them.
    """

    sigma: float = 0.7

    name: ClassVar[str] = "gaussian-blur"
    differentiable: ClassVar[bool] = True

    def check(self) -> None:
        _check_positive("sigma", self.sigma)

    def transform(self, pixels: Tensor) -> Tensor:
        images = _at_least_float32(pixels)
        channels, height, width = images.shape[1:]
        radius = int(BLUR_TRUNCATE * self.sigma + 0.5)
        if radius >= min(height, width):
            raise ValueError(
                f"sigma={self.sigma:g} reaches {radius} pixels, too far for an image of {height} x {width}: "
                f"use a sigma below {(min(height, width) - 0.5) / BLUR_TRUNCATE:g}."
            )
        offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
        kernel = torch.exp(-0.5 * (offsets / self.sigma) ** 2)
        kernel = (kernel / kernel.sum()).expand(channels, 1, -1)
        images = F.pad(images, (radius,) * 4, mode="reflect")
        return F.conv2d(F.conv2d(images, kernel[..., None], groups=channels), kernel[:, :, None], groups=channels)


@dataclass(eq=False, repr=False)
class ResizeAndPad(Defence):
    """Random resize and random zero padding (Xie et al. 2018, arXiv 1711.01991), brought back to the image's size.

    Each image is enlarged to a drawn size and put at a drawn place on a larger black canvas. Xie et al. give the
    classifier that canvas (sizes 310 to 330 on 331 for 299-pixel images, the ratios kept here: 33 to 35 on 36 for
    CIFAR). Here the canvas is resized back, since the shape must be kept; a classifier with a fixed input size would
    have it resized just so by its own preprocessing. All resizes are bilinear and antialiased. Differentiable, and
    random: an attack must average over draws (EOT).

    Args:
        smallest: least enlargement, at least 1.
        largest: the canvas in units of the image's size, greater than `smallest`; rounded up to pixels, at least
            one more than the image has.
    """

    smallest: float = 310 / 299
    largest: float = 331 / 299

    name: ClassVar[str] = "resize-and-pad"
    randomised: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    def check(self) -> None:
        _check_positive("smallest", self.smallest)
        _check_positive("largest", self.largest)
        if self.smallest < 1:
            raise ValueError(f"smallest={self.smallest:g} must be at least 1: images are enlarged before the padding.")
        if self.largest <= self.smallest:
            raise ValueError(f"largest={self.largest:g} must be greater than smallest={self.smallest:g}.")

    def transform(self, pixels: Tensor) -> Tensor:
        images = _at_least_float32(pixels)
        height, width = images.shape[2:]
        canvas = [max(side + 1, math.ceil(side * self.largest - 1e-6)) for side in (height, width)]
        least = min(round(height * self.smallest), canvas[0] - 1)
        # Drawn on the CPU whatever the device, so that a seed means the same everywhere.
        heights = torch.randint(least, canvas[0], (len(images),)).tolist()
        places = torch.rand(len(images), 2).tolist()
        padded = []
        for image, drawn, place in zip(images, heights, places, strict=True):
            size = (drawn, min(round(width * drawn / height), canvas[1] - 1))
            room = [whole - part for whole, part in zip(canvas, size, strict=True)]
            top, left = (int(share * (free + 1)) for share, free in zip(place, room, strict=True))
            padded.append(F.pad(_resize(image[None], size), (left, room[1] - left, top, room[0] - top)))
        return _resize(torch.cat(padded), (height, width))


DEFENCES: dict[str, type[Defence]] = {
    kind.name: kind for kind in (JPEG, BitDepth, Median, TotalVariation, GaussianBlur, ResizeAndPad)
}


def make_defence(name: str, **options: Any) -> Defence:
    """A classical defence by its name.

    Args:
        name: a key of `DEFENCES`: "jpeg", "bit-depth", "median", "total-variation", "gaussian-blur" or
            "resize-and-pad".
        **options: the fields of its class, e.g. `quality=50`.

    Raises:
        ValueError: no such defence, or an option out of range.
        TypeError: no such option, or one of the wrong type.
        ImportError: its library is not installed.

    Example:
        >>> make_defence("bit-depth", bits=3).record()["options"]
        {'bits': 3}
    """
    if name not in DEFENCES:
        raise ValueError(f"name={name!r} must be one of {', '.join(DEFENCES)}.")
    known = [field.name for field in fields(DEFENCES[name])]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(known)}.")
    return DEFENCES[name](**options)


class BPDA(nn.Module):
    """A purifier with the identity in place of its gradient (BPDA, Athalye et al. 2018, arXiv 1802.00420).

    The value is the purifier's, bit for bit; backwards the gradient passes as if nothing had been in the way. The
    purifier runs without gradients and in eval mode. For purifiers that have none (JPEG) and as the weak adaptive
    check of those that have one: where white-box is possible, it overstates robustness.

    Args:
        purifier: anything with a method `purify` (a `MAEPModel`, also wrapped by PEFT or DistributedDataParallel), or
            a module or callable that maps images (B, C, H, W) in [0, 1] to images of the same shape.

    Raises:
        TypeError: the purifier cannot be called.
    """

    def __init__(self, purifier: nn.Module | Callable[[Tensor], Tensor]):
        super().__init__()
        check_purifier(purifier)
        self.purifier = purifier
        self.eval()

    @property
    def randomised(self) -> bool:
        """What the purifier declares of itself; False where it declares nothing."""
        return getattr(self.purifier, "randomised", False) is True

    @property
    def config(self) -> Any:
        """The purifier's configuration, or None."""
        return getattr(self.purifier, "config", None)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """The purified images (B, C, H, W) in [0, 1]; keyword arguments go to the purifier. Errors: `call_purifier`."""
        with torch.no_grad():
            purified = call_purifier(self.purifier, pixel_values, **kwargs)
        passed = pixel_values.to(purified)
        return purified + (passed - passed.detach())  # the bracket is 0 exactly, and its gradient 1


def check_purifier(purifier: Any) -> None:
    """Refuse what can be no purifier: a name, None, or an object that cannot be called (`TypeError`)."""
    if isinstance(purifier, str):
        raise TypeError(
            f"`purifier` must be a model, got a name; use MAEPModel.from_pretrained({purifier!r}) or "
            f"make_defence({purifier!r})."
        )
    if not callable(purifier) and find_purify(purifier) is None:
        raise TypeError(f"`purifier` must have a method `purify` or be callable, got {type(purifier).__name__}.")


def _at_least_float32(pixels: Tensor) -> Tensor:
    return pixels.to(torch.promote_types(pixels.dtype, torch.float32))


def _with_numpy(pixels: Tensor, function: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """A function of NumPy images (B, C, H, W), in float32 or float64, on a tensor of any device."""
    return torch.from_numpy(function(_at_least_float32(pixels).cpu().numpy())).to(pixels.device)


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)


def _library(module: str, distribution: str) -> Any:
    """The module of a library that is an optional dependency."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this defence needs {distribution}, which is not installed: pip install 'maep-hf[attacks]'"
        ) from error


def _check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an integer.")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}={value} must be {f'at least {low}' if high is None else f'from {low} to {high}'}.")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} must be a number.")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}={value} must be positive and finite.")
