"""AutoAttack (Croce & Hein 2020, arXiv 2003.01690) and its parts, by pyautoattack, the reference implementation.

A part alone has the settings of the standard version: one restart, and the schedule of large radii for L1. Images come
out exactly as from the library, except that models of fewer than ten classes get no more target classes than there
are, and none of the parts whose loss needs more: the DLR loss takes the third-largest logit, the targeted one the
fourth.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .base import Attack, AttackSpec, Option, import_library
from .guard import Watched

COMPONENTS = {
    "apgd-ce": "apgd", "apgd-dlr": "apgd", "apgd-t": "apgd_targeted", "fab": "fab", "fab-t": "fab", "square": "square",
}  # fmt: skip
"""Part to the attribute of the library's object that runs it."""
USUAL = {"n_iter": 100, "n_queries": 5000}
"""Of every version of the library's."""
LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}
APGD_SETTINGS = {"n_iter": "n_iter", "n_restarts": "n_restarts", "eot_samples": "eot_iter", "rho": "thr_decr",
                 "large_radii_first": "use_largereps"}  # fmt: skip
FAB_SETTINGS = {"n_iter": "n_iter", "n_restarts": "n_restarts", "alpha_max": "alpha_max", "eta": "eta", "beta": "beta"}
TARGETS = {"n_target_classes": "n_target_classes"}
SETTINGS = {
    "apgd-ce": APGD_SETTINGS,
    "apgd-dlr": APGD_SETTINGS,
    "apgd-t": APGD_SETTINGS | TARGETS,
    "fab": FAB_SETTINGS,
    "fab-t": FAB_SETTINGS | TARGETS,
    "square": {"n_queries": "n_queries", "n_restarts": "n_restarts", "p_init": "p_init", "loss": "loss"},
}
"""What a record says of each part: name here to attribute of the library's object."""

logging.getLogger("auto-attack").addHandler(logging.NullHandler())  # its warnings reach whoever configures logging


@dataclass(frozen=True)
class AutoAttack(Attack):
    """AutoAttack or one part of it on a batch: `run_standard_evaluation` of the library."""

    library = "pyautoattack"

    def __post_init__(self) -> None:
        super().__post_init__()
        custom, attacks = self.options.get("version") == "custom", self.options.get("attacks")
        if custom and not attacks:
            raise ValueError("attacks: version='custom' needs a list of parts, such as ['apgd-ce', 'square']")
        if attacks and not custom:
            raise ValueError("attacks: only version='custom' takes a list of parts")
        if self.norm == "L1" and (self.options.get("n_iter") or 3) < 3:
            raise ValueError("n_iter: at least 3 are needed for L1, where APGD goes through three radii")

    @property
    def name(self) -> str:
        if self.spec.name in COMPONENTS:
            return self.spec.title
        version = self.options["version"]
        if version == "custom":
            return f"AutoAttack ({', '.join(self.parts)})"
        given = {name: self.options[name] for name in USUAL}  # what makes it another attack than the one of this name
        said = [f"{name}={value}" for name, value in given.items() if value not in (None, USUAL[name])]
        return f"AutoAttack ({', '.join([version, *said])})"

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts in the order they run, for a model of enough classes."""
        return tuple(self._adversary(nn.Identity()).attacks_to_run)

    @property
    def needs_gradient(self) -> bool:
        return self.parts != ("square",)

    def run(self, model: Watched, pixels: Tensor, labels: Tensor, seed: int) -> Tensor:
        adversary = self._adversary(model, pixels.device, seed, model.classes(pixels))
        if "square" in adversary.attacks_to_run:
            _expect_grid(self.norm, *pixels.shape[-2:])
        # The library never resets what its check for dynamic models counts, and leaves a trace function behind.
        counted = import_module("pyautoattack.checks").funcs
        counted.update(dict.fromkeys(counted, 0))
        trace = sys.gettrace()
        try:
            return adversary.run_standard_evaluation(pixels, labels, batch_size=len(pixels))[0]
        finally:
            sys.settrace(trace)

    def record(self, num_classes: int | None = None) -> dict[str, Any]:
        """Everything needed to repeat the attack.

        Args:
            num_classes: of the attacked model. With fewer than ten, parts that cannot run are named as `left_out` and
                the number of target classes is theirs. Left out of the record where it changes nothing.

        Raises:
            ValueError: no part can run with so few classes.
        """
        adversary = self._adversary(nn.Identity(), num_classes=num_classes)
        parts = {}
        for part in adversary.attacks_to_run:
            component = getattr(adversary, COMPONENTS[part])
            parts[part] = {name: getattr(component, attribute) for name, attribute in SETTINGS[part].items()}
        if "fab-t" in parts:
            parts["fab-t"]["n_restarts"] = 1  # set by the library when it runs
        record = {name: value for name, value in super().record().items() if name not in self.options}
        if "version" in self.options:
            record["version"] = self.options["version"]
        record |= {"eot_samples": adversary.apgd.eot_iter, "parts": parts}
        left_out = {part: f"needs {LEAST_CLASSES[part]} classes" for part in self.parts if part not in parts}
        return record | {"left_out": left_out} if left_out else record

    def _adversary(
        self, model: nn.Module, device: torch.device | str = "cpu", seed: int = 0, num_classes: int | None = None
    ) -> Any:
        """The library's object with the options set, for a model of `num_classes`."""
        attacks = self.options.get("attacks")
        adversary = import_library(self.library).AutoAttack(
            model,
            norm=self.norm,
            eps=self.radius,
            version=self.options.get("version", "standard"),
            attacks=list(attacks) if attacks else None,
            device=device,
            seed=seed,
        )
        if self.spec.name in COMPONENTS:
            adversary.attacks_to_run = [self.spec.name]
        for component in {getattr(adversary, component) for component in COMPONENTS.values()}:
            _configure(component, self.options)
            if num_classes is not None and hasattr(component, "n_target_classes"):
                component.n_target_classes = min(component.n_target_classes, num_classes - 1)
        if num_classes is not None:
            wanted = adversary.attacks_to_run
            adversary.attacks_to_run = [part for part in wanted if num_classes >= LEAST_CLASSES.get(part, 2)]
            if not adversary.attacks_to_run:
                least = min(LEAST_CLASSES[part] for part in wanted)
                raise ValueError(
                    f"{self.name} needs {least} classes for its loss, the model has {num_classes}: "
                    "use apgd-ce, fab-t or square"
                )
        return adversary


