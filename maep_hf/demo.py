"""`maep demo`: attack a classifier on embedded real images, purify, and say in figures and pictures what that does.

The attack differentiates the classifier alone (threat model gray-box). Twenty images show that everything works; how
far the defence holds is what an evaluation on a test set measures.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .attacks import Attack, make_attack
from .data import CIFAR10_CLASSES, EMBEDDED_DATASETS, decode_image, load_image_dataset
from .evaluation import BenchmarkResult, EvaluationImages, benchmark
from .evaluation.statistics import PSNR_LIMIT
from .figures import RIGHT, WRONG, difference_image, image_grid
from .records import append_jsonl, read_jsonl

if TYPE_CHECKING:
    from .modeling_maep import MAEPModel

Caption = Callable[[int, bool], str]  # of a predicted class and whether it is right
DIFFERENCE_FACTOR = 8
RIGHT_LABEL = "right: the prediction is the label"
VARIANTS = {
    "clean": "clean",
    "purified_clean": "clean, purified",
    "attacked": "attacked",
    "purified_attacked": "attacked, purified",
}
IMAGENET_SIZE = 224


class DemoError(ValueError):
    """The demo cannot run as asked; the message says why and what to do."""


def run_demo(
    out: str | os.PathLike,
    *,
    purifier: MAEPModel,
    purifier_name: str,
    classifier: nn.Module,
    classifier_name: str,
    imagenet_classifier: nn.Module | None = None,
    imagenet_name: str = "",
    attack: Attack | None = None,
    seed: int = 0,
    imagenet_images: int = 20,
    console: Console | None = None,
) -> list[dict]:
    """Run both parts, print their tables, and write `cifar10.png`, `imagenet.png` and `results.jsonl` into `out`.

    Args:
        out: folder for the pictures and the record; made when missing.
        purifier: in eval mode; its device is used for everything.
        classifier: `PixelClassifier` of the ten CIFAR-10 classes: (B, 3, H, W) in [0, 1] -> logits (B, 10).
        imagenet_classifier: `PixelClassifier` of the 1,000 ImageNet classes. Without it the CIFAR-10 classifier is run
            fully convolutionally on the 224-pixel images and held against its own clean predictions.
        purifier_name, classifier_name, imagenet_name: what the record calls them.
        attack: by default PGD-20, 8/255.
        seed: of the attack.
        imagenet_images: how many of the 20 embedded ImageNet images are used; 0 leaves that part out.

    Returns:
        The records that `results.jsonl` holds, one for each part.

    Raises:
        DemoError: foolbox is missing, a classifier has the wrong number of classes, or `out` holds other records.
        OSError: `out` cannot be written.
    """
    console = console or Console()
    attack = attack or make_attack("pgd")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results, records = out / "results.jsonl", []
    _refuse_other_results(results)
    device = next(purifier.parameters()).device
    classifier.eval()
    parameters = sum(parameter.numel() for parameter in purifier.parameters())
    title = attack_title(attack)
    console.print(
        f"attack     [bold]{title}[/bold], threat model [bold]gray-box[/bold]: it differentiates the\n"
        "           classifier alone. An attacker who knows the purifier is stronger.\n"
        f"classifier {classifier_name}\n"
        f"purifier   {purifier_name} ({parameters / 1e6:.2f} M parameters)",
        highlight=False,
    )

    def measure(judge: nn.Module, name: str, images: EvaluationImages, counted: str, batch: int) -> BenchmarkResult:
        options = {"attack": attack, "seed": seed, "batch_size": batch, "device": device, "progress": False}
        result = benchmark(judge, purifier, images, classifier_name=name, purifier_name=purifier_name, **options)
        result.record["counted"] = counted
        if not records:  # those of the demo before stay until then
            results.unlink(missing_ok=True)
        append_jsonl(results, result.record)
        records.append(result.record)
        return result

    pixels, labels = embedded_images("cifar10", device=device)
    _expect_classes(classifier, pixels, len(CIFAR10_CLASSES), classifier_name)
    with console.status("CIFAR-10: attacking and purifying ..."):
        images = EvaluationImages(pixels, labels, "embedded:cifar10")
        part = measure(classifier, classifier_name, images, RIGHT_LABEL, 20)
    print_table(console, part.record, "CIFAR-10", "accuracy")
    heading = f"{title} on the classifier alone (gray-box), then one pass of the purifier"
    names = [CIFAR10_CLASSES[index] for index in range(len(CIFAR10_CLASSES))]
    pictures = [
        _picture(part, classifier, labels, out / "cifar10.png", f"CIFAR-10: {heading}", 10, lambda k, right: names[k])
    ]

    if imagenet_images:
        pixels, labels = embedded_images("imagenet", IMAGENET_SIZE, device=device, count=imagenet_images)
        if imagenet_classifier is not None:
            _expect_classes(imagenet_classifier, pixels, 1000, imagenet_name)
            judge, judge_name, counted = imagenet_classifier, imagenet_name, RIGHT_LABEL
        else:
            judge = fully_convolutional(classifier)
            _expect_any_size(judge, pixels, classifier_name)
            judge_name = f"{classifier_name}, fully convolutional at {IMAGENET_SIZE} pixels"
            counted = "kept: the prediction is the classifier's own on the clean image (not an accuracy)"
            labels = _predict(judge, pixels)
        with console.status("ImageNet: attacking and purifying ..."):
            images = EvaluationImages(pixels, labels, "embedded:imagenet")
            part = measure(judge, judge_name, images, counted, 5)  # as many as are pictured
        measured = "accuracy" if imagenet_classifier is not None else "prediction kept"
        print_table(console, part.record, f"ImageNet, {IMAGENET_SIZE} pixels, the same purifier as it is", measured)
        if imagenet_classifier is None:
            console.print(
                "No ImageNet classifier is shipped: the CIFAR-10 classifier, fully convolutional,\n"
                "is attacked away from its own prediction on the clean image.\n"
                "--imagenet-classifier measures with labels.",
                highlight=False,
            )
        heading = f"ImageNet, {IMAGENET_SIZE} pixels: {title} (gray-box), the CIFAR-10-trained purifier as it is"
        words = ("right", "wrong") if counted == RIGHT_LABEL else ("prediction kept", "changed")
        pictures.append(
            _picture(part, judge, labels, out / "imagenet.png", heading, 5, lambda k, right: words[0 if right else 1])
        )

    console.print("\nwritten:")
    for path in (*pictures, results):
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    return records


def attack_title(attack: Attack) -> str:
    """`PGD-20 L∞ 8/255`."""
    unit = "/255" if attack.norm == "Linf" else ""
    return f"{attack.name} {(attack.norm or '').replace('inf', '∞')} {attack.eps:g}{unit}"


def print_table(console: Console, record: dict, title: str, measured: str) -> None:
    """Print one part's results: share and 95 % interval, PSNR against the clean image, the purifier's time."""
    n = record["protocol"]["dataset"]["n"]
    table = Table(title=f"{title} (n = {n})", title_style="bold", title_justify="left")
    for heading in ("images", measured, "of n", "95 % interval", "PSNR"):
        table.add_column(heading, justify="left" if heading == "images" else "right")
    for variant, name in VARIANTS.items():
        share = record["accuracy"][variant]
        decibel = record["psnr_db"].get(variant)
        table.add_row(
            name,
            f"{share['percent']:.0f} %",
            f"{share['correct']}/{share['n']}",
            "{:.0f} to {:.0f} %".format(*share["interval_95"]),
            "" if decibel is None else "identical" if decibel >= PSNR_LIMIT else f"{decibel:.1f} dB",
            style="bold" if variant == "purified_attacked" else "",
        )
    console.print()
    console.print(table)
    console.print(f"purifier: {record['ms_per_image']['purify']:.2f} ms per image", highlight=False)
    if record["cosine"]:
        cosine = record["cosine"]["true_direction"]
        console.print(f"cosine of its correction with the one that undoes the attack: {cosine:.2f}", highlight=False)


def embedded_images(
    name: str, size: int | None = None, *, device: str | torch.device = "cpu", count: int | None = None
) -> tuple[Tensor, Tensor]:
    """The labelled images that the foolbox package carries.

    Args:
        name: `cifar10` (20 of 32 x 32) or `imagenet` (20 of 512 x 512).
        size: side in pixels to reduce to, antialiased; `None` keeps the stored one.
        count: only the first so many.

    Returns:
        Pixels (N, 3, size, size) in [0, 1] and labels (N,).

    Raises:
        DemoError: foolbox is not installed.
    """
    try:
        dataset = load_image_dataset(f"embedded:{name}", max_images=count)
    except ValueError as error:
        raise DemoError(str(error)) from error
    arrays, labels = [], []
    for row in dataset.rows:
        image = decode_image(row[dataset.image_column])
        arrays.append(np.asarray(image if size is None else image.resize((size, size)), dtype=np.float32) / 255)
        labels.append(dataset.label(row))
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return pixels.to(device), torch.tensor(labels, device=device)


def fully_convolutional(classifier: nn.Module) -> nn.Module:
    """The same classifier with its normalisation and without its resize: it pools over whatever size it is given."""
    from .classifier import PixelClassifier

    spec = classifier.preprocessing.spec
    return PixelClassifier(
        classifier.classifier, do_resize=False, image_mean=list(spec.mean), image_std=list(spec.std)
    ).eval()


def _picture(
    part: BenchmarkResult, judge: nn.Module, labels: Tensor, path: Path, title: str, count: int, caption: Caption
) -> Path:
    """Rows clean / attacked / purified / differences of the first images, with what was predicted under each."""
    images = {name: batch[:count] for name, batch in part.images.items()}
    clean, attacked, purified = images["clean"], images["attacked"], images["purified"]
    rows = images | {
        f"attacked − clean\n× {DIFFERENCE_FACTOR}": difference_image(attacked, clean, DIFFERENCE_FACTOR),
        f"purified − clean\n× {DIFFERENCE_FACTOR}": difference_image(purified, clean, DIFFERENCE_FACTOR),
    }
    expected = labels[: len(clean)].tolist()
    captions = {}
    for name, batch in images.items():
        if name == "clean" and part.record["counted"] != RIGHT_LABEL:
            continue  # the reference itself
        predicted = _predict(judge, batch.to(labels.device)).tolist()
        captions[name] = [
            (caption(found, found == label), RIGHT if found == label else WRONG)
            for found, label in zip(predicted, expected, strict=True)
        ]
    return image_grid(rows, path, title=title, captions=captions)


@torch.no_grad()
def _predict(judge: nn.Module, pixels: Tensor, batch_size: int = 4) -> Tensor:
    return torch.cat([judge(batch).argmax(-1) for batch in pixels.split(batch_size)])


def _refuse_other_results(path: Path) -> None:
    """A demo replaces the records of the demo before it, which alone say what was counted, and nobody else's."""
    try:
        names = {(record["protocol"]["dataset"]["name"], "counted" in record) for record in read_jsonl(path)}
    except (ValueError, KeyError, TypeError):
        names = {("another form", False)}
    if others := sorted({name for name, of_a_demo in names if not of_a_demo or name not in EMBEDDED_DATASETS}):
        raise DemoError(f"out: {path} holds records of {', '.join(others)}, not of a demo; give another folder")


def _expect_classes(classifier: nn.Module, pixels: Tensor, expected: int, name: str) -> None:
    with torch.no_grad():
        classes = classifier(pixels[:1]).shape[-1]
    if classes != expected:
        raise DemoError(f"classifier: {name} has {classes} classes; the embedded images need one of {expected}")


def _expect_any_size(classifier: nn.Module, pixels: Tensor, name: str) -> None:
    try:
        _predict(classifier, pixels[:1])
    except (ValueError, RuntimeError) as error:
        raise DemoError(
            f"classifier: {name} does not take {IMAGENET_SIZE}-pixel images ({str(error).splitlines()[0]}); "
            "give --imagenet-classifier, or leave this part out with --imagenet-images 0"
        ) from error
