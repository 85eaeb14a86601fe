"""A larger purifier that starts as the same function as a smaller one (Net2Net, Chen et al. 2016, section 2)."""

from __future__ import annotations

import torch
from torch import nn

from .configuration_maep import MAEPConfig
from .modeling_maep import MAEPModel


@torch.no_grad()
def grow_local_branch(model: MAEPModel, channels: int | None = None, layers: int | None = None) -> MAEPModel:
    """The same purifier with a wider or deeper local branch, to be trained on.

    What is new reads from everything and is not read from: weights from new channels to old ones and the last
    convolution of new blocks are zero, so that outputs stay the same but for rounding and every new weight is reached
    by gradients within a few steps. Other weights of new channels are drawn from torch's global generator.

    Args:
        model: not changed.
        channels: width of the local branch, at least the model's own, which `None` keeps.
        layers: its convolution blocks, at least as many as the model's own, which `None` keeps.

    Returns:
        A new model in the mode, precision and device of the old one.

    Raises:
        ValueError: fewer than the model has, or a model without a local branch, with an adapter, or compiled.
    """
    config = model.config
    wanted = {"local_branch_channels": channels, "local_branch_layers": layers}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if model.local_branch is None:
        raise ValueError(f"{', '.join(wanted)}: this purifier has no local branch that could grow")
    for name, value in wanted.items():
        if value < getattr(config, name):
            raise ValueError(f"{name}={value}: the purifier to start from has {getattr(config, name)}; name no fewer")
    grown = MAEPModel._from_config(
        MAEPConfig.from_dict(config.to_dict() | wanted), attn_implementation=config._attn_implementation
    )
    larger = ("decoder.head.", "local_branch.")
    state, names = model.state_dict(), grown.state_dict().keys()
    kept = {name: value for name, value in state.items() if not name.startswith(larger)}
    missing = [name for name in grown.load_state_dict(kept, strict=False).missing_keys if not name.startswith(larger)]
    strange = [name for name in state if name not in names] + missing
    if strange:
        raise ValueError(
            f"model: its weights are not named as a plain purifier's ({strange[0]}); merge the adapter first "
            "(merge_adapter, or load_purifier of the adapter's folder), and pass the uncompiled model"
        )
    _widen(grown.decoder.head, model.decoder.head, config.patch_size**2)
    _widen(grown.local_branch.stem, model.local_branch.stem)
    _widen(grown.local_branch.head, model.local_branch.head)
    for block, smaller in zip(grown.local_branch.layers, model.local_branch.layers, strict=False):
        _widen(block.conv1, smaller.conv1)
        _widen(block.conv2, smaller.conv2)
    for block in grown.local_branch.layers[config.local_branch_layers :]:
        nn.init.zeros_(block.conv2.weight)
    weight = model.local_branch.stem.weight
    grown.config.dtype = weight.dtype
    return grown.to(device=weight.device, dtype=weight.dtype).train(model.training)


def _widen(new: nn.Linear | nn.Conv2d, old: nn.Linear | nn.Conv2d, groups: int = 1) -> None:
    """Put a layer's weights into a larger one, whose outputs come in so many equal groups."""
    weight = new.weight.unflatten(0, (groups, -1))
    outputs, inputs = old.weight.shape[0] // groups, old.weight.shape[1]
    weight[:, :outputs, inputs:] = 0
    weight[:, :outputs, :inputs] = old.weight.unflatten(0, (groups, -1))
    new.bias.unflatten(0, (groups, -1))[:, :outputs] = old.bias.unflatten(0, (groups, -1))
