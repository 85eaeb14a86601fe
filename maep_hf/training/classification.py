"""Training a classifier: the surrogate that purifiers are trained against, and that the demo attacks."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attacks import pgd
from ..classifier import PixelClassifier
from ..data import DataError, ImageDataset
from ..modeling_cifar_resnet import CifarResNetForImageClassification
from .samples import Augmentation
from .task import Task


class ClassificationTask(Task):
    """Cross-entropy on augmented images.

    Args:
        model: a transformers image classifier.
        image_processor: its image processor, saved beside it; its mean and std normalise the pixels.
        label_smoothing: share of the target spread over all classes.
    """

    name = "classifier"

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor,
        train_data: ImageDataset,
        validation_data: ImageDataset,
        augmentation: Augmentation,
        validation_images: int = 1000,
        label_smoothing: float = 0.0,
    ):
        super().__init__(model, train_data, validation_data, augmentation, validation_images)
        if train_data.label_column is None:
            raise DataError(f"a classifier needs labels: {train_data.no_labels}")
        # others may have weights for another purpose, such as the mask token of a dinov2; looking for them takes time
        self.leaves_weights_unused = not isinstance(model, CifarResNetForImageClassification)
        self.image_processor = image_processor
        self.label_smoothing = label_smoothing
        self._validation: dict[str, Tensor] | None = None

    def _normalize(self, pixel_values: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(values, device=pixel_values.device).view(1, -1, 1, 1)
            for values in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        return (pixel_values - mean) / std

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self._expect_labels(batch["labels"], "training")
        pixel_values = self._normalize(batch["pixel_values"]).contiguous(memory_format=torch.channels_last)
        logits = model(pixel_values=pixel_values).logits.float()
        loss = F.cross_entropy(logits, batch["labels"], label_smoothing=self.label_smoothing)
        accuracy = (logits.argmax(-1) == batch["labels"]).float().mean()
        return {"loss": loss, "accuracy": accuracy}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy (%) on the validation images, clean and under PGD-10 at 8/255 (the first 128)."""
        if self._validation is None:
            self._validation = self.validation_batch()
        pixel_values, labels = self._validation["pixel_values"], self._validation["labels"]
        self._expect_labels(labels, "validation")
        classifier = PixelClassifier(model, self.image_processor)
        logits = torch.cat([classifier(chunk) for chunk in pixel_values.split(250)])
        attacked = pgd(classifier, pixel_values[:128], labels[:128], eps=8, steps=10)
        return {
            "loss": F.cross_entropy(logits, labels).item(),
            "accuracy_clean": 100 * (logits.argmax(-1) == labels).float().mean().item(),
            "accuracy_pgd10_8": 100 * (classifier(attacked).argmax(-1) == labels[:128]).float().mean().item(),
        }

    def export(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def _expect_labels(self, labels: Tensor, role: str) -> None:
        (low, high), classes = torch.stack(labels.aminmax()).tolist(), self.model.config.num_labels
        if low < 0:
            raise DataError("an image has no label: leave such images out of the dataset of a classifier")
        if high >= classes:
            raise DataError(
                f"an image of the {role} dataset has the class index {high}, and the classifier has the {classes} "
                "classes of the training dataset: leave such images out, or let the training dataset name all classes "
                "(datasets' ClassLabel) or have images of each"
            )
