"""PGD as foolbox does it on any number of images, with eps in units of 1/255 and its protocol as a record."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .base import import_library


@dataclass(frozen=True)
class LinfPGD:
    """PGD in the L-infinity ball, as foolbox does it: random start, signed steps, last iterate.

    Attributes:
        eps, step_size: in units of 1/255.
        steps: number of gradient steps.
        seed: of the random start.
    """

    eps: float = 8.0
    steps: int = 20
    step_size: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.eps <= 255:
            raise ValueError(f"eps: {self.eps:g} is not in (0, 255]; it is given in units of 1/255")
        if self.steps < 1:
            raise ValueError(f"steps: {self.steps} is not a positive number")

    @property
    def name(self) -> str:
        return f"PGD-{self.steps} L∞ {self.eps:g}/255"

    def __call__(
        self, classifier: nn.Module, pixels: Tensor, labels: Tensor, batch_size: int = 20, progress: bool = False
    ) -> Tensor:
        """Attack (N, 3, H, W) pixels in [0, 1] of labels (N,); returns pixels of the same shape, in [0, 1]."""
        foolbox = import_library("foolbox")
        model = foolbox.PyTorchModel(classifier, bounds=(0, 1), device=pixels.device)
        attack = foolbox.attacks.LinfPGD(abs_stepsize=self.step_size / 255, steps=self.steps, random_start=True)
        attacked = []
        with torch.random.fork_rng(devices=[pixels.device] if pixels.is_cuda else []):
            torch.manual_seed(self.seed)
            batches = zip(pixels.split(batch_size), labels.split(batch_size), strict=True)
            total = -(-len(pixels) // batch_size)
            for batch, target in tqdm(batches, desc=self.name, total=total, unit="batch", disable=not progress):
                attacked.append(attack(model, batch, target, epsilons=self.eps / 255)[0].detach())
        return torch.cat(attacked)

    def record(self) -> dict:
        return {
            "name": "PGD",
            "library": f"foolbox {version('foolbox')}",
            "norm": "Linf",
            "eps_255": self.eps,
            "steps": self.steps,
            "step_size_255": self.step_size,
            "random_start": True,
            "differentiates": "the classifier alone",
        }
