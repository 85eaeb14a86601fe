"""What people look at, made from `results.jsonl` alone: tables and pictures."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..records import write_text
from .charts import accuracy_against_eps, bars_over_attacks
from .results import ATTACKS_CHART, CHARTS, EPS_CHART
from .tables import csv_table, markdown_table, read_results, rich_table


def report(results: Path, out: Path, console: Console | None = None) -> list[Path]:
    """Print the tables; write `results.md`, `results.csv` and, where there is something to draw, the charts.

    A chart of an earlier report that there is nothing to draw in goes: it would show figures of other records.

    Args:
        results: `results.jsonl` of an evaluation.
        out: folder for the files.

    Returns:
        The files written.
    """
    console = console or Console()
    records = read_results(results)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in (("results.md", markdown_table(records)), ("results.csv", csv_table(records))):
        path = out / name
        write_text(path, text)
        written.append(path)
    console.print(rich_table(records))
    attacks = [record for record in records if not record["protocol"]["attack"].get("control")]
    if len({record["protocol"]["attack"].get("eps") for record in attacks}) > 1:
        written.append(accuracy_against_eps(attacks, out / EPS_CHART))
    if len({record["protocol"]["attack"]["name"] for record in attacks}) > 1:
        written.append(bars_over_attacks(records, out / ATTACKS_CHART))
    for path in (out / name for name in CHARTS):
        if path not in written:
            path.unlink(missing_ok=True)
    for path in written:
        console.print(f"written: {path}", highlight=False, soft_wrap=True)
    return written
