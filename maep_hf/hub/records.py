"""Evaluation records, read from a folder or from the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..evaluation.results import read_results
from ..records import append_jsonl, as_jsonl
from .folders import RESULTS
from .outdated import outdated_records


def load_records(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    repo_type: str = "model",
    token: str | bool | None = None,
) -> list[dict[str, Any]]:
    """The records of `results.jsonl`, which `maep_hf.evaluation` makes tables and charts of.

    Args:
        name_or_path: folder of an evaluation or model, or Hub id of a purifier, an adapter or records.
        revision: branch, tag or commit on the Hub.
        repo_type: `"dataset"` for records with a repository of their own.
        token: for a private repository, instead of the stored one.

    Raises:
        OSError: no such folder, repository, revision or file.
        ValueError: a line that is no record.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return read_results(folder / RESULTS)
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(os.fspath(name_or_path), RESULTS, revision=revision, repo_type=repo_type, token=token)
    return read_results(path)


def drop_outdated(into: Path, new: Path) -> list[Mapping[str, Any]]:
    """Take the records that those of `new` outdate out of `into`, if it is there; returns what was taken out."""
    there = read_results(into) if into.is_file() else []
    dropped = outdated_records(there, read_results(new))
    if dropped:
        into.write_text(as_jsonl(record for record in there if record not in dropped))
    return dropped


def merge_records(into: Path, new: Iterable[Mapping[str, Any]]) -> None:
    """Add the records of `new` to those of a file, each in place of an older one of the same protocol.

    An older one stays where it was checked and the new one was not: what failed there holds for both.
    """
    there = {record["key"]: record for record in read_results(into)} if into.is_file() else {}
    for record in new:
        if not loses_checks(record, there.get(record["key"])):
            append_jsonl(into, dict(record))


def loses_checks(record: Mapping[str, Any], known: Mapping[str, Any] | None) -> bool:
    """Whether a record is one without checks of a protocol that a known one has the checks of."""
    return known is not None and record["checks"] is None and known["checks"] is not None


def merged_folder(
    folder: Path, records: Iterable[Mapping[str, Any]], before: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Write `before` and `records` into a new folder, with the tables and charts of both; returns both."""
    (folder / RESULTS).write_text(as_jsonl(before))
    merge_records(folder / RESULTS, records)
    write_report(folder)
    return read_results(folder / RESULTS)


def write_report(folder: Path) -> None:
    """Write the tables and charts of a folder's records beside them."""
    from rich.console import Console

    from ..evaluation.report import report

    with open(os.devnull, "w") as silent:
        report(folder / RESULTS, folder, Console(file=silent))
