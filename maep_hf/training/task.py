"""What the loop trains: the interface between the loop and the purification and classification tasks."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from ..adaptation import describe_base
from ..data import ImageDataset
from .samples import Augmentation, Draw, PositionedImages, Share, StreamedImages, collate, read_first

logger = logging.getLogger(__name__)


class Task(ABC):
    """A model, its data, its loss and its validation.

    Args:
        model: the network to train.
        train_data: training images.
        validation_data: held-out images; the first `validation_images` of them are used, always the same.
        augmentation: how training images are cut and mirrored.
        validation_images: size of the fixed validation subset.
    """

    name = "task"
    leaves_weights_unused = False  # whether some trainable weights may get no gradient, which DDP must be told

    def __init__(
        self,
        model: nn.Module,
        train_data: ImageDataset,
        validation_data: ImageDataset,
        augmentation: Augmentation,
        validation_images: int = 256,
    ):
        self.model = model
        self.train_data, self.validation_data = train_data, validation_data
        self.augmentation = augmentation
        self.validation_images = validation_images
        self.device = torch.device("cpu")
        self._warned_of_one_class = False

    def to(self, device: torch.device) -> None:
        """Move what the loop does not move itself (surrogates, cached validation images)."""
        self.device = device

    def draw(self) -> Draw | None:
        """Random numbers that a sample carries besides its picture."""
        return None

    def samples(self, total: int, start: int, seed: int, share: Share | None = None) -> Dataset | IterableDataset:
        """The run's samples, of a stream this process's share; see `samples.py` for what makes them resumable."""
        if self.train_data.streaming:
            return StreamedImages(self.train_data, total, self.augmentation, self.draw(), seed, start, share)
        return PositionedImages(self.train_data, total, self.augmentation, self.draw(), seed)

    def validation_batch(self) -> dict[str, Tensor]:
        """The fixed validation images, centre-cropped: `pixel_values` (N, 3, S, S) in [0, 1], `labels` (N,)."""
        center = replace(self.augmentation, crop="center", flip=False)
        samples = read_first(self.validation_data, center, self.validation_images)
        self._warn_of_one_class({sample["labels"] for sample in samples}, len(samples))
        return {key: value.to(self.device) for key, value in collate(samples).items()}

    def _warn_of_one_class(self, labels: set[int], count: int) -> None:
        """Folders of images are stored class by class, so that the first images may all be of the first class."""
        names = self.validation_data.class_names or []
        if count > 1 and len(names) > 1 and len(labels) == 1 and min(labels) >= 0 and not self._warned_of_one_class:
            self._warned_of_one_class = True
            logger.warning(
                "the %d validation images are all of one class of %d: give a shuffled validation_dataset (datasets' "
                "shuffle and save_to_disk), or larger validation_images",
                count, len(names),
            )  # fmt: skip

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Work on a batch before the training step that is timed apart (attacks)."""
        return batch

    def kept(self, model: nn.Module) -> nn.Module:
        """The model that is validated and saved where `model` was trained; the same one by default."""
        return model

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars by name; `loss` is minimised, each a mean over the samples of the batch."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Validation figures by name."""

    def preview(self, model: nn.Module, path: Path) -> None:
        """Write a picture of what the model does now; nothing by default."""
        return None

    @abstractmethod
    def export(self, model: nn.Module, folder: Path) -> None:
        """Save the model so that `from_pretrained(folder)` loads it."""

    def describe_data(self) -> dict[str, Any]:
        """Fingerprints of the data, for `run.json`."""
        described = {}
        for role, data in (("train", self.train_data), ("validation", self.validation_data)):
            described[role] = {
                "fingerprint": data.fingerprint,
                "images": None if data.streaming else len(data),
                "image_column": data.image_column,
                "label_column": data.label_column,
            }
        return described

    def describe_start(self) -> dict[str, str]:
        """Fingerprints of the weights that the run starts from, by the argument that names them, for `run.json`."""
        return {"model": describe_base(self.model)["fingerprint"]}

    def describe_frozen(self) -> dict[str, str]:
        """Fingerprints of the weights that the run is trained against and that stay, likewise, and what is done to
        pixels before them; none by default."""
        return {}
