"""`maep demo`: attack a classifier on embedded real images, purify, and say in figures and pictures what that does.

The attack differentiates the classifier alone (threat model gray-box). Twenty images show that everything works; how
far the defence holds is what an evaluation on a test set measures.
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .data import CIFAR10_CLASSES, decode_image, load_image_dataset
from .figures import RIGHT, WRONG, difference_image, image_grid

if TYPE_CHECKING:
    from .modeling_maep import MAEPModel

THREAT_MODEL = "gray-box"
STEP_SIZE = 2.0  # of PGD, in 1/255
DIFFERENCE_FACTOR = 8
PSNR_LIMIT = 100.0  # dB, what identical images count as
IMAGENET_SIZE = 224
_VARIANTS = ("clean", "purified_clean", "attacked", "purified_attacked")


class DemoError(ValueError):
    """The demo cannot run as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Attack:
    """PGD in the L-infinity ball, as foolbox does it: random start, signed steps, last iterate.

    Attributes:
        eps, step_size: in units of 1/255.
        steps: number of gradient steps.
        seed: of the random start.
    """

    eps: float = 8.0
    steps: int = 20
    step_size: float = STEP_SIZE
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.eps <= 255:
            raise DemoError(f"eps: {self.eps:g} is not in (0, 255]; it is given in units of 1/255")
        if self.steps < 1:
            raise DemoError(f"steps: {self.steps} is not a positive number")

    @property
    def name(self) -> str:
        return f"PGD-{self.steps} L∞ {self.eps:g}/255"

    def __call__(self, classifier: nn.Module, pixels: Tensor, labels: Tensor, batch_size: int = 20) -> Tensor:
        """Attack (N, 3, H, W) pixels in [0, 1] of labels (N,); returns pixels of the same shape, in [0, 1]."""
        import foolbox

        model = foolbox.PyTorchModel(classifier, bounds=(0, 1), device=pixels.device)
        attack = foolbox.attacks.LinfPGD(abs_stepsize=self.step_size / 255, steps=self.steps, random_start=True)
        attacked = []
        with torch.random.fork_rng(devices=[pixels.device] if pixels.is_cuda else []):
            torch.manual_seed(self.seed)
            for batch, target in zip(pixels.split(batch_size), labels.split(batch_size), strict=True):
                attacked.append(attack(model, batch, target, epsilons=self.eps / 255)[0].detach())
        return torch.cat(attacked)

    def record(self) -> dict:
        return {
            "name": "PGD",
            "library": f"foolbox {version('foolbox')}",
            "norm": "Linf",
            "eps_255": self.eps,
            "steps": self.steps,
            "step_size_255": self.step_size,
            "random_start": True,
            "differentiates": "the classifier alone",
        }


@dataclass
class Part:
    """One dataset of the demo: its protocol and results, and the images in [0, 1] that the picture shows."""

    record: dict
    images: dict[str, Tensor]
    predictions: dict[str, Tensor]
    reference: Tensor


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
    attack = attack or Attack()
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
        part = measure(classifier, purifier, pixels, labels, attack)
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
            part = measure(judge, purifier, pixels, reference, attack, batch_size=4)
        images = f"the first {len(pixels)} embedded in foolbox, reduced to {IMAGENET_SIZE} pixels"
        part.record |= protocol | {"dataset": "ImageNet", "images": images} | about
        records.append(part.record)
        measured = "accuracy" if imagenet_classifier is not None else "prediction kept"
        print_table(console, part, f"ImageNet, {IMAGENET_SIZE} pixels, the same purifier as it is", measured)
        if imagenet_classifier is None:
            console.print(
                "No ImageNet classifier is shipped: the CIFAR-10 classifier, fully convolutional, is\n"
                "attacked away from its own prediction on the clean image.\n"
                "--imagenet-classifier measures with labels.",
                highlight=False,
            )
        pictures.append(imagenet_picture(part, out / "imagenet.png", attack))

    results = {"environment": _environment(device), "results": records}
    write_json(results, out / "results.json")
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


