"""The masked autoencoder purifier: [0, 1] pixels in, purified [0, 1] pixels out, in one forward pass.

The method is that of *Adversarial Masked Autoencoder Purifier with Defense Transferability* (Chen & Lu, arXiv
2501.16904): a masked autoencoder trained on pairs of attacked and clean images with a joint loss. The residual output
and the local branch are additions of this project; `MAEPConfig` switches them off.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_maep import PURIFY_MODES, MAEPConfig

CHARBONNIER_EPS = 1e-3
# Pixels that purify runs at once by default: on a CPU larger batches fall out of the cache and are slower.
PIXELS_AT_ONCE = {"cpu": 2**16}
PIXELS_AT_ONCE_ELSEWHERE = 2**18


@dataclass
class MAEPOutput(ModelOutput):
    """
    What [`MAEPModel`] returns.

    Args:
        loss (`torch.Tensor` of shape `()`): Weighted sum of the two losses; only with `clean_pixel_values`.
        reconstruction_loss (`torch.Tensor` of shape `()`): Mean squared error over the masked pixels, in squared
            [0, 1] pixel units (an error of 8/255 everywhere: 1e-3); 0 if nothing is masked.
        purification_loss (`torch.Tensor` of shape `()`): Mean of `config.pixel_loss` over the visible pixels, in
            [0, 1] pixel units (squared units for `"l2"`).
        purified_pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): Values in [0, 1], of the
            input's dtype.
        mask (`torch.Tensor` of shape `(batch, num_patches)`): 1 where a patch was hidden, 0 where it was visible.
        ids_restore (`torch.LongTensor` of shape `(batch, num_patches)`): Place of every patch in the order "visible,
            then masked".
        hidden_states (`tuple` of `num_hidden_layers + 1` tensors `(batch, visible patches, hidden_size)`): The
            encoder's input and the output of each of its layers; only on request.
        attentions (`tuple` of `num_hidden_layers` tensors `(batch, heads, visible, visible)`): The encoder's attention
            weights; only on request, with eager attention.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    purification_loss: torch.Tensor | None = None
    purified_pixel_values: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    ids_restore: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def sincos_positions(
    rows: int, columns: int, width: int, native: int | None = None, device: torch.device | None = None
) -> torch.Tensor:
    """Fixed 2-D sin-cos positions of a grid of patches: half of the features for the row, half for the column.

    With `native`, the grid is laid over one of `native` x `native` patches: coordinates are interpolated in both
    directions (and the functions evaluated there), so that a larger image stays within the positions seen in training.

    Returns:
        float32 tensor of shape `(1, rows * columns, width)`, row by row.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float32, device=device) / (width // 4))
    features = []
    for count in (rows, columns):
        coordinates = torch.arange(count, dtype=torch.float32, device=device)
        if native is not None:
            coordinates = (coordinates + 0.5) * (native / count) - 0.5
        angles = coordinates[:, None] * frequencies
        features.append(torch.cat([angles.sin(), angles.cos()], dim=1))
    row = features[0][:, None].expand(rows, columns, -1)
    column = features[1][None].expand(rows, columns, -1)
    return torch.cat([row, column], dim=2).reshape(1, rows * columns, width)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, `(batch, heads, tokens, head width)` in, `(batch, tokens, heads, head width)` out."""
    weights = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.dropout(weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype), dropout, training=dropout > 0)
    return torch.matmul(weights, value).transpose(1, 2), weights


