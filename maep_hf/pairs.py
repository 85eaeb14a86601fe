"""Stored pairs: every image of a dataset attacked on frozen surrogates and written beside its clean version.

For machines that are too small to attack while they train, and for sharing what a purifier was trained on. Every draw
depends on (seed, copy, index) alone and every shard on its own images, so an interrupted run goes on at the first
missing shard, and on the same machine the result is byte for byte that of a run that was never interrupted.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image as PILImage
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from .attacks import KINDS, AttackMixture, AttackParameters, perturb
from .classifier import PixelClassifier
from .classifier_sources import count_classes, match_classes
from .data import OTHER_CLASSES, DataError, ImageDataset, decode_image, expect_classes, load_image_dataset
from .devices import pick_device
from .records import describe_environment, write_json
from .tensors import weights_fingerprint
from .training.run_folder import LOCK, RunFolder, RunFolderError, preprocessing_of
from .training.samples import DECODE_ERRORS, Augmentation, collate, read_first
from .training.stages import AttackArguments, load_surrogates

logger = logging.getLogger(__name__)

RECORD = "make_pairs.json"
UNFINISHED = ".unfinished"  # hidden: nothing loads a folder that is not complete
ROW_GROUP = 100  # images that a reader of the parquet files holds at once
PIXELS_AT_ONCE = 2**22  # of large pictures so many are decoded and attacked together, or one


@dataclass
class PairsArguments:
    """Which images are attacked, on which classifiers, and where the pairs go; names as in training.

    Raises:
        ValueError: a value out of its range; the message names it.
    """

    dataset: str = field(
        default="uoft-cs/cifar10",
        metadata={"help": "Hub id, folder of images or parquet, .parquet file, saved dataset, or embedded:cifar10"},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration name of a Hub dataset"})
    train_split: str = field(default="train", metadata={"help": "split to attack"})
    image_column: str | None = field(
        default=None, metadata={"help": "column of images; found by itself when there is one"}
    )
    label_column: str | None = field(default=None, metadata={"help": "column of class indices; found by itself"})
    streaming: bool = field(default=False, metadata={"help": "read while attacking instead of downloading first"})
    max_train_images: int | None = field(default=None, metadata={"help": "attack only the first so many images"})
    image_size: int | None = field(
        default=None,
        metadata={"help": "shrink and centre-crop to a square of so many pixels; their own size by default"},
    )
    surrogates: list[str] = field(
        default_factory=lambda: ["checkpoints/resnet20-cifar10"],
        metadata={"help": "frozen classifiers that images are attacked on: folders or Hub ids"},
    )
    attack_labels: str = field(default="true", metadata={"help": "true or predicted"})
    output_dir: str = field(default="data/pairs", metadata={"help": "folder of the new dataset"})
    copies: int = field(default=1, metadata={"help": "pairs made of every image, each with its own attack"})
    batch_size: int = field(default=128, metadata={"help": "images attacked at once"})
    shard_images: int = field(default=1000, metadata={"help": "images in a file; a restart goes on at a whole file"})
    seed: int = field(default=0, metadata={"help": "seed of every random draw"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "start over in a folder that holds pairs"})

    def __post_init__(self) -> None:
        for name in ("copies", "batch_size", "shard_images", "image_size", "max_train_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must not be negative")
        if not self.surrogates:
            raise ValueError("surrogates: at least one classifier is needed to attack")
        if self.attack_labels not in ("true", "predicted"):
            raise ValueError(f"attack_labels={self.attack_labels!r}: must be true or predicted")


def make_pairs(args: PairsArguments, attack: AttackArguments) -> Path:
    """Attack every image of a dataset once per copy and store the pairs, or go on where an interrupted run stopped.

    The folder holds `data/train-00000-of-000NN.parquet` with the columns `image` and `adversarial_image` (PNG, equal
    size), `label` (where the dataset has one), `eps` (units of 1/255, the radius drawn, of which 8 bits show the
    whole levels; 0 for clean), `attack` (one of [`maep_hf.attacks.KINDS`]), `surrogate` (the classifier attacked;
    null where none was) and `index` (row of the source dataset), and the record `make_pairs.json`.
    `datasets.load_dataset(folder)` reads it, and so does training (`--dataset FOLDER`, with `--validation_dataset`
    for held-out images). Until all is done, the files lie in a hidden folder.

    Images keep their size unless `image_size` is given, for a surrogate's own resize is part of what is attacked; one
    without an image processor must take the images as they are.

    Returns:
        The folder.

    Raises:
        maep_hf.data.DataError: the dataset cannot be read, has no usable labels, or none of its images can be decoded.
        RunFolderError: the folder cannot be written, holds something else or pairs made with other arguments, or
            another start is still at it.
        OSError, ValueError: a surrogate that cannot be loaded, or whose logits or gradients are not finite, or shares
            and ranges that make no mixture.
    """
    if attack.pgd_l2:
        raise ValueError(
            f"pgd_l2={attack.pgd_l2}: stored images have 8 bits, rounding takes an L2 perturbation out of its ball or "
            "undoes it; use 0 here and attack while training"
        )
    if attack.eps_min < 1:
        raise ValueError(f"eps_min={attack.eps_min}: stored images have 8 bits, a radius below 1 (of 255) changes none")
    folder = RunFolder(args.output_dir)
    folder.record = folder.path / RECORD
    _refuse_other_content(folder.path)
    with folder.held():
        _make(folder, args, attack)
    return folder.path


def _make(folder: RunFolder, args: PairsArguments, attack: AttackArguments) -> None:
    dataset = load_image_dataset(
        args.dataset,
        args.train_split,
        config_name=args.dataset_config,
        image_column=args.image_column,
        label_column=args.label_column,
        streaming=args.streaming,
        max_images=args.max_train_images,
    )
    mixture = attack.mixture(len(args.surrogates))
    transformers_logging.disable_progress_bar()
    surrogates = load_surrogates(args.surrogates)
    attacker = _Attacker(args, dataset, surrogates, mixture)
    arguments = {"pairs": asdict(args), "attack": asdict(attack)}
    data = {"dataset": dataset.fingerprint, "surrogates": [weights_fingerprint(model) for model in surrogates]}
    start = preprocessing_of(args.surrogates, surrogates)
    if args.overwrite_output_dir:
        doomed = [path for path in (folder.path / "data", folder.path / UNFINISHED) if path.exists()]
        folder.refuse_overwriting(arguments, doomed)
        for stale in doomed:
            shutil.rmtree(stale, ignore_errors=True)
        folder.record.unlink(missing_ok=True)
    folder.prepare(arguments, data, checkpoint_bytes=0, kept=0, overwrite=False, start=start)
    if not folder.record.is_file():
        write_json(folder.record, {"arguments": arguments, "data": data, "start": start, **describe_environment()})
    shards = _Shards(folder.path, args, dataset)
    if shards.finished:
        logger.info("%s is complete; nothing is left to do", folder.path)
    else:
        _attack_all(args, dataset, attacker, shards)
        shards.finish(folder.record)


def quantise(adversarial: Tensor, clean: Tensor, eps: Tensor) -> Tensor:
    """8-bit attacked images that stay inside the ball exactly: rounded to the nearest level, or towards the clean one.

    Args:
        adversarial: (B, C, H, W) in [0, 1].
        clean: (B, C, H, W), uint8.
        eps: (B,) radius in units of 1/255.

    Returns:
        uint8 (B, C, H, W); in levels of 0 to 255, `|adversarial - clean| <= eps` for every pixel.
    """
    radius = eps.floor().to(torch.int32).view(-1, 1, 1, 1)
    change = (adversarial * 255).round().to(torch.int32) - clean.to(torch.int32)
    change = torch.minimum(torch.maximum(change, -radius), radius)
    return (clean.to(torch.int32) + change).clamp(0, 255).to(torch.uint8)


class _Attacker:
    """Turns rows of the source dataset into rows of pairs."""

    def __init__(
        self,
        args: PairsArguments,
        dataset: ImageDataset,
        surrogates: Sequence[PixelClassifier],
        mixture: AttackMixture,
    ):
        self.args, self.dataset, self.mixture = args, dataset, mixture
        self.device = pick_device("auto")
        self.surrogates = [model.to(self.device) for model in surrogates]
        self.crop = Augmentation(args.image_size, crop="center", flip=False) if args.image_size else None
        self.true_labels = args.attack_labels == "true"
        if self.true_labels:
            if dataset.label_column is None:
                raise DataError(f"the dataset has no labels: {dataset.no_labels}, or use attack_labels=predicted")
            height, width = self._first_size()
            self.num_classes = [count_classes(model, height, width) for model in self.surrogates]
            self._expect_classes(len(dataset.class_names or []))
            match_classes(self.surrogates, dataset.class_names)

    def _expect_classes(self, found: int, named: bool = True) -> None:
        for name, classes in zip(self.args.surrogates, self.num_classes, strict=True):
            expect_classes(found, classes, f"the surrogate {name}", OTHER_CLASSES, named)

    def _first_size(self) -> tuple[int, int]:
        """Height and width that the first readable picture is attacked at."""
        if self.args.image_size:
            return self.args.image_size, self.args.image_size
        first = read_first(self.dataset, lambda images, rng: [self._pixels(image, rng) for image in images], 1)
        return tuple(first[0]["pixel_values"].shape[1:])

    def __call__(self, batch: list[tuple[int, int, dict]]) -> tuple[list[dict[str, Any]], list[int]]:
        """The batch's (copy, index, row) as rows of pairs in the same order, and the indices of broken images."""
        rows: list[dict[str, Any]] = []  # filled as the images of one size are enough for a batch of their own
        waiting: dict[tuple[int, ...], list[tuple[int, dict]]] = {}
        broken: list[int] = []

        def attack(size: tuple[int, ...]) -> None:
            chosen = waiting.pop(size)
            for (slot, _), row in zip(chosen, self._attack([sample for _, sample in chosen]), strict=True):
                rows[slot] = row

        for copy, index, row in batch:
            rng = np.random.default_rng((self.args.seed, copy, index))
            try:
                pixels = self._pixels(decode_image(row[self.dataset.image_column]), rng)
            except DECODE_ERRORS:
                broken.append(index)
                continue
            label = self.dataset.label(row)
            if self.true_labels:
                self._expect_classes(label + 1, named=False)
            size = tuple(pixels.shape)
            sample = {"pixel_values": pixels, "labels": label, "index": index} | self.mixture.draw(rng, size)
            waiting.setdefault(size, []).append((len(rows), sample))
            rows.append({})
            if (len(waiting[size]) + 1) * size[1] * size[2] > PIXELS_AT_ONCE:
                attack(size)
            elif sum(len(each) * h * w for (_, h, w), each in waiting.items()) > PIXELS_AT_ONCE:
                for each in list(waiting):
                    attack(each)
        for each in list(waiting):
            attack(each)
        return rows, broken

    def _pixels(self, image: PILImage.Image, rng: np.random.Generator) -> Tensor:
        if self.crop is not None:
            return self.crop([image], rng)[0]
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())

    def _attack(self, samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Samples of one size as rows of pairs."""
        batch = {key: value.to(self.device) for key, value in collate(samples).items()}
        parameters = AttackParameters.from_batch(batch)
        labels = batch["labels"] if self.true_labels else None
        with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
            attacked = perturb(self.surrogates, batch["pixel_values"], labels, parameters, self.args.surrogates)
        adversarial = attacked.cpu()
        clean = torch.stack([sample["pixel_values"] for sample in samples])
        # From pixel units back to the number that was drawn: a radius of 8 must not become 7.9999998 and round to 7.
        eps = (parameters.eps.cpu().double() * 255).round(decimals=5)
        for i, pixels in enumerate(quantise(adversarial, clean, eps)):
            kind = KINDS[int(samples[i]["attack_kind"])]
            by_gradient = int(samples[i]["attack_steps"]) > 0
            row = {
                "image": _png(clean[i]),
                "adversarial_image": _png(pixels),
                "eps": 0.0 if kind == "clean" else eps[i].item(),
                "attack": kind,
                "surrogate": self.args.surrogates[int(samples[i]["attack_surrogate"])] if by_gradient else None,
                "index": samples[i]["index"],
            }
            yield row | ({"label": samples[i]["labels"]} if self.dataset.label_column else {})


class _Shards:
    """The files: whole ones under their own names in a hidden folder, which becomes `data/` when all are there."""

    def __init__(self, folder: Path, args: PairsArguments, dataset: ImageDataset):
        self.target, self.unfinished = folder / "data", folder / UNFINISHED
        self.folder = self.unfinished / "data"
        self.finished = self.target.is_dir()
        if self.finished:  # killed between the last two steps of `finish`
            shutil.rmtree(self.unfinished, ignore_errors=True)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # Of a stream nobody knows how many files it makes: its files are renamed at the end.
        self.total = 0 if dataset.streaming else -(-len(dataset) * args.copies // args.shard_images)
        self.done = next(shard for shard in count() if not any(self.folder.glob(f"train-{shard:05d}-of-*.parquet")))
        label = dataset.rows.features[dataset.label_column] if dataset.label_column else None
        if label is not None and not isinstance(label, datasets.ClassLabel):
            label = datasets.Value("int64")  # a missing label is -1, which not every type of the source holds
        self.features = datasets.Features(
            {"image": datasets.Image(), "adversarial_image": datasets.Image()}
            | ({"label": label} if label is not None else {})
            | {"eps": datasets.Value("float32"), "attack": datasets.Value("string")}
            | {"surrogate": datasets.Value("string"), "index": datasets.Value("int64")}
        )

    def _path(self, shard: int) -> Path:
        return self.folder / f"train-{shard:05d}-of-{self.total:05d}.parquet"

    def _summary(self, shard: int) -> Path:
        return self.unfinished / f"shard-{shard:05d}.json"

    def write(self, batches: Iterable[tuple[list[dict[str, Any]], list[int]]]) -> int:
        """Write the next file, whole or not at all, of batches of rows and of indices of broken images.

        Returns:
            How many images came, the broken ones among them; without any there is no file.
        """
        path = self._path(self.done)
        temporary = self.unfinished / f"{path.name}.tmp"
        attacks: Counter[str] = Counter()
        broken: list[int] = []
        with self._writing():
            file = pq.ParquetWriter(temporary, self.features.arrow_schema)
        try:
            for rows, failed in batches:
                attacks.update(row["attack"] for row in rows)
                broken += failed
                if rows:
                    with self._writing():
                        table = pa.Table.from_pylist(rows, self.features.arrow_schema)
                        file.write_table(table, row_group_size=ROW_GROUP)
        finally:
            with self._writing():
                file.close()
        seen = attacks.total() + len(broken)
        with self._writing():
            if seen:
                write_json(self._summary(self.done), {"rows": attacks.total(), "attacks": attacks, "broken": broken})
                os.replace(temporary, path)
            else:
                temporary.unlink()
        self.done += bool(seen)
        return seen

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """An error of the disk says what is safe; one of the source is its own."""
        try:
            yield
        except OSError as error:
            raise RunFolderError(
                f"output_dir={str(self.target.parent)!r} cannot be written any more: {error}. Free some space and "
                f"start the same command again: it goes on after the {self.done} files that are whole."
            ) from error

    def finish(self, record: Path) -> None:
        """Give the files their final names and place, and complete the record."""
        summaries = [json.loads(self._summary(shard).read_text()) for shard in range(self.done)]
        rows = sum(summary["rows"] for summary in summaries)
        if rows == 0:
            raise DataError("none of the dataset's images can be decoded" if self.done else "the dataset has no images")
        broken = sorted({index for summary in summaries for index in summary["broken"]})
        attacks = sum((Counter(summary["attacks"]) for summary in summaries), Counter())
        for path in sorted(self.folder.glob("train-*.parquet")):
            os.replace(path, path.with_name(f"{path.stem[:-5]}{self.done:05d}.parquet"))
        result = {"pairs": rows, "attacks": dict(sorted(attacks.items())), "broken_images": broken}
        write_json(record, json.loads(record.read_text()) | {"result": result})
        os.replace(self.folder, self.target)
        shutil.rmtree(self.unfinished)
        if broken:
            logger.warning("%d images could not be decoded and were skipped", len(broken))
        logger.info("%d pairs in %s", rows, self.target.parent)


def _attack_all(args: PairsArguments, dataset: ImageDataset, attacker: _Attacker, shards: _Shards) -> None:
    start = shards.done * args.shard_images
    source = _rows(dataset, args.copies, start)
    progress = tqdm(
        total=None if dataset.streaming else args.copies * len(dataset), initial=start, desc="pairs", unit="image"
    )
    if shards.done:
        logger.info("going on after %d whole files", shards.done)
    broken_images: set[int] = set()

    def batches() -> Iterator[tuple[list[dict[str, Any]], list[int]]]:
        images = islice(source, args.shard_images)
        while batch := list(islice(images, args.batch_size)):
            made, failed = attacker(batch)
            yield made, failed
            progress.update(len(batch))
            if failed:
                broken_images.update(failed)
                progress.set_postfix(broken=len(broken_images))

    while shards.write(batches()) == args.shard_images:
        pass
    progress.close()


def _rows(dataset: ImageDataset, copies: int, start: int) -> Iterator[tuple[int, int, dict]]:
    """(copy, index, row) in stored order, copy after copy, from the position `start` on."""
    if dataset.streaming:
        positions = ((copy, index, row) for copy in range(copies) for index, row in enumerate(dataset.rows))
        yield from islice(positions, start, None)
    else:
        for position in range(start, copies * len(dataset)):
            copy, index = divmod(position, len(dataset))
            yield copy, index, dataset.rows[index]


def _refuse_other_content(folder: Path) -> None:
    """An overwrite must never remove files that are not pairs."""
    leftovers = {RECORD + ".tmp", ".writable", LOCK}  # of a run that was killed before it had a record
    content = {path.name for path in folder.iterdir()} - leftovers if folder.is_dir() else set()
    if content and RECORD not in content:
        raise RunFolderError(
            f"output_dir={str(folder)!r} holds other files ({', '.join(sorted(content)[:3])}) and no {RECORD}: "
            "give a new folder"
        )


def _png(pixels: Tensor) -> dict[str, Any]:
    """(3, H, W) uint8 as a cell of an image column."""
    stream = io.BytesIO()
    PILImage.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}
