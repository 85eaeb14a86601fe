"""DISCO (Ho & Vasconcelos, NeurIPS 2022, arXiv 2212.05630): an encoder and a local implicit function, as a baseline.

The published network: the residual encoder of EDSR-baseline (Lim et al. 2017; 16 blocks of 64 channels, without
upsampler) makes a feature map as large as the image, and a local implicit image function (Chen et al. 2021, "LIIF"; a
ReLU network of four hidden layers of 256) predicts the clean colour at a coordinate from the 3 x 3 features around it,
the coordinate relative to the feature's, and the size of a pixel. Four neighbouring features predict, weighted by the
area of the opposite rectangle ("local ensemble"). Pixels are brought to [-1, 1] inside. The loss is L1 to the clean
image.

`maep evaluate --purifier python:train.baselines.disco:load:runs/disco-cifar10` measures it, from the repository's root.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

PIXELS_AT_ONCE, PIXELS_AT_ONCE_ELSEWHERE = {"cpu": 2**14}, 2**20
CENTRED = 1e-4  # pixels; a coordinate this little below a pixel's centre, by rounding, is the centre


class DiscoConfig(PreTrainedConfig):
    """What defines a [`DiscoModel`]; the defaults are the published network.

    Args:
        num_channels: channels of the images.
        encoder_channels, encoder_blocks, residual_scale: of the encoder.
        unfold_size: side of the square of features that the implicit function sees; odd.
        hidden_size, num_hidden_layers: of the implicit function.
        local_ensemble: let four features predict each pixel. At pixel centres, all that a purifier asks for, three of
            them have weight zero except in the last row and column: without it the network is the same but there, and
            nearly half of the work is saved.
        image_size: side of the training images, pixels; the network takes any size.
        patch_size: not the network's. A training sample draws a mask before its attack; with the purifier's patches
            as many numbers are drawn, so that both are trained on the same pairs.

    Raises:
        ValueError: a value out of its range; the message names it.
    """

    model_type = "disco"

    num_channels: int = 3
    encoder_channels: int = 64
    encoder_blocks: int = 16
    residual_scale: float | int = 1.0
    unfold_size: int = 3
    hidden_size: int = 256
    num_hidden_layers: int = 4
    local_ensemble: bool = True
    image_size: int = 32
    patch_size: int = 4

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        for name in ("num_channels", "encoder_channels", "encoder_blocks", "unfold_size", "hidden_size",
                     "num_hidden_layers", "image_size", "patch_size"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.unfold_size % 2 == 0:
            raise ValueError(f"unfold_size={self.unfold_size}: must be odd")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size}: must divide image_size={self.image_size}")


@dataclass
class DiscoOutput(ModelOutput):
    """What [`DiscoModel`] returns.

    Args:
        loss: mean absolute error in [0, 1] pixel units, before clipping; only with `clean_pixel_values`.
        reconstruction_loss: 0, for the purification task: nothing is masked.
        purification_loss: the loss.
        purified_pixel_values: (B, C, H, W) in [0, 1], of the input's dtype.
    """

    loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    purification_loss: Tensor | None = None
    purified_pixel_values: Tensor | None = None


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with a ReLU between them and a skip connection, without normalisation."""

    def __init__(self, channels: int, scale: float):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        return features + self.scale * self.conv2(F.relu(self.conv1(features)))


class Encoder(nn.Module):
    """EDSR-baseline without its upsampler: (B, C, H, W) to (B, encoder_channels, H, W)."""

    def __init__(self, config: DiscoConfig):
        super().__init__()
        width = config.encoder_channels
        self.stem = nn.Conv2d(config.num_channels, width, 3, padding=1)
        self.blocks = nn.Sequential(
            *(ResidualBlock(width, config.residual_scale) for _ in range(config.encoder_blocks))
        )
        self.last = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.stem(pixels)
        return features + self.last(self.blocks(features))


def neighbours(positions: Tensor, count: int, ensemble: bool) -> list[tuple[Tensor, Tensor]]:
    """The features along one axis that predict at `positions`.

    Args:
        positions: (...) in pixels; 0 is the centre of the first.
        count: features along the axis.
        ensemble: the feature at or before the position and the one after it, instead of the nearest.

    Returns:
        For each neighbour its index, within the axis, and the position relative to it, where a pixel is 2 wide.
    """
    if ensemble:
        before = torch.floor(positions + CENTRED)
        found = [before, before + 1]
    else:
        found = [torch.round(positions)]
    indices = [each.clamp(0, count - 1) for each in found]
    return [(index.long(), 2 * (positions - index)) for index in indices]


def ensemble_weights(rows: list[Tensor], columns: list[Tensor]) -> list[Tensor]:
    """Weights of the pairs of a row and a column neighbour, row by row: each has the area of the rectangle opposite.

    Args:
        rows, columns: relative positions of one or two neighbours, of shapes that broadcast.

    Returns:
        Non-negative, summing to one everywhere.
    """
    areas = [(row * column).abs() + 1e-9 for row in reversed(rows) for column in reversed(columns)]
    total = sum(areas)
    return [area / total for area in areas]


