"""The images of an evaluation: the first so many readable ones of a dataset, of one size, with their labels."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from ..data import DataError, ImageDataset, decode_image, names_that_differ, numbers_as_text, same_names_in_order
from ..tensors import tensor_bytes

logger = logging.getLogger(__name__)

FEW = 20
"""Images of which nobody can tell by their classes that they are sorted."""
SORTED_SHARE = 0.7
"""Of the classes that images drawn at random would be of; below it they are taken for sorted."""


@dataclass(frozen=True)
class EvaluationImages:
    """Labelled images of one size.

    Attributes:
        pixels: (N, 3, H, W), uint8 as decoded, or floats in [0, 1].
        labels: (N,) class indices.
        name, split: of the dataset, for the record.
        class_names: in the order of the labels; `None` where the dataset names none.
        broken: how many images could not be read and were passed over.
    """

    pixels: Tensor
    labels: Tensor
    name: str = "tensors"
    split: str | None = None
    broken: int = 0
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.labels.shape != self.pixels.shape[:1] or not len(self.labels):
            raise DataError(
                f"dataset: needs pixels (N, 3, H, W) and labels (N,) with N > 0, got {tuple(self.pixels.shape)} and "
                f"{tuple(self.labels.shape)}"
            )
        if self.labels.is_floating_point() or self.labels.is_complex():
            raise DataError(f"dataset: labels must be class indices, got {self.labels.dtype}")

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, first: int, last: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Pixels in [0, 1], float32, and labels of the images `first` to `last` (exclusive), on `device`."""
        pixels = self.pixels[first:last].to(device)
        pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
        return pixels, self.labels[first:last].long().to(device)

    def first(self, count: int | None) -> EvaluationImages:
        """The first `count` images; all of them for `None`."""
        if count is None or count >= len(self):
            return self
        return replace(self, pixels=self.pixels[:count], labels=self.labels[:count])

    @property
    def classes(self) -> int | None:
        """How many the dataset names; `None` where it names none."""
        return len(self.class_names) if self.class_names else None

    def in_order_of(self, names: Sequence[str] | None) -> EvaluationImages:
        """The same images with labels that mean the classes of a classifier, where it has those of the dataset by name.

        A folder of images has its classes in the order of the alphabet, which need not be the classifier's; where the
        names are not the same, nothing is known and nothing changed.

        Args:
            names: the classifier's, in the order of its logits; `None` where it has none.

        Raises:
            DataError: there are labels that none of the dataset's names is of.
        """
        order = same_names_in_order(names, self.class_names)
        if order is None:
            if differ := names_that_differ(self.class_names, names):
                logger.warning("dataset: its class names are not the classifier's (%s); taken by index", differ)
            if doubt := numbers_as_text(names, self.class_names):
                logger.warning("dataset: %s", doubt)
            return self
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(order):
            raise DataError(f"dataset: labels go from {low} to {high}, and it names {len(order)} classes")
        logger.warning("dataset: its classes stand in another order than the classifier's; they are matched by name")
        return replace(self, labels=torch.tensor(order)[self.labels.long().cpu()], class_names=tuple(names))

    def describe(self) -> dict:
        """Which images these are, for the record: their fingerprint is of pixels and labels."""
        skipped = f" readable ({self.broken} broken passed over)" if self.broken else ""
        return {
            "name": self.name,
            "split": self.split,
            "images": f"the first {len(self)}{skipped}",
            "n": len(self),
            "size": list(self.pixels.shape[-2:]),
            "fingerprint": fingerprint_images(self.pixels, self.labels),
        }


def fingerprint_images(pixels: Tensor, labels: Tensor) -> str:
    """Hash of images and labels, as they are stored."""
    digest = hashlib.sha256()
    for tensor in (pixels, labels):
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:16]


def read_images(
    dataset: ImageDataset, max_images: int | None = None, image_size: int | None = None, name: str = "", split: str = ""
) -> EvaluationImages:
    """Decode the first `max_images` readable images, in stored order; a broken one is passed over with a warning.

    Args:
        dataset: with labels.
        max_images: how many; all of them when `None`.
        image_size: shorten the short side to this many pixels (bicubic) and cut the centre square; `None` keeps the
            images as they are, which must then all have one size.

    Raises:
        DataError: no labels, an image without one, images of different sizes, or none that can be read.
    """
    if dataset.label_column is None:
        raise DataError(f"dataset: it has no labels, and accuracy needs them; {dataset.no_labels}")
    if max_images is not None and max_images < 1:
        raise DataError(f"max_images={max_images}: must be at least 1")
    arrays: list[np.ndarray] = []
    labels: list[int] = []
    broken, cut = 0, False
    for index, row in enumerate(dataset.rows):
        if max_images is not None and len(arrays) == max_images:
            cut = True
            break
        try:
            image = decode_image(row[dataset.image_column])
        except OSError as error:
            broken += 1
            logger.warning("dataset: image %d is passed over: %s", index, error)
            continue
        label = dataset.label(row)
        if label < 0:
            raise DataError(f"dataset: image {index} has no label; leave such images out of an evaluation")
        array = np.asarray(image if image_size is None else _center_square(image, image_size))
        if arrays and array.shape != arrays[0].shape:
            raise DataError(
                f"dataset: image {index} has {array.shape[1]} x {array.shape[0]} pixels, the first one "
                f"{arrays[0].shape[1]} x {arrays[0].shape[0]}; give image_size to bring them to one size"
            )
        arrays.append(array)
        labels.append(label)
    if not arrays:
        raise DataError("dataset: none of its images can be read")
    if cut and not dataset.streaming:
        _warn_if_sorted(labels, _count_labels(dataset))
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    names = tuple(dataset.class_names) if dataset.class_names else None
    return EvaluationImages(pixels, torch.tensor(labels), name, split or None, broken, names)


def _count_labels(dataset: ImageDataset) -> Counter[int | None]:
    """How often each label is stored; counted by arrow, since a million rows one by one take a minute."""
    column = dataset.rows.select_columns([dataset.label_column]).with_format("arrow")[:][dataset.label_column]
    return Counter({entry["values"]: entry["counts"] for entry in column.value_counts().to_pylist()})


def _warn_if_sorted(labels: list[int], stored: Counter[int | None]) -> None:
    """A folder of images is listed class by class, so that its first images are of its first classes alone.

    Args:
        labels: of the first images.
        stored: how often the whole dataset has each label; a class that is only named, or rare, is not missed.
    """
    if len(labels) < FEW:
        return
    found = len(set(labels))
    counts = [count for label, count in stored.items() if label is not None and label >= 0]
    total = sum(counts)
    drawn = sum(1 - (1 - count / total) ** len(labels) for count in counts)  # that as many random images would be of
    if found < SORTED_SHARE * drawn:
        logger.warning(
            "dataset: the first %d images are of %d of %d classes, so they seem to be sorted by class: shuffle the "
            "dataset, or take more with max_images", len(labels), found, len(counts),
        )  # fmt: skip


def _center_square(image: PILImage.Image, size: int) -> PILImage.Image:
    width, height = image.size
    scale = size / min(width, height)
    if scale != 1:
        width, height = max(size, round(width * scale)), max(size, round(height * scale))
        image = image.resize((width, height), PILImage.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
