"""Images in: any `datasets` source, its image and label columns, tolerant decoding, and the embedded default."""

from __future__ import annotations

import hashlib
import logging
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps

from .imageio import wide_grey

logger = logging.getLogger(__name__)

EMBEDDED_DATASETS = {"embedded:cifar10": "cifar10", "embedded:imagenet": "imagenet"}
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
# What PIL raises on bytes that are not an image, or not a whole one, and on damaged metadata.
UNREADABLE = (SyntaxError, ValueError, TypeError, LookupError, AttributeError, EOFError, OverflowError, struct.error,
              zlib.error, PILImage.DecompressionBombError)  # fmt: skip
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class DataError(ValueError):
    """A dataset that cannot be used as asked; the message names the argument and the fix."""


@dataclass
class ImageDataset:
    """A `datasets.Dataset` or `IterableDataset` whose image columns are undecoded, with the names of its columns.

    Columns that are not in use are left out of the rows, unless they are plain values: what a row does not need could
    not be decoded either.

    Rows are read with [`decode_image`], so that one broken file costs one image and not the run.
    """

    rows: Any
    image_column: str
    label_column: str | None = None
    adversarial_column: str | None = None
    surrogate_column: str | None = None  # names of the classifiers that stored attacked images were made on
    class_names: list[str] | None = None
    streaming: bool = False
    origin: str = ""
    stored_columns: Any = None  # features of all columns, where the rows have not all of them

    def __len__(self) -> int:
        if self.streaming:
            raise TypeError("a streamed dataset has no length")
        return len(self.rows)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the size, the columns and 256 or more evenly spread rows: the same wherever the data lies.

        Of a stream, which would have to be read to know, only what was asked for and its columns.
        """
        if self.streaming:
            columns = self.stored_columns or self.rows.features
            return hashlib.sha256(f"{self.origin} {columns}".encode()).hexdigest()[:16]
        digest = hashlib.sha256(repr((len(self.rows), self.image_column, self.label_column)).encode())
        for index in range(0, len(self.rows), max(1, len(self.rows) // 256)):
            row = self.rows[index]
            for column in filter(None, (self.image_column, self.adversarial_column)):
                digest.update(_cell_bytes(row[column]))
            digest.update(str(self.label(row)).encode())
        return digest.hexdigest()[:16]

    @property
    def num_classes(self) -> int | None:
        """Classes by name, or by the largest index in the label column; `None` where a stream does not say."""
        if self.class_names:
            return len(self.class_names)
        if self.label_column is None or self.streaming:
            return None
        labels = [label for label in self.rows.unique(self.label_column) if label is not None]
        return max(labels, default=-1) + 1

    @property
    def no_labels(self) -> str:
        """What to do where there is no `label_column`, and why a column with a usual name of labels is none."""
        unusable = [name for name in LABEL_NAMES if name in (self.stored_columns or {})]
        if not unusable:
            return "name them with label_column"
        return _no_indices(f"its column {unusable[0]!r}", self.stored_columns[unusable[0]])

    def find_class_names(self) -> list[str]:
        """Names of the classes; where the labels are bare numbers, the numbers up to the largest one.

        Raises:
            DataError: no labels, or a stream whose labels carry no names.
        """
        if self.class_names:
            return self.class_names
        if self.label_column is None:
            raise DataError(f"dataset: it has no labels; {self.no_labels}")
        if not self.num_classes:
            raise DataError(
                f"label_column={self.label_column!r} says nothing of the classes: name a column of labels, and do not "
                "stream one whose labels are bare numbers"
            )
        return [str(index) for index in range(self.num_classes)]

    def label(self, row: dict) -> int:
        """The row's class index, or -1 where there is none."""
        value = row[self.label_column] if self.label_column else None
        return -1 if value is None else int(value)


OTHER_CLASSES = "give a surrogate of this dataset, or attack_labels=predicted"
"""What to do where a surrogate does not have the classes of the dataset."""


