"""Which images the attacks of the gradient-masking checks left right, on disk: interrupted checks go on at the attack
where they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..records import append_jsonl, read_jsonl


class KeptAttacks(dict[str, list[bool]]):
    """By attack, of one pipeline, threat model, radius and set of images; every one is on disk once it is put in.

    Args:
        path: a JSON-lines file that several may share.
        about: what tells them apart, as JSON gives it back.
    """

    def __init__(self, path: Path, about: list[Any]):
        lines = (line for line in read_jsonl(path) if line["key"][0] == about)
        super().__init__({line["key"][1]: line["right"] for line in lines})
        self.path, self.about = path, about

    def __setitem__(self, attack: str, right: list[bool]) -> None:
        super().__setitem__(attack, right)
        append_jsonl(self.path, {"key": [self.about, attack], "right": right})
