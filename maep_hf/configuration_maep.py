"""Configuration of the masked autoencoder purifier (MAEP)."""

import math
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PIXEL_LOSSES = ("l1", "l2", "charbonnier")
PURIFY_MODES = ("windows", "interpolate")


class MAEPConfig(PreTrainedConfig):
    r"""
    Everything that defines a [`MAEPModel`]. Field names follow `ViTMAEConfig`; every field is checked, here and again
    when a model is built from it.

    Args:
        image_size (`int`): Height and width in pixels of the square window the model is trained on.
        patch_size (`int`): Height and width of a patch in pixels; must divide `image_size`.
        num_channels (`int`): Channels of the images.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`): The encoder. `hidden_size` must
            be divisible by 4 (2-D sin-cos positions) and by the number of heads.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size (`int`):
            The decoder, under the same rules.
        hidden_act (`str`): Activation of the MLPs and of the local branch, a key of transformers' `ACT2FN`.
        hidden_dropout_prob, attention_probs_dropout_prob (`float` in [0, 1)): Dropout in training.
        qkv_bias (`bool`): Whether queries, keys and values have a bias.
        layer_norm_eps (`float`): Epsilon of the layer norms.
        initializer_range (`float`): Standard deviation of the mask token, and of the last layer if not `residual`.
        mask_ratio (`float` in [0, 1)): Share of the patches hidden from the encoder in training mode.
        residual (`bool`): Predict a correction that is added to the visible pixels (an untrained model is then the
            identity). `False`: the network predicts all pixels itself.
        local_branch_layers (`int`): Residual convolution blocks at full resolution beside the transformer; 0 for the
            plain masked autoencoder.
        local_branch_channels (`int`): Their width.
        reconstruction_loss_weight, purification_loss_weight (`float` >= 0): Weights of the error on masked patches
            (always squared) and on visible patches (`pixel_loss`).
        pixel_loss (`"l1"`, `"l2"` or `"charbonnier"`): Pixel norm of the purification loss.
        image_mean, image_std (`list[float]`, one a channel): Normalisation inside the model, in [0, 1] units. Default:
            ImageNet's for 3 channels, 0.5 and 0.25 otherwise.
        window_overlap (`float` in [0, 0.9]): Least overlap of neighbouring windows in `purify`, as a fraction of the
            window (0.25 of a 32-pixel window: at least 8 pixels).
        window_batch_size (`int` or `None`): Most windows `purify` runs at once. `None`: as many as make 2**16
            pixels on a CPU (64 windows of 32 x 32), 2**18 elsewhere, which bounds memory whatever the window.
        purify_mode (`"windows"` or `"interpolate"`): How `purify` treats images of another size than `image_size`.
        purify_strength (`float` >= 0): Factor on the corrections of `purify`: 1 as they were trained, 0 leaves images
            as they are.
        norm_pix_loss (`bool`): Only `False`: a model of normalised patches cannot return real pixels.

    Raises:
        ValueError: a field is out of its range; the message names it.

    Example:
        >>> MAEPConfig.tiny(mask_ratio=0.25).num_patches
        64
    """

    model_type = "maep"

    image_size: int = 32
    patch_size: int = 4
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    mask_ratio: float | int = 0.5
    residual: bool = True
    local_branch_layers: int = 4
    local_branch_channels: int = 32
    reconstruction_loss_weight: float | int = 1.0
    purification_loss_weight: float | int = 1.0
    pixel_loss: str = "l1"
    image_mean: list[float] | tuple[float, ...] | None = None
    image_std: list[float] | tuple[float, ...] | None = None
    window_overlap: float | int = 0.25
    window_batch_size: int | None = None
    purify_mode: str = "windows"
    purify_strength: float | int = 1.0
    norm_pix_loss: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        _check_integer("num_channels", self.num_channels, 1)
        rgb = self.num_channels == 3
        if self.image_mean is None:
            self.image_mean = list(IMAGENET_MEAN) if rgb else [0.5] * self.num_channels
        if self.image_std is None:
            self.image_std = list(IMAGENET_STD) if rgb else [0.25] * self.num_channels
        super().__post_init__(**kwargs)
        self.check()
        self.image_mean, self.image_std = [float(v) for v in self.image_mean], [float(v) for v in self.image_std]

    def check(self) -> None:
        """Raise a `ValueError` that names the first field with a value that no model can be built from."""
        for name in ("image_size", "patch_size", "num_channels", "local_branch_channels"):
            _check_integer(name, getattr(self, name), 1)
        _check_integer("local_branch_layers", self.local_branch_layers, 0)
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} must divide image_size={self.image_size}.")
        for prefix in ("", "decoder_"):
            for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
                _check_integer(prefix + name, getattr(self, prefix + name), 1)
            width, heads = getattr(self, prefix + "hidden_size"), getattr(self, prefix + "num_attention_heads")
            if width % 4:
                raise ValueError(f"{prefix}hidden_size={width} must be divisible by 4 for 2-D sin-cos positions.")
            if width % heads:
                raise ValueError(f"{prefix}num_attention_heads={heads} must divide {prefix}hidden_size={width}.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "mask_ratio"):
            value = _check_number(name, getattr(self, name))
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value} must be at least 0 and less than 1.")
        for name in ("reconstruction_loss_weight", "purification_loss_weight", "purify_strength"):
            if _check_number(name, getattr(self, name)) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        for name in ("layer_norm_eps", "initializer_range"):
            if _check_number(name, getattr(self, name)) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        for name in ("qkv_bias", "residual", "norm_pix_loss"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        choices = {"pixel_loss": PIXEL_LOSSES, "purify_mode": PURIFY_MODES, "hidden_act": ACT2FN}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}.")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or len(values) != self.num_channels:
                raise ValueError(f"{name} must be a list of num_channels={self.num_channels} numbers, got {values!r}.")
            for value in values:
                _check_number(name, value)
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std={self.image_std} must be positive.")
        if not 0 <= _check_number("window_overlap", self.window_overlap) <= 0.9:
            raise ValueError(f"window_overlap={self.window_overlap} must be a fraction between 0 and 0.9.")
        if self.window_batch_size is not None:
            _check_integer("window_batch_size", self.window_batch_size, 1)
        if self.norm_pix_loss:
            raise ValueError(
                "norm_pix_loss=True is refused: a masked autoencoder trained on normalised patches does not know their "
                "mean and contrast, so it cannot return real pixels. Train with norm_pix_loss=False."
            )

    @property
    def num_patches(self) -> int:
        """Patches in one window of the native size."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def tiny(cls, **overrides: Any) -> "MAEPConfig":
        """About a million weights, for CIFAR-size windows; two processor cores train it in two hours."""
        sizes = {"patch_size": 4, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 512, "decoder_hidden_size": 96, "decoder_num_hidden_layers": 1}
        sizes |= {"decoder_num_attention_heads": 4, "decoder_intermediate_size": 384}
        return cls._preset(sizes | {"local_branch_layers": 4, "local_branch_channels": 32}, overrides)

    @classmethod
    def small(cls, **overrides: Any) -> "MAEPConfig":
        """ViT-small widths and 8 layers, for one accelerator."""
        sizes = {"patch_size": 4, "hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6}
        sizes |= {"intermediate_size": 1536, "decoder_hidden_size": 192, "decoder_num_hidden_layers": 4}
        sizes |= {"decoder_num_attention_heads": 6, "decoder_intermediate_size": 768}
        return cls._preset(sizes | {"local_branch_layers": 8, "local_branch_channels": 64}, overrides)

    @classmethod
    def base(cls, **overrides: Any) -> "MAEPConfig":
        """ViT-base encoder with the usual masked autoencoder's decoder."""
        sizes = {"patch_size": 4, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
        sizes |= {"intermediate_size": 3072, "decoder_hidden_size": 512, "decoder_num_hidden_layers": 8}
        sizes |= {"decoder_num_attention_heads": 16, "decoder_intermediate_size": 2048}
        return cls._preset(sizes | {"local_branch_layers": 8, "local_branch_channels": 96}, overrides)

    @classmethod
    def _preset(cls, sizes: dict[str, Any], overrides: dict[str, Any]) -> "MAEPConfig":
        unknown = sorted(set(overrides) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no such field of {cls.__name__}.")
        return cls(**(sizes | overrides))


def _check_integer(name: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}={value!r} must be an integer of at least {minimum}.")
    return value


def _check_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number.")
    return value


# With this, every save_pretrained writes this file and its auto_map entry beside the weights.
MAEPConfig.register_for_auto_class()

__all__ = ["MAEPConfig"]
