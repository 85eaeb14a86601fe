"""LoRA on a purifier through PEFT: the one place that knows the right targets (Hu et al. 2022)."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper, load_peft_weights
from torch import Tensor, nn
from transformers.utils import cached_file

from .checkpoints import ADAPTER_CONFIG, BASE_RECORD, is_other_base, readable_weights
from .modeling_maep import MAEPModel
from .tensors import tensor_bytes

logger = logging.getLogger(__name__)

SCOPES = ("decoder", "all")
LINEAR_LAYERS = r"(q_proj|k_proj|v_proj|o_proj|fc1|fc2)"
DEFAULT_RANK = 4
EVERY_LAYER = "all"
ADAPTER_FOLDER = "adapter"
_BASE_DESCRIPTION = "_base_description"
"""Where a `PeftModel` keeps what it was put on; it goes with it when it is copied, and not with a merged purifier."""
_MOVES_BASE_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of PEFT's `init_lora_weights`, or their beginnings, that take a part out of the base's own weights."""


def default_lora_config(
    model: MAEPModel,
    scope: str = "all",
    rank: int = DEFAULT_RANK,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
) -> LoraConfig:
    """LoRA configuration with the purifier's targets; its prediction head is trained whole (`modules_to_save`).

    Args:
        model: the purifier to adapt; where it has a local branch, that branch's last layer is the prediction head.
        scope: `decoder` adapts the decoder's blocks (the paper's stage 2), `all` the encoder's too (stage 3).
        rank: rank of the update; 4 on the tiny purifier is 4.2 % of its parameters, head included.
        alpha: its scale is `alpha / rank`; twice the rank by default.
        dropout: on the input of the update, in [0, 1).
        targets: names of linear or convolution layers in place of attention and MLP of every block: a layer's own name
            (`q_proj`) or the end of its path (`decoder.embed`, `layers.0.mlp.fc1`); those outside the scope are passed
            over. A head that is named gets LoRA and is not trained whole. `all` stands for every layer but the head.

    Raises:
        ValueError: unknown scope, a rank below 1, a dropout out of range, or a target that is no layer.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r}: must be one of {', '.join(SCOPES)}")
    if rank < 1:
        raise ValueError(f"rank={rank}: must be at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be in [0, 1)")
    head = "decoder.head" if model.local_branch is None else "local_branch.head"
    if targets is None:
        parts = "decoder" if scope == "decoder" else "(encoder|decoder)"
        target_modules: str | list[str] = rf"{parts}\.layers\.\d+\..*{LINEAR_LAYERS}"
    else:
        target_modules = _find_targets(model, scope, targets, head)
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        modules_to_save=None if head in target_modules else [head],
    )


def _find_targets(model: MAEPModel, scope: str, targets: Sequence[str], head: str) -> list[str]:
    """Paths of the layers that are named."""
    if isinstance(targets, str):
        raise ValueError(f"targets={targets!r}: must be a list of names")
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    found: set[str] = set()
    for target in targets:
        if target == EVERY_LAYER:
            matching = set(layers) - {head}
        else:
            matching = {name for name in layers if name == target or name.endswith(f".{target}")}
        if not matching:
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise ValueError(
                f"targets: no linear or convolution layer {target!r}; there are {', '.join(known)}, by path from "
                f"{layers[0]} to {layers[-1]}, and {EVERY_LAYER} for every layer but the head"
            )
        found |= matching
    if not found:
        raise ValueError("targets: name at least one layer, or leave it out for the attention and MLP of every block")
    inside = sorted(name for name in found if scope == "all" or not name.startswith("encoder."))
    if not inside:
        raise ValueError(f"targets: none of {', '.join(sorted(found))} is in scope {scope!r}")
    return inside


def add_lora(model: MAEPModel, config: LoraConfig) -> PeftModel:
    """Freeze a trained purifier and put trainable LoRA weights beside it.

    Of a purifier that was loaded at a revision, the configuration records that, unless it names one itself.

    Raises:
        ValueError: the purifier has an adapter already, or was never trained (its output is still the identity, so
            there is nothing to adapt), or an initialisation that changes its weights.
    """
    if isinstance(model, PeftModel) or _adapters(model):
        raise ValueError(
            "model: it has an adapter already; merge_adapter it, or load_adapter(..., trainable=True) to go on training"
        )
    if is_untrained(model):
        raise ValueError(
            "model: this purifier is still the identity it was initialised as; LoRA adapts a trained one. "
            "Train it with train/pretrain.py first, or give a released checkpoint."
        )
    moved = _moves_base_weights(config)
    if moved:
        raise ValueError(
            f"config: {moved} moves a part of the base's weights into the adapter, and here they stay bit for bit, so "
            "that other adapters fit beside it; leave init_lora_weights at True, or use 'gaussian'"
        )
    base = describe_base(model)
    adapted = get_peft_model(model, config, revision=config.revision or getattr(model, "loaded_revision", None))
    _remember_base(adapted, base)
    return adapted


def is_untrained(model: MAEPModel) -> bool:
    """Whether an output layer is all zeros, as it is at initialisation.

    Of pixels (`residual=False`) without a local branch none is, and this cannot tell.
    """
    heads = [model.decoder.head] + ([] if model.local_branch is None else [model.local_branch.head])
    return any(not head.weight.any() for head in heads)


def trainable_share(model: nn.Module) -> float:
    """Trainable parameters as a fraction of the base's own, the prediction head's copy among the former."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    buffers = {name for name, _ in model.named_buffers()}
    base = sum(value.numel() for name, value in _base_weights(model, without=buffers).items())
    return trainable / base


