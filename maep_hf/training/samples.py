"""Training samples that depend on (seed, position) alone.

Every random draw of a sample (which image, crop, flip, mask, attack) comes from a generator seeded by the run's seed
and the sample's position in the run. So an interrupted run resumes exactly by starting at a later position, and neither
batch size, accumulation, worker count nor number of processes changes what is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..data import DataError, ImageDataset, decode_image

Draw = Callable[[np.random.Generator, dict], dict[str, torch.Tensor]]  # of a sample's generator and its row
DECODE_ERRORS = (OSError,)  # what decode_image raises
CROPS = ("native", "resized", "mixed", "center")


@dataclass(frozen=True)
class Augmentation:
    """How a picture becomes a square of `image_size` pixels.

    Args:
        image_size: side of the square, pixels.
        crop: `native` cuts a window at the picture's own scale, `resized` brings the short side to `resize` first,
            `mixed` tosses a coin, `center` is `resized` without randomness. Smaller pictures are enlarged.
        resize: what `resized` brings the short side to, pixels; `image_size` by default. A larger one cuts windows
            out of pictures at the scale that they are used at.
        padding: reflected border, pixels, added before the random crop.
        flip: mirror half of the pictures.
        max_zoom: pictures are enlarged up to so many times before a window is cut, the factor drawn log-uniformly: a
            window of a large picture is smoother than a small picture, and the purifier is to know both. 1 is off.
        zoom_share: share of the samples that are.

    Raises:
        ValueError: an unknown crop, a `resize` below `image_size`, a zoom below 1, or a share outside [0, 1].
    """

    image_size: int = 32
    crop: str = "mixed"
    padding: int = 0
    flip: bool = True
    max_zoom: float = 1.0
    zoom_share: float = 0.5
    resize: int | None = None

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f"crop={self.crop!r}: must be one of {', '.join(CROPS)}")
        if self.resize is not None and self.resize < self.image_size:
            raise ValueError(f"resize={self.resize}: must be at least image_size={self.image_size}, which is cut out")
        if not self.max_zoom >= 1:
            raise ValueError(f"max_zoom={self.max_zoom}: must be at least 1, which is off")
        if not 0 <= self.zoom_share <= 1:
            raise ValueError(f"zoom_share={self.zoom_share}: must be in [0, 1]")

    def __call__(self, images: list[PILImage.Image], rng: np.random.Generator) -> list[torch.Tensor]:
        """Apply one draw to all `images` alike (an image and its attacked version); uint8 tensors (3, S, S)."""
        size = self.image_size
        native = self.crop == "native" or (self.crop == "mixed" and rng.random() < 0.5)
        width, height = images[0].size
        short = min(width, height)
        scale = max(size, short if native else self.resize or size) / short
        if scale != 1:
            width, height = max(size, round(width * scale)), max(size, round(height * scale))
        random_crop = self.crop != "center"
        if random_crop and self.max_zoom > 1 and rng.random() < self.zoom_share:
            zoom = self.max_zoom ** rng.random()
            width, height = round(width * zoom), round(height * zoom)
        padding = self.padding if random_crop else 0
        top, left = (height + 2 * padding - size) // 2, (width + 2 * padding - size) // 2
        if random_crop:
            top = int(rng.integers(height + 2 * padding - size + 1))
            left = int(rng.integers(width + 2 * padding - size + 1))
        flip = self.flip and rng.random() < 0.5
        out = []
        for image in images:
            if image.size != (width, height):
                image = image.resize((width, height), PILImage.Resampling.BICUBIC)
            pixels = np.asarray(image)
            if padding:
                pixels = np.pad(pixels, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
            pixels = pixels[top : top + size, left : left + size]
            if flip:
                pixels = pixels[:, ::-1]
            out.append(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))))
        return out


def make_sample(
    dataset: ImageDataset, row: dict, augmentation: Augmentation, draw: Draw | None, seed: int, position: int
) -> dict[str, Any]:
    """One row as a sample: `pixel_values` and, where stored, `adversarial_pixel_values`, uint8 (3, S, S), `labels`,
    `position`, and the draw.

    Raises:
        OSError: the image is broken.
    """
    columns = [name for name in (dataset.image_column, dataset.adversarial_column) if name]
    rng = np.random.default_rng((seed, position))
    tensors = augmentation([decode_image(row[name]) for name in columns], rng)
    sample: dict[str, Any] = {"pixel_values": tensors[0], "labels": dataset.label(row), "position": position}
    if len(tensors) > 1:
        sample["adversarial_pixel_values"] = tensors[1]
    if draw is not None:
        sample.update(draw(rng, row))
    return sample


class PositionedImages(Dataset):
    """`total` samples over shuffled epochs of a map-style dataset, addressed by position.

    A broken image is replaced by the next good one, and its row is named in the sample's `broken` entry (-1 for none).
    """

    def __init__(
        self, dataset: ImageDataset, total: int, augmentation: Augmentation, draw: Draw | None = None, seed: int = 0
    ):
        self.dataset, self.total, self.augmentation, self.draw, self.seed = dataset, total, augmentation, draw, seed
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.total

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.dataset))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch, 1)).permutation(len(self.dataset)))
        return int(self._order[1][offset])

    def __getitem__(self, position: int) -> dict[str, Any]:
        first = self._index(position)
        for step in range(len(self.dataset)):
            index = (first + step) % len(self.dataset)
            try:
                row = self.dataset.rows[index]
                sample = make_sample(self.dataset, row, self.augmentation, self.draw, self.seed, position)
            except DECODE_ERRORS:
                continue
            return sample | {"broken": first if step else -1}
        raise DataError("none of the dataset's images can be decoded")


@dataclass(frozen=True)
class Share:
    """One of several processes that take turns at a stream, `batch_size` samples each: only these need be decoded."""

    process: int = 0
    processes: int = 1
    batch_size: int = 1

    def has(self, position: int) -> bool:
        return position // self.batch_size % self.processes == self.process


class StreamedImages(IterableDataset):
    """The same over a streamed dataset: shuffled in a buffer, epoch after epoch, from `start` on.

    A stream is read in one piece, so a loader may use one worker at most. Every process reads it whole and decodes its
    own `share`; in the place of the others' samples there is `None`, which Accelerate's loader leaves out.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        total: int,
        augmentation: Augmentation,
        draw: Draw | None = None,
        seed: int = 0,
        start: int = 0,
        share: Share | None = None,
        shuffle_buffer: int = 10_000,
    ):
        self.dataset, self.total, self.augmentation, self.draw, self.seed = dataset, total, augmentation, draw, seed
        self.start, self.share = start, share or Share()
        self._rows = dataset.rows.shuffle(seed=seed, buffer_size=shuffle_buffer)

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(f"dataloader_num_workers={worker.num_workers}: a stream is read by one at most")
        waiting: list[int] = []  # positions of broken images that wait for the next good one
        waiting_since = 0
        for position, (epoch, row) in enumerate(self._endless()):
            if position >= self.total and not waiting:
                return
            if position < self.start:
                continue
            positions = [*waiting, position] if position < self.total else waiting
            try:
                samples = [
                    make_sample(self.dataset, row, self.augmentation, self.draw, self.seed, each)
                    if self.share.has(each)
                    else None
                    for each in positions
                ]
            except DECODE_ERRORS:
                waiting_since = waiting_since if waiting else epoch
                if epoch > waiting_since + 1:  # a whole epoch went by
                    raise DataError("none of the dataset's images can be decoded") from None
                waiting = positions
                continue
            for each, sample in zip(positions, samples, strict=True):
                yield sample and sample | {"broken": -1 if each == position else each}
            waiting = []

    def _endless(self) -> Iterator[tuple[int, dict]]:
        for epoch in count():
            self._rows.set_epoch(epoch)
            empty = True
            for rows in self._rows.iter(batch_size=1):  # plain iteration is shuffled otherwise in a loader's worker
                empty = False
                yield epoch, {name: values[0] for name, values in rows.items()}
            if empty:
                raise DataError("the streamed dataset holds no images")


def read_first(dataset: ImageDataset, augmentation: Augmentation, count: int) -> list[dict[str, Any]]:
    """The first `count` readable images in stored order as samples (fewer where the dataset has fewer)."""
    samples: list[dict[str, Any]] = []
    for row in dataset.rows:
        if len(samples) == count:
            break
        try:
            samples.append(make_sample(dataset, row, augmentation, None, 0, len(samples)))
        except DECODE_ERRORS:
            continue
    if not samples:
        raise DataError("none of the dataset's images can be decoded")
    return samples


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack samples; pictures become float32 in [0, 1], (B, 3, S, S)."""
    batch: dict[str, torch.Tensor] = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        stacked = torch.stack(values) if isinstance(values[0], torch.Tensor) else torch.tensor(values)
        batch[key] = stacked.float().div_(255) if stacked.dtype == torch.uint8 else stacked
    return batch
