"""The command `maep`: purify, evaluate, push and the demo. Errors a user can cause are one line and exit code 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .checkpoints import expanded_path
from .cli_evaluation import attacks, evaluate, report
from .cli_hub import card, push
from .memory import keep_freed_memory

if TYPE_CHECKING:
    import torch

    from .modeling_maep import MAEPModel

# torch and transformers take seconds to import: each command imports them itself, so that --help is at once there.

app = typer.Typer(
    name="maep",
    help="Defend image classifiers with a masked-autoencoder purifier: one forward pass per image.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for command in (evaluate, report, attacks, push, card):
    app.command()(command)
errors = Console(stderr=True, highlight=False)


class Mode(StrEnum):
    """How images of another size than the purifier's own are treated."""

    windows = "windows"
    interpolate = "interpolate"


class Precision(StrEnum):
    """Number type of the purifier's weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def _print_version(value: bool) -> None:
    if value:
        try:
            typer.echo(f"maep {version('maep-hf')}")
        except PackageNotFoundError:
            typer.echo("maep (not installed as a package)")
        raise typer.Exit()


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Defend image classifiers with a masked-autoencoder purifier: one forward pass per image."""
    keep_freed_memory()


@app.command()
def purify(
    images: Annotated[
        list[str], typer.Argument(help="Image files, folders (searched recursively) or quoted glob patterns.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", callback=expanded_path, help="Folder for the results; made when missing.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Purifier: folder or Hub id.", show_default="checkpoints/maep-tiny-cifar10")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also write NAME.compare.png: image, purified, magnified difference.")
    ] = False,
    mode: Annotated[
        Mode | None,
        typer.Option(
            help="Windows of the model's size, or its positions interpolated to the image.", show_default="model's"
        ),
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option(min=0.0, max=0.9, help="Least overlap of windows, as a share of one.", show_default="model's"),
    ] = None,
    window_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Windows run at once: less memory when small.", show_default="model's")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(min=0.0, help="Factor on the correction; 0 leaves images as they are.", show_default="model's"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    dtype: Annotated[Precision, typer.Option(help="Number type of the weights.")] = Precision.float32,
) -> None:
    """Purify image files; results keep name, format, size, mode, alpha channel and orientation.

    Inputs are never overwritten, results of an earlier run are. A broken file, or one whose name is too long, is
    skipped with a warning, and the exit code is then 1. JPEG results are saved at quality 95; PNG, TIFF and WebP
    without loss. A palette image gets a new palette; of an animation or a multi-page file the first frame is written.
    """
    with one_line_errors():
        from .imageio import check_outputs, find_images

        found = find_images(images, exclude=out, compare=compare)
        check_outputs(found, out, compare)
        purifier = _load_purifier(model, device, dtype, revision)
        options = {
            "mode": mode and mode.value, "overlap": overlap, "window_batch_size": window_batch_size,
            "strength": strength,
        }  # fmt: skip
        options = {name: value for name, value in options.items() if value is not None}
        failed, uncompared = _purify_files(purifier, found, out, compare, options)
    done = len(found) - failed
    typer.echo(f"{done} of {len(found)} image{'s' * (len(found) != 1)} purified into {out}")
    for count, what in ((failed, "files skipped"), (uncompared, "comparisons not written")):
        if count:
            errors.print(f"[yellow]warning:[/yellow] {count} of {len(found)} {what}")
    if failed or uncompared:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", callback=expanded_path, help="Folder for the results.")] = Path(
        "demo_output"
    ),
    model: Annotated[
        str | None, typer.Option(help="Purifier: folder or Hub id.", show_default="checkpoints/maep-tiny-cifar10")
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(help="CIFAR-10 classifier: folder or Hub id.", show_default="checkpoints/resnet20-cifar10"),
    ] = None,
    imagenet_classifier: Annotated[
        str | None,
        typer.Option(
            help="ImageNet classifier (1,000 classes): folder or Hub id.", show_default="none: see the output"
        ),
    ] = None,
    imagenet_images: Annotated[
        int, typer.Option(min=0, max=20, help="How many of the embedded ImageNet images; 0 leaves the part out.")
    ] = 20,
    eps: Annotated[float, typer.Option(help="Strength of the attack, in units of 1/255.")] = 8.0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the attack.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the attack's random start.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
) -> None:
    """Attack a classifier on real images, purify them, print accuracy and save pictures.

    Runs on the 20 CIFAR-10 and 20 ImageNet images that come with foolbox, so nothing is downloaded. The attack is PGD
    in the L-infinity ball on the classifier alone (gray-box).
    """
    with one_line_errors():
        from .attacks import make_attack
        from .checkpoints import CLASSIFIER, PURIFIER, check_model, released_checkpoint
        from .demo import run_demo

        attack = make_attack("pgd", norm="Linf", eps=eps, steps=steps)
        purifier = _load_purifier(model, device, Precision.float32)
        classifier_path = classifier or str(released_checkpoint(CLASSIFIER))
        for path in filter(None, (classifier_path, imagenet_classifier)):
            check_model(path, kind="an image classifier")
        from .classifier import load_classifier

        where = next(purifier.parameters()).device
        imagenet = load_classifier(imagenet_classifier).to(where) if imagenet_classifier else None
        run_demo(
            out,
            purifier=purifier,
            purifier_name=model or PURIFIER,
            classifier=load_classifier(classifier_path).to(where),
            classifier_name=classifier or CLASSIFIER,
            imagenet_classifier=imagenet,
            imagenet_name=imagenet_classifier or "",
            attack=attack,
            seed=seed,
            imagenet_images=imagenet_images,
        )


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can cause (a missing file, a wrong model, a full disk) into one line and exit code 1.

    Errors of other types are ours, and keep their traceback.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, MemoryError) as error:
        lines = (str(error) or type(error).__name__).strip().splitlines()
        errors.print(f"[red]error:[/red] {escape(lines[0])}", soft_wrap=True)
        raise typer.Exit(1) from error


