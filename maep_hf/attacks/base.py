"""What every attack has in common: norm and radius, options, one guarded call, the check of what comes out.

Radii: in units of 1/255 for Linf (8 = 8/255), in pixel units of the [0, 1] image for L2 and L1, a number of changed
values for L0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from numbers import Real
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .guard import Watched, isolated

NORMS = ("Linf", "L2", "L1", "L0")
EPS_UNIT = {"Linf": "1/255", "L2": "pixels in [0, 1]", "L1": "pixels in [0, 1]", "L0": "changed values"}
DEFAULT_EPS = {"Linf": 8.0, "L2": 0.5, "L1": 12.0}
TOLERANCE = 1e-5
"""Relative overshoot of a ball that is a library's float error; it is projected back, more is an error."""
FLOAT_NOISE = 1e-6
"""Relative overshoot that is left alone, as is that of rounding, so that a library's images come out as they are."""
NO_FLOAT64 = {"mps"}
"""Devices without it."""


@dataclass(frozen=True)
class Option:
    """One option of an attack: its default, what values it takes, and what it means.

    Attributes:
        default: `None` where the attack derives it (a step size from eps, say).
        kind: `int` (at least 1), `float` (at least 0, finite), `bool`, `str` (one of `choices`) or `tuple` (of them).
        positive: of a `float`, whether 0 is none of its values.
    """

    default: Any
    kind: type
    about: str
    choices: tuple[str, ...] = ()
    positive: bool = False

    def checked(self, name: str, value: Any) -> Any:
        """The value in its kind; ValueError naming the option and what it takes."""
        if value is None and self.default is None:
            return None
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if self.kind is int and number and value == int(value) and value >= 1:
            return int(value)
        if self.kind is float and number and (value > 0 or (value == 0 and not self.positive)):
            return float(value)
        if self.kind is bool and isinstance(value, bool):
            return value
        if self.kind is str and value in self.choices:
            return value
        if self.kind is tuple and not isinstance(value, str) and isinstance(value, Sequence) and value:
            if set(value) <= set(self.choices):
                return tuple(value)
        floats = "a number above 0" if self.positive else "a number of at least 0"
        takes = {int: "a whole number of at least 1", float: floats, bool: "True or False"}
        listed = ", ".join(self.choices)
        expected = takes.get(self.kind) or (f"one of {listed}" if self.kind is str else f"a list of {listed}")
        raise ValueError(f"{name}: {value!r} is not {expected} ({self.about})")


@dataclass(frozen=True)
class AttackSpec:
    """One row of the registry.

    Attributes:
        name: as given to [`make_attack`].
        title: as shown in tables.
        description: one line.
        family: the class that runs it.
        implementations: norm (`None` where the attack has none) to the library's class.
        options: name to [`Option`].
        needs_gradient: whether the attack differentiates the model.
        unbounded: whether eps may be left out for the smallest perturbation that the attack finds.
        control: a corruption that knows nothing of the model.
    """

    name: str
    title: str
    description: str
    family: type[Attack]
    implementations: Mapping[str | None, str]
    options: Mapping[str, Option] = field(default_factory=dict)
    needs_gradient: bool = True
    unbounded: bool = False
    control: bool = False

    @property
    def norms(self) -> tuple[str | None, ...]:
        """Norms that it is there for, the default one first; `(None,)` where it is bounded by none."""
        return tuple(self.implementations)

    def make(self, norm: str | None, eps: float | None, options: Mapping[str, Any]) -> Attack:
        """The attack, with everything checked that can be without a model; see [`make_attack`]."""
        unknown = [name for name in options if name not in self.options]
        if unknown:
            accepted = ", ".join(self.options) or "none"
            raise ValueError(f"{self.name} has no option {', '.join(unknown)}; it has: {accepted}")
        values = {
            name: option.checked(name, options.get(name, option.default)) for name, option in self.options.items()
        }
        norm = self._norm(norm)
        return self.family(self, norm, self._eps(norm, eps), values)

    def _norm(self, norm: str | None) -> str | None:
        if norm is None:
            return self.norms[0]
        found = {known.lower(): known for known in NORMS}.get(str(norm).lower())
        if found in self.norms:
            return found
        if self.norms == (None,):
            raise ValueError(f"norm: {self.name} is bounded by no norm, got {norm!r}; leave norm and eps out (None)")
        raise ValueError(f"norm: {self.name} is there for {' and '.join(map(str, self.norms))}, got {norm!r}")

    def _eps(self, norm: str | None, eps: float | None) -> float | None:
        if eps is None:
            return None if self.unbounded or norm is None else DEFAULT_EPS[norm]
        if norm is None:
            raise ValueError(f"eps: {self.name} is bounded by no norm, got {eps!r}; leave eps out (None)")
        if isinstance(eps, bool) or not isinstance(eps, Real) or not math.isfinite(eps) or eps <= 0:
            raise ValueError(f"eps: {eps!r} is not a positive number ({norm}: in units of {EPS_UNIT[norm]})")
        if norm == "Linf" and eps < 0.1:
            raise ValueError(f"eps: {eps:g} is far below a grey level; for Linf it is in units of 1/255: 8, not 8/255")
        if norm == "Linf" and eps > 255:
            raise ValueError(f"eps: {eps:g} is above 255, the whole range; for Linf it is in units of 1/255")
        return float(eps)


