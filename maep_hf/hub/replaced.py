"""Weights and pairs of an older push that would load in place of a newer one's or beside them, under other names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from .folders import read_own_json

# as transformers names them; it takes the single file before the index of the others
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
# as `pairs.py` names them, and so does everybody; all of a split are read, whatever number they say they are of
_SHARD = re.compile(r"data/(?P<split>[^/]+)-\d{5,}-of-\d{5,}\.parquet")


def replaced_weights(names: Iterable[str], new: Collection[str]) -> list[str]:
    """Files with the weights of a whole model that those of a push replace.

    Args:
        names: paths of the repository's files.
        new: paths that are pushed. Without weights among them, nothing is replaced.
    """
    if not any(_WEIGHTS.fullmatch(name) for name in new):
        return []
    return sorted(name for name in names if _WEIGHTS.fullmatch(name) and name not in new)


def files_of_weights(names: Iterable[str]) -> list[str]:
    """The files among `names` that hold the weights of a whole model."""
    return [name for name in names if _WEIGHTS.fullmatch(name) and name.endswith(".safetensors")]


def hides_processor(path: Path | None) -> bool:
    """Whether a `processor_config.json` holds an image processor, which is read before `preprocessor_config.json`."""
    return "image_processor" in read_own_json(path)


def replaced_shards(names: Iterable[str], new: Collection[str]) -> list[str]:
    """Files of the splits that are pushed and that the push does not write over; other splits may be a person's.

    Args:
        names: paths of the repository's files.
        new: paths that are pushed.
    """
    splits = {shard["split"] for name in new if (shard := _SHARD.fullmatch(name))}
    shards = [shard for name in names if name not in new and (shard := _SHARD.fullmatch(name))]
    return sorted(shard[0] for shard in shards if shard["split"] in splits)


def is_pairs_record(path: Path | None) -> bool:
    """Whether a file is there and is the record that `make_pairs` writes beside its pairs."""
    arguments = read_own_json(path).get("arguments")
    return isinstance(arguments, dict) and {"pairs", "attack"} <= set(arguments)


def in_short(names: list[str], at_most: int = 3) -> str:
    """Names as a message lists them: the first of many."""
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more} more" if more > 0 else "")
