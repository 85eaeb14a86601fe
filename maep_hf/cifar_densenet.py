"""DenseNet-BC for CIFAR images (Huang et al. 2017), as a classifier to defend: another family than the residual ones.

`maep evaluate --classifier python:maep_hf.cifar_densenet:published:FILE` takes a checkpoint of the authors' layout,
such as `checkpoints/CIFAR-10/densenet/checkpoint_100.pth.tar` of github.com/deeplearning-wisc/dice (MIT; 100 layers,
growth 12, 0.77 million weights).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import PixelClassifier
from .folding import fold_batch_norm
from .published_weights import read_published_weights

# Of the CIFAR-10 training images; the published weights were trained with them.
IMAGE_MEAN = (0.4914, 0.4822, 0.4465)
IMAGE_STD = (0.2023, 0.1994, 0.2010)
BLOCKS = 3
BOTTLENECK = 4
LAYER = re.compile(r"block1\.layer\.\d+\.conv2\.weight")


class DenseLayer(nn.Module):
    """A 1 x 1 and a 3 x 3 convolution, each after normalisation and ReLU; the result is appended to the input."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, BOTTLENECK * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(BOTTLENECK * growth)
        self.conv2 = nn.Conv2d(BOTTLENECK * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(F.relu(self.bn2(hidden)))], dim=1)


class DenseBlock(nn.Module):
    def __init__(self, channels: int, growth: int, layers: int):
        super().__init__()
        self.layer = nn.Sequential(*(DenseLayer(channels + index * growth, growth) for index in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Transition(nn.Module):
    """Half of the channels at half of the resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class CifarDenseNet(nn.Module):
    """DenseNet-BC: three dense blocks, compression by a half between them; (B, 3, H, W) normalised pixels to logits.

    Args:
        num_labels: classes.
        growth: channels that every layer appends.
        layers: of a block; the depth is `6 * layers + 4`.
    """

    def __init__(self, num_labels: int = 10, growth: int = 12, layers: int = 16):
        super().__init__()
        channels = 2 * growth
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for number in range(1, BLOCKS + 1):
            setattr(self, f"block{number}", DenseBlock(channels, growth, layers))
            channels += layers * growth
            if number < BLOCKS:
                setattr(self, f"trans{number}", Transition(channels))
                channels //= 2
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trans1(self.block1(self.conv1(x)))
        x = self.block3(self.trans2(self.block2(x)))
        return self.fc(F.relu(self.bn1(x)).mean(dim=(2, 3)))


def published(file: str) -> PixelClassifier:
    """The network of a checkpoint file, growth, depth and classes read off it, from [0, 1] pixels to logits.

    The second normalisation of every layer is folded into the convolution before it: the same function, faster.

    Args:
        file: see [`read_published_weights`].

    Raises:
        OSError: no such file.
        ValueError: it holds something else.
    """
    state = read_published_weights(file)
    layers = sum(LAYER.fullmatch(name) is not None for name in state)
    if not layers or "fc.weight" not in state:
        raise ValueError(f"{file} holds no DenseNet-BC: it has no block1.layer.0.conv2.weight or no fc.weight")
    growth = len(state["block1.layer.0.conv2.weight"])
    network = CifarDenseNet(len(state["fc.weight"]), growth, layers)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{file} holds another DenseNet: {' '.join(str(error).split())}") from error
    fold_batch_norm(network.eval())
    classifier = PixelClassifier(network, image_mean=IMAGE_MEAN, image_std=IMAGE_STD)
    return classifier.to(memory_format=torch.channels_last)  # faster on a processor
