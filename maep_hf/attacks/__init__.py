"""Attacks: the gradient iteration used in training, the mixture pairs are drawn from, the attack library."""

from .gradient import AttackParameters, perturb, pgd
from .library import LinfPGD
from .mixture import KINDS, AttackMixture

__all__ = ["KINDS", "AttackMixture", "AttackParameters", "LinfPGD", "perturb", "pgd"]