def _load_purifier(model: str | None, device: str, dtype: Precision, revision: str | None = None) -> MAEPModel:
    import torch
    from transformers.utils import logging

    from .checkpoints import load_purifier
    from .devices import pick_device

    logging.disable_progress_bar()  # of loading weights, which takes no time here
    return load_purifier(model, device=pick_device(device), dtype=getattr(torch, dtype.value), revision=revision)


def _purify_files(purifier: MAEPModel, found: list, out: Path, compare: bool, options: dict) -> tuple[int, int]:
    """Purify one file after the other; returns how many were skipped, and how many others have no comparison."""
    from .imageio import ImageReadError, ImageWriteError

    failed = uncompared = 0
    device = next(purifier.parameters()).device
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=errors) as progress:
        task = progress.add_task("purifying", total=len(found))
        for item in found:
            try:
                note, whole = _purify_file(purifier, item.source, out / item.relative, device, compare, options)
                uncompared += not whole
            except (ImageReadError, ImageWriteError) as error:
                failed += 1
                note = f"skipped {error}"
            if note:
                progress.console.print(f"[yellow]warning:[/yellow] {escape(note)}", soft_wrap=True)
            progress.advance(task)
    return failed, uncompared


def _purify_file(
    purifier: MAEPModel, source: Path, target: Path, device: torch.device, compare: bool, options: dict
) -> tuple[str, bool]:
    """Purify one file; returns what the user should know about it, if anything, and whether all of it is written."""
    import torch

    from .imageio import ImageReadError, ImageWriteError, load_image, restore_image, save_image

    image = load_image(source)
    pixels = image.pixels
    if purifier.config.num_channels == 1:
        if not image.grey:
            raise ImageReadError(f"{source}: it has colours, and this purifier takes grey pictures; convert it first")
        pixels = pixels[:1]
    try:
        with torch.inference_mode():
            purified = purifier.purify(pixels[None].to(device), **options)[0].float().cpu()
            purified = purified.expand_as(image.pixels)
    except RuntimeError as error:
        if "memory" not in str(error):  # torch has one error class for it on a GPU and none on a CPU
            raise
        advice = "use --mode windows, or a smaller --window-batch-size"
        raise MemoryError(f"{source}: out of memory at {tuple(image.pixels.shape[1:])} pixels; {advice}") from error
    save_image(restore_image(purified, image), target, image.format, image.metadata)
    notes, whole = [f"only the first of {image.frames} frames is purified"] if image.frames > 1 else [], True
    if compare:
        try:
            _write_comparison(image.pixels, purified, target)
        except ImageWriteError as error:  # its name is the longer one
            notes, whole = [*notes, f"purified without a comparison ({error})"], False
    return f"{source}: {'; '.join(notes)}" if notes else "", whole


def _write_comparison(pixels: torch.Tensor, purified: torch.Tensor, path: Path) -> None:
    import torch

    from .figures import difference_image, image_grid
    from .imageio import comparison_path

    factor = 8
    panels = torch.stack([pixels, purified, difference_image(purified, pixels, factor)])
    caption = ["image", "purified", f"difference × {factor}"]
    image_grid({"": panels}, comparison_path(path), title=path.name, captions={"": caption}, cell=320)


if __name__ == "__main__":
    app()
