"""Tables of evaluation records: for the terminal, in Markdown and as CSV; two threat models never share a column.

A record is one line of results.jsonl. In the tables a row is one attack on one purifier in front of one classifier, and
each threat model has its own column. "undefended" is the bare classifier under an attack made on itself: a row of its
own where it was measured alone, and the same figure beside the gray-box one, whose attack is just that.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from .results import (
    NO_PURIFIER,
    UNDEFENDED,
    UNRELIABLE,
    Result,
    ResultsError,
    flatten,
    read_results,
    results,
    with_fields,
)
from .threat_models import THREAT_MODELS

__all__ = ["csv_table", "escape", "markdown_table", "percent", "read_results", "rich_table", "rows_of", "worst_of"]

ATTACKS, CONTROLS = "Attacks", "Corruptions (control, no attacks)"
_NAMES = ("dataset", "classifier", "purifier", "attack")
_LONGEST_WORD, _SHORTEST_COLUMN = 20, 4  # characters; longer words in names are broken where there is no room


def rich_table(records: Iterable[Mapping], *, percent_digits: int = 1) -> RichTables:
    """The tables for a terminal, as a renderable for `rich.print` or a `rich.console.Console`.

    Args:
        records: from [`read_results`], or results as they are measured.
        percent_digits: digits after the point of every percentage.

    Raises:
        ResultsError: no records, or one lacks a field.
        ValueError: `percent_digits` is no whole number from 0 up.
    """
    return RichTables(*_parts(records, percent_digits))


@dataclass(frozen=True)
class RichTables:
    """What [`rich_table`] returns: where the console is too narrow for all columns, they follow under each other."""

    parts: Sequence[_Part]
    notes: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        for part in self.parts:
            yield Text(part.title, style="bold")
            yield Text(_said(part.common))
            yield from _fitting_tables(part, options.max_width)
            yield Text("")
        for number, note in enumerate(self.notes, 1):
            yield Text(f"[{number}] {note}", style="red" if note.startswith(UNRELIABLE) else "")


def _fitting_tables(part: _Part, width: int) -> Iterator[Table]:
    """Tables of at most `width` characters: each with the columns of names, and as many figures as fit beside them."""
    columns = [[Text(name), *map(_rich_cell, cells)] for name, *cells in zip(part.header, *part.rows, strict=True)]
    whole = [max(text.cell_len for text in column) for column in columns]
    least = [max(cell_len(word) for text in column for word in text.plain.split()) for column in columns]
    names = [index for index, name in enumerate(part.header) if name in _NAMES]
    figures = [index for index in range(len(columns)) if index not in names]
    widest = max(least[index] for index in figures)
    for longest in range(_LONGEST_WORD, _SHORTEST_COLUMN - 1, -1):  # long names give way before a figure does
        for index in names:
            least[index] = min(least[index], longest)
        if _table_width([widest, *(least[index] for index in names)]) <= width:
            break
    while figures:
        shown = [*names, figures.pop(0)]
        while figures and _table_width(least[index] for index in [*shown, figures[0]]) <= width:
            shown.append(figures.pop(0))
        spare = width - _table_width(least[index] for index in shown)
        table = Table(show_lines=sum(whole[index] - least[index] for index in shown) > spare)
        for index in shown:
            more = max(0, min(spare, whole[index] - least[index]))
            spare -= more
            justify = "left" if index in names else "right"
            table.add_column(columns[index][0], justify=justify, width=least[index] + more, overflow="fold")
        for row in zip(*(columns[index][1:] for index in shown), strict=True):
            table.add_row(*row)
        yield table


def _table_width(widths: Iterable[int]) -> int:
    """With a space on both sides of every column and lines between."""
    return 1 + sum(width + 3 for width in widths)


def markdown_table(records: Iterable[Mapping], *, percent_digits: int = 1) -> str:
    """The tables in GitHub's Markdown, with footnotes under them. Arguments and errors as of [`rich_table`]."""
    parts, notes = _parts(records, percent_digits)
    lines = []
    for part in parts:
        lines += [f"**{escape(part.title)}.** {escape(_said(part.common))}", ""]
        lines.append(_markdown_row(map(escape, part.header)))
        lines.append(_markdown_row("---" if name in _NAMES else "---:" for name in part.header))
        lines += [_markdown_row(map(_markdown_cell, row)) for row in part.rows]
        lines.append("")
    for number, note in enumerate(notes, 1):
        lines += [f"<sup>{number}</sup> {escape(note)}", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def csv_table(records: Iterable[Mapping]) -> str:
    """One line per record with raw numbers and every field of the protocol; controls come last.

    The columns are the fields' dotted names. Before them stand `part` (attack or control), `column` (the one of the
    other tables that the figure belongs to) and `status` (unreliable with the failed checks, not checked, or empty).
    A field that is null is empty. The environment and the checks' data stay in results.jsonl.

    Raises:
        ResultsError: no records, or one lacks a field.
    """
    lines = []
    for result in sorted(_some(results(records)), key=lambda result: result.control):
        status = f"{result.mark}: {'; '.join(result.failed)}" if result.failed else result.mark
        line = {"part": "control" if result.control else "attack", "column": result.column, "status": status}
        line |= flatten({key: value for key, value in result.record.items() if key not in ("environment", "checks")})
        lines.append({key: value for key, value in line.items() if value is not None})
    position: dict[str, int] = {}  # of every field and object, so that a field met late still stands with its like
    for line in lines:
        for key in line:
            for parent in _parents(key):
                position.setdefault(parent, len(position))
    names = {key for line in lines for key in line}
    columns = sorted(names, key=lambda key: [position[parent] for parent in _parents(key)])
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def worst_of(records: Iterable[Mapping], *, per_budget: bool = True) -> list[Mapping]:
    """The record of the strongest attack for each dataset, classifier, purifier and threat model.

    It is the lowest accuracy of one attack over all images, not the worst attack on each image. Controls are left out.

    Args:
        per_budget: compare attacks of one norm and eps only; otherwise the largest eps, or an attack without a bound,
            wins by its budget alone.

    Returns:
        Records in the order in which their groups came first; of equal ones the first.

    Raises:
        ResultsError: no records, or one lacks a field.
    """
    worst: dict[tuple, Result] = {}
    for result in _some(results(records)):
        if result.control:
            continue
        attack = result.record["protocol"]["attack"]
        budget = (attack["norm"], attack["eps"]) if per_budget else None
        group = (result.dataset, result.classifier, result.purifier, result.column, budget)
        if group not in worst or result.figure["percent"] < worst[group].figure["percent"]:
            worst[group] = result
    return [result.record for result in worst.values()]


def _some(found: list[Result]) -> list[Result]:
    if not found:
        raise ResultsError("records: there are none to show")
    return found


# What the tables have in common.


@dataclass(frozen=True)
class _Cell:
    text: str
    mark: str = ""
    note: int = 0


@dataclass(frozen=True)
class _Part:
    """One table: `common` holds what is the same in every row and is said above it."""

    title: str
    common: dict[str, str]
    header: list[str]
    rows: list[list[_Cell]]


def _parts(records: Iterable[Mapping], percent_digits: int) -> tuple[list[_Part], list[str]]:
    """The tables, and the notes that their cells refer to by number."""
    if isinstance(percent_digits, bool) or not isinstance(percent_digits, int) or percent_digits < 0:
        raise ValueError(f"percent_digits: {percent_digits!r} is no whole number from 0 up")
    found = _some(results(records))
    notes: dict[str, int] = {}
    parts = []
    for title, control in ((ATTACKS, False), (CONTROLS, True)):
        if part := [result for result in found if result.control == control]:
            parts.append(_part(title, rows_of(part), notes, percent_digits))
    return parts, list(notes)


def _part(title: str, rows: Sequence[Row], notes: dict[str, int], digits: int) -> _Part:
    named = {name: [row.names[name] for row in rows] for name in (*_NAMES, "n")}
    common = {name: values[0] for name, values in named.items() if name != "attack" and len(set(values)) == 1}
    columns = [UNDEFENDED, *(f"{UNDEFENDED} ({name})" for name in THREAT_MODELS), *THREAT_MODELS]
    present = {column for row in rows for column in row.cells} | {UNDEFENDED for row in rows if row.undefended}
    columns = [column for column in columns if column in present]
    purified = any(row.purified_clean for row in rows)
    header = [name for name in named if name not in common] + ["clean"] + ["purified clean"] * purified + columns

    def cell(row: Row, column: str) -> _Cell:
        if column in row.names:
            return _Cell(row.names[column])
        if column == "clean":
            return _Cell(percent(row.clean, digits))
        if column == "purified clean":
            return _Cell(percent(row.purified_clean, digits))
        result = row.cells.get(column)
        figure = None if result is None else result.figure
        if result is None and column == UNDEFENDED:
            result, figure = row.beside, row.undefended
        note = _note(result) if result else ""
        mark = result.mark if result else ""
        return _Cell(percent(figure, digits), mark, notes.setdefault(note, len(notes) + 1) if note else 0)

    return _Part(title, common, header, [[cell(row, column) for column in header] for row in rows])


def _note(result: Result) -> str:
    said = []
    if result.mark == UNRELIABLE:
        said.append(f"{UNRELIABLE}: failed {', '.join(result.failed) or 'checks that the record does not name'}")
    if result.source:
        said.append(f"attack made on {result.source}")
    return "; ".join(said)


def percent(value: Mapping | None, digits: int = 1) -> str:
    """A share as `82.3 (79.8–84.5)`: percent and its 95 % interval; a dash for none."""
    if value is None:
        return "–"
    low, high = value["interval_95"]
    return f"{value['percent']:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _said(common: Mapping[str, str]) -> str:
    names = {"dataset": "", "classifier": "classifier ", "purifier": "purifier ", "n": "n = "}
    said = [f"{names[name]}{value}" for name, value in common.items()]
    return "; ".join([*said, "accuracy in % (95 % Wilson interval)"])


def _rich_cell(cell: _Cell) -> Text:
    text = Text(cell.text)
    if cell.mark:
        text.append(f" {cell.mark}", style="bold red" if cell.mark == UNRELIABLE else "yellow")
    return text.append(f" [{cell.note}]") if cell.note else text


def _markdown_cell(cell: _Cell) -> str:
    mark = f" {cell.mark}" if cell.mark else ""
    note = f" <sup>{cell.note}</sup>" if cell.note else ""
    return f"{escape(cell.text)}{mark}{note}"


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escape(text: str) -> str:
    """Text that Markdown shows as it is; underscores within a word need nothing."""
    text = re.sub(r"([\\|*<>`\[\]~])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


# Which records share a row.


@dataclass
class Row:
    """One attack on one purifier in front of one classifier.

    Attributes:
        names: `dataset`, `classifier`, `purifier`, `attack` and `n`, as they are shown.
        clean, purified_clean: shares before the attack; the second is `None` without a purifier.
        cells: results by column.
        beside: the result that has the share of the bare classifier under an attack made on itself, if one has it.
    """

    names: dict[str, str]
    clean: Mapping
    purified_clean: Mapping | None
    cells: dict[str, Result]
    beside: Result | None = None

    @property
    def undefended(self) -> Mapping | None:
        """The share of the bare classifier under an attack made on itself, where a result has it."""
        return self.beside.undefended if self.beside else None


def rows_of(part: Sequence[Result]) -> list[Row]:
    """Rows by dataset, classifier and purifier, the bare classifier first; attacks in the order they came in."""
    order = {place: index for index, place in enumerate(dict.fromkeys(_place(result)[:-1] for result in part))}
    first = {place[:2]: index for place, index in reversed(order.items())}
    groups: dict[tuple, list[Result]] = {}
    for result in part:
        groups.setdefault(_place(result), []).append(result)
    ordered = sorted(groups, key=lambda place: (first[place[:2]], place[2] != NO_PURIFIER, order[place[:3]]))
    return [row for place in ordered for row in _split(groups[place])]


def _place(result: Result) -> tuple[str, str, str, str]:
    return result.dataset, result.classifier, result.purifier, result.attack


def _split(group: Sequence[Result]) -> list[Row]:
    """Rows that hold one figure in each column: what else differs (seed, surrogate, ...) makes rows of their own."""
    others = [_other_fields(result.record["protocol"]) for result in group]
    names = dict.fromkeys(key for fields in others for key in fields)
    differing = [key for key in names if any(fields.get(key) != others[0].get(key) for fields in others)]
    differing.sort(key=lambda key: key.endswith("fingerprint"))  # what can be read first
    for chosen in ([], *([key] for key in differing), differing):
        if rows := _rows_by(group, [{key: fields.get(key) for key in chosen} for fields in others]):
            return rows
    return _rows_by(group, [{"key": result.record["key"]} for result in group])


def _other_fields(protocol: Mapping) -> dict[str, Any]:
    named = ("dataset", "classifier", "purifier", "attack", "threat_model")
    return flatten({key: value for key, value in protocol.items() if key not in named})


def _rows_by(group: Sequence[Result], fields: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows for each set of fields, or none at all if a column would hold two figures under one name.

    A row's accuracy before the attack is that of all its figures, so results that differ in it have rows of their own.
    """
    rows: dict[tuple, Row] = {}
    taken = set()
    for result, chosen in zip(group, fields, strict=True):
        accuracy = result.record["accuracy"]
        before = [accuracy["clean"], accuracy.get("purified_clean")]
        n = result.figure["n"]
        name = json.dumps(chosen, default=str)
        if (name, result.column) in taken:
            return []
        taken.add((name, result.column))
        names = dict(zip(_NAMES, _place(result), strict=True)) | {"n": str(n)}
        names["attack"] = with_fields(result.attack, chosen, fields)
        key = (name, n, *(share and (share["percent"], share["n"]) for share in before))
        row = rows.setdefault(key, Row(names, *before, {}))
        row.cells[result.column] = result
        if row.beside is None and result.undefended is not None:
            row.beside = result
    return list(rows.values())
