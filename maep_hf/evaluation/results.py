"""Records of results.jsonl: read, checked, and named so that tables and charts can tell them apart."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .protocol import SCHEMA
from .threat_models import ADAPTIVE, THREAT_MODELS

UNDEFENDED = "undefended"
NO_PURIFIER = "none (undefended)"
UNRELIABLE = "⚠ unreliable"
NOT_CHECKED = "not checked"

ATTACKS_CHART, EPS_CHART = CHARTS = ("attacks.png", "accuracy_against_eps.png")

WITHOUT_GRADIENT = 0.05
"""Share of the images from which an attack that finds no gradient there makes a figure unreliable."""

_KEPT = "kept"
_MISSING = object()
_SEEING_THE_CLASSIFIER = ("gray-box", "bpda", "white-box")  # one and the same without a purifier


class ResultsError(ValueError):
    """Records that no table can be made of; the message names the file and line, or the position, and what is wrong."""


def read_results(path: str | os.PathLike) -> list[dict]:
    """The records of a results.jsonl, one JSON object a line; empty lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ResultsError: a line is no JSON object, or lacks a field that the tables need.
    """
    records = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{Path(path)}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ResultsError(
                    f"{where}: not a whole JSON object ({error.msg} at character {error.pos}); remove the line and "
                    "evaluate again"
                ) from None
            check_record(record, where)
            records.append(record)
    return records


def check_record(record: Any, where: str = "record") -> None:
    """Raise [`ResultsError`] unless `record` has every field that the tables need, in the form they need it."""
    if not isinstance(record, Mapping):
        raise ResultsError(f"{where}: {type(record).__name__}, not a JSON object")
    if (schema := record.get("schema", SCHEMA)) != SCHEMA:
        raise ResultsError(f"{where}: schema {schema!r}, but this version reads schema {SCHEMA}")
    needed = ["key", "protocol.threat_model", "protocol.purifier", "protocol.classifier.name"]
    needed += [f"protocol.attack.{name}" for name in ("name", "norm", "eps")]
    needed += [f"protocol.dataset.{name}" for name in ("name", "n")]
    shares = ["accuracy.clean", "accuracy.attacked"]
    if _field(record, "protocol.purifier") not in (None, _MISSING):
        needed.append("protocol.purifier.name")
        shares += ["accuracy.purified_clean", "accuracy.purified_attacked"]
    needed += [*shares, "checks"]
    if missing := [name for name in needed if _field(record, name) is _MISSING]:
        raise ResultsError(f"{where}: there is no {', '.join(missing)}")
    for name in shares:
        _check_share(_field(record, name), f"{where}: {name}")
    threat_model = record["protocol"]["threat_model"]
    if threat_model not in THREAT_MODELS:
        raise ResultsError(f"{where}: threat_model {threat_model!r} is none of {', '.join(THREAT_MODELS)}")
    eps = record["protocol"]["attack"]["eps"]
    if eps is not None and (isinstance(eps, bool) or not isinstance(eps, int | float) or not eps >= 0):
        raise ResultsError(f"{where}: protocol.attack.eps {eps!r} is neither null nor a number from 0 up")
    checks = record["checks"]
    if checks is not None and not (
        isinstance(checks, Mapping)
        and isinstance(checks.get("reliable"), bool)
        and isinstance(checks.get("failed"), Sequence)
    ):
        raise ResultsError(f"{where}: checks must be null or have reliable (true or false) and failed (names)")
    _check_gradient(record.get("gradient"), where)


def _check_gradient(value: Any, where: str) -> None:
    """Older records have none, nor have those of attacks that follow no gradient or one through a purifier."""
    if value is None:
        return
    images, zero = (value.get(name) if isinstance(value, Mapping) else None for name in ("images", "zero"))
    if not (isinstance(images, int) and isinstance(zero, int) and 0 <= zero <= images and images > 0):
        raise ResultsError(f"{where}: gradient must be null or have images and zero, how many of them: {value!r}")


def _check_share(value: Any, where: str) -> None:
    try:
        correct, n, percent = value["correct"], value["n"], value["percent"]
        low, high = value["interval_95"]
        sound = 0 <= correct <= n and n > 0 and -1e-6 <= low <= percent + 1e-6 and percent - 1e-6 <= high <= 100 + 1e-6
    except (KeyError, TypeError, ValueError):
        sound = False
    # averaged over several passes, percent is not a whole number of images, but correct is its rounding
    if not sound or abs(percent - 100 * correct / n) > 50 / n + 1e-6:
        raise ResultsError(
            f"{where} must have correct, n, percent = 100 correct / n and interval_95 around it: {value!r}"
        )


def _field(record: Any, name: str) -> Any:
    for part in name.split("."):
        if not isinstance(record, Mapping) or part not in record:
            return _MISSING
        record = record[part]
    return record


@dataclass(frozen=True)
class Result:
    """A record with the names that tell it apart from the records beside it.

    Attributes:
        record: the JSON object.
        dataset, classifier, purifier, attack: names to show; `attack` with norm and eps.
        column: the threat model; without a purifier `UNDEFENDED`, with the threat model if the attack was not made on
            the classifier itself.
        figure: the share (`correct`, `n`, `percent`, `interval_95`) that stands in the column.
        undefended: the share of the bare classifier under an attack made on itself, if the record has it.
        control: a corruption, which is no attack.
        mark: `UNRELIABLE`, `NOT_CHECKED` or nothing.
        failed: names of the failed checks; that of a classifier's gradient tells of how many images.
        source: name of the pipeline that a transferred attack was made on, or nothing.
    """

    record: Mapping
    dataset: str
    classifier: str
    purifier: str
    attack: str
    column: str
    figure: Mapping
    undefended: Mapping | None
    control: bool
    mark: str
    failed: tuple[str, ...]
    source: str


def results(records: Iterable[Mapping]) -> list[Result]:
    """Check and name records; of two with one key the later replaces the earlier.

    Raises:
        ResultsError: a record lacks a field; the message gives its position.
    """
    by_key: dict[str, Mapping] = {}
    for index, record in enumerate(records):
        check_record(record, f"records[{index}]")
        by_key[record["key"]] = record
    kept = list(by_key.values())
    protocols = [record["protocol"] for record in kept]
    datasets = _names([protocol["dataset"] for protocol in protocols], _dataset_name)
    datasets = [
        name if is_accuracy(record) else f"{name} (share of predictions kept, no accuracy)"
        for name, record in zip(datasets, kept, strict=True)
    ]
    classifiers = _names([protocol["classifier"] for protocol in protocols], lambda part: part["name"])
    purifiers = _names([protocol["purifier"] for protocol in protocols], _purifier_name)
    attacks = _names([protocol["attack"] for protocol in protocols], attack_name)
    return [
        Result(record, dataset, classifier, purifier, attack, **_figures(record))
        for record, dataset, classifier, purifier, attack in zip(
            kept, datasets, classifiers, purifiers, attacks, strict=True
        )
    ]


def is_accuracy(record: Mapping) -> bool:
    """Whether a record counts labels: the demo may count the predictions that stay as they are on the clean images."""
    return not str(record.get("counted", "")).startswith(_KEPT)


def _figures(record: Mapping) -> dict[str, Any]:
    protocol, accuracy = record["protocol"], record["accuracy"]
    threat_model, checks = protocol["threat_model"], record["checks"]
    control = bool(protocol["attack"].get("control", False))
    bare = protocol["purifier"] is None
    if bare:
        on_itself = control or threat_model in _SEEING_THE_CLASSIFIER
        column = UNDEFENDED if on_itself else f"{UNDEFENDED} ({threat_model})"
        undefended = accuracy["attacked"] if on_itself else None
    else:
        # Images attacked through the purifier, or from elsewhere, say nothing of the classifier attacked by itself.
        column = threat_model
        undefended = accuracy["attacked"] if control or threat_model == "gray-box" else None
    mark, failed = "", ()
    if checks is None:
        mark = NOT_CHECKED if threat_model in ADAPTIVE and not bare and not control else ""
    elif not checks["reliable"]:
        mark, failed = UNRELIABLE, tuple(map(str, checks["failed"]))
    if masked := _without_gradient(record):
        mark, failed = UNRELIABLE, (*failed, masked)
    return {
        "column": column,
        "figure": accuracy["attacked" if bare else "purified_attacked"],
        "undefended": undefended,
        "control": control,
        "mark": mark,
        "failed": failed,
        "source": str((protocol.get("source") or {}).get("name", "")) if threat_model == "transfer" else "",
    }


def _without_gradient(record: Mapping) -> str:
    """The failed check of a classifier that gave too many images no gradient; of an attack that left none right none,
    since a figure of zero is not too high."""
    found = record.get("gradient")
    if (
        not found
        or found["zero"] <= WITHOUT_GRADIENT * found["images"]
        or not record["accuracy"]["attacked"]["percent"]
    ):
        return ""
    return f"gradient (zero for {found['zero']} of {found['images']} images)"


def _dataset_name(dataset: Mapping) -> str:
    name = " ".join(str(dataset[part]) for part in ("name", "split") if dataset.get(part))
    return f"{name}, {dataset['images']}" if dataset.get("images") else name


def _purifier_name(purifier: Mapping | None) -> str:
    if purifier is None:
        return NO_PURIFIER
    return f"{purifier['name']} (randomised)" if purifier.get("randomised") else purifier["name"]


def attack_name(attack: Mapping) -> str:
    """Name, norm and eps of an attack record, e.g. `PGD-20, Linf 8/255`; norm and eps may be null."""
    return ", ".join(filter(None, (attack["name"], budget_name(attack))))


def budget_name(attack: Mapping) -> str:
    """Norm and eps of an attack record, e.g. `Linf 8/255` or `L2 0.5`; `L2 minimum norm` without an eps.

    A corruption without an eps searches for nothing, so it has neither.
    """
    norm, eps = attack["norm"], attack["eps"]
    if eps is None:
        return f"{norm} minimum norm" if norm and not attack.get("control") else ""
    return f"{norm or 'eps'} {eps:g}{'/255' if norm == 'Linf' else ''}"


def _names(parts: Sequence[Mapping | None], name: Callable[[Any], str]) -> list[str]:
    """A short name for each part; where different parts have one name, with the fields that differ."""
    flat = [flatten(part or {}) for part in parts]
    short = [name(part) for part in parts]
    return [
        with_fields(label, fields, [other for other, again in zip(flat, short, strict=True) if again == label])
        for label, fields in zip(short, flat, strict=True)
    ]


def with_fields(label: str, fields: Mapping[str, Any], among: Sequence[Mapping[str, Any]]) -> str:
    """`label`, and in brackets those of `fields` that are not the same in all of `among`."""
    differing = [key for key in fields if any(other.get(key, _MISSING) != fields[key] for other in among)]
    # a fingerprint only where what can be read does not tell these fields from all others
    readable = [key for key in differing if not key.endswith("fingerprint")]
    if all(other == fields or any(other.get(key, _MISSING) != fields[key] for key in readable) for other in among):
        differing = readable
    if not differing:
        return label
    shown = (f"{key}={_shorten(fields[key])}" for key in differing)
    return f"{label} [{', '.join(shown)}]"


def _shorten(value: Any) -> str:
    text = str(value)
    return f"{text[:8]}…" if re.fullmatch(r"[0-9a-f]{12,}", text) else text


def flatten(value: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one object with dotted names; lists as JSON text, intervals as two numbers."""
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            flat |= flatten(entry, f"{prefix}{key}.")
        elif key == "interval_95" and entry is not None:
            flat[f"{prefix}{key}.low"], flat[f"{prefix}{key}.high"] = entry
        else:
            flat[f"{prefix}{key}"] = json.dumps(entry) if isinstance(entry, list | tuple) else entry
    return flat
