"""Attacked batches on disk: each is there whole or not at all, which makes an evaluation resumable."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class AttackedStore:
    """Batches of attacked images by the index of their first image.

    Args:
        folder: where they lie; `None` keeps only the first batch, in memory.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._first: tuple[Tensor, dict] | None = None

    def load(self, start: int, like: Tensor | None) -> tuple[Tensor | None, dict]:
        """The batch that begins at `start` and what was noted with it, or `(None, {})` where it is not there.

        Args:
            like: the clean batch, whose device it comes to; of another shape it counts as not there. `None`: any.
        """
        if self.folder is None:
            return self._first if start == 0 and like is None and self._first else (None, {})
        try:
            with safe_open(self._path(start), framework="pt") as file:
                attacked, about = file.get_tensor("attacked"), json.loads(file.metadata()["about"])
        except (FileNotFoundError, SafetensorError):
            return None, {}
        if like is not None and attacked.shape != like.shape:
            return None, {}
        return (attacked if like is None else attacked.to(like.device)), about

    def save(self, start: int, attacked: Tensor, about: dict) -> None:
        if self.folder is None:
            if start == 0:
                self._first = attacked, about
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(start)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        tensors = {"attacked": attacked.detach().to("cpu", torch.float32).contiguous()}
        save_file(tensors, temporary, metadata={"about": json.dumps(about)})
        os.replace(temporary, path)

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:07d}.safetensors"
