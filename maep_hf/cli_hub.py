"""`maep push` and `maep card`: what was made here, on the Hub, and the page that people find it by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .checkpoints import expanded_path

_BASE_HELP = "Hub id of the model this one was made from; needed for an adapter of a local folder."


def push(
    folder: Annotated[
        Path,
        typer.Argument(
            callback=expanded_path,
            help="Folder of a purifier, classifier, adapter, evaluation (maep evaluate) or stored pairs.",
        ),
    ],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME, or NAME under your account; made when missing.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="For a new repository.", show_default="your account's setting"),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch (made when missing) or refs/pr/N.", show_default="main")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Name for the commit, such as v1.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Message of the commit.")] = None,
    base_model: Annotated[str | None, typer.Option(help=_BASE_HELP)] = None,
    repo_type: Annotated[
        str | None,
        typer.Option(help="dataset: a repository of their own for evaluation records.", show_default="the folder's"),
    ] = None,
) -> None:
    """Push a folder to the Hub, and the card made from its records.

    Only weights, configuration, code, records, tables and pictures go: no checkpoint, optimiser state, token or path of
    this machine. A README on the Hub that a person edited keeps its text and gets the results into its metadata.
    Evaluation records go to the purifier's repository. A push that failed can be repeated.
    """
    from .cli import one_line_errors

    with one_line_errors():
        from transformers.utils import logging

        from .hub import push_to_hub

        logging.disable_progress_bar()
        pushed = push_to_hub(
            folder,
            repo_id,
            private=private,
            revision=revision,
            tag=tag,
            create_pr=create_pr,
            commit_message=message,
            base_model=base_model,
            repo_type=repo_type,
        )
        cards = {
            "written": "card written",
            "merged": "README edited by hand: results in its metadata brought up to date",
            "kept": "README edited by hand: left as it is",
            "none": "no card",
        }
        _say(f"pushed: {pushed.url} ({pushed.branch}, {pushed.revision[:8]}; {cards[pushed.card]})")


def card(
    folder: Annotated[
        Path,
        typer.Argument(
            callback=expanded_path, help="Folder of a purifier, adapter, classifier, evaluation or stored pairs."
        ),
    ],
    repo_id: Annotated[str | None, typer.Option(help="Hub id that the card's code names.")] = None,
    base_model: Annotated[str | None, typer.Option(help=_BASE_HELP)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a README.md that was edited, too.")] = False,
    results: Annotated[
        Path | None,
        typer.Option(callback=expanded_path, help="A results.jsonl from elsewhere.", show_default="the folder's"),
    ] = None,
    template: Annotated[
        Path | None,
        typer.Option(callback=expanded_path, help="Your own Jinja template.", show_default="the kind's"),
    ] = None,
) -> None:
    """Write the card of a folder, FOLDER/README.md, from the records beside the weights.

    A README.md that a person edited keeps its text, and gets the results into its metadata.
    """
    from .cli import one_line_errors

    with one_line_errors():
        from transformers.utils import logging

        from .evaluation.results import read_results
        from .hub import write_card

        logging.disable_progress_bar()
        records = None if results is None else read_results(results)
        how = write_card(
            folder, repo_id, base_model=base_model, overwrite=overwrite, results=records, template=template
        )
        done = "written" if how == "written" else "results merged into the metadata of"
        _say(f"{done}: {folder / 'README.md'}")


def _say(line: str) -> None:
    Console().print(line, highlight=False, soft_wrap=True)
