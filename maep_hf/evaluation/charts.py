"""Pictures of evaluation records: accuracy against eps, and bars over attacks; threat models are never mixed."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..figures import GREY, GRID, INK, PALETTE, new_figure, save_figure, whiskers
from .results import NO_PURIFIER, NOT_CHECKED, UNDEFENDED, UNRELIABLE, Result, ResultsError, results
from .tables import Row, rows_of
from .threat_models import ADAPTIVE, THREAT_MODELS

# Okabe and Ito's colours, which colour-blind eyes tell apart; grey is for what is not defended.
COLORS = {
    "gray-box": "#0072b2",
    "bpda": "#e69f00",
    "white-box": "#d55e00",
    "black-box": "#009e73",
    "transfer": "#cc79a7",
    UNDEFENDED: GREY,
}
_LINES = ("-", "--", ":", "-.")
_MARKERS = "osD^vPX*<>hp"
# What tells apart those that come after the last of these, or of the colours.
_FILLS = ("full", "none", "left", "right", "top", "bottom")
_HATCHES = ("", "...", "xxx", "ooo", "---", "+++", "***")
_DPI = 130
_NORMS = ("Linf", "L2", "L1", "L0", None)
_COLUMNS = (UNDEFENDED, *(f"{UNDEFENDED} ({name})" for name in THREAT_MODELS), *THREAT_MODELS)
_LABEL_CHARACTERS = 32
_GAP = 0.12  # inches between attacks and controls
# Lines that coincide are drawn from the back to the front, ever thinner, so that each can be seen.
_FRONT = (UNDEFENDED, "transfer", "gray-box", "black-box", "bpda", "white-box")


def accuracy_against_eps(records: Iterable[Mapping], path: str | os.PathLike) -> Path:
    """Accuracy over the attacks' eps: a line for each threat model, purifier and attack, with its interval as a band.

    Norms stand side by side, data sets and classifiers under each other. Lines begin at eps 0 with the accuracy without
    an attack; the bare classifier is grey. Of several results at one point (seeds, parameters) the lowest is drawn.
    Controls and attacks without an eps are left out, and, where some attack was measured at several radii, those
    measured at one: a line from 0 to there says no more than the bars do.

    Args:
        records: as from [`read_results`].
        path: the PNG file; its folder is made.

    Returns:
        The path written.

    Raises:
        ResultsError: no record has an eps, or one lacks a field.
        OSError: the file cannot be written.
    """
    found = [result for result in results(records) if not result.control and _eps(result) is not None]
    if not found:
        raise ResultsError("records: none is of an attack with an eps, there is nothing to draw")
    found = _of_several_radii(found)
    norms = [norm for norm in _NORMS if any(_attack(result)["norm"] == norm for result in found)]
    places = list(dict.fromkeys((result.dataset, result.classifier) for result in found))
    purifiers = _in_order(result.purifier for result in found if result.purifier != NO_PURIFIER)
    attacks = _in_order(_attack(result)["name"] for result in found)
    styles = _Styles(purifiers, attacks)

    width, height = max(6.8, 4.4 * len(norms) + 0.8), 3.3 * len(places) + 1.6
    figure = _figure(width, height)
    axes = figure.subplots(len(places), len(norms), squeeze=False, sharey=True, sharex="col")
    handles: dict[str, Line2D] = {}
    for row, place in zip(axes, places, strict=True):
        for norm, axis in zip(norms, row, strict=True):
            here = [r for r in found if (r.dataset, r.classifier) == place and _attack(r)["norm"] == norm]
            for line in _lines(here):
                handles.setdefault(*_draw_line(axis, line, styles))
            names = [norm] * (len(norms) > 1 and norm is not None) + list(_place_name(place, places))
            _dress(axis, ", ".join(names))
            axis.set_ylim(-3, 103)
    for norm, axis in zip(norms, axes[-1], strict=True):
        axis.set_xlim(left=0)  # when all rows are drawn: it ends the scaling to what they hold
        unit = next((_attack(r).get("eps_unit") for r in found if _attack(r)["norm"] == norm), None)
        axis.set_xlabel(" ".join(filter(None, ("eps,", norm, f"({unit})" if unit else ""))))
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy (%)")
    said = [*_common_place(places), *_only("purifier", purifiers), *_only("attack", attacks)]
    columns = [column for column in _COLUMNS if any(line.column == column for line in _lines(found))]
    _title(figure, width, f"Accuracy against eps: {', '.join(columns)}", said)
    _legend(figure, width, _sorted(handles), found)
    return save_figure(figure, path)


def _of_several_radii(found: list[Result]) -> list[Result]:
    """The results of attacks that were measured at several radii on the same images; all where none was."""
    radii: dict[tuple, set] = defaultdict(set)

    def kind(result: Result) -> tuple:
        return result.dataset, result.classifier, _attack(result)["name"], _attack(result)["norm"]

    for result in found:
        radii[kind(result)].add(_eps(result))
    return [result for result in found if len(radii[kind(result)]) > 1] or found


def bars_over_attacks(records: Iterable[Mapping], path: str | os.PathLike) -> Path:
    """Accuracy under each attack: a panel for each threat model, bars with their intervals.

    The bare classifier is grey, and a dashed line is the accuracy without an attack. Where it was not measured alone
    and several figures of it stand beside those of purifiers (seeds, parameters), the lowest is drawn. Data sets and
    classifiers stand under each other; corruptions, which are controls and no attacks, come last, under a line. A
    threat model has no panel where nothing was measured under it. Arguments, return value and errors as of
    [`accuracy_against_eps`], but that an eps is not needed.
    """
    found = results(records)
    if not found:
        raise ResultsError("records: there are none to draw")
    rows = [row for control in (False, True) for row in rows_of([r for r in found if r.control == control])]
    places = list(dict.fromkeys((row.names["dataset"], row.names["classifier"]) for row in rows))
    purifiers = _in_order(row.names["purifier"] for row in rows if row.names["purifier"] != NO_PURIFIER)
    present = {column for row in rows for column in row.cells} | {UNDEFENDED for row in rows if row.undefended}
    columns = [column for column in _COLUMNS if column in present]
    panels = [_Panels([row for row in rows if _place(row) == place]) for place in places]

    heights = [panel.rows_from_top(len(purifiers))[1] for panel in panels]
    label = max(len(line) for panel in panels for name in panel.attacks for line in panel.label(name).split("\n"))
    width = max(6.8, 0.4 + 0.082 * label + 2.3 * len(columns))
    left = [[column for index, column in enumerate(columns) if not index or panel.bars(column)] for panel in panels]
    lowest = {column: max(index for index, kept in enumerate(left) if column in kept) for column in columns}
    scales = len({*lowest.values()} - {len(places) - 1})  # other rows with the numbers of the scale under them
    figure = _figure(width, sum(heights) + 0.62 * len(places) + 0.45 * scales + 1.4)
    axes = figure.subplots(len(places), len(columns), squeeze=False, sharex=True, sharey="row", height_ratios=heights)
    for row, (line, panel, place) in enumerate(zip(axes, panels, places, strict=True)):
        for index, (axis, column) in enumerate(zip(line, columns, strict=True)):
            if column not in left[row]:
                axis.remove()
                continue
            _draw_bars(axis, panel, column, purifiers)
            name = ", ".join(_place_name(place, places)) if index == 0 else ""
            _dress(axis, f"{name}\n{column}" if name else column, "x")
            if row == lowest[column]:
                axis.tick_params(axis="x", labelbottom=True)
                axis.set_xlabel("accuracy (%)")
    said = [*_common_place(places), *_only("purifier", purifiers)]
    _title(figure, width, f"Accuracy under each attack: {', '.join(columns)}", said)
    handles = {}
    if len(purifiers) > 1:
        handles |= {name: _purifier_patch(purifiers, name) for name in purifiers}
        if any(column.startswith(UNDEFENDED) for column in columns):
            handles["no purifier"] = Patch(color=COLORS[UNDEFENDED])
    handles["accuracy without an attack"] = Line2D([], [], color=INK, linestyle="--", linewidth=1.2)
    _legend(figure, width, handles, found, bars=True)
    return save_figure(figure, path)


# Accuracy against eps.


@dataclass
class _Line:
    column: str
    purifier: str
    attack: str
    points: dict[float, tuple[Mapping, Result | None]] = field(default_factory=dict)  # by eps

    def add(self, eps: float, share: Mapping, result: Result | None, replace: bool = True) -> None:
        known = self.points.get(eps)
        if known is None or (replace and share["percent"] < known[0]["percent"]):
            self.points[eps] = (share, result)

    @property
    def adaptive(self) -> list[Result]:
        return [result for _, result in self.points.values() if result is not None and result.column in ADAPTIVE]


@dataclass(frozen=True)
class _Styles:
    purifiers: Sequence[str]
    attacks: Sequence[str]

    def of(self, line: _Line) -> tuple[str | tuple, str, str]:
        """Line style, marker and how it is filled: the purifier's and the attack's."""
        purifier = self.purifiers.index(line.purifier) if line.purifier in self.purifiers else 0
        round_, marker = divmod(self.attacks.index(line.attack), len(_MARKERS))
        return _line_style(purifier), _MARKERS[marker], _FILLS[round_ % len(_FILLS)]

    def name(self, line: _Line) -> str:
        """What the legend says; the only purifier and the only attack stand in the title."""
        names = [line.column]
        if len(self.purifiers) > 1 and line.purifier != NO_PURIFIER:
            names.append(line.purifier)
        if len(self.attacks) > 1:
            names.append(line.attack)
        unchecked = [result.mark == NOT_CHECKED for result in line.adaptive]
        mark = f" ({NOT_CHECKED})" if unchecked and all(unchecked) else " (checked in part)" if any(unchecked) else ""
        return ", ".join(names) + mark


def _lines(found: Sequence[Result]) -> list[_Line]:
    lines: dict[tuple[str, str, str], _Line] = {}

    def line(column: str, purifier: str, attack: str) -> _Line:
        return lines.setdefault((column, purifier, attack), _Line(column, purifier, attack))

    for result in found:
        own = line(result.column, result.purifier, _attack(result)["name"])
        own.add(_eps(result), result.figure, result)
    for result in found:  # beside a gray-box figure stands that of the bare classifier under the same attack
        if result.undefended is not None and result.purifier != NO_PURIFIER:
            bare = line(UNDEFENDED, NO_PURIFIER, _attack(result)["name"])
            if bare.points.get(_eps(result), (None, None))[1] is None:  # what was measured alone stays
                bare.add(_eps(result), result.undefended, None)
    for result in found:
        accuracy = result.record["accuracy"]
        own = lines[result.column, result.purifier, _attack(result)["name"]]
        own.add(0.0, accuracy["clean"] if result.purifier == NO_PURIFIER else accuracy["purified_clean"], None)
    for bare in lines.values():
        if bare.purifier == NO_PURIFIER:
            bare.add(0.0, found[0].record["accuracy"]["clean"], None, replace=False)
    return sorted(lines.values(), key=lambda line: _COLUMNS.index(line.column))


def _draw_line(axis: Axes, line: _Line, styles: _Styles) -> tuple[str, Line2D]:
    radii = sorted(line.points)
    shares = [line.points[eps][0] for eps in radii]
    style, marker, filled = styles.of(line)
    color = _column_color(line.column)
    values = [share["percent"] for share in shares]
    low, high = zip(*(share["interval_95"] for share in shares), strict=True)
    axis.fill_between(radii, low, high, color=color, alpha=0.14, linewidth=0)
    rank = _FRONT.index(line.column) if line.column in _FRONT else 0
    (drawn,) = axis.plot(
        radii, values, color=color, linestyle=style, marker=marker, fillstyle=filled, markersize=6.8 - 0.45 * rank,
        linewidth=2.4 - 0.18 * rank, clip_on=False, zorder=3 + rank / 10,
    )  # fmt: skip
    for eps in radii:
        share, result = line.points[eps]
        if result is not None and result.mark == UNRELIABLE:
            axis.plot(eps, share["percent"], clip_on=False, zorder=4, **_DOUBTFUL_MARKER)
    return styles.name(line), drawn


_DOUBTFUL_MARKER = {
    "linestyle": "", "marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgecolor": "black",
    "markeredgewidth": 1.4,
}  # fmt: skip


# Bars over attacks.


class _Panels:
    """The rows of one data set and classifier, put together by attack."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows
        self.controls = {row.names["attack"] for row in rows for result in row.cells.values() if result.control}
        self.measured = {(row.names["attack"], row.names["purifier"]) for row in rows}
        names = _in_order(row.names["attack"] for row in rows)
        self.attacks = sorted(names, key=lambda name: name in self.controls)

    def label(self, attack: str) -> str:
        return _wrapped(f"{attack} (control)" if attack in self.controls else attack)

    def rows_from_top(self, purifiers: int) -> tuple[dict[str, tuple[float, float]], float]:
        """(top, bottom) of each attack's row and the height of all, in inches: a row has room for its bars and for
        every line of its label, and stands off the attacks where the controls begin."""
        places, bottom = {}, 0.0
        for name in self.attacks:
            if name in self.controls and self.attacks[0] not in self.controls and not self.controls & places.keys():
                bottom += _GAP
            top, lines = bottom, self.label(name).count("\n") + 1
            bottom = top + max(_bars_height(purifiers), 0.08 + 0.15 * lines)
            places[name] = top, bottom
        return places, bottom

    def bars(self, column: str) -> list[tuple[str, str, Mapping, str]]:
        """(attack, purifier, share, mark) of a column."""
        bars: dict[tuple[str, str], tuple[Mapping, str]] = {}
        for row in self.rows:
            if result := row.cells.get(column):
                bars[row.names["attack"], row.names["purifier"]] = (result.figure, result.mark)
        if column == UNDEFENDED:
            beside = [row for row in self.rows if row.beside is not None]
            for row in sorted(beside, key=lambda row: row.undefended["percent"]):
                bars.setdefault((row.names["attack"], NO_PURIFIER), (row.undefended, row.beside.mark))
        return [(*names, *bar) for names, bar in bars.items()]

    def before(self, column: str) -> list[tuple[str, float]]:
        """(purifier, percent) without an attack, of every purifier in a column."""
        if column.startswith(UNDEFENDED):
            return [(NO_PURIFIER, row.clean["percent"]) for row in self.rows]
        return [(row.names["purifier"], row.purified_clean["percent"]) for row in self.rows if column in row.cells]