def save_adapter(model: PeftModel, folder: str | os.PathLike) -> None:
    """Save the active adapter in `folder` itself, whatever its name, with a record of the weights it was trained on.

    Raises:
        ValueError: no `PeftModel`; several adapters are active together, or none; or PEFT alone put the adapter on, and
            it has changed the weights it was put on since: no record of them would be right.
    """
    _refuse_switched_off(model)
    folder, active = Path(folder), list(model.active_adapters)
    if len(active) != 1:
        raise ValueError(
            f"model: {len(active)} adapters are active ({', '.join(active) or 'none'}), and a folder holds one; choose "
            "it with switch_adapter(model, NAME)"
        )
    _refuse_to_save(model, model.peft_config[active[0]])
    base = describe_base(model)
    folder.mkdir(parents=True, exist_ok=True)
    if active == ["default"]:
        model.save_pretrained(folder, selected_adapters=active)
    else:  # PEFT saves it in a folder of that name, away from the record, so that no base would be compared
        with tempfile.TemporaryDirectory(prefix=".adapter-", dir=folder) as temporary:
            model.save_pretrained(temporary, selected_adapters=active)
            for path in Path(temporary, *active).iterdir():
                os.replace(path, folder / path.name)
    write_base_record(folder, base)


def write_base_record(folder: Path, base: Mapping[str, str]) -> None:
    """Put what [`describe_base`] says of an adapter's base beside the adapter."""
    (folder / BASE_RECORD).write_text(json.dumps(base, indent=2) + "\n")


def _refuse_to_save(model: PeftModel, config: PeftConfig) -> None:
    """An adapter of which a part lies in the base's weights is saved only where that part is known."""
    moved, bias = _moves_base_weights(config), _trains_base_biases(config)
    if moved:
        raise ValueError(
            f"model: {moved} moved a part of the base's weights into the adapter, which fits no base as it is stored; "
            "PEFT can save it as plain LoRA: path_initial_model_for_weight_conversion of model.save_pretrained"
        )
    if bias and not _known_base(model):
        raise ValueError(
            f"model: {bias} trains the base's own biases, and what they were before is not known; put the adapter on "
            "with add_lora or load_adapter, which remember it"
        )
    if bias and _is_merged(model):  # a bias of the update's own would be saved within the base's
        raise ValueError(f"model: {bias}, and it is merged into its base; call model.unmerge_adapter() first")


def save_adapter_run(model: PeftModel, folder: Path) -> None:
    """Save the adapter in `folder/adapter` and the merged purifier in `folder`, which `from_pretrained` loads."""
    save_adapter(model, folder / ADAPTER_FOLDER)
    merge_adapter(copy.deepcopy(model)).save_pretrained(folder)


def merge_adapter(model: PeftModel) -> MAEPModel:
    """The purifier with its active adapter in its weights; `model` is used up. The same bits on any number of threads,
    since records know a purifier by them.

    Raises:
        ValueError: no adapter is active, or no `PeftModel`.
    """
    _refuse_switched_off(model)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several round the sums otherwise
    try:
        return model.merge_and_unload()
    finally:
        torch.set_num_threads(threads)