def expect_classes(found: int | None, classes: int, model: str, hint: str, named: bool = True) -> None:
    """That a model tells apart the classes of a dataset.

    Args:
        found: classes of the dataset; `None` where they are not known, which passes.
        classes: outputs of the model.
        model: what the message calls it.
        hint: what to do about it.
        named: the dataset names its classes; where it has bare numbers, the largest may be missing by chance.

    Raises:
        DataError: the model has fewer, or not as many as are named.
    """
    if found and (found > classes or (named and found < classes)):
        least, only = "" if named else "at least ", "only " if found > classes else ""
        raise DataError(f"the dataset has {least}{found} classes and {model} {only}{classes}: {hint}")


def same_names_in_order(own: Sequence[str] | None, wanted: Sequence[str] | None) -> list[int] | None:
    """Where each of the `wanted` class names stands among one's `own`; case, underscores and hyphens do not count.

    Returns:
        Indices into `own`; `None` where these are not the same names, are so in the same order, or repeat one: then
        nothing is known of their order, or nothing is to be done.
    """
    for mine, theirs in ((list(own or []), list(wanted or [])), (normalised_names(own), normalised_names(wanted))):
        if mine == theirs:
            return None
        if len(set(mine)) == len(mine) and sorted(mine) == sorted(theirs):
            return [mine.index(name) for name in theirs]
    return None


def names_that_differ(own: Sequence[str] | None, wanted: Sequence[str] | None, most: int = 3) -> str | None:
    """The first class names that one of two sides has alone, as `cat, dog / tabby`, to warn that nothing matches them;
    or that both repeat a name and stand in different orders, which nothing matches either.

    Returns:
        `None` where both have the same, or one has none but numbers (`LABEL_3`), which say nothing.
    """
    sides = [dict(zip(normalised_names(side), side or [], strict=True)) for side in (own, wanted)]
    if any(all(re.fullmatch(r"(label|class)? *\d*", name) for name in side) for side in sides):
        return None
    alone = [[str(name) for plain, name in side.items() if plain not in other] for side, other in (sides, sides[::-1])]
    if not any(alone):
        mine, theirs = normalised_names(own), normalised_names(wanted)
        repeated = next((str(name) for name, plain in zip(own or [], mine, strict=True) if mine.count(plain) > 1), None)
        if repeated is None or mine == theirs or same_names_in_order(own, wanted) is not None:
            return None
        return f"both repeat a name, as {repeated}, and stand in different orders"
    shown = (", ".join(names[:most]) + (", ..." if len(names) > most else "") for names in alone)
    return " / ".join(text or "none" for text in shown)


def numbers_as_text(own: Sequence[str] | None, wanted: Sequence[str] | None) -> str | None:
    """That a dataset's classes (`wanted`) are numbers in the order of the alphabet, which nothing confirms.

    Folders named 0, 1, ..., 10 are listed as 0, 1, 10, 2, ...: right for a classifier trained on the same listing, and
    wrong for one whose indices the numbers are.

    Returns:
        What to say of it; `None` where they are not, or a classifier (`own`) has the same names.
    """
    names = [str(name) for name in wanted or []]
    if not names or not all(name.isdecimal() for name in names) or {str(name) for name in own or []} == set(names):
        return None
    numbers = [int(name) for name in names]
    if names != sorted(names) or numbers == sorted(numbers):
        return None
    index = next(at for at, number in enumerate(numbers) if number > numbers[at + 1])
    return (
        f"its classes are numbers in the order of the alphabet, class {names[index]} the one of index {index}: if they "
        f"are the classifier's indices, pad the names with zeros ({names[0].zfill(max(map(len, names)))}, ...)"
    )


def normalised_names(names: Sequence[str] | None) -> list[str]:
    """Class names as they are compared: case, underscores, hyphens and repeated blanks do not count."""
    return [" ".join(re.split(r"[\s_-]+", str(name).casefold())).strip() for name in names or []]


