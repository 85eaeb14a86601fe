"""What an older push left on the Hub and a newer one outdates: figures of this package, and nobody's own files."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from ..checkpoints import is_other_base
from .cards import picture_captions
from .folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_RECORD, RESULT_TEXTS, read_json, read_own_json
from .results import fingerprints_of
from .seal import edited_card, without_results

README = "README.md"
_RUN_RECORD = re.compile(r"([^/]+_)?run\.json")
# of adapter_config.json: how much of the weights is added to the base
_SCALE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def outdated_operations(
    names: Iterable[str], page: str | None, records: Sequence[Mapping[str, Any]]
) -> list[CommitOperationDelete | CommitOperationAdd]:
    """What takes the figures of records off a repository.

    The records, their tables and the pictures that a card shows of them go, each by its exact name beside the weights.
    A page that a person edited keeps its text and the pictures it mentions, and loses the results that this package put
    into its metadata; any other page is written anew by the push.

    Args:
        names: paths of the repository's files.
        page: its README; `None` without one.
        records: those that are outdated.

    Raises:
        ValueError: the metadata of the README cannot be read.
    """
    there, theirs = set(names), edited_card(page)
    pictures = [name for name in picture_captions(records) if theirs is None or name not in page]
    going: list = [CommitOperationDelete(name) for name in (*RESULT_TEXTS, *pictures) if name in there]
    if theirs is not None and (cleared := without_results(theirs)) is not None:
        going.append(CommitOperationAdd(README, str(cleared).encode()))
    return going


def outdated_records(
    records: Iterable[Mapping[str, Any]], newer: Iterable[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The records of an adapter that newer ones outdate: all but those of bare classifiers, or none.

    None where both were measured on the same weights, or where one side has only records of a rescaled or randomised
    purifier: their fingerprint is another, whatever the weights.
    """
    measured = [record for record in records if record["protocol"]["purifier"] is not None]
    before, now = fingerprints_of(measured), fingerprints_of(newer)
    return measured if before and now and not before & now else []


def outdated_runs(names: Collection[str], new: Collection[str], file_of: Callable[[str], Path | None]) -> list[str]:
    """Records of the training of weights that a push replaces, and that it does not write over.

    They would be the source of a later page. A record goes with the metrics beside it, and only where it is of the form
    that this package writes.

    Args:
        names: paths of the repository's files.
        new: paths that are pushed.
        file_of: gives a file of the repository by its path.
    """
    found = []
    for name in sorted(names):
        run = _RUN_RECORD.fullmatch(name)
        if run and _is_run_record(file_of(name)):
            found += [each for each in (name, f"{run[1] or ''}metrics.jsonl") if each in names and each not in new]
    return found


def _is_run_record(path: Path | None) -> bool:
    return isinstance(read_own_json(path).get("arguments"), dict)


def same_adapter(folder: Path, there: Mapping[str, Path | None]) -> bool:
    """Whether an adapter purifies as the one in a folder: its weights, their scale, and its base as far as recorded.

    Args:
        folder: of the one.
        there: files of the other by their names; `None` for one that is missing.
    """
    weights, config, base = (there[name] for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, BASE_RECORD))
    if weights is None or config is None or weights.read_bytes() != (folder / ADAPTER_WEIGHTS).read_bytes():
        return False
    recorded = base is not None and (folder / BASE_RECORD).is_file()
    if recorded and is_other_base(read_json(folder / BASE_RECORD), read_json(base)):
        return False
    ours, theirs = read_json(folder / ADAPTER_CONFIG), read_json(config)
    return all((ours.get(name) or None) == (theirs.get(name) or None) for name in _SCALE)