def _refuse_switched_off(model: PeftModel) -> None:
    """PEFT goes on calling an adapter active that is switched off."""
    if isinstance(model, MAEPModel):  # with adapters of its own load_adapter, or none
        raise ValueError(
            "model: a MAEPModel itself is neither merged nor saved as an adapter; put the adapter on with load_adapter "
            "of maep_hf.adaptation (or add_lora) and pass what that returns"
        )
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if layers and all(layer.disable_adapters for layer in layers):
        raise ValueError("model: no adapter is active; switch_adapter(model, NAME) first")


def load_adapter(
    model: MAEPModel | PeftModel,
    source: str | os.PathLike,
    name: str = "default",
    *,
    trainable: bool = False,
    allow_other_base: bool = False,
    revision: str | None = None,
) -> PeftModel:
    """Put a saved adapter on its base; `PeftModel.from_pretrained`, but a wrong base is refused.

    Args:
        model: the base, or one with another adapter on it already.
        source: folder or Hub id of the adapter.
        name: what [`switch_adapter`] calls it; the adapter loaded last is the active one.
        trainable: go on training it.
        allow_other_base: accept a base of the same shape with other weights (one that was trained further).
        revision: branch, tag or commit of the adapter's Hub repository.

    Raises:
        ValueError: no LoRA adapter, one for a purifier of another shape or with other weights, one whose weights are
            cut off or not those of its configuration, a name that is taken, or two adapters of which one changes the
            base's own weights.
    """
    source = os.fspath(source)
    hub = {} if revision is None else {"revision": revision}
    with readable_weights(source):
        try:
            config = PeftConfig.from_pretrained(source, **hub)
            weights = load_peft_weights(source, device="cpu", **hub)
        except (ValueError, OSError, TypeError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"adapter {source}: neither a folder nor a Hub id with a PEFT adapter ({reason})"
            ) from error
    if not isinstance(config, LoraConfig):
        raise ValueError(f"adapter {source}: its type is {config.peft_type}, not LoRA")
    if name in _adapters(model):
        raise ValueError(f"name={name!r}: this purifier has an adapter of that name; give another one")
    _refuse_changed_base(model, config, source)
    own = _base_weights(model)
    problem = _mismatch(config, weights, own)
    if problem:
        raise ValueError(
            f"adapter {source}: this is not the base that it was trained on ({problem}); "
            f"its own is {config.base_model_name_or_path or 'not recorded'}"
        )
    damage = _incomplete(config, weights, own)
    if damage:
        raise ValueError(
            f"adapter {source}: its weights are not those of its {ADAPTER_CONFIG}: {damage}; save it again"
        )
    record = None if allow_other_base else _read_base_record(source, revision)
    # taken before anything is put on; of a merged model that PEFT alone made only where it is needed
    base = describe_base(model) if record or not isinstance(model, PeftModel) else None
    if record:
        _refuse_other_base(base, record, config, source)
    others = isinstance(model, PeftModel) or bool(_adapters(model))
    if isinstance(model, PeftModel):
        model.load_adapter(source, adapter_name=name, is_trainable=trainable, **hub)
    else:
        model = PeftModel.from_pretrained(model, source, adapter_name=name, is_trainable=trainable, **hub)
    if others:  # one that the base itself had would stay active beside it
        switch_adapter(model, name, trainable=trainable)
    if base:
        _remember_base(model, base)
    return model


def base_dtype(source: str, revision: str | None = None) -> torch.dtype | None:
    """The one in which an adapter's base was while it was trained, which need not be the stored one; `None` where it is
    not recorded."""
    found = getattr(torch, (_read_base_record(source, revision) or {}).get("dtype", ""), None)
    return found if isinstance(found, torch.dtype) else None


def _adapters(model: nn.Module) -> Mapping[str, PeftConfig]:
    """Adapters by name, also those that a `MAEPModel` loaded by itself."""
    return getattr(model, "peft_config", None) or {}


def _refuse_changed_base(model: nn.Module, config: LoraConfig, source: str) -> None:
    """Adapters that share a base need it as it was; one that changes it goes on alone."""
    there = _adapters(model)
    named = {**there, "this one": config} if there else {}
    for name, each in named.items():
        changed = changes_base(each)
        if changed:
            raise ValueError(
                f"adapter {source}: {name} ({changed}) changes weights of the base that other adapters need as they "
                "were; load it alone, on a base of its own"
            )


