"""The command line of a table that is made from stored evaluation records."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maep_hf.evaluation.results import read_results
from maep_hf.records import write_text

Records = Sequence[Mapping[str, Any]]


def table_command(
    argv: Sequence[str] | None,
    description: str,
    stem: str,
    markdown: Callable[[Records], str],
    picture: Callable[[Records, Path], None],
) -> None:
    """Read `FOLDER/results.jsonl`, write `FOLDER/STEM.md` and `FOLDER/STEM.png`, and print the table.

    Args:
        argv: the command line's arguments; the process's own when `None`.
        description: of the command, for its help.
        stem: name of both files.
        markdown: makes the table; raises ValueError where the records make none.
        picture: draws it into a file.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path, help=f"holds results.jsonl; {stem}.md and {stem}.png go there")
    folder = parser.parse_args(argv).folder
    try:
        records = read_results(folder / "results.jsonl")
        text = markdown(records)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    write_text(folder / f"{stem}.md", text)
    picture(records, folder / f"{stem}.png")
    print(text)