def _bars_height(purifiers: int) -> float:
    """Inches that the bars of an attack take."""
    return 0.1 + 0.17 * max(1, purifiers)


def _draw_bars(axis: Axes, panel: _Panels, column: str, purifiers: Sequence[str]) -> None:
    bare = column.startswith(UNDEFENDED)
    places, height = panel.rows_from_top(len(purifiers))
    middles = {name: (top + bottom) / 2 for name, (top, bottom) in places.items()}
    step = 0.8 * _bars_height(len(purifiers)) / (1 if bare else max(1, len(purifiers)))
    bars = panel.bars(column)
    for attack in set(panel.attacks) - {attack for attack, *_ in bars}:
        axis.text(104, middles[attack], "–", va="center", fontsize=8, color=COLORS[UNDEFENDED])
    heights, shares, colors, hatches, doubted = [], [], [], [], []
    for attack, purifier, share, mark in bars:
        slots = [NO_PURIFIER] if bare else [name for name in purifiers if (attack, name) in panel.measured]
        y = middles[attack] + (slots.index(purifier) - (len(slots) - 1) / 2) * step
        sign = {UNRELIABLE: " ⚠", NOT_CHECKED: " ?"}.get(mark, "")
        axis.text(104, y, f"{share['percent']:.1f}{sign}", va="center", fontsize=8, color=INK)
        heights.append(y)
        shares.append(share)
        colors.append(_bar_color(column, purifier, purifiers))
        doubted.append(mark == UNRELIABLE)
        own = "" if purifier == NO_PURIFIER else _purifier_hatch(purifiers, purifier)
        hatches.append("/////" * doubted[-1] + own)
    values = [share["percent"] for share in shares]
    faces = ["white" if doubt else color for doubt, color in zip(doubted, colors, strict=True)]
    edges = [
        "white" if hatch and not doubt else color for hatch, doubt, color in zip(hatches, doubted, colors, strict=True)
    ]
    axis.barh(heights, values, 0.86 * step, color=faces, edgecolor=edges, hatch=hatches, linewidth=1)
    axis.errorbar(values, heights, xerr=whiskers(shares), fmt="none", ecolor=INK, elinewidth=1, capsize=2, zorder=3)
    for purifier, value in dict.fromkeys(panel.before(column)):
        color = INK if bare or len(purifiers) < 2 else _purifier_color(purifiers, purifier)
        round_ = 0 if bare or len(purifiers) < 2 else purifiers.index(purifier) // len(PALETTE)
        axis.axvline(value, color=color, linestyle=("--", ":", "-.")[round_ % 3], linewidth=1.2, zorder=2)
    axis.set_xlim(0, 128)
    axis.set_xticks(range(0, 101, 25))
    labels = [panel.label(name) for name in panel.attacks]
    axis.set_yticks(list(middles.values()), labels)
    axis.set_ylim(height, 0)
    if panel.controls and len(panel.controls) < len(labels):
        first = next(name for name in panel.attacks if name in panel.controls)
        axis.axhline(places[first][0] - _GAP / 2, color=INK, linewidth=0.8)