@dataclass(frozen=True)
class Attack(ABC):
    """An attack with its parameters; made by [`make_attack`].

    Attributes:
        spec: its row of the registry.
        norm: `Linf`, `L2`, `L1`, `L0` or `None`.
        eps: radius in the unit of the norm (see the module); `None`: the smallest perturbation that is found.
        options: every option with its value.
    """

    spec: AttackSpec
    norm: str | None
    eps: float | None
    options: Mapping[str, Any]

    library = ""
    """Distribution that the attack comes from."""

    def __post_init__(self) -> None:
        if self.library:
            import_library(self.library)

    @property
    def name(self) -> str:
        """As shown in tables."""
        return self.spec.title

    @property
    def needs_gradient(self) -> bool:
        """Whether the model is differentiated; without, the attack is one of a black-box attacker."""
        return self.spec.needs_gradient

    @property
    def control(self) -> bool:
        """Whether this is a corruption that knows nothing of the model."""
        return self.spec.control

    @property
    def radius(self) -> float | None:
        """`eps` in pixel units of the [0, 1] image."""
        return self.in_pixels(self.eps)

    def in_pixels(self, value: float | None) -> float | None:
        """A length in the unit of the norm, in pixel units of the [0, 1] image."""
        return value / 255 if self.norm == "Linf" and value is not None else value

    def __call__(self, model: nn.Module, pixels: Tensor, labels: Tensor, *, seed: int) -> Tensor:
        """Attack one batch in one go.

        What becomes of images that the model has wrong already is up to the library: one-step and iterated gradient
        attacks go on, most others leave them as they are. Images for which a search finds nothing come back as they
        are or clipped to the ball.

        Args:
            model: (B, C, H, W) in [0, 1] -> logits (B, K), in eval mode, on the device of the pixels. Its parameters,
                their gradients and `requires_grad` are left as they were.
            pixels: (B, C, H, W) float32 in [0, 1].
            labels: (B,) integers.
            seed: of everything that is drawn, the model's own draws included. The global random state is left as it
                was. May be called under `torch.no_grad()`.

        Returns:
            Attacked images: shape, dtype and device of `pixels`, in [0, 1] and the ball, detached.

        Raises:
            TypeError: model or logits are of the wrong type.
            ValueError: pixels or labels are not as above, logits are not finite, or the classes are too few.
        """
        labels = _check_batch(model, pixels, labels)
        if len(pixels) == 0:
            return pixels.detach().clone()
        with isolated(model, seed):
            # also of tensors made in inference mode; attack libraries take views of pixels that lie in order
            source = pixels.detach().clone(memory_format=torch.contiguous_format)
            labels = labels.clone()
            attacked = self.run(Watched(model, labels), source, labels, seed)
        return check_attacked(self, pixels.detach(), attacked)

    @abstractmethod
    def run(self, model: Watched, pixels: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Attacked images of one batch, before the check; gradients are enabled and the random state is seeded."""

    def parameters(self) -> dict[str, Any]:
        """Everything but norm and eps that decides what the attack does."""
        return dict(self.options)

    def record(self, num_classes: int | None = None) -> dict[str, Any]:
        """Everything needed to repeat the attack, as JSON values.

        Args:
            num_classes: of the attacked model, for attacks whose parts depend on it.
        """
        return {
            "name": self.name,
            "attack": self.spec.name,
            "library": f"{self.library} {version(self.library)}" if self.library else "torch",
            "implementation": self.spec.implementations[self.norm],
            "norm": self.norm,
            "eps": self.eps,
            "eps_unit": EPS_UNIT[self.norm] if self.norm else None,
            **({"control": True} if self.control else {}),
            **self.parameters(),
        }


def import_library(name: str) -> ModuleType:
    """Import an attack library when it is first needed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"this attack comes from {name} ({error}): pip install 'maep-hf[attacks]'") from error