class LocalImplicitFunction(nn.Module):
    """The colour at a coordinate from the features around it."""

    def __init__(self, config: DiscoConfig):
        super().__init__()
        self.unfold_size, self.local_ensemble = config.unfold_size, config.local_ensemble
        self.channels = config.encoder_channels
        # the first layer's inputs: features of the square, relative row and column, height and width of a pixel
        seen = self.channels * config.unfold_size**2
        self.first = nn.Linear(seen + 4, config.hidden_size)
        self.hidden = nn.ModuleList(
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.num_hidden_layers - 1)
        )
        self.last = nn.Linear(config.hidden_size, config.num_channels)

    def forward(self, features: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """Colours on a grid of positions, by default the centres of the pixels.

        Args:
            features: (B, encoder_channels, H, W).
            rows, columns: (R,) and (S,) positions in pixels, 0 the centre of the first.

        Returns:
            (B, C, R, S).
        """
        height, width = features.shape[2:]
        like = {"device": features.device, "dtype": torch.float32}  # half precision has no pixel beyond the 2048th
        rows = torch.arange(height, **like) if rows is None else rows.to(**like)
        columns = torch.arange(width, **like) if columns is None else columns.to(**like)
        row_neighbours = neighbours(rows[:, None], height, self.local_ensemble)
        column_neighbours = neighbours(columns[None, :], width, self.local_ensemble)
        weights = ensemble_weights([row for _, row in row_neighbours], [column for _, column in column_neighbours])
        seen = self._see(features)
        colours: Tensor | None = None
        for (row, row_offset), (column, column_offset), weight in zip(
            [each for each in row_neighbours for _ in column_neighbours],
            column_neighbours * len(row_neighbours),
            weights,
            strict=True,
        ):
            part = self._predict(seen[:, row, column], row_offset, column_offset) * weight[..., None].to(seen.dtype)
            colours = part if colours is None else colours + part
        return colours.permute(0, 3, 1, 2)

    def _see(self, features: Tensor) -> Tensor:
        """What the first layer makes of the square around every feature, (B, H, W, hidden_size).

        A linear layer on unfolded features is a convolution, and one for all neighbours: they share it.
        """
        size, inputs = self.unfold_size, self.channels * self.unfold_size**2
        kernel = self.first.weight[:, :inputs].reshape(-1, self.channels, size, size)
        return F.conv2d(features, kernel, self.first.bias, padding=size // 2).permute(0, 2, 3, 1)

    def _predict(self, seen: Tensor, row_offset: Tensor, column_offset: Tensor) -> Tensor:
        """The rest of the network, (B, R, S, hidden_size) to (B, R, S, C)."""
        row, column, height, width = self.first.weight[:, -4:].unbind(1)
        # A pixel is 2 high and wide, whatever the image: the coordinates of an image go from -1 to 1 times its size.
        row_offset, column_offset = (offset[..., None].to(seen.dtype) for offset in (row_offset, column_offset))
        hidden = F.relu(seen + (row_offset * row + column_offset * column + 2 * (height + width)))
        for layer in self.hidden:
            hidden = F.relu(layer(hidden))
        return self.last(hidden)


class DiscoModel(PreTrainedModel):
    """The purifier: [0, 1] pixels (B, C, H, W) of any size to the same, differentiable.

    Example:
        >>> DiscoModel(DiscoConfig()).eval().purify(torch.rand(1, 3, 24, 40)).shape
        torch.Size([1, 3, 24, 40])
    """

    config: DiscoConfig
    config_class = DiscoConfig
    base_model_prefix = "disco"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: DiscoConfig):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.implicit = LocalImplicitFunction(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation, which the published network has."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.bias, -bound, bound)

    def forward(
        self,
        pixel_values: Tensor,
        clean_pixel_values: Tensor | None = None,
        mask_ratio: float | None = None,
        noise: Tensor | None = None,
    ) -> DiscoOutput:
        """Predict the clean image.

        Args:
            pixel_values: (B, C, H, W) in [0, 1].
            clean_pixel_values: the clean images, for the loss.
            mask_ratio, noise: what the purification task gives to every purifier; there is nothing to mask here.

        Raises:
            ValueError: another number of channels or dimensions.
        """
        channels = self.config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(f"pixel_values must be (B, {channels}, H, W), got {tuple(pixel_values.shape)}")
        pixels = (2 * pixel_values - 1).to(self.dtype).contiguous(memory_format=torch.channels_last)
        predicted = (self.implicit(self.encoder(pixels)).to(pixel_values.dtype) + 1) / 2
        purified = predicted.clamp(0, 1)
        if clean_pixel_values is None:
            return DiscoOutput(purified_pixel_values=purified)
        loss = (predicted - clean_pixel_values).abs().mean()
        return DiscoOutput(loss, loss.detach() * 0, loss, purified)

    def purify(self, pixel_values: Tensor) -> Tensor:
        """The purified images, as `MAEPModel.purify` returns them; a large batch in parts, which is faster on a CPU."""
        pixels = PIXELS_AT_ONCE.get(pixel_values.device.type, PIXELS_AT_ONCE_ELSEWHERE)
        at_once = max(1, pixels // (pixel_values.shape[-2] * pixel_values.shape[-1]))
        parts = [self(part).purified_pixel_values for part in pixel_values.split(at_once)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def load(path: str | os.PathLike) -> DiscoModel:
    """A trained DISCO from its folder, in eval mode, its parameters without gradients."""
    return DiscoModel.from_pretrained(path).eval().requires_grad_(False)


def untrained(local_ensemble: str = "true") -> DiscoModel:
    """The published network with random weights, for measuring its speed.

    Args:
        local_ensemble: `true`, or `false` for the form that saves the predictions of weight zero.

    Raises:
        ValueError: neither.
    """
    if local_ensemble not in ("true", "false"):
        raise ValueError(f"local_ensemble={local_ensemble!r}: must be true or false")
    return DiscoModel(DiscoConfig(local_ensemble=local_ensemble == "true")).eval().requires_grad_(False)
