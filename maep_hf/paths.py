"""Paths of this machine in what others read: they are cut down to their last part."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

# An absolute path inside a text, also after a colon (`python:/home/...`); not the path of a URL, not a fraction.
_PATH = re.compile(r"""(?<![\w./\\~-])(?:file://)?(?:~|[A-Za-z]:(?=[\\/]))?(?:[\\/][^\s\\/"'<>|:,;()\[\]]+){2,}""")


def short(name: str) -> str:
    """The last part of a path or Hub id."""
    return PurePath(name.replace("\\", "/")).name


def without_paths(value: Any) -> Any:
    """JSON values whose absolute paths are cut down to their last part, in names of entries too: the rest says nothing
    elsewhere, and perhaps too much of the machine it was written on. Names that are then the same are numbered."""
    if isinstance(value, dict):
        return _named_apart([(without_paths(name), without_paths(entry)) for name, entry in value.items()])
    if isinstance(value, list | tuple):
        return [without_paths(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if PurePath(value).is_absolute() or re.match(r"~[/\\]|[A-Za-z]:[/\\]", value):
        return short(value)
    return _PATH.sub(lambda found: short(found[0]), value)


def _named_apart(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    """`/a/net` and `/b/net` are both `net`: the second one is `net (2)`."""
    named: dict[str, Any] = {}
    for name, entry in entries:
        number, free = 1, name
        while free in named:
            number += 1
            free = f"{name} ({number})"
        named[free] = entry
    return named
