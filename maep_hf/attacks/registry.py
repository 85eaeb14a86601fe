"""Attacks by the names the field uses."""

from __future__ import annotations

import difflib
import re
from typing import Any

from . import autoattack, corruptions, foolbox_attacks
from .base import Attack, AttackSpec

ATTACKS: dict[str, AttackSpec] = {
    spec.name: spec for module in (autoattack, foolbox_attacks, corruptions) for spec in module.SPECS
}
"""Name to description, norms, options and whether a gradient is needed; AutoAttack first, controls last."""

ALIASES = {
    "aa": "autoattack", "standard": "autoattack", "fgm": "fgsm", "ifgsm": "bim", "mifgm": "mi-fgsm", "mim": "mi-fgsm",
    "pgdeot": "eot-pgd", "cw": "cw-l2", "carliniwagner": "cw-l2", "squareattack": "square", "hsj": "hopskipjump",
    "hsja": "hopskipjump", "boundaryattack": "boundary", "slide": "sparse-l1-descent", "rotationtranslation": "spatial",
}  # fmt: skip


def make_attack(name: str, *, norm: str | None = None, eps: float | None = None, **options: Any) -> Attack:
    """An attack by its name.

    Args:
        name: a key of `ATTACKS`; case, `-` and `_` do not matter. A number is the steps: `pgd-100`, `bim-20`;
            `autoattack-plus` is `autoattack` with `version="plus"`, `pgd+eot` is `eot-pgd`.
        norm: `Linf`, `L2`, `L1` or `L0`; by default the attack's first, which is Linf where it has it.
        eps: radius, in units of 1/255 for Linf (8 = 8/255), in pixel units of the [0, 1] image for L2 and L1. By
            default 8, 0.5 and 12; attacks that look for the smallest perturbation have no bound then.
        **options: those of `ATTACKS[name].options`; step sizes are in the unit of eps.

    Raises:
        ValueError: unknown name or option, a norm that the attack is not there for, a value out of range.
        ImportError: the attack's library is not installed.

    Example:
        >>> make_attack("PGD-100", eps=8, step_size=2)(model, pixels, labels, seed=0)
    """
    spec, implied = find_attack(name)
    for option, value in implied.items():
        if options.setdefault(option, value) != value:
            raise ValueError(f"{option}: {name!r} says {value}, the option {options[option]}; give one of them")
    return spec.make(norm, eps, options)


def find_attack(name: str) -> tuple[AttackSpec, dict[str, Any]]:
    """The row of the registry, and the options that a name implies, as `pgd-100` its steps.

    Raises:
        ValueError: there is no such attack.
    """
    known = {_plain(key): key for key in ATTACKS} | ALIASES
    plain = _plain(name)
    if plain in known:
        return ATTACKS[known[plain]], {}
    if found := re.fullmatch(r"(?:autoattack|aa)(standard|plus|rand)", plain):
        return ATTACKS["autoattack"], {"version": found[1]}
    if found := re.fullmatch(r"(\D+)(\d+)(\D*)", plain):
        key = known.get(found[1] + found[3])
        if key is not None and "steps" in ATTACKS[key].options:
            return ATTACKS[key], {"steps": int(found[2])}
    close = difflib.get_close_matches(plain, known, n=1)
    meant = f" (did you mean {known[close[0]]}?)" if close else ""
    raise ValueError(f"name: there is no attack {name!r}{meant}; there are: {', '.join(ATTACKS)}")


def _plain(name: str) -> str:
    return re.sub(r"[-_+ ]", "", str(name).lower())


def attack_options(name: str) -> tuple[str, ...]:
    """The options that [`make_attack`] takes for an attack.

    Raises:
        ValueError: there is no such attack.
    """
    return tuple(find_attack(name)[0].options)
