"""PSNR and SSIM of purified images against the clean ones, computed by torchmetrics."""

from itertools import groupby

import datasets
import evaluate
import numpy as np
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from maep_hf.evaluation.statistics import PSNR_LIMIT

_DESCRIPTION = """\
How close purified images come to the clean ones: peak signal-to-noise ratio (PSNR, dB) and structural similarity (SSIM,
Gaussian window of 11 pixels), both by torchmetrics for a data range of 1, image by image, then averaged.
"""

_INPUTS = """
Args:
    predictions: N purified images, each (C, H, W) with C 1 or 3 and values in [0, 1]: an (N, C, H, W) array or tensor,
        or a list of images whose sizes may differ. Kept as float32.
    references: N clean images; each has the shape of its prediction.
  In the configuration "images" the two are called `purified_images` and `clean_images`, which leaves `predictions` and
  `references` to the labels of other modules in `evaluate.combine`.

Returns:
    psnr_db: mean PSNR in dB; an image that equals its reference counts as 100 dB, and none counts more.
    ssim: mean SSIM, at most 1.
    n: number of images.

Raises:
    ValueError: no images, different numbers or shapes of them, not (C, H, W), under 6 pixels on a side (SSIM needs
        them), or values outside [0, 1].

Examples:
    >>> import evaluate, numpy
    >>> from maep_hf import metrics
    >>> quality = evaluate.load(metrics.path("purification_quality"))
    >>> clean = numpy.full((2, 3, 8, 8), 0.5)
    >>> result = quality.compute(predictions=clean + 0.1, references=clean)
    >>> round(result["psnr_db"], 2), result["n"]
    (20.0, 2)
"""

_CONFIGURATIONS = {
    "default": ("predictions", "references"),
    "images": ("purified_images", "clean_images"),
}
# a column of the package's other module: `combine` hands every argument of `compute` to every module
_OF_OTHERS = {"clean_predictions"}
_SMALLEST = 6  # SSIM reflects 5 pixels at each border
_BATCH_VALUES = 1 << 20  # bounds the memory that SSIM takes


class PurificationQuality(evaluate.Metric):
    """See `_DESCRIPTION` and `_INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in _CONFIGURATIONS:
            raise ValueError(f"config_name: {self.config_name!r} is none of {', '.join(_CONFIGURATIONS)}")
        # Nested lists take every size; Array3D fixes height and width, Image rounds to 8 bits.
        image = datasets.Value("float32")
        for _ in range(3):
            image = datasets.Sequence(image)
        info = evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({name: image for name in _CONFIGURATIONS[self.config_name]}),
        )
        # The constructor takes formats for flat columns only. Without it every pixel comes back as a Python object.
        info.format = "numpy"
        return info

    def _compute(self, **columns) -> dict:
        names = _CONFIGURATIONS[self.config_name]
        if unknown := set(columns) - set(names) - _OF_OTHERS:
            raise ValueError(f"{', '.join(sorted(unknown))}: no argument of purification_quality")
        purified, clean = (_images(name, columns[name]) for name in names)
        if len(purified) != len(clean):
            raise ValueError(f"{names[0]}: {len(purified)} images, but {len(clean)} {names[1]}")
        for index, (image, reference) in enumerate(zip(purified, clean, strict=True)):
            if image.shape != reference.shape:
                raise ValueError(f"{names[0]}: image {index} has shape {image.shape}, its reference {reference.shape}")
        psnr, ssim = [], []
        for images, references in _batches(purified, clean):
            ratio = peak_signal_noise_ratio(images, references, data_range=1.0, dim=(1, 2, 3), reduction="none")
            psnr.append(ratio.clamp(max=PSNR_LIMIT))
            ssim.append(structural_similarity_index_measure(images, references, data_range=1.0, reduction="none"))
        return {"psnr_db": _mean(psnr), "ssim": _mean(ssim), "n": len(purified)}


def _images(name: str, column) -> list[np.ndarray]:
    if len(column) == 0:
        raise ValueError(f"{name}: empty, there is nothing to measure")
    return [_image(name, index, image) for index, image in enumerate(column)]


def _image(name: str, index: int, image) -> np.ndarray:
    try:
        array = np.asarray(image, dtype=np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: image {index} is no rectangle of pixels") from None
    if array.ndim != 3 or array.shape[0] not in (1, 3):
        raise ValueError(f"{name}: image {index} has shape {array.shape}, but (C, H, W) with C 1 or 3 is needed")
    if min(array.shape[1:]) < _SMALLEST:
        raise ValueError(f"{name}: image {index} has shape {array.shape}; SSIM needs {_SMALLEST} pixels on each side")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # false for NaN as well
        raise ValueError(
            f"{name}: image {index} has values from {low:g} to {high:g}, but [0, 1] is needed; clip, or divide by 255"
        )
    return array


def _batches(purified: list[np.ndarray], clean: list[np.ndarray]):
    """Neighbours of one shape together: (B, C, H, W) tensors, at most `_BATCH_VALUES` values each."""
    for _, group in groupby(zip(purified, clean, strict=True), key=lambda pair: pair[0].shape):
        pairs = list(group)
        count = max(1, _BATCH_VALUES // pairs[0][0].size)
        for start in range(0, len(pairs), count):
            images, references = zip(*pairs[start : start + count], strict=True)
            yield torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(references))


def _mean(parts: list[torch.Tensor]) -> float:
    return torch.cat(parts).double().mean().item()
