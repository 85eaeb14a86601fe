"""The rows of an ablation, read from YAML and turned into one recipe for each stage script."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import finetune
import pretrain
import yaml

from maep_hf.training.arguments import FREE_ARGUMENTS

SCRIPTS = {"pretrain": pretrain, "finetune": finetune}
GIVEN_BY_THE_RUNNER = ("output_dir", "max_steps", "seed", "model", "dataset", "cpu_threads", "overwrite_output_dir")


class _Told(Exception):
    """Carries the argument types out of a script's `main`."""


def argument_types(script: str) -> tuple[type, ...]:
    """The argument dataclasses that the `main` of a stage script parses, as it is now: it is run up to that point."""
    module = SCRIPTS[script]
    parse = module.parse_arguments

    def tell(*types: type, **options: Any) -> None:
        raise _Told(types)

    module.parse_arguments = tell
    try:
        module.main([])
    except _Told as told:
        return told.args[0]
    finally:
        module.parse_arguments = parse
    raise RuntimeError(f"train/{script}.py does not parse its arguments with parse_arguments")


@dataclass(frozen=True)
class Row:
    """One line of the ablation: what is changed of the common arguments.

    Args:
        name: of the row, a part of its folder's name.
        change: in words.
        group: what is varied.
        stage_1_share: share of the images that stage 1 sees; 1 leaves stage 2 out. The ablation's own when `None`.
        both, pretrain, finetune: arguments of both stages, of stage 1 and of stage 2; the latter two are stronger.
    """

    name: str
    change: str = ""
    group: str = ""
    stage_1_share: float | None = None
    both: Mapping[str, Any] = field(default_factory=dict)
    pretrain: Mapping[str, Any] = field(default_factory=dict)
    finetune: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """One stage of a row: the script and its arguments."""

    script: str
    values: dict[str, Any]

    @property
    def key(self) -> str:
        """Hash of the arguments that decide the weights: rows with the same stage 1 share its run."""
        deciding = {name: value for name, value in self.values.items() if name not in FREE_ARGUMENTS}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Ablation:
    """The rows and what they have in common.

    Args:
        rows: by name, in the order of the file.
        common: a [`Row`] of the arguments that every row starts from.
        warmup_share: warm-up as a share of a stage's steps, where `warmup_steps` is not given.
    """

    rows: dict[str, Row]
    common: Row
    warmup_share: float = 0.05

    @classmethod
    def read(cls, path: str | Path) -> Ablation:
        """Read and check the YAML file.

        Raises:
            ValueError: a key that is not known, or no rows.
            OSError: it cannot be read.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict) or not isinstance(values.get("rows"), dict) or not values["rows"]:
            raise ValueError(f"{path}: must hold a mapping `rows` of at least one row")
        rows = values.pop("rows")
        warmup_share = values.pop("warmup_share", cls.warmup_share)
        common = _row("common", {"stage_1_share": 0.2} | values, path)
        return cls({name: _row(name, row or {}, path) for name, row in rows.items()}, common, warmup_share)

    def missing(self, row: Row) -> list[str]:
        """Arguments that the row sets and the scripts do not have, as `stage.argument`."""
        found = []
        for stage in SCRIPTS:
            known = {entry.name for kind in argument_types(stage) for entry in fields(kind)}
            found += [f"{stage}.{name}" for name in self._values(row, stage) if name not in known]
        return found

    def recipes(self, row: Row, max_steps: int, seed: int, dataset: str, cpu_threads: int = 0) -> list[Recipe]:
        """The stages of a row, one or two, without their folders.

        The seed of stage 2 is another one, so that it does not see the draws of stage 1 again.

        Raises:
            ValueError: a share out of range, too few steps for two stages, or an argument that a row may not set.
        """
        share = self.common.stage_1_share if row.stage_1_share is None else row.stage_1_share
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"row {row.name}: stage_1_share={share!r} must be more than 0 and at most 1")
        first = max_steps if share == 1 else max(1, round(share * max_steps))
        steps = {"pretrain": first, "finetune": max_steps - first}
        if share < 1 and not steps["finetune"]:
            raise ValueError(f"max_steps={max_steps}: row {row.name} has two stages and needs at least 2")
        found = []
        for number, (stage, count) in enumerate(steps.items()):
            if not count:
                continue
            values = self._values(row, stage)
            if refused := sorted(set(values) & set(GIVEN_BY_THE_RUNNER)):
                raise ValueError(f"row {row.name}: {', '.join(refused)} is given by the ablation's command line")
            usual = {"warmup_steps": round(self.warmup_share * count), "eval_steps": count}
            usual |= {"save_steps": min(count, 100), "save_total_limit": 1}
            values = usual | values | {"max_steps": count, "seed": seed + 1000 * number}
            found.append(Recipe(stage, values | {"dataset": dataset, "cpu_threads": cpu_threads}))
        return found

    def _values(self, row: Row, stage: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for owner, part in ((self.common, "both"), (self.common, stage), (row, "both"), (row, stage)):
            found |= getattr(owner, part)
        return found


def _row(name: str, values: Any, path: str | Path) -> Row:
    known = {entry.name for entry in fields(Row)} - {"name"}
    if not isinstance(values, dict) or set(values) - known:
        wrong = ", ".join(sorted(set(values) - known)) if isinstance(values, dict) else repr(values)
        raise ValueError(f"{path}: row {name}: {wrong} is not known; a row has {', '.join(sorted(known))}")
    for part in ("both", "pretrain", "finetune"):
        if not isinstance(values.get(part, {}), dict):
            raise ValueError(f"{path}: row {name}: {part} must be a mapping of arguments, got {values[part]!r}")
    if not all(letter.isalnum() or letter in "-_." for letter in str(name)):
        raise ValueError(f"{path}: row {name!r}: a name has letters, digits, '-', '_' and '.' only (it names a folder)")
    return Row(str(name), **values)