def _configure(component: Any, options: Mapping[str, Any]) -> None:
    """Set the options that a part of AutoAttack has; `None` leaves what its version sets."""
    for option, attribute in {**APGD_SETTINGS, **TARGETS, "n_queries": "n_queries"}.items():
        if options.get(option) is not None and hasattr(component, attribute):
            setattr(component, attribute, options[option])
    if options.get("n_iter") is not None and hasattr(component, "n_iter_orig"):  # APGD's schedule, as it derives it
        steps = component.n_iter_orig = component.n_iter
        component.n_iter_2, component.n_iter_min, component.size_decr = (
            max(int(share * steps), 1) for share in (0.22, 0.06, 0.03)
        )


def square_starts(norm: str | None, height: int, width: int) -> bool:
    """Whether Square can start on images of this size.

    Its L2 and L1 start is a grid of tiles a fifth of the height wide, which the library lets run over the edge.
    """
    tile = height // 5
    offset = (height - 5 * tile) // 2
    return norm == "Linf" or (tile > 0 and all(offset + side // tile * tile <= side for side in (height, width)))


def _expect_grid(norm: str | None, height: int, width: int) -> None:
    """Refuse images on which Square cannot start.

    Raises:
        ValueError: it would, half-way through AutoAttack.
    """
    if not square_starts(norm, height, width):
        raise ValueError(
            f"pixels: Square of pyautoattack cannot start in L2 or L1 on images of {height} x {width} "
            "(it can on 32 x 32 and 224 x 224); use Linf, or version='custom' without square"
        )


def _spec(name: str, title: str, description: str, options: tuple[str, ...], needs_gradient: bool = True) -> AttackSpec:
    return AttackSpec(
        name,
        title,
        description,
        AutoAttack,
        {norm: "AutoAttack" for norm in ("Linf", "L2", "L1")},
        {option: OPTIONS[option] for option in options},
        needs_gradient,
    )


OPTIONS = {
    "version": Option("standard", str, "which parts", ("standard", "plus", "rand", "custom")),
    "attacks": Option(None, tuple, "parts of version='custom', in order", tuple(COMPONENTS)),
    "n_iter": Option(None, int, "iterations of APGD and FAB; 100"),
    "n_restarts": Option(None, int, "restarts; 1, for APGD-CE and APGD-DLR in L1 5"),
    "eot_samples": Option(None, int, "passes that APGD averages each gradient over; 1, in version='rand' 20"),
    "n_target_classes": Option(None, int, "classes aimed at; 9, for APGD-T in L1 5"),
    "n_queries": Option(None, int, "queries of Square; 5000"),
}
APGD = ("n_iter", "n_restarts", "eot_samples")
SPECS = (
    _spec(
        "autoattack",
        "AutoAttack",
        "APGD-CE, APGD-T, FAB-T and Square in turn (standard), or another version",
        ("version", "attacks", "n_iter", "eot_samples", "n_queries"),
    ),
    _spec("apgd-ce", "APGD-CE", "Auto-PGD on the cross-entropy", APGD),
    _spec("apgd-dlr", "APGD-DLR", "Auto-PGD on the difference of logits ratio; 3 classes or more", APGD),
    _spec("apgd-t", "APGD-T", "targeted Auto-PGD; 4 classes or more", (*APGD, "n_target_classes")),
    _spec("fab", "FAB", "minimum-norm FAB (Croce & Hein 2020)", ("n_iter", "n_restarts")),
    _spec("fab-t", "FAB-T", "targeted FAB", ("n_iter", "n_target_classes")),
    _spec("square", "Square", "random search with queries (Andriushchenko et al. 2020)", ("n_queries", "n_restarts"),
          needs_gradient=False),
)  # fmt: skip
