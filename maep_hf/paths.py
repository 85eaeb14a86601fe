"""Paths of this machine in what others read: they are cut down to their last part."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

_ABOVE = r"(?:[\w.-]+[\\/])*\.\."  # a relative path out of the folder it is read in
_USER = r"~(?:[A-Za-z_][\w.-]*)?"
# How a path begins that says something of this machine: absolute, of a home, of a share, a URI of a file, or `../`.
_START = rf"(?:/+[^/\\]+[\\/]|\\\\(?=\w)|{_USER}[\\/]|[A-Za-z]:[\\/]|file:/|{_ABOVE}[\\/])"
_WHOLE = re.compile(rf"/|{_START}")
# What stands around a whole value: `--name=` and `-n`, `name[` and `]`, `python:MODULE:FUNCTION:`, but not `https:`.
_FRAMED = re.compile(rf"([^\s/\\~]*?(?:[=\[]|:(?!//))|-[A-Za-z])({_START}.*?)(\]?)", re.DOTALL)
# In a text a path ends at a space, unless it is quoted.
_QUOTED = re.compile(rf"""(["'`])(?={_START})((?:(?!\1).)*)\1""")
_PART = r"""[\\/](?:[^\s\\/"'<>|:,;()\[\]]|(?<=\w)'(?=\w))+"""
_PATH = re.compile(
    rf"(?<![\w./\\~-])(?:(?:file:(?://[\w.-]*)?|[A-Za-z]:(?=[\\/])|\\(?=\\\w))?(?:{_PART}){{2,}}"  # not a fraction
    rf"|{_USER}(?:{_PART})+|(?<!\]\(){_ABOVE}(?:{_PART})+)"  # not a link of Markdown to a file beside it
)


def short(name: str) -> str:
    """The last part of a path or Hub id."""
    return PurePath(name.replace("\\", "/")).name


def without_paths(value: Any) -> Any:
    """JSON values whose paths are cut down to their last part, in names of entries too, where they are absolute or lead
    out of the working directory: the rest says nothing elsewhere, and perhaps too much of the machine it was written
    on. Names of entries, or texts of one list, that are then the same are numbered."""
    if isinstance(value, dict):
        return _named_apart([(without_paths(name), without_paths(entry)) for name, entry in value.items()])
    if isinstance(value, list | tuple):
        named = short_names(entry for entry in value if isinstance(entry, str))
        return [named[entry] if isinstance(entry, str) else without_paths(entry) for entry in value]
    return _cut(value) if isinstance(value, str) else value


def text_without_paths(text: str) -> str:
    """A text of many words, such as a file's, whose paths are cut as [`without_paths`] does; links of Markdown stay."""
    home = os.path.expanduser("~").rstrip("/\\")
    if home not in ("", "~"):  # perhaps with a space
        text = re.sub(rf"(?<![\w./\\~-]){re.escape(home)}(?=[\\/])", "~", text)
    text = _QUOTED.sub(lambda found: f"{found[1]}{short(found[2]) or found[2]}{found[1]}", text)
    return _PATH.sub(lambda found: short(found[0]), text)


def short_names(names: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """Names -> the same without paths, in their order. `/a/net` and `/b/net` are both `net`: the second one is `net
    (2)`, as it is where `net` is another of the names, or `taken`."""
    cut = {name: _cut(name) for name in names}
    used = {name for name in cut if cut[name] == name}.union(taken)
    for name, kept in cut.items():
        if kept != name:
            cut[name] = _free(kept, used)
            used.add(cut[name])
    return cut


def _cut(value: str) -> str:
    if _WHOLE.match(value):
        return short(value) or value
    if framed := _FRAMED.fullmatch(value):
        return f"{framed[1]}{short(framed[2])}{framed[3]}"
    return text_without_paths(value)


def _named_apart(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, entry in entries:
        named[_free(name, named)] = entry
    return named


def _free(name: str, used: Iterable[str]) -> str:
    """The name, or else its first one with a number that is not used."""
    number, free = 1, name
    while free in used:
        number += 1
        free = f"{name} ({number})"
    return free
