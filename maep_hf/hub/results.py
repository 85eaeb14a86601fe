"""Evaluation records in a card: whose they are, the summary, the table and the metadata of its results."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..evaluation.results import Result, attack_name, check_record, flatten, is_accuracy, results
from ..evaluation.statistics import wilson_interval
from ..evaluation.tables import csv_table, escape, markdown_table, percent
from ..paths import short
from ..records import read_jsonl
from .folders import TABLE
from .names import dataset_id
from .recipe import Recipe
from .seal import RECORD

# What each attacker differentiates; transfer is measured between pipelines and is missed by nobody.
ATTACKERS = {
    "gray-box": "the classifier, not knowing the purifier",
    "bpda": "the classifier, and the identity in place of the purifier",
    "white-box": "purifier and classifier together",
    "black-box": "nothing: it only asks for outputs",
}

_FIGURES = ("clean", "purified_clean", "attacked", "purified_attacked")
_RANDOMISED = ("mask_ratio", "draws", "seed", "purify_kwargs")  # options that a `RandomisedPurifier` records


class CardResults:
    """Records of one purifier as a card shows them.

    Attributes:
        table: Markdown tables, every threat model in a column of its own; empty without records.
        summary: one row a threat model, the worst attack of those measured or that there is none.
        metadata: `EvalResult`s, whose names say threat model, attack, classifier and number of images.
        records: the records.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]]):
        self.records = list(records)
        named = results(records)
        self.table = markdown_table(records).rstrip() if records else ""
        self.summary = [_summary(name, named) for name in ATTACKERS]
        self.metadata = [*_clean(named), *map(_robust, named)]


def records_of(records: Iterable[Mapping[str, Any]], fingerprints: set[str] | None) -> list[Mapping[str, Any]]:
    """The records that belong to one purifier: a page never shows figures of other weights.

    Args:
        records: of `results.jsonl`, perhaps of several purifiers and of none, or of the demo, which may count what is
            no accuracy: a page shows none of these.
        fingerprints: of the purifier's weights; unknown, the records must all be of one purifier.

    Raises:
        ValueError: a record without a field of its protocol, all of them are of other weights, or of several.
    """
    found = []
    for index, record in enumerate(records):
        check_record(record, f"results, record {index + 1}")
        if record["protocol"]["purifier"] is not None and is_accuracy(record):
            found.append(record)
    made_on = fingerprints_of(found)
    if fingerprints is None and len(made_on) > 1:
        names = sorted({record["protocol"]["purifier"]["name"] for record in found})
        raise ValueError(
            f"results: they are of {len(made_on)} purifiers ({', '.join(names)}); give records of one, in a folder"
        )
    if fingerprints is None or not found:
        return found
    own = [record for record in found if _fingerprint(record) in fingerprints]
    if not own:
        others = sorted({_fingerprint(record) for record in found})
        raise ValueError(
            f"results: they were measured on other weights (fingerprint {', '.join(others)}; these "
            f"are {', '.join(sorted(fingerprints))}): evaluate again, or take results.jsonl out of the folder"
        )
    return own


