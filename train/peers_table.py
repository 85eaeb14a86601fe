"""One line a defence, from stored evaluation records: what it costs on clean images, what it gives back, and its time.

python train/peers_table.py checkpoints/peers     # reads results.jsonl, writes peers.md and peers.png

Every defence must have been measured in front of one classifier under the same gray-box attacks, so that the worst
attack is the worst of the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from table_command import table_command

from maep_hf.evaluation.results import NO_PURIFIER, Result, results
from maep_hf.evaluation.tables import percent
from maep_hf.figures import GRID, INK, PALETTE, new_figure, save_figure

MAIN_ATTACK = "AutoAttack (standard), Linf 8/255"


@dataclass(frozen=True)
class Line:
    """One defence.

    Attributes:
        name: of the purifier.
        results: of every attack, the same ones for all defences.
        main: the one under [`MAIN_ATTACK`], on the same images for all defences.
    """

    name: str
    results: list[Result]
    main: Result

    @property
    def worst(self) -> Result:
        """The result with the lowest accuracy."""
        return min(self.results, key=lambda result: result.figure["percent"])

    @property
    def ms_per_image(self) -> float:
        """Of purification, median over the records."""
        return median(result.record["ms_per_image"]["purify"] for result in self.results)

    @property
    def clean_drop(self) -> float:
        """Points that clean images lose by being purified."""
        accuracy = self.main.record["accuracy"]
        return accuracy["clean"]["percent"] - accuracy["purified_clean"]["percent"]

    @property
    def gap(self) -> float:
        """Points from purified clean images to attacked and purified ones."""
        return self.main.record["accuracy"]["purified_clean"]["percent"] - self.main.figure["percent"]


def lines_of(records: Sequence[Mapping[str, Any]]) -> list[Line]:
    """The defences in the order they came in.

    Raises:
        ValueError: no gray-box records with a purifier, several classifiers, a defence without the main attack, or
            defences that were measured under different attacks; several results of the main attack to choose from.
    """
    found: dict[str, list[Result]] = {}
    for result in results(records):
        if result.column == "gray-box" and not result.control:
            found.setdefault(result.purifier, []).append(result)
    if not found:
        raise ValueError("records: there are no gray-box ones with a purifier")
    if len(classifiers := {result.classifier for rows in found.values() for result in rows}) > 1:
        raise ValueError(f"records: one classifier is needed for a comparison, there are {sorted(classifiers)}")
    attacks = {name: {(result.attack, result.dataset) for result in rows} for name, rows in found.items()}
    all_attacks = set().union(*attacks.values())
    if partial := {name: sorted(all_attacks - seen) for name, seen in attacks.items() if seen != all_attacks}:
        name, lacking = next(iter(partial.items()))
        raise ValueError(f"records: {name} was not measured under {lacking[0][0]}, as others were")
    return [Line(name, rows, _on_most_images(name, rows)) for name, rows in found.items()]


def _on_most_images(name: str, rows: Sequence[Result]) -> Result:
    """The result under the main attack on the most images; all defences were measured on the same ones."""
    under = [result for result in rows if result.attack == MAIN_ATTACK]
    if not under:
        raise ValueError(f"records: {MAIN_ATTACK} is missing")
    most = max(result.figure["n"] for result in under)
    first, *others = (result for result in under if result.figure["n"] == most)
    if others:
        places = ", ".join(f"{each.dataset} (key {each.record['key']})" for each in (first, *others))
        raise ValueError(
            f"records: of {name}, {MAIN_ATTACK} was measured several times on {most} images: {places}; leave one in"
        )
    return first


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """The table, what was measured above it."""
    lines = lines_of(records)
    main = lines[0].main
    worst = f"worst of {len({each.attack for each in lines[0].results})} attacks"
    header = ["defence", "purified clean", "clean drop", "AutoAttack", "gap", worst, "ms an image"]
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    bare = main.record["accuracy"]["clean"]
    rows.append([NO_PURIFIER, percent(bare), "", percent(main.undefended), "", "", ""])
    for line in lines:
        rows.append([
            line.name, percent(line.main.record["accuracy"]["purified_clean"]), f"{line.clean_drop:.1f}",
            percent(line.main.figure), f"{line.gap:.1f}",
            f"{percent(line.worst.figure)} {line.worst.attack}", f"{line.ms_per_image:.1f}",
        ])  # fmt: skip
    said = (
        f"Gray-box, {main.dataset} of {main.classifier}; accuracy in % (95 % Wilson interval); clean drop and gap in "
        f"points; AutoAttack: {MAIN_ATTACK}; the other attacks on fewer images, where `results.jsonl` says so."
    )
    return said + "\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def picture(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of clean images, AutoAttack and the worst attack, a group for each defence."""
    lines = lines_of(records)
    figure = new_figure(8.5, 1.4 + 0.62 * len(lines), dpi=130)
    axis = figure.subplots()
    kinds = ("clean images", "AutoAttack", "worst attack")
    for place, line in enumerate(lines):
        accuracy = line.main.record["accuracy"]["purified_clean"], line.main.figure, line.worst.figure
        for offset, color, kind, share in zip((-0.27, 0, 0.27), PALETTE, kinds, accuracy, strict=False):
            axis.barh(place + offset, share["percent"], 0.25, color=color, label=kind if place == 0 else None)
            low, high = share["interval_95"]
            axis.plot([low, high], [place + offset] * 2, color=INK, linewidth=0.8)
            axis.text(high + 0.8, place + offset, f"{share['percent']:.1f}", va="center", fontsize=7.5)
    axis.set(yticks=range(len(lines)), xlim=(0, 108), xlabel="accuracy in %, 95 % interval")
    axis.set_yticklabels([f"{line.name}\n{line.ms_per_image:.1f} ms an image" for line in lines], fontsize=8.5)
    axis.invert_yaxis()
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="upper center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path, tight=(0, 0, 1, 0.94))


def main(argv: Sequence[str] | None = None) -> None:
    table_command(argv, __doc__.splitlines()[0], "peers", markdown, picture)


if __name__ == "__main__":
    main()
