"""Which images the attacks of the gradient-masking checks left right, on disk: interrupted checks go on at the attack
where they were."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

from ..records import append_jsonl, read_jsonl


class CheckAttacks(UserDict[str, list[bool]]):
    """By attack, of one pipeline, threat model, radius and set of images; every one is kept as it is put in.

    Args:
        path: a JSON-lines file that several may share.
        about: what tells them apart.
    """

    def __init__(self, path: Path, about: list[Any]):
        super().__init__()
        self.path, self.about = path, about
        self.data = {line["attack"]: line["right"] for line in read_jsonl(path) if line["about"] == about}

    def __setitem__(self, attack: str, right: list[bool]) -> None:
        super().__setitem__(attack, right)
        line = {"about": self.about, "attack": attack, "right": right}
        append_jsonl(self.path, {"key": f"{self.about} {attack}"} | line)