def without_other_weights(records: Iterable[dict[str, Any]], own: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All records but those of other weights under the name of a purifier's own ones: as it was before a training.

    Records of other purifiers and of none, which their names tell apart, stay.
    """
    own = list(own)
    keys = {record["key"] for record in own}
    names = {record["protocol"]["purifier"]["name"] for record in own}
    return [
        record for record in records
        if record["key"] in keys or not is_accuracy(record)
        or (record["protocol"]["purifier"] or {}).get("name") not in names
    ]  # fmt: skip


def is_outdated_report(folder: Path, records: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the tables in a folder, and so the charts that were made with them, are of other records than these.

    As after an evaluation that was interrupted, or where somebody took records away.
    """
    path = folder / TABLE
    if not path.is_file():
        return False
    there = _figures_in(path.read_text(encoding="utf-8", errors="replace"))
    return there is not None and there != _figures_in(csv_table(records))


def _figures_in(table: str) -> set[tuple] | None:
    """Keys and figures of a CSV table; `None` where it is not of our form."""
    lines = csv.DictReader(io.StringIO(table))
    if "key" not in (lines.fieldnames or ()):
        return None
    return {(line["key"], *(line.get(f"accuracy.{name}.percent") for name in _FIGURES)) for line in lines}


def fingerprints_of(records: Iterable[Mapping[str, Any]]) -> set[str]:
    """Fingerprints of the weights that records were measured on; that of a rescaled or randomised purifier is none."""
    purifiers = [record["protocol"]["purifier"] or {"randomised": True} for record in records]
    plain = [each for each in purifiers if not each.get("randomised") and "scale" not in (each.get("options") or {})]
    return {each.get("fingerprint") or "not recorded" for each in plain}


def fingerprints_as_measured(purifier: Any, records: Iterable[Mapping[str, Any]]) -> set[str]:
    """Fingerprints of a purifier, and of it randomised and rescaled in the ways that records say."""
    from ..evaluation.fingerprint import fingerprint
    from ..randomised import RandomisedPurifier
    from ..rescaled import RescaledPurifier

    ways: dict[str, Mapping[str, Any]] = {}
    for record in records:
        options = (record["protocol"]["purifier"] or {}).get("options") or {}
        way = {name: options[name] for name in (*_RANDOMISED, "scale") if name in options}
        ways[json.dumps(way, sort_keys=True, default=str)] = way
    found = {fingerprint(purifier)}
    for way in ways.values():
        with suppress(TypeError, ValueError):  # nothing of ours was made in such a way
            varied = purifier
            if "mask_ratio" in way:
                varied = RandomisedPurifier(varied, **{name: way[name] for name in _RANDOMISED if name in way})
            if "scale" in way:
                varied = RescaledPurifier(varied, way["scale"])
            found.add(fingerprint(varied))
    return found


def _fingerprint(record: Mapping[str, Any]) -> str:
    return record["protocol"]["purifier"].get("fingerprint") or "not recorded"


def _summary(threat_model: str, named: Sequence[Result]) -> dict[str, str]:
    row = {"threat_model": threat_model, "differentiates": ATTACKERS[threat_model]}
    found = [each for each in named if each.column == threat_model and not each.control]
    if not found:
        return row | {"worst": "**not measured**", "by": "–"}
    worst = min(found, key=lambda each: each.figure["percent"])
    mark = f" {worst.mark}" if worst.mark else ""
    by = escape(f"{worst.attack}, {worst.classifier}{_way(worst)}")
    clean = percent(worst.record["accuracy"]["purified_clean"])  # a classifier of few right by itself looks worse
    return row | {
        "worst": f"**{percent(worst.figure)} %**{mark}",
        "by": f"{by}, n = {worst.figure['n']}; purified clean {clean} %; worst of {len(found)} measured",
    }


def _clean(named: Sequence[Result]) -> Iterable[EvalResult]:
    """Accuracy on clean images, once for each classifier and set of images."""
    seen = set()
    for each in named:
        place = (each.dataset, each.classifier, each.purifier)
        if place not in seen:
            seen.add(place)
            share = each.record["accuracy"]["purified_clean"]
            yield _result(each, share, f"accuracy (%) of purified clean images, no attack, {_measured(each, share)}")


def _robust(each: Result) -> EvalResult:
    protocol, attack = each.record["protocol"], each.record["protocol"]["attack"]
    what = "accuracy (%) under corruption" if each.control else "robust accuracy (%)"
    threat_model = protocol["threat_model"] + (f" from {each.source}" if each.source else "")
    mark = f", {each.mark.removeprefix('⚠ ')}" if each.mark else ""
    mark += f": failed {', '.join(each.failed)}" if each.failed else ""
    args = {
        "threat_model": protocol["threat_model"], "source": protocol.get("source") if each.source else None,
        "attack": attack["name"], "norm": attack["norm"], "eps": attack["eps"], "eps_unit": attack.get("eps_unit"),
        "seed": protocol.get("seed"),
    }  # fmt: skip
    name = f"{what}, {threat_model}, {attack_name(attack)}, {_measured(each, each.figure)}{mark}"
    return _result(each, each.figure, name, **args)


def _measured(each: Result, share: Mapping[str, Any]) -> str:
    low, high = share["interval_95"]
    return f"{each.classifier}{_way(each)}, n = {share['n']}, 95 % interval {low:.1f} to {high:.1f}"


def _way(each: Result) -> str:
    """How the purifier was used, after a comma; nothing where it was used as it is."""
    purifier = each.record["protocol"]["purifier"]
    ways = ["randomised"] if purifier.get("randomised") else []
    options = flatten(purifier.get("options") or {})
    ways += [f"{key} {value}" for key, value in options.items() if key != "randomised" and value is not None]
    return f", purifier {', '.join(ways)}" if ways else ""


def _result(each: Result, share: Mapping[str, Any], name: str, **protocol: Any) -> EvalResult:
    data = each.record["protocol"]["dataset"]
    # The Hub takes all results of one type and split for one data set: the few embedded images are none of the Hub's.
    published = None if data["name"].startswith("embedded:") else dataset_id(data["name"])
    args = {"classifier": each.classifier, "n": share["n"], "interval_95": [round(x, 2) for x in share["interval_95"]]}
    protocol |= {"purifier_options": each.record["protocol"]["purifier"].get("options") or None}
    args |= {key: value for key, value in protocol.items() if value is not None}
    return EvalResult(
        task_type="image-classification",
        task_name="Image classification behind the purifier",
        dataset_type=published or data["name"],
        dataset_name=data["name"],
        dataset_split=data.get("split"),
        metric_type="accuracy",
        metric_name=name,
        metric_value=round(share["percent"], 2),
        metric_args=args | {RECORD: each.record["key"]},
    )


def validation_results(folder: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """What the training of a classifier measured last, as rows of a card's table with their `metadata`.

    The number of images is the recorded one; without a record of it nothing is shown, for a share needs its n.
    """
    lines = [line["validation"] for line in read_jsonl(folder / "metrics.jsonl") if "validation" in line]
    if not lines or not recipe.validation_images:
        return []
    n = recipe.validation_images
    rows = []
    for key, threat_model, attack, count in (
        ("accuracy_clean", "no attack", "none", n),
        ("accuracy_pgd10_8", "white-box", "PGD-10, Linf 8/255", min(n, 128)),
    ):
        if key not in lines[-1]:
            continue
        correct = round(lines[-1][key] * count / 100)
        low, high = (100 * bound for bound in wilson_interval(correct, count))
        interval = f"95 % interval {low:.1f} to {high:.1f}"
        what = threat_model if attack == "none" else f"{threat_model}, {attack}"
        metadata = EvalResult(
            task_type="image-classification",
            dataset_type=recipe.datasets[0] if recipe.datasets else recipe.dataset,
            dataset_name=short(recipe.dataset),
            metric_type="accuracy",
            metric_name=f"accuracy (%), {what}, no purifier, n = {count}, {interval}",
            metric_value=round(100 * correct / count, 2),
            metric_args={"n": count, "interval_95": [round(low, 2), round(high, 2)], RECORD: key},
        )
        accuracy = f"{100 * correct / count:.1f} ({low:.1f}–{high:.1f}) %"
        rows.append(
            {"threat_model": threat_model, "attack": attack, "n": count, "accuracy": accuracy, "metadata": metadata}
        )
    return rows
