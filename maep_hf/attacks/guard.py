"""What stands between an attack library and the caller's model and process: nothing of an attack is left behind."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..random_states import seeded


@contextmanager
def isolated(model: nn.Module, seed: int) -> Iterator[None]:
    """Gradients on, random state seeded and parameters frozen inside; all as before outside.

    The libraries draw from the global states of torch and NumPy, and their `backward()` would fill the gradients of
    the parameters, at the cost of computing them. foolbox logs in a way that sets up logging to the terminal.
    """
    quiet = logging.NullHandler()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.inference_mode(False), torch.enable_grad(), seeded(seed):
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            logging.root.addHandler(quiet)
            yield
        finally:
            logging.root.removeHandler(quiet)
            for parameter in trained:
                parameter.requires_grad_(True)


class Watched(nn.Module):
    """The attacked model; its logits are held to what the libraries take for granted.

    Where the pixels get no gradient (from a model that detaches) or one that is not finite, the attack sees zeros and
    the caller a warning, rather than an error or NaN pixels in the middle of an attack: whether an attack on such a
    model means anything is for an evaluation's checks to say.

    Attributes:
        num_classes: known after the first pass.
    """

    def __init__(self, model: nn.Module, labels: Tensor):
        super().__init__()
        self.model = model
        self.training = False
        name = getattr(model, "name", None)
        self.name = name if isinstance(name, str) else type(model).__name__
        self.num_classes: int | None = None
        self._labels = labels
        if any(module.training for module in model.modules() if isinstance(module, _BatchNorm)):
            raise ValueError(f"model: {self.name} is in training mode, where images influence each other; call eval()")

    def forward(self, pixels: Tensor) -> Tensor:
        differentiated = pixels.requires_grad and torch.is_grad_enabled()
        seen = pixels
        if differentiated:
            seen = pixels.view_as(pixels)  # takes a hook of this pass alone
            seen.register_hook(self._finite)
        logits = self.model(seen)
        if self.num_classes is None:
            self._check(pixels, logits)
        if not logits.isfinite().all():
            if not pixels.isfinite().all():
                raise ValueError(f"the attack gave {self.name} NaN or infinite pixels")
            rows = int((~logits.isfinite()).any(1).sum())
            raise ValueError(f"{self.name} returns NaN or infinite logits for {rows} of {len(pixels)} images")
        if differentiated and not logits.requires_grad:
            warnings.warn(f"{self.name} gives the pixels no gradient; the attack sees zeros", stacklevel=2)
            logits = logits + 0 * pixels.flatten(1).sum(1, keepdim=True)
        return logits

    @torch.no_grad()
    def classes(self, pixels: Tensor) -> int:
        """Number of classes, by one pass where none has been made."""
        if self.num_classes is None:
            self(pixels[:1])
        return self.num_classes

    def _finite(self, gradient: Tensor) -> Tensor | None:
        """Hook on the gradient of the pixels; `None` keeps it."""
        broken = ~gradient.isfinite().flatten(1).all(1)
        if not broken.any():
            return None
        count = f"{int(broken.sum())} of {len(broken)} images"
        warnings.warn(f"{self.name} gives {count} a NaN or infinite gradient; the attack sees zeros", stacklevel=2)
        return torch.where(broken.view(-1, 1, 1, 1), torch.zeros_like(gradient), gradient)

    def _check(self, pixels: Tensor, logits: Tensor) -> None:
        if not isinstance(logits, Tensor):
            raise TypeError(f"{self.name} returns {type(logits).__name__}, not logits; wrap it in PixelClassifier")
        if logits.ndim != 2 or len(logits) != len(pixels) or logits.shape[1] < 2:
            raise ValueError(
                f"{self.name} returns shape {tuple(logits.shape)} for {len(pixels)} images; logits (B, K) of at least "
                "2 classes are needed"
            )
        low, high = int(self._labels.min()), int(self._labels.max())
        if low < 0 or high >= logits.shape[1]:
            wrong = low if low < 0 else high
            raise ValueError(f"labels: {wrong} is none of the {logits.shape[1]} classes of {self.name}")
        self.num_classes = logits.shape[1]
