"""Attacks: the gradient iteration used in training, and the mixture training pairs are drawn from."""

from .gradient import AttackParameters, perturb, pgd
from .mixture import KINDS, AttackMixture

__all__ = ["KINDS", "AttackMixture", "AttackParameters", "perturb", "pgd"]