def check_attacked(attack: Attack, pixels: Tensor, attacked: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """What an attack handed back, once it is known to be inside [0, 1] and the norm ball.

    Args:
        attack: gives `name`, `norm`, `radius` and `control` (a corruption is bounded by no ball).
        pixels: clean images (B, C, H, W) in [0, 1].
        attacked: the attack's images.
        tolerance: overshoot that is projected back, relative to the radius, and absolute for [0, 1]; what rounding to
            the pixels' dtype can add comes on top. Less than float arithmetic resolves is left as it is.

    Raises:
        ValueError: another shape or dtype, NaN or infinite values, or a larger overshoot.
    """
    if attacked.shape != pixels.shape or attacked.dtype != pixels.dtype:
        raise ValueError(
            f"{attack.name} returned {attacked.dtype} of shape {tuple(attacked.shape)} for {pixels.dtype} of shape "
            f"{tuple(pixels.shape)}"
        )
    attacked = attacked.detach()
    broken = int((~attacked.isfinite()).flatten(1).any(1).sum())
    if broken:
        raise ValueError(f"{attack.name} returned NaN or infinite pixels for {broken} of {len(pixels)} images")
    outside = max(float(attacked.max()) - 1, -float(attacked.min()))
    if outside > tolerance:
        raise ValueError(f"{attack.name} left [0, 1] by {outside:.3g}")
    attacked = attacked.clamp(0, 1)
    if attack.radius is None or attack.norm is None or attack.control:
        return attacked
    sizes = perturbation_size(pixels, attacked, attack.norm)
    typical, largest = _rounding(pixels, attack.norm)
    worst = float(sizes.max())
    if worst > attack.radius * (1 + tolerance) + largest:
        raise ValueError(f"{attack.name} left its {attack.norm} ball of {attack.radius:.6g} (in pixels): {worst:.6g}")
    over = sizes > attack.radius * (1 + FLOAT_NOISE) + typical
    if over.any():
        shrink = torch.where(over, attack.radius / sizes, torch.ones_like(sizes))
        shrink, over = shrink.to(pixels.dtype).to(pixels.device), over.to(pixels.device)  # Apple's has no float64
        shrunk = pixels + (attacked - pixels) * shrink.view(-1, 1, 1, 1)
        attacked = torch.where(over.view(-1, 1, 1, 1), shrunk, attacked)
    return attacked


def perturbation_size(pixels: Tensor, attacked: Tensor, norm: str) -> Tensor:
    """Norm of each image's perturbation in pixel units (`L0`: values changed), (B,) in float64.

    On the device of the images, or on the CPU where that has no float64 (Apple's).
    """
    if pixels.device.type in NO_FLOAT64:
        attacked, pixels = attacked.cpu(), pixels.cpu()
    difference = (attacked.double() - pixels.double()).flatten(1)
    order = {"Linf": math.inf, "L2": 2, "L1": 1, "L0": 0}[norm]
    return torch.linalg.vector_norm(difference, order, dim=1)


def _rounding(pixels: Tensor, norm: str) -> tuple[float, float]:
    """What half a unit in the last place of every pixel adds to a norm: in random directions, and at most."""
    half = torch.finfo(pixels.dtype).eps / 2
    values = pixels[0].numel()
    shares = {"Linf": (1, 1), "L2": (1, values**0.5), "L1": (values**0.5, values), "L0": (0, 0)}[norm]
    return half * shares[0], half * shares[1]


def _check_batch(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: a torch.nn.Module is needed, got {type(model).__name__}; see PixelClassifier")
    if pixels.ndim != 4 or pixels.dtype != torch.float32:
        raise ValueError(f"pixels: (B, C, H, W) float32 is needed, got {pixels.dtype} of shape {tuple(pixels.shape)}")
    if labels.shape != pixels.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels: {len(pixels)} integers are needed, got {labels.dtype} {tuple(labels.shape)}")
    if len(pixels) and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError("pixels: values in [0, 1] are needed (8-bit images divided by 255), and no NaN")
    return labels.to(pixels.device, torch.long)
