"""LoRA on a purifier through PEFT: the one place that knows the right targets (Hu et al. 2022)."""

from __future__ import annotations

import copy
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from .modeling_maep import MAEPModel

SCOPES = ("decoder", "all")
LINEAR_LAYERS = r"(q_proj|k_proj|v_proj|o_proj|fc1|fc2)"
ADAPTER_FOLDER = "adapter"


def default_lora_config(
    model: MAEPModel, scope: str = "all", rank: int = 8, alpha: int | None = None, dropout: float = 0.0
) -> LoraConfig:
    """LoRA configuration with the purifier's targets.

    Args:
        model: the purifier to adapt; where it has a local branch, that branch's last layer is the prediction head.
        scope: `decoder` adapts the decoder's blocks (the paper's stage 2), `all` the encoder's too (stage 3).
        rank: rank of the update.
        alpha: its scale is `alpha / rank`; twice the rank by default.
        dropout: on the input of the update.

    Raises:
        ValueError: unknown scope or a rank below 1.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r}: must be one of {', '.join(SCOPES)}")
    if rank < 1:
        raise ValueError(f"rank={rank}: must be at least 1")
    parts = "decoder" if scope == "decoder" else "(encoder|decoder)"
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=rf".*{parts}\.layers\.\d+\..*{LINEAR_LAYERS}",
        modules_to_save=["local_branch.head" if model.local_branch is not None else "decoder.head"],
    )


def add_lora(model: MAEPModel, config: LoraConfig) -> PeftModel:
    """Freeze a trained purifier and put trainable LoRA weights beside it.

    Raises:
        ValueError: the purifier was never trained (its output is still the identity, so there is nothing to adapt).
    """
    if is_untrained(model):
        raise ValueError(
            "model: this purifier is still the identity it was initialised as; LoRA adapts a trained one. "
            "Train it with train/pretrain.py first, or give a released checkpoint."
        )
    return get_peft_model(model, config)


def is_untrained(model: MAEPModel) -> bool:
    """Whether the output layer is all zeros, as it is at initialisation."""
    head = model.decoder.head if model.local_branch is None else model.local_branch.head
    return not bool(head.weight.detach().any())


def save_adapter_run(model: PeftModel, folder: Path) -> None:
    """Save the adapter in `folder/adapter` and the merged purifier in `folder`, which `from_pretrained` loads."""
    model.save_pretrained(folder / ADAPTER_FOLDER)
    merged: nn.Module = copy.deepcopy(model).merge_and_unload()
    merged.save_pretrained(folder)