def load_image_dataset(
    source: str,
    split: str = "train",
    *,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    adversarial_column: str | None = None,
    streaming: bool = False,
    max_images: int | None = None,
    columns_where_found: bool = False,
) -> ImageDataset:
    """Load images from the Hub, a folder (images or parquet), a parquet file, a saved dataset, or `embedded:cifar10`.

    Args:
        source: Hub id (`uoft-cs/cifar10`), path, or one of `embedded:cifar10`, `embedded:imagenet`.
        split: split name, also sliced or added up as datasets does (`train[:50%]`, `train[:100]+test`), which a stream
            does not take unless it is one of a saved dataset; a single parquet file is that split by itself.
        image_column, label_column: column names; found by feature type and usual names when `None`. Images may be
            image features, encoded bytes, or `{bytes, path}`; labels are class indices, in a column of a usual name
            or else in the only one with named classes.
        adversarial_column: column of attacked images (a stored pairs dataset); `adversarial_image` is found by itself.
        streaming: read without downloading first.
        max_images: keep only the first so many images.
        columns_where_found: column names may be those of another dataset; where this one has none of the name, it is
            as if none was given.

    Raises:
        DataError: the source cannot be reached or read, it has no such split or column, or a slice of it is streamed.
    """
    if source in EMBEDDED_DATASETS:
        rows = _take_split(_embedded_rows(EMBEDDED_DATASETS[source]), source, split)
        rows = rows.to_iterable_dataset() if streaming else rows
    elif source.startswith("embedded:"):
        raise DataError(f"dataset={source!r}: no such embedded dataset; there are {', '.join(EMBEDDED_DATASETS)}")
    else:
        rows = _load_rows(source, split, config_name, streaming)
    if max_images is not None:
        if max_images < 1:
            raise DataError(f"max_images={max_images}: must be at least 1")
        rows = rows.take(max_images) if streaming else rows.select(range(min(max_images, len(rows))))
    if not streaming and len(rows) == 0:
        raise DataError(f"dataset={source!r}, split={split!r}: there are no images in it")
    if rows.features is None:  # some streams do not say what they hold until they are read
        rows = rows._resolve_features()
    if columns_where_found:
        named = (image_column, label_column, adversarial_column)
        image_column, label_column, adversarial_column = (name if name in rows.features else None for name in named)
    found = _with_columns(rows, source, image_column, label_column, adversarial_column, streaming)
    found.origin = repr((source, split, config_name, max_images))
    return found


def _cell_bytes(cell: dict | None) -> bytes:
    """The file behind an undecoded image cell; its name where it cannot be read, which decoding will report."""
    cell = cell or {}
    if cell.get("bytes") is not None:
        return cell["bytes"]
    try:
        return Path(cell["path"]).read_bytes()
    except (OSError, KeyError, TypeError):
        return str(cell.get("path")).encode()


def decode_image(value: Any) -> PILImage.Image:
    """Decode one undecoded image cell to an upright RGB picture; grey, palette, 16-bit and alpha come out as RGB.

    Raises:
        OSError: the bytes are not an image, or are cut off.
    """
    import datasets

    try:
        if isinstance(value, PILImage.Image):
            image = value
        elif isinstance(value, np.ndarray):
            image = PILImage.fromarray(value)
        elif isinstance(value, dict):
            image = datasets.Image().decode_example(value)  # local files, archives and the Hub alike
        else:
            raise OSError(f"not an image: {type(value).__name__}")
        return to_rgb(ImageOps.exif_transpose(image))
    except UNREADABLE as error:
        raise OSError(f"not a readable image ({type(error).__name__}: {error})") from error


