"""Public image collections as parquet in the Hub's layout, pictures bit for bit, with ImageNet's class indices.

python train/prepare_images.py nips2017 tf_to_pytorch_model/dataset data/nips2017-dev
python train/prepare_images.py one-a-class imagenet-sample-images data/imagenet-sample --validation data/nips2017-dev
python train/prepare_images.py tiny-imagenet tiny-imagenet-200 data/tiny-imagenet

`nips2017`: the 1,000 development images of the NIPS 2017 competition on adversarial attacks (dev_dataset.csv, images/).
`one-a-class`: a folder whose 1,000 names, sorted, begin with the WordNet numbers of ImageNet's classes; to validate on,
images 560 to 687 of a `nips2017` dataset, which no evaluation of the first 500 sees. `tiny-imagenet`: the 10,000
labelled validation images (val/), 5,000 to train on, 1,000 to validate, 4,000 to test.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, load_dataset

Rows = list[tuple[Path, int]]
IMAGENET_CLASSES = 1000
HELD_OUT = range(560, 688)


def nips2017(folder: Path) -> dict[str, Rows]:
    with open(folder / "dev_dataset.csv", newline="", encoding="utf-8") as lines:
        found = [
            (folder / "images" / f"{row['ImageId']}.png", int(row["TrueLabel"]) - 1) for row in csv.DictReader(lines)
        ]
    return {"test": found}


def one_a_class(folder: Path) -> dict[str, Rows]:
    paths = sorted(folder.glob("n[0-9]*.*"))
    if len(paths) != IMAGENET_CLASSES:
        raise ValueError(
            f"{folder}: {len(paths)} pictures named n01234567..., and one for each of 1,000 classes is needed"
        )
    return {"train": [(path, index) for index, path in enumerate(paths)]}


def tiny_imagenet(folder: Path) -> dict[str, Rows]:
    classes = {name: index for index, name in enumerate(sorted((folder / "wnids.txt").read_text().split()))}
    lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
    fields = [line.split("\t") for line in lines]
    found = [(folder / "val" / "images" / name, classes[label]) for name, label, *_ in fields]
    return {"train": found[:5000], "validation": found[5000:6000], "test": found[6000:]}


KINDS = {"nips2017": (nips2017, IMAGENET_CLASSES), "one-a-class": (one_a_class, IMAGENET_CLASSES),
         "tiny-imagenet": (tiny_imagenet, 200)}  # fmt: skip


def save(rows: Rows, classes: int, path: Path) -> None:
    """Write one split; a picture's bytes stay as they are."""
    features = Features({"image": Image(), "label": ClassLabel(names=[str(index) for index in range(classes)])})
    stored = [{"image": {"bytes": path.read_bytes(), "path": path.name}, "label": label} for path, label in rows]
    write(Dataset.from_list(stored, features=features), path)


def write(images: Dataset, path: Path) -> None:
    """Write a parquet file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    images.to_parquet(temporary)
    temporary.replace(path)
    print(f"{path}: {len(images):,} images")


def read_held_out(folder: Path) -> Dataset:
    """The images of a prepared `nips2017` dataset to validate on.

    Raises:
        ValueError: it has too few images.
    """
    images = load_dataset("parquet", data_files=str(folder / "test-*.parquet"), split="train")
    if len(images) < HELD_OUT.stop:
        raise ValueError(
            f"--validation {folder}: {len(images)} images, and those from {HELD_OUT.start} to {HELD_OUT.stop - 1} are "
            "needed; give what `nips2017` made of the whole collection"
        )
    return images.select(HELD_OUT)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path, help="of the collection, as it is published")
    parser.add_argument("out", type=Path, help="folder for the parquet files")
    parser.add_argument("--validation", type=Path, help="one-a-class: a nips2017 dataset, its images 560 to 687")
    args = parser.parse_args(argv)
    if args.validation and args.kind != "one-a-class":
        parser.error(f"--validation: {args.kind} takes none; leave it out")
    read, classes = KINDS[args.kind]
    try:
        held_out = read_held_out(args.validation) if args.validation else None  # before anything is written
        for split, rows in read(args.folder).items():
            save(rows, classes, args.out / f"{split}-00000-of-00001.parquet")
        if held_out is not None:
            write(held_out, args.out / "validation-00000-of-00001.parquet")
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
