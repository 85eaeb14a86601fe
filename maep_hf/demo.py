"""`maep demo`: attack a classifier on embedded real images, purify, and say in figures and pictures what that does.

The attack differentiates the classifier alone (threat model gray-box). Twenty images show that everything works; how
far the defence holds is what an evaluation on a test set measures.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from .attacks import LinfPGD
from .data import CIFAR10_CLASSES, decode_image, load_image_dataset
from .evaluation import THREAT_MODEL, GrayBoxResult, evaluate_gray_box, predict, print_table
from .figures import RIGHT, WRONG, difference_image, image_grid
from .records import describe_environment, write_json

if TYPE_CHECKING:
    from .modeling_maep import MAEPModel

DIFFERENCE_FACTOR = 8
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
    attack: LinfPGD | None = None,
    imagenet_images: int = 20,
    console: Console | None = None,
) -> dict:
    """Run both parts, print their tables, and write `cifar10.png`, `imagenet.png` and `results.json` into `out`.

    Args:
        out: folder for the pictures and the record; made when missing.
        purifier: in eval mode; its device is used for everything.
        classifier: `PixelClassifier` of the ten CIFAR-10 classes: (B, 3, H, W) in [0, 1] -> logits (B, 10).
        imagenet_classifier: `PixelClassifier` of the 1,000 ImageNet classes. Without it the CIFAR-10 classifier is run
            fully convolutionally on the 224-pixel images and held against its own clean predictions.
        purifier_name, classifier_name, imagenet_name: what the record calls them.
        attack: by default PGD-20, 8/255, seed 0.
        imagenet_images: how many of the 20 embedded ImageNet images are used; 0 leaves that part out.

    Returns:
        What `results.json` holds.

    Raises:
        DemoError: foolbox is missing, or a classifier has the wrong number of classes.
        OSError: `out` cannot be written.
    """
    console = console or Console()
    attack = attack or LinfPGD()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    device = next(purifier.parameters()).device
    classifier.eval()
    parameters = sum(parameter.numel() for parameter in purifier.parameters())
    protocol = {
        "purifier": purifier_name,
        "purifier_parameters": parameters,
        "threat_model": THREAT_MODEL,
        "attack": attack.record(),
        "seed": attack.seed,
    }
    console.print(
        f"attack     [bold]{attack.name}[/bold], threat model [bold]{THREAT_MODEL}[/bold]: it differentiates the\n"
        "           classifier alone. An attacker who knows the purifier is stronger.\n"
        f"classifier {classifier_name}\n"
        f"purifier   {purifier_name} ({parameters / 1e6:.2f} M parameters)",
        highlight=False,
    )

    pixels, labels = embedded_images("cifar10", device=device)
    _expect_classes(classifier, pixels, len(CIFAR10_CLASSES), classifier_name)
    with console.status("CIFAR-10: attacking and purifying ..."):
        part = evaluate_gray_box(classifier, purifier, pixels, labels, attack)
    part.record |= protocol | {
        "dataset": "CIFAR-10",
        "images": "the 20 test images embedded in foolbox",
        "classifier": classifier_name,
        "counted": "right: the prediction is the label",
    }
    records = [part.record]
    print_table(console, part, "CIFAR-10", "accuracy")
    pictures = [cifar_picture(part, out / "cifar10.png", attack)]

    if imagenet_images:
        pixels, labels = embedded_images("imagenet", IMAGENET_SIZE, device=device, count=imagenet_images)
        if imagenet_classifier is not None:
            _expect_classes(imagenet_classifier, pixels, 1000, imagenet_name)
            judge, reference = imagenet_classifier, labels
            about = {"classifier": imagenet_name, "counted": "right: the prediction is the label"}
        else:
            judge, reference = fully_convolutional(classifier), None
            _expect_any_size(judge, pixels, classifier_name)
            about = {
                "classifier": f"{classifier_name}, fully convolutional at {IMAGENET_SIZE} pixels",
                "counted": "kept: the prediction is the classifier's own on the clean image (not an accuracy)",
            }
        with console.status("ImageNet: attacking and purifying ..."):
            part = evaluate_gray_box(judge, purifier, pixels, reference, attack, batch_size=4)
        images = f"the first {len(pixels)} embedded in foolbox, reduced to {IMAGENET_SIZE} pixels"
        part.record |= protocol | {"dataset": "ImageNet", "images": images} | about
        records.append(part.record)
        measured = "accuracy" if imagenet_classifier is not None else "prediction kept"
        print_table(console, part, f"ImageNet, {IMAGENET_SIZE} pixels, the same purifier as it is", measured)
        if imagenet_classifier is None:
            console.print(
                "No ImageNet classifier is shipped: the CIFAR-10 classifier, fully convolutional,\n"
                "is attacked away from its own prediction on the clean image.\n"
                "--imagenet-classifier measures with labels.",
                highlight=False,
            )
        pictures.append(imagenet_picture(part, out / "imagenet.png", attack))

    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    environment = describe_environment() | {"device": hardware, "threads": torch.get_num_threads()}
    results = {"environment": environment, "results": records}
    write_json(out / "results.json", results)
    console.print("\nwritten:")
    for path in (*pictures, out / "results.json"):
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    return results


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


def cifar_picture(part: GrayBoxResult, path: Path, attack: LinfPGD, count: int = 10) -> Path:
    """Rows clean / attacked / purified / differences of the first images, with the predicted class under each."""
    names = [CIFAR10_CLASSES[index] for index in range(len(CIFAR10_CLASSES))]
    title = f"CIFAR-10: {attack.name} on the classifier alone ({THREAT_MODEL}), then one pass of the purifier"
    return _picture(part, path, title, count, lambda predicted, right: names[predicted])


def imagenet_picture(part: GrayBoxResult, path: Path, attack: LinfPGD, count: int = 5) -> Path:
    """The same rows for the ImageNet images at their own size, with whether the prediction is right or kept."""
    words = ("right", "wrong") if part.record["counted"].startswith("right") else ("prediction kept", "changed")
    title = f"ImageNet, {IMAGENET_SIZE} pixels: {attack.name} ({THREAT_MODEL}), the CIFAR-10-trained purifier as it is"
    return _picture(part, path, title, count, lambda predicted, right: words[0] if right else words[1])


def fully_convolutional(classifier: nn.Module) -> nn.Module:
    """The same classifier with its normalisation and without its resize: it pools over whatever size it is given."""
    from .classifier import PixelClassifier

    spec = classifier.preprocessing.spec
    return PixelClassifier(
        classifier.classifier, do_resize=False, image_mean=list(spec.mean), image_std=list(spec.std)
    ).eval()


def _picture(part: GrayBoxResult, path: Path, title: str, count: int, caption) -> Path:
    images = {name: batch[:count] for name, batch in part.images.items()}
    clean, attacked, purified = images["clean"], images["attacked"], images["purified_attacked"]
    rows = {
        "clean": clean,
        "attacked": attacked,
        "purified": purified,
        f"attacked − clean\n× {DIFFERENCE_FACTOR}": difference_image(attacked, clean, DIFFERENCE_FACTOR),
        f"purified − clean\n× {DIFFERENCE_FACTOR}": difference_image(purified, clean, DIFFERENCE_FACTOR),
    }
    captions = {}
    for row, variant in (("clean", "clean"), ("attacked", "attacked"), ("purified", "purified_attacked")):
        if variant == "clean" and part.record["counted"].startswith("kept"):
            continue  # the reference itself
        captions[row] = [
            (caption(predicted, predicted == expected), RIGHT if predicted == expected else WRONG)
            for predicted, expected in zip(
                part.predictions[variant][:count].tolist(), part.reference[:count].tolist(), strict=True
            )
        ]
    return image_grid(rows, path, title=title, captions=captions)


def _expect_classes(classifier: nn.Module, pixels: Tensor, expected: int, name: str) -> None:
    with torch.no_grad():
        classes = classifier(pixels[:1]).shape[-1]
    if classes != expected:
        raise DemoError(f"classifier: {name} has {classes} classes; the embedded images need one of {expected}")


def _expect_any_size(classifier: nn.Module, pixels: Tensor, name: str) -> None:
    try:
        predict(classifier, pixels[:1])
    except (ValueError, RuntimeError) as error:
        raise DemoError(
            f"classifier: {name} does not take {IMAGENET_SIZE}-pixel images ({str(error).splitlines()[0]}); "
            "give --imagenet-classifier, or leave this part out with --imagenet-images 0"
        ) from error
