"""Threat models: which model an attack sees, while the defended one is what is measured; they are never mixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..classifier import PixelClassifier, PurifiedClassifier
from ..defences import BPDA

if TYPE_CHECKING:
    from ..attacks import Attack

THREAT_MODELS = ("gray-box", "bpda", "white-box", "black-box", "transfer")
ADAPTIVE = ("bpda", "white-box")
"""Threat models whose result rests on a gradient through or around the purifier: they need the masking checks."""


def attacked_model(
    threat_model: str,
    classifier: PixelClassifier,
    purifier: Any = None,
    source: nn.Module | None = None,
    purify_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model that an attack under `threat_model` is given.

    Args:
        threat_model: `gray-box` the classifier alone; `bpda` classifier behind the purifier with the identity as its
            gradient (Athalye et al. 2018); `white-box` and `black-box` the whole pipeline, which a black-box attack
            only queries; `transfer` the pipeline `source`.
        purifier: `None` measures the bare classifier.
        source: surrogate pipeline of `transfer`, [0, 1] pixels to logits.
        purify_kwargs: for every call of the purifier, which the attack meets as it is measured.

    Raises:
        ValueError: unknown threat model, or `transfer` without `source`.
    """
    if threat_model not in THREAT_MODELS:
        raise ValueError(f"threat_model={threat_model!r}: must be one of {', '.join(THREAT_MODELS)}")
    if threat_model == "transfer":
        if source is None:
            raise ValueError("threat_model='transfer' needs source: the surrogate pipeline that the attack is made on")
        return source
    if threat_model == "gray-box" or purifier is None:
        return classifier
    front = BPDA(purifier) if threat_model == "bpda" else purifier
    return PurifiedClassifier(front, classifier, purify_kwargs=purify_kwargs)


def check_attack(threat_model: str, attack: Attack) -> None:
    """Refuse an attack that the threat model does not allow.

    Raises:
        ValueError: a gradient attack under `black-box`.
    """
    if threat_model == "black-box" and attack.needs_gradient:
        raise ValueError(
            f"attack={attack.name!r} uses gradients, which threat_model='black-box' does not give; "
            "use square, hopskipjump or boundary, or threat_model='white-box'"
        )
