"""What the page of a repository is made of: the files that are pushed, beside the records that are there already."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.results import read_results
from .cards import own_records, picture_captions
from .folders import ADAPTER, EVALUATION, PURIFIER, RESULT_TEXTS, RESULTS, Kind, kind_of
from .outdated import outdated_records
from .records import drop_outdated, loses_checks, merge_records, merged_folder, write_report
from .repository import Repository
from .results import is_outdated_report, without_other_weights


@dataclass
class Page:
    """What goes to a repository, and what its page goes on to show.

    Attributes:
        folder: the source, or records staged beside the model or records on the Hub.
        kind: what the folder holds.
        records: all that the page shows of a model; `None` where those in `folder` say all.
        merged: folder with those records and their tables, which replace those of `folder`.
        pictures: files on the Hub, or in `merged`, that the page may show.
        cleared: operations that take figures of other weights off the Hub.
    """

    folder: Path
    kind: Kind
    records: list[dict] | None = None
    merged: Path | None = None
    pictures: Collection[str] = ()
    cleared: list = field(default_factory=list)

    @property
    def has_own_records(self) -> bool:
        return (self.folder / RESULTS).is_file()


def page_of(
    push: Repository, folder: Path, kind: Kind, at: str | None, names: Collection[str], stack: ExitStack
) -> Page:
    """Bring a source and what the repository has of its weights together; nothing is sent.

    Args:
        push: the repository.
        folder, kind: the source.
        at, names: the commit that the push goes on top of, if any, and its files.
        stack: temporary folders go with it.

    Raises:
        ValueError: records of other weights than those that they would lie beside.
    """
    if kind is EVALUATION:
        return _of_records(push, folder, at, names, _temporary(stack))
    if kind in (PURIFIER, ADAPTER):
        return _of_model(push, folder, kind, at, names, stack)
    return Page(folder, kind)


def _of_records(push: Repository, records: Path, at: str | None, names: Collection[str], staged: Path) -> Page:
    pictures: Collection[str] = ()
    if push.repo_type == "model":
        push.download_model(staged, at)
    elif at and (path := push.file(RESULTS, at)):
        shutil.copy(path, staged / RESULTS)
        pictures = names
    kind, dropped = _with_records(staged, records, push.repo_id)
    return Page(staged, kind, pictures=pictures, cleared=_without(push, dropped))


def _of_model(
    push: Repository, folder: Path, kind: Kind, at: str | None, names: Collection[str], stack: ExitStack
) -> Page:
    page = Page(folder, kind)
    page.records, page.cleared = push.records_of(folder, kind, at)
    page.pictures = names if page.records else ()
    if page.has_own_records:
        mine = read_results(folder / RESULTS)
        kept = _of_these_weights(folder, kind, mine)
        if len(kept) < len(mine):
            push.going.append(f"{len(mine) - len(kept)} records in the folder are of other weights and stay there")
        known = _of_these_weights(folder, kind, page.records)
        there, dropped = _beside_own(folder, kind, kept, known, page.pictures)
        if there is None and (len(kept) < len(mine) or is_outdated_report(folder, mine)):
            there = []
        page.records = there
        if there is not None:
            page.merged = _temporary(stack)
            page.records = merged_folder(page.merged, kept, there)
            page.pictures = {*page.pictures, *(path.name for path in page.merged.iterdir())}
        page.cleared = _without(push, dropped) or page.cleared
    return page


def _of_these_weights(folder: Path, kind: Kind, records: list[dict]) -> list[dict]:
    """Records without those of what a purifier was before a training; those of other weights alone are refused."""
    return without_other_weights(records, own_records(folder, records)) if kind is PURIFIER else records


def _temporary(stack: ExitStack) -> Path:
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="maep-push-")))


def _without(push: Repository, dropped: list[Mapping[str, Any]]) -> list:
    return push.without(dropped, "with another fingerprint of the adapter") if dropped else []


def _with_records(folder: Path, records: Path, repo_id: str) -> tuple[Kind, list[Mapping[str, Any]]]:
    """Bring records into a folder, perhaps beside a model, with the tables and charts of all that are then there.

    Returns:
        What the folder then holds, and the records of an adapter's other weights that gave way.
    """
    kind = kind_of(folder) if any(folder.iterdir()) else EVALUATION
    if kind not in (PURIFIER, ADAPTER, EVALUATION):
        raise ValueError(f"{repo_id} is the repository of a {kind.name}, not of what these records measured")
    new = _of_these_weights(folder, kind, read_results(records / RESULTS))
    dropped = drop_outdated(folder / RESULTS, records / RESULTS) if kind is ADAPTER else []
    for name in picture_captions(dropped) if dropped else ():
        (folder / name).unlink(missing_ok=True)
    merge_records(folder / RESULTS, new)
    for picture in records.glob("*.png"):
        shutil.copy(picture, folder / picture.name)
    write_report(folder)
    return kind, dropped


def _beside_own(
    folder: Path, kind: Kind, mine: list[dict], there: list[dict], names: Collection[str]
) -> tuple[list[dict] | None, list[Mapping[str, Any]]]:
    """Records on the Hub that go on beside those of a model's folder, and those of an adapter that give way to them.

    `None` in place of the former where what is in the folder says all, its tables included.
    """
    dropped = outdated_records(there, mine) if kind is ADAPTER else []
    left = [record for record in there if record not in dropped]
    known = {record["key"]: record for record in mine}
    more = any(record["key"] not in known or loses_checks(known[record["key"]], record) for record in left)
    stale = any(name in names and not (folder / name).is_file() for name in RESULT_TEXTS)
    return (left if more or (left and stale) else None), dropped