class MAEPAttention(nn.Module):
    """Multi-head self-attention of one width, through transformers' attention interface."""

    def __init__(self, config: MAEPConfig, hidden_size: int, num_attention_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, use_dropout: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, tokens, width = hidden_states.shape
        heads = (batch, tokens, width // self.head_dim, self.head_dim)
        implementation = self.config._attn_implementation if batch else "eager"  # others cannot reshape no images
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self,
            self.q_proj(hidden_states).view(heads).transpose(1, 2),
            self.k_proj(hidden_states).view(heads).transpose(1, 2),
            self.v_proj(hidden_states).view(heads).transpose(1, 2),
            None,
            scaling=self.scaling,
            dropout=self.config.attention_probs_dropout_prob if use_dropout else 0.0,
        )
        return self.o_proj(output.reshape(batch, tokens, width)), weights


class MAEPMLP(nn.Module):
    """The two-layer perceptron of a block."""

    def __init__(self, config: MAEPConfig, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class MAEPLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block; returns its output and the attention weights (`None` unless eager)."""

    def __init__(self, config: MAEPConfig, hidden_size: int, num_attention_heads: int, intermediate_size: int):
        super().__init__()
        self.dropout = config.hidden_dropout_prob
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = MAEPAttention(config, hidden_size, num_attention_heads)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = MAEPMLP(config, hidden_size, intermediate_size)

    def forward(self, hidden_states: torch.Tensor, use_dropout: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        update, weights = self.attention(self.layernorm_before(hidden_states), use_dropout)
        hidden_states = hidden_states + F.dropout(update, self.dropout, training=use_dropout)
        update = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + F.dropout(update, self.dropout, training=use_dropout), weights


def _positions(own: torch.Tensor, grid: tuple[int, int] | None, dtype: torch.dtype) -> torch.Tensor:
    """`(1, num_patches, width)`: a part's `own` positions, or those of another `grid` laid over that square one."""
    if grid is not None:
        own = sincos_positions(*grid, own.shape[2], math.isqrt(own.shape[1]), own.device)
    return own.to(dtype)


class MAEPEncoder(nn.Module):
    """Linear patch embedding, positions and transformer blocks over the visible patches."""

    def __init__(self, config: MAEPConfig):
        super().__init__()
        grid, width = config.image_size // config.patch_size, config.hidden_size
        # A linear layer on flat patches is the usual strided convolution, and need not embed what is hidden.
        self.projection = nn.Linear(config.num_channels * config.patch_size**2, width)
        self.register_buffer("position_embeddings", sincos_positions(grid, grid, width))
        self.layers = nn.ModuleList(
            MAEPLayer(config, width, config.num_attention_heads, config.intermediate_size)
            for _ in range(config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(
        self, patches: torch.Tensor, grid: tuple[int, int] | None, ids_keep: torch.Tensor | None, use_dropout: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """`(batch, num_patches, channels * patch_size**2)` to `(batch, visible patches, hidden_size)`; `grid` where it
        is not the native one."""
        # Read here, not by the model: where they are kept elsewhere, only this part's own hook brings them.
        positions = _positions(self.position_embeddings, grid, patches.dtype)
        if ids_keep is not None:
            patches = patches.gather(1, ids_keep[:, :, None].expand(-1, -1, patches.shape[2]))
            positions = positions[0][ids_keep]
        hidden_states = self.projection(patches) + positions
        states, attentions = [hidden_states], []
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, use_dropout)
            states.append(hidden_states)
            attentions.append(weights)
        return self.layernorm(hidden_states), states, attentions


class MAEPDecoder(nn.Module):
    """Puts mask tokens where patches were hidden, adds positions and predicts `out_channels` for every pixel."""

    def __init__(self, config: MAEPConfig, out_channels: int):
        super().__init__()
        grid, width = config.image_size // config.patch_size, config.decoder_hidden_size
        self.embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("position_embeddings", sincos_positions(grid, grid, width))
        self.layers = nn.ModuleList(
            MAEPLayer(config, width, config.decoder_num_attention_heads, config.decoder_intermediate_size)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, config.patch_size**2 * out_channels)

    def forward(
        self, visible: torch.Tensor, grid: tuple[int, int] | None, ids_keep: torch.Tensor | None, use_dropout: bool
    ) -> torch.Tensor:
        """`(batch, visible patches, hidden_size)` to `(batch, num_patches, patch_size**2 * out_channels)`."""
        positions = _positions(self.position_embeddings, grid, self.mask_token.dtype)
        hidden_states = self.embed(visible)
        mask_token = self.mask_token.to(hidden_states.dtype)
        if ids_keep is None:
            # Adds nothing; it keeps the mask token in the graph, so that distributed training at mask ratio 0 need not
            # search for parameters without a gradient.
            positions = positions + 0.0 * mask_token
        else:
            batch, width = hidden_states.shape[0], hidden_states.shape[2]
            tokens = mask_token.expand(batch, positions.shape[1], width)
            hidden_states = tokens.scatter(1, ids_keep[:, :, None].expand(-1, -1, width), hidden_states)
        hidden_states = hidden_states + positions
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states, use_dropout)
        return self.head(self.layernorm(hidden_states))


class MAEPConvBlock(GradientCheckpointingLayer):
    """Two 3 x 3 convolutions with a skip connection."""

    def __init__(self, config: MAEPConfig):
        super().__init__()
        channels = config.local_branch_channels
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.conv2(self.activation_fn(self.conv1(features)))


class MAEPLocalBranch(nn.Module):
    """Full-resolution convolutions that see the input beside the decoder's output."""

    def __init__(self, config: MAEPConfig):
        super().__init__()
        self.stem = nn.Conv2d(config.num_channels, config.local_branch_channels, 3, padding=1)
        self.layers = nn.ModuleList(MAEPConvBlock(config) for _ in range(config.local_branch_layers))
        self.head = nn.Conv2d(config.local_branch_channels, config.num_channels, 3, padding=1)

    def forward(self, normalised: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """`(batch, num_channels, H, W)` and `(batch, local_branch_channels, H, W)` to `(batch, num_channels, H, W)`."""
        # The context comes with its channels last in memory; convolutions of that layout are a fifth faster on CPUs.
        features = self.stem(normalised.contiguous(memory_format=torch.channels_last)) + context
        for layer in self.layers:
            features = layer(features)
        return self.head(features)


class MAEPPreTrainedModel(PreTrainedModel):
    """Loading, saving and weight initialisation."""

    config: MAEPConfig
    config_class = MAEPConfig
    base_model_prefix = "maep"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["MAEPEncoder", "MAEPDecoder", "MAEPLocalBranch"]
    # The one that was asked for, where it came from a repository; adapters record it. transformers does not keep it.
    loaded_revision: str | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            # The gain of this bound keeps a stack of residual blocks near its input at the start.
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (MAEPEncoder, MAEPDecoder)):
            grid, width = self.config.image_size // self.config.patch_size, module.position_embeddings.shape[2]
            init.copy_(module.position_embeddings, sincos_positions(grid, grid, width))
            if isinstance(module, MAEPDecoder):
                init.normal_(module.mask_token, std=self.config.initializer_range)
        elif isinstance(module, MAEPModel):
            # Runs after the parts have been initialised, so this is the last word on the output layers.
            init.copy_(module.image_mean, torch.tensor(self.config.image_mean).view(1, -1, 1, 1))
            init.copy_(module.image_std, torch.tensor(self.config.image_std).view(1, -1, 1, 1))
            last = module.decoder.head
            if module.local_branch is not None:
                init.zeros_(last.weight)
                last = module.local_branch.head
            if self.config.residual:
                init.zeros_(last.weight)
            else:
                init.normal_(last.weight, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As `PreTrainedModel.from_pretrained`, but a checkpoint that is not a whole purifier is refused.

        `ignore_mismatched_sizes=True` still accepts weights of other shapes, on the caller's own decision.

        Raises:
            ValueError: weights are missing, left over or of another shape, or the configuration is not a purifier's
                (among others: `norm_pix_loss`).
        """
        ignore_mismatched = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        problems = {"missing": sorted(info["missing_keys"]), "not part of a purifier": sorted(info["unexpected_keys"])}
        if not ignore_mismatched:
            problems["of another shape"] = [
                f"{key} {tuple(found)}, expected {tuple(expected)}"
                for key, found, expected in sorted(info["mismatched_keys"], key=lambda item: item[0])
            ]
        found = [
            f"{len(keys)} weights {what} ({'; '.join(keys[:3])}{'; ...' if len(keys) > 3 else ''})"
            for what, keys in problems.items()
            if keys
        ]
        if found:
            raise ValueError(
                f"{pretrained_model_name_or_path} is not a checkpoint of this purifier: {', '.join(found)}. A masked "
                "autoencoder without its decoder, or with another configuration, cannot purify; load a folder or "
                "repository that MAEPModel.save_pretrained wrote."
            )
        model.loaded_revision = kwargs.get("revision")
        return (model, info) if output_loading_info else model

    def load_adapter(
        self, peft_model_id: str | None = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As `PreTrainedModel.load_adapter`, but the adapter is active with its prediction head, also as a second one:
        transformers alone would run it with the base's head until `set_adapter`."""
        info = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        trainable = [parameter.requires_grad for parameter in self.parameters()]
        self.set_adapter("default" if adapter_name is None else adapter_name)
        for parameter, before in zip(self.parameters(), trainable, strict=True):
            parameter.requires_grad_(before)  # of an adapter for inference set_adapter asks for gradients
        return info


class MAEPModel(MAEPPreTrainedModel):
    """The purifier. `forward` is one pass over windows of the native size, with masking and losses; `purify` takes
    images of any size.

    Pixels are in [0, 1] on both sides; normalisation is inside, so an attack's eps keeps its meaning. An untrained
    model with `config.residual` is the identity. Computations run in the dtype of the weights; the result has the
    dtype of the pixels, to which the correction is added at full precision.

    Example:
        >>> model = MAEPModel(MAEPConfig.tiny()).eval()
        >>> model.purify(torch.rand(1, 3, 48, 100)).shape
        torch.Size([1, 3, 48, 100])
    """

    def __init__(self, config: MAEPConfig):
        super().__init__(config)
        config.check()
        self.encoder = MAEPEncoder(config)
        local = config.local_branch_layers > 0
        self.decoder = MAEPDecoder(config, config.local_branch_channels if local else config.num_channels)
        self.local_branch = MAEPLocalBranch(config) if local else None
        # Not in the checkpoint: the configuration is their only source; _init_weights fills them after loading.
        self.register_buffer("image_mean", torch.tensor(config.image_mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(config.image_std).view(1, -1, 1, 1), persistent=False)
        self.post_init()

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, but `config.json` names a pipeline of its own only where its code lies
        in `save_directory`: what was loaded from the Hub has the name and not the code."""
        said = vars(self.config).get("custom_pipelines")
        if said is None:
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        kept = {}
        for task, entry in said.items():
            if os.path.isfile(os.path.join(save_directory, f"{str(entry.get('impl')).split('.')[0]}.py")):
                kept[task] = entry
        del vars(self.config)["custom_pipelines"]
        try:
            if kept:
                self.config.custom_pipelines = kept
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.custom_pipelines = said

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.encoder.projection

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the patch embedding."""
        self.encoder.projection = value

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        clean_pixel_values: torch.Tensor | None = None,
        mask_ratio: float | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        deterministic: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> MAEPOutput:
        """Purify a batch of windows in one pass.

        Args:
            pixel_values: `(batch, num_channels, image_size, image_size)`, floating, in [0, 1] (not checked here).
            clean_pixel_values: The clean images, of the same shape; with them the losses are returned.
            mask_ratio: Share of the patches to hide, in [0, 1). Default: `config.mask_ratio` in training mode, else 0.
                At 0 nothing is drawn and nothing hidden.
            noise: `(batch, num_patches)` scores; the patches with the lowest stay visible. The same noise gives the
                same mask. Not read at mask ratio 0.
            generator: Draws the noise when none is given, on the generator's own device.
            bool_masked_pos: `(batch, num_patches)`, true where hidden, as many in every row; in place of `mask_ratio`
                and `noise`. Its count is read on the host: under `torch.compile` prefer `noise`.
            interpolate_pos_encoding: Accept any height and width that are multiples of `patch_size`, with positions
                interpolated in 2-D. The cost grows with the square of the pixels.
            deterministic: Switch dropout off. Default: `not self.training`.
            output_hidden_states, output_attentions: Also return those of the encoder.
            return_dict: `False` returns a tuple of what is not `None` (taken by the decorator).

        Returns:
            [`MAEPOutput`]

        Raises:
            TypeError: `pixel_values` is not a tensor.
            ValueError: a tensor of the wrong shape or dtype, a mask ratio out of range, unequal rows of
                `bool_masked_pos`, or attention weights asked of an attention that does not form them.
        """
        config, patch = self.config, self.config.patch_size
        self._check_pixels(pixel_values, any_size="patches" if interpolate_pos_encoding else False)
        batch, _, height, width = pixel_values.shape
        rows, columns = height // patch, width // patch
        use_dropout = self.training if deterministic is None else not deterministic
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions needs eager attention, this model runs {config._attn_implementation!r}: load it "
                "with attn_implementation='eager' or call set_attn_implementation('eager')."
            )
        if mask_ratio is None:
            mask_ratio = config.mask_ratio if self.training else 0.0
        mask, ids_keep, ids_restore, masked = self._mask(
            batch, rows * columns, mask_ratio, noise, generator, bool_masked_pos, pixel_values.device
        )

        dtype = torch.promote_types(pixel_values.dtype, torch.float32)
        pixels, mean, std = pixel_values.to(dtype), self.image_mean.to(dtype), self.image_std.to(dtype)
        normalised = ((pixels - mean) / std).to(self.decoder.mask_token.dtype)
        patches = normalised.view(batch, config.num_channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
        other = interpolate_pos_encoding and (height, width) != (config.image_size, config.image_size)
        grid = (rows, columns) if other else None
        visible, states, attentions = self.encoder(patches.flatten(3).flatten(1, 2), grid, ids_keep, use_dropout)
        decoded = self.decoder(visible, grid, ids_keep, use_dropout)

        pixel_mask = None
        if masked:
            pixel_mask = mask.view(batch, 1, rows, 1, columns, 1).expand(-1, -1, -1, patch, -1, patch)
            pixel_mask = pixel_mask.reshape(batch, 1, height, width)
            normalised = normalised * (1 - pixel_mask).to(normalised.dtype)
        residual = self._unpatchify(decoded, rows, columns)
        if self.local_branch is not None:
            residual = self.local_branch(normalised, residual)
        if not config.residual:
            base = mean
        elif pixel_mask is None:
            base = pixels
        else:
            base = torch.where(pixel_mask.bool(), mean, pixels)
        prediction = base + std * residual.to(pixels.device, dtype)

        output = MAEPOutput(
            purified_pixel_values=prediction.clamp(0, 1).to(pixel_values.dtype).contiguous(),
            mask=mask,
            ids_restore=ids_restore,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        if clean_pixel_values is not None:
            if clean_pixel_values.shape != pixel_values.shape:
                raise ValueError(
                    f"clean_pixel_values has shape {tuple(clean_pixel_values.shape)}, it must be that of pixel_values, "
                    f"{tuple(pixel_values.shape)}."
                )
            # From the prediction before the clamp: outside [0, 1] the clamp would stop the gradient.
            rec, pur = self._losses(prediction, clean_pixel_values, pixel_mask, masked / (rows * columns))
            output.reconstruction_loss, output.purification_loss = rec, pur
            output.loss = config.reconstruction_loss_weight * rec + config.purification_loss_weight * pur
        return output

    def purify(
        self,
        pixel_values: torch.Tensor,
        mode: str | None = None,
        overlap: float | None = None,
        window_batch_size: int | None = None,
        mask_ratio: float = 0.0,
        generator: torch.Generator | None = None,
        strength: float | None = None,
    ) -> torch.Tensor:
        """Purify images of any height and width, in training mode as in evaluation mode: nothing is masked unless
        asked, and dropout is off. Differentiable; gradients are recorded unless the caller switches them off.

        Images of exactly the native size are one forward pass (or several, of `window_batch_size` images). Otherwise,
        in mode `"windows"`, overlapping windows of the native size cover the image (one smaller than a window is
        extended by reflection and cropped again); their corrections are blended by a raised cosine. Cost is linear in
        pixels, and without gradients the memory is that of one batch of windows, one band of the image, and two more
        copies of the image. Under `torch.export` all windows are one batch, so that its size may be dynamic.

        Args:
            pixel_values: `(batch, num_channels, height, width)`, floating, in [0, 1]; the batch may be empty.
            mode: `"windows"` or `"interpolate"` (the whole image as one grid of patches with positions interpolated
                in 2-D; cost quadratic in pixels). Default: `config.purify_mode`.
            overlap: Least overlap of neighbouring windows, a fraction of the window in [0, 0.9]. Default:
                `config.window_overlap`.
            window_batch_size: Most windows (or images of the native size) to run at once. Default: that of the
                configuration.
            mask_ratio: Share of each window's patches to hide.
            generator: Draws that mask.
            strength: Factor on the correction, finite and not negative; pixels are cut off at 0 and 1 after it. More
                than 1 where the purifier corrects too little, on images unlike those of its training. Default:
                `config.purify_strength`.

        Returns:
            Tensor of the shape and dtype of `pixel_values`, in [0, 1].

        Raises:
            TypeError: `pixel_values` is not a tensor.
            ValueError: wrong shape, dtype or range of `pixel_values`, unknown mode, overlap, batch size or strength out
                of range.
        """
        self._check_pixels(pixel_values, any_size=True)
        mode = self.config.purify_mode if mode is None else mode
        if mode not in PURIFY_MODES:
            raise ValueError(f"mode={mode!r} must be one of {', '.join(PURIFY_MODES)}.")
        overlap = self.config.window_overlap if overlap is None else overlap
        if not 0 <= overlap <= 0.9:
            raise ValueError(f"overlap={overlap} must be a fraction between 0 and 0.9.")
        size = self.config.image_size
        limit = self.config.window_batch_size if window_batch_size is None else window_batch_size
        if limit is None:
            limit = max(1, PIXELS_AT_ONCE.get(pixel_values.device.type, PIXELS_AT_ONCE_ELSEWHERE) // size**2)
        if limit < 1:
            raise ValueError(f"window_batch_size={window_batch_size} must be at least 1.")
        strength = self.config.purify_strength if strength is None else strength
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength={strength} must be a finite number, not negative.")
        if not _is_exporting() and not len(pixel_values):
            return pixel_values.clone()
        if not torch.compiler.is_compiling():
            low, high = pixel_values.detach().aminmax()
            if not (low >= -0.01 and high <= 1.01):  # also false for NaN
                raise ValueError(
                    f"pixel_values must be in [0, 1], got values from {low.item():.4g} to {high.item():.4g}: divide "
                    "8-bit images by 255 and leave out mean and standard deviation, the model applies them itself."
                )

        def run(windows: torch.Tensor, interpolate: bool = False) -> torch.Tensor:
            output = self(
                windows,
                mask_ratio=mask_ratio,
                generator=generator,
                interpolate_pos_encoding=interpolate,
                deterministic=True,
            )
            # No return_dict: accelerate may strip the decorator that takes it. A tuple has no losses before the pixels.
            return output[0] if isinstance(output, tuple) else output.purified_pixel_values

        height, width = pixel_values.shape[2:]
        if torch.jit.is_tracing():  # tensors there, and the trace is of this size alone
            height, width = int(height), int(width)
        if (height, width) == (size, size):
            parts = [run(part) for part in ([pixel_values] if _is_exporting() else pixel_values.split(limit))]
            purified = parts[0] if len(parts) == 1 else torch.cat(parts)
        elif mode == "interpolate":
            patch = self.config.patch_size
            padded = _extend(pixel_values, -(-height // patch) * patch, -(-width // patch) * patch)
            purified = run(padded, interpolate=True)[:, :, :height, :width]
        else:
            grid = MAEPWindows(height, width, size, overlap, pixel_values.device, pixel_values.dtype)
            purified = self._purify_windows(grid, pixel_values, limit, run)
        if strength == 1:
            return purified
        wide = torch.promote_types(purified.dtype, torch.float32)
        corrected = torch.lerp(pixel_values.to(wide), purified.to(wide), float(strength))
        return corrected.clamp(0, 1).to(purified.dtype)

    def _purify_windows(
        self, grid: "MAEPWindows", image: torch.Tensor, limit: int, run: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        dtype = image.dtype
        image = grid.extend(image).to(grid.dtype)  # corrections of 16 bits would be differences of rounded pixels
        if _is_exporting():
            return grid.blend(image, run(windows := grid.cut(image)) - windows).to(dtype)
        total = torch.zeros_like(image, dtype=grid.dtype)
        rows_at_once = max(1, limit // (len(image) * grid.columns))
        for first in range(0, grid.rows, rows_at_once):
            rows = range(first, min(first + rows_at_once, grid.rows))
            windows = grid.cut(image, rows)
            grid.add(total, torch.cat([run(part) - part for part in windows.split(limit)]), rows)
        return grid.finish(image, total).to(dtype)

    def _check_pixels(self, pixel_values: torch.Tensor, any_size: bool | str) -> None:
        channels, size, patch = self.config.num_channels, self.config.image_size, self.config.patch_size
        if not isinstance(pixel_values, torch.Tensor):
            raise TypeError(
                f"pixel_values must be a tensor (batch, {channels}, height, width) in [0, 1], got "
                f"{type(pixel_values).__name__}: MAEPImageProcessor makes one of pictures and arrays."
            )
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != channels:
            raise ValueError(f"pixel_values must have shape (batch, {channels}, height, width), got {shape}.")
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be floating point in [0, 1], got {pixel_values.dtype}: divide 8-bit images by 255."
            )
        if min(shape[2:]) < 1:
            raise ValueError(f"pixel_values has no pixels, its shape is {shape}.")
        if any_size == "patches" and (shape[2] % patch or shape[3] % patch):
            raise ValueError(
                f"height and width must be multiples of patch_size={patch}, got {shape[2]} x {shape[3]}: purify() "
                "handles any size."
            )
        if not any_size and shape[2:] != (size, size):
            raise ValueError(
                f"forward takes images of {size} x {size} pixels, got {shape[2]} x {shape[3]}: purify() handles any "
                "size (or pass interpolate_pos_encoding=True)."
            )

    def _mask(
        self,
        batch: int,
        num_patches: int,
        mask_ratio: float,
        noise: torch.Tensor | None,
        generator: torch.Generator | None,
        bool_masked_pos: torch.Tensor | None,
        device: torch.device,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, int]:
        """The mask, the visible patches in ascending order (`None`: all), `ids_restore`, and how many are masked."""
        shape = (batch, num_patches)
        for name, value in (("noise", noise), ("bool_masked_pos", bool_masked_pos)):
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape (batch, num_patches) = {shape}, got {tuple(value.shape)}.")
        if bool_masked_pos is not None:
            if noise is not None:
                raise ValueError("Pass noise or bool_masked_pos, not both.")
            mask = bool_masked_pos.to(device=device, dtype=torch.bool)
            counts = sorted(set(mask.sum(dim=1).tolist())) if batch else [0]
            if len(counts) != 1 or counts[0] == num_patches:
                raise ValueError(
                    "bool_masked_pos must hide the same number of patches in every row and leave at least one visible; "
                    f"its rows hide {counts} of {num_patches}."
                )
            masked = counts[0]
        else:
            if not 0 <= mask_ratio < 1:
                raise ValueError(f"mask_ratio={mask_ratio} must be at least 0 and less than 1.")
            # Under torch.jit.trace the number of patches is a tensor, which has no round().
            masked = min(round(num_patches * mask_ratio), num_patches - 1) if mask_ratio else 0
        if masked == 0:
            ids = torch.arange(num_patches, device=device).expand(shape)
            return torch.zeros(shape, device=device), None, ids, 0
        if bool_masked_pos is None:
            if noise is None:
                source = device if generator is None else generator.device
                noise = torch.rand(shape, generator=generator, device=source)
            keep = noise.to(device).topk(num_patches - masked, dim=1, largest=False).indices
            mask = torch.ones(shape, dtype=torch.bool, device=device).scatter(1, keep, False)
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)
        return mask.float(), order[:, : num_patches - masked], order.argsort(dim=1), masked

    def _unpatchify(self, decoded: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """`(batch, num_patches, patch**2 * channels)` to `(batch, channels, height, width)`, channels_last."""
        batch, patch = decoded.shape[0], self.config.patch_size
        channels = decoded.shape[2] // patch**2
        pixels = decoded.view(batch, rows, columns, patch, patch, channels).transpose(2, 3)
        return pixels.reshape(batch, rows * patch, columns * patch, channels).permute(0, 3, 1, 2)

    def _losses(
        self, prediction: torch.Tensor, clean: torch.Tensor, pixel_mask: torch.Tensor | None, masked: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Divided by counts that the mask ratio fixes, not by sums over the batch: micro-batches average exactly.
        difference = prediction.float() - clean.float()
        squared = difference.square()
        if self.config.pixel_loss == "l2":
            error = squared
        elif self.config.pixel_loss == "l1":
            error = difference.abs()
        else:
            error = (squared + CHARBONNIER_EPS**2).sqrt() - CHARBONNIER_EPS
        if pixel_mask is None:
            return error.new_zeros(()), error.mean()
        return (squared * pixel_mask).mean() / masked, (error * (1 - pixel_mask)).mean() / (1 - masked)


class MAEPWindows:
    """The overlapping windows that [`MAEPModel.purify`] lays over images of one height and width.

    What is blended are corrections (purified minus attacked), not pixels: where nothing is corrected the image stays
    bit for bit. An image smaller than a window is extended by reflection, and cropped again at the end.

    Args:
        height, width: Of the images, in pixels.
        size: Side of a window (`config.image_size`).
        overlap: Least overlap of neighbouring windows, a fraction of the window in [0, 0.9].
        device: Of the blending weights.
        dtype: Of the images; the weights and sums are at least float32.
    """

    def __init__(
        self,
        height: int,
        width: int,
        size: int,
        overlap: float,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.height, self.width, self.size = height, width, size
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.tops, self.row_weights = _windows(max(height, size), size, overlap, device, self.dtype)
        self.lefts, self.column_weights = _windows(max(width, size), size, overlap, device, self.dtype)
        self.rows, self.columns = len(self.tops), len(self.lefts)

    def __len__(self) -> int:
        """Windows in an image."""
        return self.rows * self.columns

    def extend(self, images: torch.Tensor) -> torch.Tensor:
        """Images no smaller than a window; the same tensor where they are not."""
        return _extend(images, max(self.height, self.size), max(self.width, self.size))

    def cut(self, images: torch.Tensor, rows: range | None = None) -> torch.Tensor:
        """`(batch, channels, height, width)` to `(batch * windows, channels, size, size)`, an image's windows together
        and row by row; `rows` takes only some rows of windows."""
        images = self.extend(images)
        tops = self.tops if rows is None else [self.tops[row] for row in rows]
        # Rows first, then columns: far fewer slices (each costs a full-size gradient) than window by window.
        bands = torch.stack([images[:, :, top : top + self.size] for top in tops], dim=1)
        return torch.stack([bands[..., left : left + self.size] for left in self.lefts], dim=2).flatten(0, 2)

    def add(self, total: torch.Tensor, corrections: torch.Tensor, rows: range | None = None) -> None:
        """Add the weighted corrections of the windows that `cut` made to `total`, of the extended images' shape."""
        rows = range(self.rows) if rows is None else rows
        size, (batch, _, _, width) = self.size, total.shape
        corrections = corrections.to(self.dtype).reshape(batch, len(rows), self.columns, -1, size, size)
        blended = corrections.new_zeros((batch, len(rows), corrections.shape[3], size, width))
        for index, left in enumerate(self.lefts):
            blended[..., left : left + size] += corrections[:, :, index] * self.column_weights[index]
        for index, row in enumerate(rows):
            top = self.tops[row]
            total[:, :, top : top + size] += blended[:, index] * self.row_weights[row][:, None]

    def finish(self, images: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """The corrected images, of the size and dtype of `images`, in [0, 1]; `total` is used up."""
        total += self.extend(images)
        return total.clamp(0, 1).to(images.dtype)[:, :, : self.height, : self.width]

    def blend(self, images: torch.Tensor, corrections: torch.Tensor) -> torch.Tensor:
        """`images` with the corrections of all their windows, `(batch * windows, channels, size, size)`."""
        total = torch.zeros_like(self.extend(images), dtype=self.dtype)
        self.add(total, corrections)
        return self.finish(images, total)


def _is_exporting() -> bool:
    """Whether `torch.export` is tracing, where counting images would fix their number; never known in torch 2.6."""
    return getattr(torch.compiler, "is_exporting", bool)()


def _extend(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Extend `(B, C, H, W)` to the right and below, by reflection where the image is large enough for it."""
    down, right = height - image.shape[2], width - image.shape[3]
    if down:
        image = F.pad(image, (0, 0, 0, down), mode="reflect" if down < image.shape[2] else "replicate")
    if right:
        image = F.pad(image, (0, right, 0, 0), mode="reflect" if right < image.shape[3] else "replicate")
    return image


def _windows(
    length: int, size: int, overlap: float, device: torch.device | str, dtype: torch.dtype
) -> tuple[list[int], torch.Tensor]:
    """First pixels of evenly spread windows over `length` pixels, and their blending weights `(windows, size)`.

    The weights are a raised cosine, positive everywhere, divided by their sum: at every pixel they add up to one.
    """
    step = max(1, int(size * (1 - overlap)))
    count = -(-(length - size) // step) + 1
    starts = [round(index * (length - size) / max(1, count - 1)) for index in range(count)]
    bump = torch.sin(math.pi * (torch.arange(size, device=device, dtype=dtype) + 0.5) / size).square()
    total = torch.zeros(length, device=device, dtype=dtype)
    for start in starts:
        total[start : start + size] += bump
    return starts, torch.stack([bump / total[start : start + size] for start in starts])


# With this, every save_pretrained writes the code beside the weights, for trust_remote_code=True.
MAEPModel.register_for_auto_class("AutoModel")

__all__ = ["MAEPModel", "MAEPOutput", "MAEPPreTrainedModel"]
