"""Controls: corruptions of fixed severity that know nothing of the model, to hold attacks against."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from .base import Attack, AttackSpec, Option
from .guard import Watched

DEFAULT_STD = 8 / 255


@dataclass(frozen=True)
class GaussianNoise(Attack):
    """Gaussian noise, clipped to [0, 1]: of standard deviation `eps` for Linf, of expected size `eps` for L2 and L1."""

    def __post_init__(self) -> None:
        if self.eps is not None and self.options["std"] is not None:
            raise ValueError("std: give either eps, from which it follows, or std (in [0, 1] pixel units)")

    def run(self, model: Watched, pixels: Tensor, labels: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)  # of the CPU: the same noise on every device
        noise = torch.randn(pixels.shape, generator=generator).to(pixels)
        return (pixels + self.std(pixels[0].numel()) * noise).clamp(0, 1)

    def std(self, values: int) -> float:
        """Standard deviation in [0, 1] pixel units for an image of so many values."""
        if self.radius is None:
            return DEFAULT_STD if self.options["std"] is None else self.options["std"]
        return {
            "Linf": self.radius,
            "L2": self.radius / math.sqrt(values),
            "L1": self.radius / (values * math.sqrt(2 / math.pi)),
        }[self.norm]

    def parameters(self) -> dict[str, Any]:
        if self.radius is None:
            return {"std": self.std(1)}
        return {"std": self.radius if self.norm == "Linf" else None, "eps_means": "size of the noise, not a bound"}


@dataclass(frozen=True)
class Corruption(Attack):
    """A defence of `maep_hf.defences` (JPEG, blur) turned on clean images."""

    def __post_init__(self) -> None:
        self._transform()  # refuses options out of range

    def run(self, model: Watched, pixels: Tensor, labels: Tensor, seed: int) -> Tensor:
        with torch.no_grad():
            return self._transform()(pixels)

    def parameters(self) -> dict[str, Any]:
        return self._transform().record()["options"]

    def record(self, num_classes: int | None = None) -> dict[str, Any]:
        library = self._transform().library
        return super().record() | {"library": f"{library} {version(library)}"}

    def _transform(self) -> Any:
        from ..defences import make_defence

        return make_defence(self.spec.name, **self.options)


def _spec(name: str, title: str, description: str, family: type[Attack], norms: dict, option: dict) -> AttackSpec:
    return AttackSpec(name, title, description, family, norms, option, False, unbounded=True, control=True)


SPECS = (
    _spec(
        "gaussian-noise",
        "Gaussian noise",
        "control: noise of std 8/255, of another, or of the size of eps",
        GaussianNoise,
        dict.fromkeys(("Linf", "L2", "L1"), "randn"),
        {"std": Option(None, float, "standard deviation in [0, 1] pixel units; 8/255 without eps")},
    ),
    _spec(
        "gaussian-blur",
        "Gaussian blur",
        "control: blur",
        Corruption,
        {None: "GaussianBlur"},
        {"sigma": Option(1.0, float, "standard deviation of the kernel in pixels", positive=True)},
    ),
    _spec(
        "jpeg",
        "JPEG",
        "control: compression",
        Corruption,
        {None: "JPEG"},
        {"quality": Option(75, int, "1 to 100")},
    ),
)