def _refuse_other_base(found: Mapping[str, str], record: Mapping[str, str], config: LoraConfig, source: str) -> None:
    """What is found below an adapter against what the adapter's folder says of its base."""
    if found["dtype"] != record.get("dtype"):
        logger.warning(
            "adapter %s: the base is in %s here and was in %s there, so that its weights cannot be compared",
            source, found["dtype"], record.get("dtype"),
        )  # fmt: skip
    elif is_other_base(found, record):
        raise ValueError(
            f"adapter {source}: it was trained on {config.base_model_name_or_path or 'a base'} with other weights "
            "than these (the same shapes); load that base, or pass allow_other_base=True if you mean it"
        )


def switch_adapter(model: MAEPModel | PeftModel, name: str | None, *, trainable: bool = False) -> None:
    """Use the adapter of that name, or none: the base's own output.

    Works on what [`load_adapter`] and `PeftModel` return as on a `MAEPModel` with its own `load_adapter`. (There,
    `enable_adapters` after `disable_adapters` would leave the base's prediction head in use. And PEFT's `unload` takes
    off the LoRA alone, and leaves the adapter's head: for the base without adapters load it again.)

    Args:
        model: a purifier with adapters.
        name: one of them, or `None`.
        trainable: whether its weights take gradients.

    Raises:
        ValueError: the purifier has no such adapter, or `None` where an adapter changed the base's own weights.
    """
    known = list(_adapters(model))
    if not known or (name is not None and name not in known):
        raise ValueError(f"adapter {name!r}: this purifier has {', '.join(known) if known else 'no adapters'}")
    changed = [changes_base(config) for config in model.peft_config.values()]
    if name is None and any(changed):
        raise ValueError(
            f"adapter None: {next(filter(None, changed))} changed weights of the base itself, so that its own output "
            "is gone; load the base again for it"
        )
    if name is not None and isinstance(model, PeftModel):
        model.set_adapter(name)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            module.enable_adapters(name is not None)
            if name is not None:
                module.set_adapter(name)
    for key, parameter in model.named_parameters():
        if _is_adapter_weight(key):
            parameter.requires_grad_(trainable and name is not None and _adapter_of(key) == name)


def describe_base(model: nn.Module) -> dict[str, str]:
    """The weights below the adapters: their hash and their dtype.

    Those that `add_lora` or `load_adapter` found when they put the first adapter on: merging changes them, unmerging
    rounds them, and an adapter may train the base's biases; or those that `load_state_dict` brought since, as a
    training checkpoint does. Where PEFT alone put it on, those that are there now.

    Raises:
        ValueError: an adapter is merged that PEFT alone put on, or that was merged when the base's weights were loaded.
    """
    known = _known_base(model)
    if known:
        return dict(known)
    if _is_merged(model):
        raise ValueError(
            "model: an adapter is merged into its weights, so that the base's own cannot be told; call "
            "model.unmerge_adapter() first"
        )
    weights = _in_one_precision(_base_weights(model), {_plain_name(name) for name, _ in model.named_buffers()})
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(tensor_bytes(value.detach().cpu() + 0))  # averaged weights lose the sign of a zero
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in weights.values()})
    return {"fingerprint": digest.hexdigest()[:16], "dtype": ",".join(dtypes)}


def _in_one_precision(weights: Mapping[str, Tensor], buffers: Container[str]) -> dict[str, Tensor]:
    """Buffers in the dtype of the parameters: `from_pretrained(dtype=...)` leaves them in float32, `to(...)` does not,
    and the model computes the same."""
    found = {value.dtype for name, value in weights.items() if name not in buffers}
    own = found.pop() if len(found) == 1 else None
    if own is None or not own.is_floating_point:
        return dict(weights)
    return {
        name: value.to(own) if name in buffers and value.is_floating_point() else value
        for name, value in weights.items()
    }


def _known_base(model: nn.Module) -> dict[str, str] | None:
    return vars(model).get(_BASE_DESCRIPTION)


def _remember_base(model: PeftModel, base: Mapping[str, str]) -> None:
    if _renew_base not in model._load_state_dict_post_hooks.values():
        model.register_load_state_dict_post_hook(_renew_base)
    setattr(model, _BASE_DESCRIPTION, dict(base))