def _bar_color(column: str, purifier: str, purifiers: Sequence[str]) -> str:
    if purifier == NO_PURIFIER or len(purifiers) < 2:
        return _column_color(column)
    return _purifier_color(purifiers, purifier)


def _purifier_color(purifiers: Sequence[str], purifier: str) -> str:
    return PALETTE[purifiers.index(purifier) % len(PALETTE)]


def _purifier_hatch(purifiers: Sequence[str], purifier: str) -> str:
    """Nothing for those that have a colour to themselves."""
    return _HATCHES[purifiers.index(purifier) // len(PALETTE) % len(_HATCHES)]


def _purifier_patch(purifiers: Sequence[str], purifier: str) -> Patch:
    color, hatch = _purifier_color(purifiers, purifier), _purifier_hatch(purifiers, purifier)
    return Patch(facecolor=color, edgecolor="white", hatch=hatch) if hatch else Patch(color=color)


def _line_style(index: int) -> str | tuple[int, tuple[float, ...]]:
    """Of the purifier of this place; after those with a name, long or short dashes and ever more dots."""
    if index < len(_LINES):
        return _LINES[index]
    more, long = divmod(index - len(_LINES), 2)
    return 0, (8 if long else 3.5, 1.5, *(1, 1.5) * (more + 2))


# What the pictures have in common.


def _attack(result: Result) -> Mapping:
    return result.record["protocol"]["attack"]


def _eps(result: Result) -> float | None:
    return _attack(result)["eps"]


def _place(row: Row) -> tuple[str, str]:
    return row.names["dataset"], row.names["classifier"]


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _wrapped(name: str) -> str:
    attack, comma, budget = name.rpartition(", ")
    if comma:  # norm and eps stay on one line
        name = attack + comma + budget.replace(" ", "\xa0")
    return fill(name, _LABEL_CHARACTERS, break_on_hyphens=False)


def _column_color(column: str) -> str:
    return COLORS.get(column, COLORS[UNDEFENDED])


def _place_name(place: tuple[str, str], places: Sequence[tuple[str, str]]) -> list[str]:
    """Of data set and classifier, what is not the same in the whole picture."""
    return [name for index, name in enumerate(place) if len({other[index] for other in places}) > 1]


def _common_place(places: Sequence[tuple[str, str]]) -> list[str]:
    kinds = ("", "classifier ")
    return [f"{kind}{places[0][index]}" for index, kind in enumerate(kinds) if len({p[index] for p in places}) == 1]


def _only(kind: str, names: Sequence[str]) -> list[str]:
    return [f"{kind} {names[0]}"] if len(names) == 1 else []


def _figure(width: float, height: float) -> Figure:
    figure = new_figure(width, height, _DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.09)
    return figure


def _dress(axis: Axes, title: str, grid: str = "both") -> None:
    axis.set_title(title, fontsize=10, color=INK, loc="left")
    axis.grid(axis=grid, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8.5, colors=INK)


def _title(figure: Figure, width: float, title: str, said: Sequence[str]) -> None:
    said = "; ".join([*said, "95 % Wilson intervals".replace(" ", "\xa0")])
    lines = [fill(line, int(width * 11.5), break_on_hyphens=False) for line in (title, said)]
    figure.suptitle("\n".join(lines), fontsize=11, color=INK, x=0.02, ha="left")


def _sorted(handles: Mapping[str, Line2D]) -> dict[str, Line2D]:
    """Legend entries in the order of the threat models."""

    def position(name: str) -> int:
        return max(range(len(_COLUMNS)), key=lambda index: len(_COLUMNS[index]) * name.startswith(_COLUMNS[index]))

    return {name: handles[name] for name in sorted(handles, key=position)}


def _legend(figure: Figure, width: float, handles: Mapping[str, object], found: Sequence[Result], bars=False) -> None:
    handles = dict(handles)
    if any(result.mark == UNRELIABLE for result in found):
        said = f"{UNRELIABLE}: failed a check for gradient masking"
        hatched = Patch(facecolor="white", edgecolor=INK, hatch="/////")
        handles[said] = hatched if bars else Line2D([], [], **_DOUBTFUL_MARKER)
    if bars and any(result.mark == NOT_CHECKED for result in found):
        handles[f"? {NOT_CHECKED} for gradient masking"] = Line2D([], [], linestyle="")
    longest = max(map(len, handles), default=1)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower left", ncols=max(1, int(width / (0.075 * longest + 0.6))),
        fontsize=9, frameon=False, labelcolor=INK, handlelength=3.4,
    )  # fmt: skip
