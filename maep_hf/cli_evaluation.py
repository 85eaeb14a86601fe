"""`maep evaluate` and `maep report`: measure a purifier under named threat models, and show what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .checkpoints import expanded_path


def evaluate(
    purifier: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or Hub id (of an adapter too), defence:NAME (jpeg, median, ...), "
            "python:MODULE:FUNCTION[:ARGUMENT], or none. Repeatable.",
            show_default="checkpoints/maep-tiny-cifar10",
        ),
    ] = None,
    classifier: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or Hub id, timm:NAME, or python:MODULE:FUNCTION[:ARGUMENT] for what your function makes. "
            "Repeatable.",
            show_default="checkpoints/resnet20-cifar10",
        ),
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="Hub id, folder, .parquet file, embedded:cifar10 or embedded:imagenet.")
    ] = "uoft-cs/cifar10",
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "test",
    dataset_config: Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of images.", show_default="found by itself")] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of class indices.", show_default="found by itself")
    ] = None,
    max_images: Annotated[int, typer.Option(min=1, help="The first so many images.")] = 1000,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Shorten to this and cut the centre square.", show_default="as they are")
    ] = None,
    threat_model: Annotated[
        list[str] | None,
        typer.Option(
            help="gray-box, bpda, white-box, black-box or transfer: what the attack sees. Repeatable.",
            show_default="gray-box",
        ),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME, NAME:NORM or NAME:NORM:EPS; `maep attacks` lists the names. Repeatable.",
            show_default="autoattack",
        ),
    ] = None,
    norm: Annotated[str | None, typer.Option(help="Linf, L2 or L1.", show_default="the attack's first")] = None,
    eps: Annotated[
        list[float] | None,
        typer.Option(
            help="Radius of the attacks in --norm (Linf by default): units of 1/255 for Linf, of pixels in [0, 1] for "
            "L2 and L1. Repeatable.",
            show_default="the attack's",
        ),
    ] = None,
    attack_option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE for the attacks: steps=40, or for one of them cw-l2.steps=50. Repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every batch's attack.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images attacked at once; part of the protocol.")] = 100,
    passes: Annotated[
        int | None,
        typer.Option(min=1, help="Final passes averaged.", show_default="10 for a randomised purifier, else 1"),
    ] = None,
    random_mask_ratio: Annotated[
        float, typer.Option(min=0, max=0.95, help="Purify under random masks of this ratio.")
    ] = 0.0,
    draws: Annotated[int, typer.Option(min=1, help="Random masks that are averaged.")] = 1,
    eot_samples: Annotated[
        int, typer.Option(min=1, help="Passes that gradients are averaged over, for what is random.")
    ] = 1,
    mode: Annotated[
        str | None, typer.Option(help="windows or interpolate, for images of another size.", show_default="model's")
    ] = None,
    overlap: Annotated[
        float | None, typer.Option(min=0, max=0.9, help="Least overlap of windows.", show_default="model's")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(min=0, help="Factor on the purifier's correction.", show_default="model's")
    ] = None,
    scale: Annotated[
        float, typer.Option(help="Purify images resized by this factor; the correction is resized back.")
    ] = 1.0,
    source_classifier: Annotated[
        str | None,
        typer.Option(help="Classifier of the surrogate pipeline that `transfer` attacks, named as --classifier."),
    ] = None,
    source_purifier: Annotated[str | None, typer.Option(help="Purifier of that pipeline.", show_default="none")] = None,
    checks: Annotated[
        bool, typer.Option(help="Gradient-masking checks with bpda and white-box, of figures above zero.")
    ] = True,
    check_images: Annotated[int, typer.Option(min=10, help="Images that those run on.")] = 50,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    out: Annotated[
        Path, typer.Option("--out", "-o", callback=expanded_path, help="Folder for records, tables and pictures.")
    ] = Path("evaluation"),
) -> None:
    """Measure clean and robust accuracy; every combination of what is repeated is one record.

    Records go to OUT/results.jsonl with their whole protocol, tables and pictures beside them. An interrupted command,
    given again, goes on at the batch where it was. `accelerate launch train/evaluate.py` takes the same options and
    shares the images between processes.
    """
    from .cli import one_line_errors

    with one_line_errors():
        from .evaluation.run import EvaluationArguments, parse_options, run_evaluation

        given = {
            "purifiers": purifier, "classifiers": classifier, "threat_models": threat_model, "attacks": attack,
            "eps": eps,
        }  # fmt: skip
        run_evaluation(
            EvaluationArguments(
                **{name: value for name, value in given.items() if value},
                dataset=dataset,
                split=split,
                dataset_config=dataset_config,
                image_column=image_column,
                label_column=label_column,
                max_images=max_images,
                image_size=image_size,
                norm=norm,
                attack_options=parse_options(attack_option or ()),
                seed=seed,
                batch_size=batch_size,
                passes=passes,
                random_mask_ratio=random_mask_ratio,
                draws=draws,
                eot_samples=eot_samples,
                mode=mode,
                overlap=overlap,
                strength=strength,
                scale=scale,
                source_classifier=source_classifier,
                source_purifier=source_purifier,
                checks=checks,
                check_images=check_images,
                device=device,
                out=out,
            )
        )


def report(
    results: Annotated[
        Path, typer.Argument(callback=expanded_path, help="results.jsonl of an evaluation, or its folder.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", callback=expanded_path, help="Folder for tables and charts.", show_default="the records'"
        ),
    ] = None,
) -> None:
    """Rebuild the tables and charts from stored records; nothing is measured."""
    from .cli import one_line_errors

    with one_line_errors():
        from .evaluation.report import report as write

        path = results / "results.jsonl" if results.is_dir() else results
        write(path, out or path.parent)


def attacks() -> None:
    """List the attacks by name, with the norms they are defined for."""
    from .cli import one_line_errors

    with one_line_errors():
        from .attacks import ATTACKS

        width = max(map(len, ATTACKS))
        for name, about in ATTACKS.items():
            norms = ", ".join(filter(None, about.norms)) or "-"
            typer.echo(f"{name:{width}}  {norms:13}  {about.description}")
