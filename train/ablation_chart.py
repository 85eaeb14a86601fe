"""The ablation's picture: what each change makes of clean accuracy and of accuracy under each attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ablation_table import REFERENCE

from maep_hf.figures import GREY, GRID, INK, PALETTE, new_figure, save_figure

COLORS = (GREY, *PALETTE[:6])  # clean is grey
MARKERS = "|osD^vP"
ROW_INCHES, GROUP_GAP = 0.23, 0.6


def write_chart(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line a row: a mark for clean and for each attack (the mean over seeds, least to greatest as a bar), and the
    reference's figures as dashed lines down the picture. Without a row there is no picture.

    Args:
        path: PNG file.
        rows: as `ablation_table.summarise` gives them.
    """
    if not rows:
        path.unlink(missing_ok=True)
        return
    places, groups = _places(rows)
    names = ["clean", *rows[0]["attacks"]]
    figure = new_figure(9.5, ROW_INCHES * max(places.values()) + 1.9, dpi=130)
    axis = figure.subplots()
    reference = next((row for row in rows if row["row"] == REFERENCE), None)
    for index, name in enumerate(names):
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        if reference is not None:
            axis.axvline(_figure_of(reference, name)["mean"], color=color, linestyle="--", linewidth=0.8, zorder=1)
        for row in rows:
            found, place = _figure_of(row, name), places[row["row"]]
            axis.hlines(place, found["min"], found["max"], color=color, linewidth=1.4, zorder=2)
            axis.plot(found["mean"], place, marker, color=color, markersize=6 if marker != "|" else 9, zorder=3,
                      label=name if row is rows[0] else None)  # fmt: skip
    axis.set(yticks=list(places.values()), ylim=(max(places.values()) + 0.8, -0.8), xlim=(-2, 102))
    axis.set_yticklabels([row["change"] if row["row"] != REFERENCE else REFERENCE for row in rows], fontsize=8)
    for group, place in groups.items():
        if group != REFERENCE:
            axis.text(-1, place - GROUP_GAP - 0.08, group, fontsize=7.5, fontweight="bold", color=INK, va="center")
    axis.grid(axis="x", color=GRID)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_xlabel("accuracy in %, gray-box; dashed: the reference")
    figure.legend(*axis.get_legend_handles_labels(), loc="upper center", ncols=len(names), frameon=False)
    save_figure(figure, path, tight=(0, 0, 1, 1 - 0.4 / figure.get_figheight()))


def _figure_of(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return row["clean"] if name == "clean" else row["attacks"][name]


def _places(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Where each row stands, and the first row of each group, with room for the group's name between groups."""
    places: dict[str, float] = {}
    groups: dict[str, float] = {}
    place = 0.0
    for row in rows:
        if row["group"] not in groups:
            place += (1 + GROUP_GAP) if groups else 0
            groups[row["group"]] = place
        else:
            place += 1
        places[row["row"]] = place
    return places, groups
