"""Tables of what a purifier does on images that it was not trained on, from stored evaluation records.

python train/transfer_table.py checkpoints/transfer     # reads results.jsonl, writes transfer.md and transfer.png

One table a domain (dataset and classifier): every purifier, every way to take large images and every strength, with the
accuracy, picture quality and time of each; and one table across domains, trained on A and used on B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from table_command import table_command

from maep_hf.evaluation.results import NO_PURIFIER, Result, flatten, results, with_fields
from maep_hf.evaluation.tables import percent
from maep_hf.figures import new_figure, save_figure

Domain = tuple[str, str]
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
    everywhere: dict[str, dict[Domain, Mapping[str, Any]]] = {}
    attacks = {domain: rows[0].attack for domain, rows in found.items()}
    for domain, rows in found.items():
        for result in rows:
            options = result.record["protocol"]["purifier"]["options"]
            if result.attack == attacks[domain] and options.keys() <= {STRENGTH}:
                everywhere.setdefault(result.purifier, {})[domain] = result.record
    kept = {name: by for name, by in everywhere.items() if len(by) > 1}
    header = ["purifier"] + [
        f"{dataset}; {classifier}; {attacks[dataset, classifier]}" for dataset, classifier in found
    ]
    lines = [header, ["---"] + ["---:"] * len(found)]
    figures: dict[str, list[tuple[float, float] | None]] = {}
    for name, by in kept.items():
        line = [name]
        figures[name] = []
        for domain in found:
            record = by.get(domain)
            accuracy = None if record is None else record["accuracy"]
            line.append(
                "–" if accuracy is None
                else f"{percent(accuracy['purified_clean'])} / {percent(accuracy['purified_attacked'])}"
            )  # fmt: skip
            figures[name].append(
                None if accuracy is None
                else (accuracy["purified_clean"]["percent"], accuracy["purified_attacked"]["percent"])
            )  # fmt: skip
        lines.append(line)
    return [f"| {' | '.join(line)} |" for line in lines], figures


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
    """Bars of the table across domains; no picture where no purifier was measured in several."""
    found = compared(domains(records))
    _, figures = across(found)
    if not figures:
        return
    figure = new_figure(4.2 * len(found), 1.2 + 0.7 * len(figures), dpi=130)
    axes = figure.subplots(1, len(found), sharey=True)
    for index, (axis, ((dataset, classifier), rows)) in enumerate(zip(axes, found.items(), strict=True)):
        accuracy = rows[0].record["accuracy"]
        bars = {NO_PURIFIER: (accuracy["clean"]["percent"], rows[0].undefended["percent"])}
        bars |= {name: values[index] for name, values in figures.items()}
        for place, values in enumerate(bars.values()):
            if values is not None:
                axis.barh(place - 0.2, values[0], 0.38, color="#8fb8de")
                axis.barh(place + 0.2, values[1], 0.38, color="#1f5a96")
                for offset, value in zip((-0.2, 0.2), values, strict=True):
                    axis.text(value + 1, place + offset, f"{value:.1f}", va="center", fontsize=8)
        axis.set(yticks=range(len(bars)), yticklabels=list(bars), xlim=(0, 112))
        axis.set_title(f"{dataset.split(',')[0]}, {classifier}\n{rows[0].attack}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.supxlabel("accuracy in %: light, clean images; dark, attacked images (gray-box)", fontsize=9)
    save_figure(figure, path, tight=(0, 0, 1, 1))


def main(argv: Sequence[str] | None = None) -> None:
    table_command(argv, __doc__.splitlines()[0], "transfer", markdown, picture)


if __name__ == "__main__":
    main()
