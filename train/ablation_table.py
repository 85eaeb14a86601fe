"""The ablation's table: means and spread over seeds, as Markdown and JSON lines, from the records of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from maep_hf.records import as_jsonl, write_text

REFERENCE = "reference"


def summarise(records: Sequence[Mapping[str, Any]], order: Sequence[str]) -> list[dict[str, Any]]:
    """One line a row: figures over its seeds, and differences to the row `reference` over the seeds both have.

    Args:
        records: one for each row and seed, as the runner writes them; those of failed runs are left out.
        order: names of rows; others follow in the order of the records.
    """
    rows: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in records:
        if "failed" not in record:
            rows.setdefault(record["row"], {})[record["seed"]] = record
    names = [name for name in order if name in rows] + [name for name in rows if name not in order]
    reference = rows.get(REFERENCE, {})
    return [_summary(name, rows[name], {} if name == REFERENCE else reference) for name in names]


def _summary(
    name: str, seeds: Mapping[int, Mapping[str, Any]], reference: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    records = [seeds[seed] for seed in sorted(seeds)]
    common = sorted(set(seeds) & set(reference))
    found: dict[str, Any] = {
        "row": name, "group": records[0]["group"], "change": records[0]["change"], "seeds": sorted(seeds)
    }  # fmt: skip
    for figure in ("clean", "worst"):
        found[figure] = spread([record["percent"][figure] for record in records])
        pairs = [seeds[seed]["percent"][figure] - reference[seed]["percent"][figure] for seed in common]
        found[f"{figure}_against_reference"] = spread(pairs) if pairs else None
    attacks = list(records[0]["percent"]["attacks"])
    found["attacks"] = {each: spread([record["percent"]["attacks"][each] for record in records]) for each in attacks}
    found["worst_attack"] = min(attacks, key=lambda each: found["attacks"][each]["mean"])
    found["minutes"] = fmean(record["training_seconds"] for record in records) / 60
    found["attack_time_share"] = fmean(record["attack_time_share"] for record in records)
    found["parameters"] = records[0]["parameters"]
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (`None` for one value), least and greatest."""
    deviation = stdev(values) if len(values) > 1 else None
    return {"mean": fmean(values), "sd": deviation, "min": min(values), "max": max(values), "values": list(values)}


def markdown(rows: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> str:
    """The table with its protocol above it and what failed below; a figure of several seeds shows least to greatest."""
    if not rows:
        return _failures(records) or "No row is finished yet.\n"
    measured = [record for record in records if "failed" not in record]
    attacks = list(rows[0]["attacks"])
    lines = [f"{line}\n" for line in _protocol(measured)]
    titles = ["varied", "row", "change", "clean", *attacks, "worst", "worst - reference", "clean - reference",
              "million weights", "minutes", "attack, % of them", "seeds"]  # fmt: skip
    lines += [f"| {' | '.join(titles)} |", f"|{' --- |' * 3}{' ---: |' * (len(titles) - 3)}"]
    group = None
    for row in rows:
        cells = ["" if row["group"] == group else row["group"], row["row"], row["change"], shown(row["clean"])]
        group = row["group"]
        cells += [shown(row["attacks"][name]) if name in row["attacks"] else "" for name in attacks]
        cells.append(f"{shown(row['worst'])}")
        cells += [shown(row[f"{figure}_against_reference"], signed=True) for figure in ("worst", "clean")]
        cells += [f"{row['parameters'] / 1e6:.2f}", f"{row['minutes']:.1f}", f"{100 * row['attack_time_share']:.0f}"]
        cells.append(", ".join(map(str, row["seeds"])))
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n" + _failures(records)


def shown(value: Mapping[str, Any] | None, signed: bool = False) -> str:
    """`83.2 (82.1 to 84.0)`, or the one value there is."""
    if value is None:
        return ""
    form = "+.1f" if signed else ".1f"
    text = format(value["mean"], form)
    return text if len(value["values"]) == 1 else f"{text} ({value['min']:{form}} to {value['max']:{form}})"


def _protocol(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the figures are; one paragraph where all rows have one protocol, which the runner sees to."""
    first = records[0]
    evaluation, undefended = first["evaluation"], first["undefended"]
    budgets = sorted({record["images"] for record in records})
    bare = ", ".join(f"{name} {value:.1f}" for name, value in undefended["attacks"].items())
    return [
        f"Accuracy in %, gray-box, L-inf {evaluation['eps']:g}/255, on {evaluation['classifier']}, the first "
        f"{evaluation['dataset']['n']} images of {evaluation['dataset']['name']} "
        f"({evaluation['dataset'].get('split') or 'tensors'}), the same attacked images for every row. "
        f"Undefended: clean {undefended['clean']:.1f}, {bare}.",
        f"Every row is trained from scratch on {' or '.join(f'{count:,}' for count in budgets)} images. With several "
        "seeds a figure is the mean (least to greatest); differences to the reference are formed seed by seed.",
    ]


def _failures(records: Sequence[Mapping[str, Any]]) -> str:
    failed = [f"- {record['row']}, seed {record['seed']}: {record['failed']}" for record in records
              if "failed" in record]  # fmt: skip
    return "\nNot measured:\n\n" + "\n".join(failed) + "\n" if failed else ""


def write_table(folder: Path, records: Sequence[Mapping[str, Any]], order: Sequence[str]) -> list[dict[str, Any]]:
    """Write `table.md` and `table.jsonl` in `folder`, each whole or not at all; returns the table's rows."""
    rows = summarise(records, order)
    write_text(folder / "table.md", markdown(rows, records))
    write_text(folder / "table.jsonl", as_jsonl(rows))
    return rows