@torch.no_grad()
def measure(
    classifier: nn.Module,
    purifier: MAEPModel,
    pixels: Tensor,
    labels: Tensor | None,
    attack: Attack,
    batch_size: int = 20,
) -> Part:
    """Attack, purify and classify; accuracy with its interval, PSNR and time of every variant.

    Args:
        pixels: (N, 3, H, W) in [0, 1].
        labels: (N,), or `None` to hold predictions against the classifier's own on the clean images.
    """
    reference = predict(classifier, pixels, batch_size) if labels is None else labels
    with torch.enable_grad():
        attacked = attack(classifier, pixels, reference, batch_size)
    purified, seconds = _timed(purifier.purify, attacked)
    images = {
        "clean": pixels,
        "purified_clean": purifier.purify(pixels),
        "attacked": attacked,
        "purified_attacked": purified,
    }
    predictions = {name: predict(classifier, batch, batch_size) for name, batch in images.items()}
    record = {
        "n": len(pixels),
        "size": list(pixels.shape[-2:]),
        "accuracy": {name: _share(predictions[name] == reference) for name in _VARIANTS},
        "psnr_db": {name: psnr(images[name], pixels) for name in _VARIANTS[1:]},
        # cosine between what the purifier changes and what would undo the attack, 1 at best
        "direction": _cosine(purified - attacked, pixels - attacked),
        "purify_ms_per_image": 1000 * seconds / len(pixels),
    }
    return Part(record, images, predictions, reference)


@torch.no_grad()
def predict(classifier: nn.Module, pixels: Tensor, batch_size: int = 20) -> Tensor:
    """Predicted classes (N,) of (N, 3, H, W) pixels in [0, 1]."""
    return torch.cat([classifier(batch).argmax(-1) for batch in pixels.split(batch_size)])


def psnr(images: Tensor, reference: Tensor) -> float:
    """Mean over the images of the peak signal-to-noise ratio in dB, for (N, C, H, W) in [0, 1]; at most 100."""
    error = (images.float() - reference.float()).square().flatten(1).mean(1)
    return (-10 * error.clamp_min(10 ** (-PSNR_LIMIT / 10)).log10()).mean().item()


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share, as fractions; 95 % by default (Wilson 1927)."""
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"correct: {correct} of n = {n} is no share")
    share, spread = correct / n, z * z / n
    center = share + spread / 2
    half = z * sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, (center - half) / (1 + spread)), min(1.0, (center + half) / (1 + spread))


def print_table(console: Console, part: Part, title: str, measured: str) -> None:
    """Print a part's results: share and 95 % interval, PSNR against the clean image, the purifier's time."""
    record = part.record
    table = Table(title=f"{title} (n = {record['n']})", title_style="bold", title_justify="left")
    for heading in ("images", measured, "of n", "95 % interval", "PSNR"):
        table.add_column(heading, justify="left" if heading == "images" else "right")
    names = {"clean": "clean", "purified_clean": "clean, purified", "attacked": "attacked"}
    for variant in _VARIANTS:
        share = record["accuracy"][variant]
        decibel = record["psnr_db"].get(variant)
        table.add_row(
            names.get(variant, "attacked, purified"),
            f"{share['percent']:.0f} %",
            f"{share['correct']}/{share['n']}",
            "{:.0f} to {:.0f} %".format(*share["interval_95"]),
            "" if decibel is None else "identical" if decibel >= PSNR_LIMIT else f"{decibel:.1f} dB",
            style="bold" if variant == "purified_attacked" else "",
        )
    console.print()
    console.print(table)
    console.print(
        f"purifier: {record['purify_ms_per_image']:.2f} ms per image\n"
        f"cosine of its correction with the one that undoes the attack: {record['direction']:.2f}",
        highlight=False,
    )


def cifar_picture(part: Part, path: Path, attack: Attack, count: int = 10) -> Path:
    """Rows clean / attacked / purified / differences of the first images, with the predicted class under each."""
    names = [CIFAR10_CLASSES[index] for index in range(len(CIFAR10_CLASSES))]
    title = f"CIFAR-10: {attack.name} on the classifier alone ({THREAT_MODEL}), then one pass of the purifier"
    return _picture(part, path, title, count, lambda predicted, right: names[predicted])


def imagenet_picture(part: Part, path: Path, attack: Attack, count: int = 5) -> Path:
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


def write_json(value: dict, path: str | os.PathLike) -> None:
    """Write JSON so that `path` holds either the whole new file or what was there before."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _picture(part: Part, path: Path, title: str, count: int, caption) -> Path:
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


def _share(hits: Tensor) -> dict:
    correct, n = int(hits.sum()), len(hits)
    interval = [100 * bound for bound in wilson_interval(correct, n)]
    return {"correct": correct, "n": n, "percent": 100 * correct / n, "interval_95": interval}


def _cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.float().flatten(1), b.float().flatten(1), dim=1).mean().item()


def _timed(function, pixels: Tensor) -> tuple[Tensor, float]:
    """The result and the seconds of one call after a warm-up."""
    function(pixels[:1])
    _synchronize(pixels.device)
    start = time.perf_counter()
    result = function(pixels)
    _synchronize(pixels.device)
    return result, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


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


def _environment(device: torch.device) -> dict:
    versions = {}
    for package in ("maep-hf", "torch", "transformers", "foolbox"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": device.type, "device_name": name, "threads": torch.get_num_threads(), "versions": versions}