def to_rgb(image: PILImage.Image) -> PILImage.Image:
    """RGB version of a picture of any mode; transparent pixels show over white, wide grey keeps its scale.

    Raises:
        ValueError: a grey picture of 32 bits or of floats, whose values say no scale.
    """
    if image.mode == "RGB" and not isinstance(image.info.get("transparency"), tuple):  # a PNG may have such a colour
        return image
    if image.mode == "F" or image.mode.startswith("I"):  # PIL clips these when it converts; scale them instead
        return PILImage.fromarray(np.rint(wide_grey(image) * 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        background = PILImage.new("RGBA", rgba.size, "white")
        return PILImage.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")


def _load_rows(source: str, split: str, config_name: str | None, streaming: bool):
    import datasets
    from datasets.exceptions import DatasetsError

    path = Path(source).expanduser()
    try:
        if path.is_file():
            if path.suffix != ".parquet":
                raise DataError(f"dataset={source!r}: a single file must be .parquet; give a folder for images")
            name = _one_split(source, split)
            _refuse_streamed_slice(source, split, streaming)
            return datasets.load_dataset("parquet", data_files={name: str(path)}, split=split, streaming=streaming)
        if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(str(path))
            saved = _take_split(saved, source, split)
            saved = saved.with_format(None)  # one that it was saved with would leave out columns, or make tensors
            return saved.to_iterable_dataset() if streaming else saved
        _refuse_streamed_slice(source, split, streaming)
        name = str(path.resolve()) if path.is_dir() else source
        rows = datasets.load_dataset(name, config_name, split=split, streaming=streaming)
        if path.is_dir() and not any(map(_is_image, (rows.features or {"": None}).values())) and _has_pictures(path):
            # the most frequent kind of file was taken, such as texts beside the pictures
            return datasets.load_dataset("imagefolder", data_dir=name, split=split, streaming=streaming)
        return rows
    except DataError:
        raise
    except (DatasetsError, OSError, ValueError, LookupError, RuntimeError) as error:
        if path.exists():
            raise DataError(f"dataset={source!r}, split={split!r} cannot be read: {error}") from error
        raise DataError(
            f"dataset={source!r} is neither a local path nor reachable on the Hub ({type(error).__name__}: {error}). "
            "Without the Hub, give local data: --dataset FOLDER with train/test images or parquet files, "
            "--dataset FILE.parquet, or --dataset embedded:cifar10 for the 20 images that come with foolbox."
        ) from error


def _read_instruction(source: str, split: str) -> tuple[Any, list[Any]]:
    """datasets' own reading of a split, and its parts, each with a `splitname` and the ends `from_` and `to`, or none.

    Raises:
        DataError: it is not the name of a split, nor slices of some.
    """
    import datasets

    try:
        instruction = datasets.ReadInstruction.from_spec(split)
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"dataset={source!r}, split={split!r} is no split: {error}; give a name such as train, or a slice such as "
            "train[:50%] or train[100:200]"
        ) from error
    return instruction, instruction._relative_instructions  # nothing public tells the names


def _one_split(source: str, split: str) -> str:
    """The name of the one split that `split` is, or is slices of."""
    names = {part.splitname for part in _read_instruction(source, split)[1]}
    if len(names) > 1:
        raise DataError(
            f"dataset={source!r}, split={split!r} is made of {len(names)} splits, and this dataset is one: name one"
        )
    return names.pop()


def _refuse_streamed_slice(source: str, split: str, streaming: bool) -> None:
    if streaming and "[" in split:  # in no name of a split
        raise DataError(
            f"dataset={source!r}, split={split!r}: a stream has no slices; leave streaming out, name a whole split, or "
            "take its first images by their number (--max_train_images, --max-images)"
        )


def _take_split(saved: Any, source: str, split: str) -> Any:
    """A split, or slices of some, of a `DatasetDict`, or of a `Dataset` that is one split as a whole.

    Raises:
        DataError: there is no such split, or no row in these slices.
    """
    import datasets

    if isinstance(saved, datasets.DatasetDict):
        if split in saved:
            return saved[split]
        splits = dict(saved)
    elif saved.split is not None and str(saved.split) == split:  # a slice too, where one was saved
        return saved
    else:
        name = _one_split(source, split)
        if saved.split is not None and str(saved.split) != name:
            logger.warning(
                "dataset=%r: it was saved as one split, %r by its record, and is taken for %r", source,
                str(saved.split), name,
            )  # fmt: skip
        splits = {name: saved}
    instruction, parts = _read_instruction(source, split)
    if any(part.splitname not in splits for part in parts):
        raise DataError(f"split={split!r} is not in {source!r}; it has {', '.join(splits)}")
    taken = [
        rows if (part.from_, part.to) == (0, len(rows)) else rows.select(range(part.from_, part.to))
        for part in instruction.to_absolute({name: len(rows) for name, rows in splits.items()})
        for rows in [splits[part.splitname]]
    ]
    if not any(map(len, taken)):
        raise DataError(f"dataset={source!r}, split={split!r}: there are no images in it")
    return taken[0] if len(taken) == 1 else datasets.concatenate_datasets(taken)


def _has_pictures(folder: Path) -> bool:
    """Whether there are image files, and none of a table that says what the dataset is."""
    kinds = {path.suffix.lower() for path in folder.rglob("*") if path.is_file()}
    return bool(kinds & PILImage.registered_extensions().keys()) and not kinds & {".parquet", ".arrow", ".csv"}


def _with_columns(rows, source, image_column, label_column, adversarial_column, streaming) -> ImageDataset:
    import datasets

    features = rows.features
    image_columns = [name for name, feature in features.items() if _is_image(feature)]
    adversarial = adversarial_column or ("adversarial_image" if "adversarial_image" in image_columns else None)
    if image_column is None:
        candidates = [name for name in image_columns if name != adversarial]
        if len(candidates) != 1:
            paths = "" if candidates else (
                ", but paths in a column are not read: for them, make a folder of the images with a metadata.csv "
                "whose column file_name names each"
            )  # fmt: skip
            raise DataError(
                f"dataset={source!r} has {len(candidates)} image columns among {list(features)}; "
                f"name one with image_column{paths}"
            )
        image_column = candidates[0]
    if label_column is None:
        classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        known = [name for name in LABEL_NAMES if name in features and _is_label(features[name])]
        if len(classes) == 1 and (classes[0] in known or not known):
            known = classes  # the one that names its classes
        label_column = (known or [None])[0]
    images = {"image_column": image_column, "adversarial_column": adversarial}
    for argument, name in (images | {"label_column": label_column}).items():
        if name is not None and name not in features:
            raise DataError(f"{argument}={name!r} is not in {source!r}; its columns are {list(features)}")
    if label_column is not None and not _is_label(features[label_column]):
        raise DataError(_no_indices(f"label_column={label_column!r} of {source!r}", features[label_column]))
    for argument, name in images.items():
        if name is not None:
            if not _is_image(features[name], named=True):
                raise DataError(f"{argument}={name!r} of {source!r} holds {features[name]}, not images")
            rows = rows.cast_column(name, datasets.Image(decode=False))
    stored, used = rows.features, (image_column, label_column, adversarial)
    kept = [name for name, feature in stored.items() if name in used or _is_plain(feature)]
    return ImageDataset(
        rows=rows.select_columns(kept) if len(kept) < len(stored) else rows,
        image_column=image_column,
        label_column=label_column,
        adversarial_column=adversarial,
        surrogate_column="surrogate" if adversarial and "surrogate" in features else None,
        class_names=getattr(features.get(label_column), "names", None) if label_column else None,
        streaming=streaming,
        stored_columns=stored,
    )


def _no_indices(column: str, feature: Any) -> str:
    # class_encode_column would put numbers into the order of the alphabet: 0, 1, 10, 11, 2, ...
    return (
        f"{column} holds {feature}, not class indices; turn them into indices with datasets' class_encode_column if "
        "they are names, or cast_column(..., Value('int64')) if they are numbers"
    )


def _is_plain(feature: Any) -> bool:
    """Whether reading a value costs nothing and cannot fail: text, numbers and class indices."""
    import datasets

    if isinstance(feature, datasets.Value):
        return "binary" not in feature.dtype
    return isinstance(feature, datasets.ClassLabel)


def _is_image(feature: Any, named: bool = False) -> bool:
    """Whether a column holds images; plain bytes count only where the column was named."""
    import datasets

    if isinstance(feature, dict):  # what an image feature becomes when another library writes the file
        return set(feature) == {"bytes", "path"}
    encoded = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    return isinstance(feature, datasets.Image) or (named and encoded)


def _is_label(feature: Any) -> bool:
    import datasets

    if isinstance(feature, datasets.Value):
        return feature.dtype == "bool" or feature.dtype.lstrip("u").startswith("int")
    return isinstance(feature, datasets.ClassLabel)


def _embedded_rows(name: str):
    """The labelled sample images that the foolbox package carries (20 of CIFAR-10, 20 of ImageNet)."""
    import datasets

    try:
        import foolbox
    except ImportError as error:
        raise DataError("the embedded images come with foolbox: pip install 'maep-hf[attacks]'") from error
    folder = Path(foolbox.__file__).parent / "data"
    rows: dict[str, list] = {"image": [], "label": []}
    for path in sorted(folder.glob(f"{name}_*")):  # NAME_INDEX_LABEL.EXT
        rows["image"].append({"bytes": path.read_bytes(), "path": path.name})
        rows["label"].append(int(path.stem.split("_")[-1]))
    label = datasets.ClassLabel(names=list(CIFAR10_CLASSES)) if name == "cifar10" else datasets.Value("int64")
    return datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(), "label": label}))