def _renew_base(model: PeftModel, loaded: Any) -> None:
    """Describe the base anew where `load_state_dict` brought other weights of it, as a training checkpoint does.

    What is known stays where an adapter alone was loaded, as PEFT does, and where one trains the base's biases: those
    that come with a checkpoint are trained ones, and what they were before is known from nowhere else.
    """
    own = sum(not _is_adapter_weight(name) for name in model.state_dict())
    missing = sum(not _is_adapter_weight(name) for name in loaded.missing_keys)
    if missing < own and not any(map(_trains_base_biases, model.peft_config.values())):
        vars(model).pop(_BASE_DESCRIPTION, None)
        if not _is_merged(model):
            setattr(model, _BASE_DESCRIPTION, describe_base(model))


def _is_merged(model: nn.Module) -> bool:
    return any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer))


def changes_base(config: PeftConfig) -> str | None:
    """The setting by which a part of an adapter lies in the base's own weights, in words."""
    return _moves_base_weights(config) or _trains_base_biases(config)


def _moves_base_weights(config: PeftConfig) -> str | None:
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE_WEIGHTS):
        return f"init_lora_weights={start!r}"
    return "kasa_config" if getattr(config, "kasa_config", None) else None  # it truncates the base's weights


def _trains_base_biases(config: PeftConfig) -> str | None:
    bias = getattr(config, "bias", "none")
    return None if bias == "none" else f"bias={bias!r}"


def _is_adapter_weight(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def _adapter_of(key: str) -> str | None:
    """The adapter that a weight belongs to; the name of one may also be that of a module, such as `decoder`."""
    found = re.search(r"\.(?:lora_\w+|modules_to_save)\.([^.]+)", key)
    return found and found[1]


def _plain_name(name: str) -> str:
    """The name that a weight of the base, or of a layer's trained copy, has without adapters."""
    plain = name.removeprefix("base_model.model.")
    for inserted in (".base_layer.", ".original_module.", ".modules_to_save."):
        plain = plain.replace(inserted, ".")
    return plain


def _base_weights(model: nn.Module, without: Iterable[str] = ()) -> dict[str, Tensor]:
    """The base's own weights under the names that they have without adapters."""
    found = {}
    for name, value in model.state_dict().items():
        if name in without or _is_adapter_weight(name):
            continue
        found[_plain_name(name)] = value
    return found


def _mismatch(config: LoraConfig, weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> str | None:
    """What of an adapter's weights does not fit a base, in words."""
    adapted = set()
    for key, value in weights.items():
        layer, _, part = _plain_name(key).partition(".lora_")
        part = part.split(".")[0]
        if part:
            adapted.add(layer)
        name = f"{layer}.weight" if part else layer
        if name not in base:
            return f"it has no {name}"
        shape, found = tuple(value.shape), tuple(base[name].shape)
        if not _fits(part, shape, found):
            return f"its {name} is {found}, the adapter's {'lora_' + part if part else 'own'} {shape}"
    layers = {name.removesuffix(".weight") for name, value in base.items() if value.ndim > 1}
    missing = sorted(layer for layer in layers - adapted if check_target_module_exists(config, layer))
    return f"the adapter has nothing for {missing[0]}" if missing else None


def _incomplete(config: LoraConfig, weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> str | None:
    """What of an adapter's weights is not as its configuration says, in words; they fit the base."""
    there = {_plain_name(key) for key in weights}
    for name in base:
        layer = name.rpartition(".")[0]
        if name not in there and any(layer.endswith(saved) for saved in config.modules_to_save or ()):
            return f"nothing for {name}, which is trained whole (modules_to_save)"
    ranks = {config.r, *(config.rank_pattern or {}).values()}
    for key, value in weights.items():
        part = _plain_name(key).partition(".lora_")[2]
        rank = {"A.weight": 0, "B.weight": 1}.get(part)
        if rank is not None and value.shape[rank] not in ranks:
            return f"r={config.r}, and {key} is {tuple(value.shape)}"
    return None


def _fits(part: str, shape: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """Whether a part of an update, or a whole weight (`part` empty), fits a base's weight of shape `found`."""
    if part == "A":
        return shape[1:] == found[1:]
    if part == "B":
        return shape[0] == found[0]
    if part == "magnitude_vector":  # DoRA's, one for every output; of a convolution (1, out, 1, 1)
        return shape == ((1, found[0], 1, 1) if len(found) == 4 else found[:1])
    return shape == found


def _read_base_record(source: str, revision: str | None) -> dict | None:
    path = cached_file(
        source,
        BASE_RECORD,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return json.loads(Path(path).read_text()) if path else None
