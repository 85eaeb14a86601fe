"""The CIFAR ResNet of He et al. 2016 ("Deep Residual Learning", section 4.2) as a transformers model.

Three stages of `n` basic blocks (two 3x3 convolutions with batch normalisation each), with shortcuts of option A:
no parameters, a stride-2 subsample and zero channels where the shape changes. This file and its configuration are all
that a saved folder needs (`trust_remote_code=True`): they import torch, transformers and each other only.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from .configuration_cifar_resnet import CifarResNetConfig

MIN_IMAGE_SIZE = 8


class CifarResNetBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus the shortcut, then ReLU: (B, in, H, W) -> (B, out, ceil(H/stride), ceil(W/stride))."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        missing = out_channels - in_channels
        # New channels are zeros, half before and half after the old ones, as the published weights were trained.
        self.channel_padding = (missing // 2, missing - missing // 2)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        shortcut = hidden_states
        if self.stride > 1:
            shortcut = shortcut[:, :, :: self.stride, :: self.stride]
        if any(self.channel_padding):
            shortcut = F.pad(shortcut, (0, 0, 0, 0, *self.channel_padding))
        hidden_states = F.relu(self.bn1(self.conv1(hidden_states)))
        hidden_states = self.bn2(self.conv2(hidden_states))
        return F.relu(hidden_states + shortcut)


class CifarResNetPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving."""

    config_class = CifarResNetConfig
    base_model_prefix = "cifar_resnet"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["CifarResNetBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # He initialisation; every batch-norm buffer too, since from_pretrained leaves what a file lacks to us.
        if isinstance(module, nn.Conv2d | nn.Linear):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)


class CifarResNetForImageClassification(CifarResNetPreTrainedModel):
    """CIFAR ResNet with a linear classifier on the globally averaged features.

    Takes *normalised* pixels, as every transformers classifier does; `maep_hf.classifier.PixelClassifier` puts the
    normalisation in front for [0, 1] pixels. Global pooling lets it take any height and width of 8 and more.
    """

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        widths = [config.width, 2 * config.width, 4 * config.width]
        self.conv1 = nn.Conv2d(config.num_channels, config.width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(config.width)
        self.stages = nn.ModuleList()
        in_channels = config.width
        for stage, width in enumerate(widths):
            blocks = []
            for index in range(config.blocks_per_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(CifarResNetBlock(in_channels, width, stride))
                in_channels = width
            self.stages.append(nn.Sequential(*blocks))
        self.classifier = nn.Linear(in_channels, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutputWithNoAttention | tuple[torch.Tensor, ...]:
        """Classify a batch of images.

        Args:
            pixel_values: (B, num_channels, H, W), normalised, H and W at least 8; cast to the weights' dtype.
            labels: class indices (B,), or class probabilities (B, num_labels); adds the cross-entropy loss.
            output_hidden_states: also return the features after the first convolution and after each stage.
            return_dict: False returns a plain tuple of what is not None.

        Returns:
            `loss` (scalar, with `labels`), `logits` (B, num_labels), `hidden_states` (4 tensors) on request.

        Raises:
            ValueError: the images or labels do not have the shape above.
        """
        config = self.config
        return_dict = config.return_dict if return_dict is None else return_dict
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
            raise ValueError(
                f"`pixel_values` must have the shape (batch, {config.num_channels}, height, width) for this model "
                f"(config.num_channels={config.num_channels}), got {tuple(pixel_values.shape)}."
            )
        if min(pixel_values.shape[-2:]) < MIN_IMAGE_SIZE:
            raise ValueError(
                f"`pixel_values` must be at least {MIN_IMAGE_SIZE} pixels high and wide, "
                f"got {tuple(pixel_values.shape[-2:])}; resize the images first."
            )

        hidden_states = F.relu(self.bn1(self.conv1(pixel_values.to(self.conv1.weight.dtype))))
        all_hidden_states = [hidden_states]
        for stage in self.stages:
            hidden_states = stage(hidden_states)
            all_hidden_states.append(hidden_states)
        logits = self.classifier(hidden_states.mean(dim=(2, 3)))

        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:1] and labels.shape != logits.shape:
                raise ValueError(
                    f"`labels` must be class indices of the shape {tuple(logits.shape[:1])} or probabilities of the "
                    f"shape {tuple(logits.shape)}, got {tuple(labels.shape)}."
                )
            loss = F.cross_entropy(logits.float(), labels)

        output = ImageClassifierOutputWithNoAttention(
            loss=loss, logits=logits, hidden_states=tuple(all_hidden_states) if output_hidden_states else None
        )
        return output if return_dict else output.to_tuple()


CifarResNetConfig.register_for_auto_class()
CifarResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")

# A copy of this file loaded as remote code must not take the installed package's place in the registry.
if not __name__.startswith("transformers_modules"):
    AutoConfig.register("cifar_resnet", CifarResNetConfig, exist_ok=True)
    AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification, exist_ok=True)

__all__ = ["CifarResNetForImageClassification", "CifarResNetPreTrainedModel"]
