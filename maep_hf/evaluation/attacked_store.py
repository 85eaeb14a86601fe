"""Attacked batches on disk: each is there whole or not at all, which makes an evaluation resumable."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..storage import write_tensors
from .images import fingerprint_images


class AttackedStore:
    """Batches of attacked images by the clean ones, so that an evaluation of more images finds those of fewer.

    Args:
        folder: where they lie; `None` keeps only the first batch, in memory.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._first: tuple[Tensor, dict] | None = None

    def load(self, start: int, x: Tensor, y: Tensor) -> tuple[Tensor | None, dict]:
        """The attacked batch, on the device of `x`, and what was noted with it; `(None, {})` where it is not there.

        Args:
            start: index of its first image.
            x: (B, 3, H, W), the clean images.
            y: (B,), their labels.
        """
        if self.folder is None:
            return self._first if start == 0 and self._first else (None, {})
        try:
            with safe_open(self._path(start, x, y), framework="pt") as file:
                return file.get_tensor("attacked").to(x.device), json.loads(file.metadata()["about"])
        except (FileNotFoundError, SafetensorError):
            return None, {}

    def save(self, start: int, x: Tensor, y: Tensor, attacked: Tensor, about: dict) -> None:
        """Keep the attacked images of a batch; see [`~AttackedStore.load`].

        Raises:
            OSError: the file cannot be written.
        """
        if self.folder is None:
            if start == 0:
                self._first = attacked, about
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {"attacked": attacked.detach().to("cpu", torch.float32).contiguous()}
        write_tensors(self._path(start, x, y), tensors, {"about": json.dumps(about)})

    def _path(self, start: int, x: Tensor, y: Tensor) -> Path:
        return self.folder / f"{start:07d}-{fingerprint_images(x, y)}.safetensors"
