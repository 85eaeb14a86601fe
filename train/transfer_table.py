"""Tables of what a purifier does on images that it was not trained on, from stored evaluation records.

python train/transfer_table.py checkpoints/transfer     # reads results.jsonl, writes transfer.md and transfer.png

One table a domain (dataset and classifier): every purifier, every way to take large images and every strength, with the
accuracy, picture quality and time of each; and one table across domains, trained on A and used on B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from table_command import table_command

from maep_hf.evaluation.results import NO_PURIFIER, Result, flatten, results, with_fields
from maep_hf.evaluation.tables import percent
from maep_hf.figures import GRID, INK, new_figure, save_figure, whiskers

Domain = tuple[str, str]
Share = Mapping[str, Any]  # percent, n and interval_95, as records hold them
COLUMNS = 2  # of panels: a page is some 900 pixels wide
BARS = ("#8fb8de", "#1f5a96")  # clean, attacked
STRENGTH = "strength"
TAKEN = ("mode", "overlap", "scale", STRENGTH)  # options of how images are purified


def domains(records: Sequence[Mapping[str, Any]]) -> dict[Domain, list[Result]]:
    """The gray-box results with a purifier, by dataset and classifier; each purifier by the name of its lines.

    Raises:
        ValueError: two results for one place in a table, such as those of two seeds.
    """
    gray_box = [result for result in results(records) if result.column == "gray-box"]
    found: dict[Domain, list[Result]] = {}
    places: dict[tuple[str, ...], Result] = {}
    for result, line in zip(gray_box, _lines(gray_box), strict=True):
        place = (line, result.attack, result.dataset, result.classifier)
        if (other := places.setdefault(place, result)) is not result:
            one, two = (flatten(each.record["protocol"]) for each in (other, result))
            differing = [key for key in {**one, **two} if one.get(key) != two.get(key)]
            raise ValueError(
                f"records: there are two of {', '.join(place)} (keys {other.record['key']} and {result.record['key']}; "
                f"they differ in {', '.join(differing)}); take one out of results.jsonl"
            )
        found.setdefault((result.dataset, result.classifier), []).append(replace(result, purifier=line))
    return found


def _lines(rows: Sequence[Result]) -> list[str]:
    """For each result the purifier and how it took the images, where that is not its default; and what tells it from
    another one of that name, as in the tables of `maep report`."""
    described = [result.record["protocol"]["purifier"] for result in rows]
    names = [
        ", ".join([each["name"], *(f"{key} {each['options'][key]}" for key in TAKEN if key in each["options"])])
        for each in described
    ]
    fields = list(map(flatten, described))
    return [
        with_fields(name, own, [other for other, again in zip(fields, names, strict=True) if again == name])
        for name, own in zip(names, fields, strict=True)
    ]


def domain_table(rows: Sequence[Result]) -> list[str]:
    """One line a purifier: accuracy with intervals, PSNR in dB against the clean image, and time an image."""
    attacks = list(dict.fromkeys(result.attack for result in rows))
    header = ["purifier", "clean", "PSNR clean"]
    for attack in attacks:
        header += [attack, "PSNR"]
    header += ["ms an image", "times the classifier's"]
    first = {result.attack: result for result in reversed(rows)}
    bare = [NO_PURIFIER, percent(rows[0].record["accuracy"]["clean"]), ""]
    for attack in attacks:
        bare += [percent(first[attack].undefended), ""]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), [*bare, "", ""]]
    for purifier in dict.fromkeys(result.purifier for result in rows):
        by_attack = {result.attack: result.record for result in rows if result.purifier == purifier}
        one = next(iter(by_attack.values()))
        line = [purifier, percent(one["accuracy"]["purified_clean"]), _db(one["psnr_db"]["purified_clean"])]
        for attack in attacks:
            record = by_attack.get(attack)
            line += ["–", "–"] if record is None else [
                percent(record["accuracy"]["purified_attacked"]), _db(record["psnr_db"]["purified_attacked"])
            ]  # fmt: skip
        time = one["ms_per_image"]
        lines.append([*line, f"{time['purify']:.1f}", f"{time['purify'] / time['classify']:.1f}"])
    return [f"| {' | '.join(line)} |" for line in lines]


def compared(found: Mapping[Domain, Sequence[Result]]) -> dict[Domain, Sequence[Result]]:
    """The domains for the table across them: without those of one purifier alone, where others have several."""

    def purifiers(rows: Sequence[Result]) -> int:
        return len({result.purifier for result in rows if not result.record["protocol"]["purifier"]["options"]})

    several = max(map(purifiers, found.values()), default=0) > 1
    return {domain: rows for domain, rows in found.items() if not several or purifiers(rows) > 1}


def across(found: Mapping[Domain, Sequence[Result]]) -> tuple[list[str], dict[str, list[tuple[float, float] | None]]]:
    """The attack that all of a domain's purifiers were measured under (its first), for those measured in several
    domains, of whatever strength: lines of the table, and for each its (purified clean, robust) percentages by domain.
    """
    attacks = {domain: rows[0].attack for domain, rows in found.items()}
    header = ["purifier"] + [
        f"{dataset}; {classifier}; {attacks[dataset, classifier]}" for dataset, classifier in found
    ]
    lines = [header, ["---"] + ["---:"] * len(found)]
    figures: dict[str, list[tuple[float, float] | None]] = {}
    for name, pairs in _shares(found).items():
        lines.append([name, *("–" if pair is None else " / ".join(map(percent, pair)) for pair in pairs)])
        figures[name] = [None if pair is None else (pair[0]["percent"], pair[1]["percent"]) for pair in pairs]
    return [f"| {' | '.join(line)} |" for line in lines], figures


def _shares(found: Mapping[Domain, Sequence[Result]]) -> dict[str, list[tuple[Share, Share] | None]]:
    """For each purifier of [`across`] its accuracy on purified clean and on attacked and purified images, by domain."""
    everywhere: dict[str, dict[Domain, tuple[Share, Share]]] = {}
    for domain, rows in found.items():
        for result in rows:
            options = result.record["protocol"]["purifier"]["options"]
            if result.attack == rows[0].attack and options.keys() <= {STRENGTH}:
                accuracy = result.record["accuracy"]
                pair = accuracy["purified_clean"], accuracy["purified_attacked"]
                everywhere.setdefault(result.purifier, {})[domain] = pair
    return {name: [by.get(domain) for domain in found] for name, by in everywhere.items() if len(by) > 1}


def _db(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """All tables.

    Raises:
        ValueError: no gray-box record with a purifier, or two for one place.
    """
    found = domains(records)
    if not found:
        raise ValueError("records: there are no gray-box ones with a purifier")
    parts = ["Gray-box: the attacker differentiates the classifier alone. Accuracy in % (95 % Wilson interval)."]
    for (dataset, classifier), rows in found.items():
        parts += [f"**{dataset}; {classifier}**", "\n".join(domain_table(rows))]
    lines, figures = across(compared(found))
    if figures:
        parts += ["**Trained on one, used on another** (clean and purified / attacked and purified)", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def picture(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of the table across domains, a panel each; no picture where no purifier was measured in several."""
    found = compared(domains(records))
    lines = _shares(found)
    if not lines:
        return
    names = [NO_PURIFIER, *lines]
    rows = -(-len(found) // COLUMNS)
    figure = new_figure(9, rows * (1.1 + 0.45 * len(names)) + 0.5, dpi=130)
    axes = figure.subplots(rows, COLUMNS, squeeze=False, sharey=True)
    for index, (axis, ((dataset, classifier), results_here)) in enumerate(zip(axes.flat, found.items(), strict=False)):
        bare = results_here[0].record["accuracy"]["clean"], results_here[0].undefended
        for place, pair in enumerate([bare, *(pairs[index] for pairs in lines.values())]):
            if pair is None:
                axis.text(1, place, "– not measured", va="center", fontsize=8, color=INK)
            else:
                _draw_pair(axis, place, pair)
        axis.set(yticks=range(len(names)), xlim=(0, 118), xticks=range(0, 101, 25))
        axis.set_yticklabels(map(_wrapped, names), fontsize=8.5)
        title = "\n".join(fill(line, 46) for line in (dataset, classifier, results_here[0].attack))
        axis.set_title(title, fontsize=9, color=INK, loc="left")
        axis.grid(axis="x", color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8.5, colors=INK)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].invert_yaxis()
    for axis in axes.flat[len(found) :]:
        axis.remove()
    kinds = {kind: Patch(color=color) for kind, color in zip(("clean", "attacked (gray-box)"), BARS, strict=True)}
    kinds["95 % Wilson interval"] = Line2D([], [], color=INK, linewidth=1)
    figure.legend(
        kinds.values(), kinds, loc="lower center", ncols=len(kinds), frameon=False, fontsize=9,
        title="accuracy in %; images are purified, but for the undefended", title_fontsize=9,
    )  # fmt: skip
    save_figure(figure, path, tight=(0, 0.6 / figure.get_figheight(), 1, 1))


def _draw_pair(axis: Axes, place: int, pair: tuple[Share, Share]) -> None:
    """A purifier's bars with their intervals: clean images above, attacked ones below."""
    heights, values = (place - 0.2, place + 0.2), [share["percent"] for share in pair]
    axis.barh(heights, values, 0.38, color=BARS)
    axis.errorbar(values, heights, xerr=whiskers(pair), fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    for height, share in zip(heights, pair, strict=True):
        at = share["interval_95"][1] + 1.5
        axis.text(at, height, f"{share['percent']:.1f}", va="center", fontsize=8, color=INK)


def _wrapped(name: str) -> str:
    """A purifier's name on short lines, an option (`strength 1.3`) on one."""
    return fill(", ".join(part.replace(" ", "\xa0") for part in name.split(", ")), 24)


def main(argv: Sequence[str] | None = None) -> None:
    table_command(argv, __doc__.splitlines()[0], "transfer", markdown, picture)


if __name__ == "__main__":
    main()
