"""Attacks: the registry for evaluation, and the gradient iteration and mixture that training draws pairs from."""

from .base import Attack, AttackSpec, check_attacked
from .gradient import AttackParameters, perturb, pgd
from .mixture import KINDS, AttackMixture
from .registry import ATTACKS, attack_options, make_attack

__all__ = [
    "ATTACKS", "KINDS", "Attack", "AttackMixture", "AttackParameters", "AttackSpec", "check_attacked",
    "attack_options", "make_attack", "perturb", "pgd",
]  # fmt: skip
