"""How weights came about, from the run's own records: data, stages, arguments, versions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import yaml

from ..paths import short, without_paths
from .folders import read_json, run_record
from .names import dataset_id, hub_id

# Where things lay, and where they were pushed to: neither changes what was computed.
_NOT_SHOWN = ("output_dir", "overwrite_output_dir", "push_to_hub", "hub_model_id", "hub_private", "hub_strategy",
              "hub_base_model")  # fmt: skip


class Recipe:
    """What a card says of the training.

    Attributes:
        known: whether there is a record at all.
        dataset: the training data as it was named, and `datasets`: its Hub id, where it has one.
        validation_images: how many held-out images were validated on; 0 where that is not recorded.
        images: training images seen in all stages, counted each time.
        base_model: Hub id of the model that training started from, where it has one.
        surrogates: short names of the classifiers that training images were attacked on.
        arguments: of the last stage, as YAML.
        stages: one line for each stage, in order.
        data, revision, versions: one line each.
    """

    def __init__(self, folder: Path):
        recorded = run_record(folder)
        run = without_paths(recorded)
        self.known = bool(run)
        arguments = run.get("arguments", {})
        dataset = arguments.get("data", {}).get("dataset")
        self.dataset = dataset or "unnamed"
        self.validation_images = _validation_images(arguments.get("data", {}), run.get("data"))
        self.datasets = [found] if (found := dataset_id(dataset)) else []
        self.base_model = hub_id(_started_from(run))
        self.surrogates = [short(name) for name in arguments.get("purification", {}).get("surrogates", [])]
        shown = {
            group: {name: value for name, value in values.items() if name not in _NOT_SHOWN}
            for group, values in arguments.items()
        }
        self.arguments = yaml.safe_dump(shown, sort_keys=False).strip() if shown else ""
        self.data = _data(dataset, run.get("data"))
        # of a later start that changed an argument, and of the first one where it differs
        starts = [run, run["first_start"]] if run.get("first_start") else [run]
        self.revision = ", first started with ".join(dict.fromkeys(map(_revision, starts)))
        self.versions = "; first started with ".join(dict.fromkeys(_inline(each.get("versions")) for each in starts))
        chain = _chain(folder, recorded)
        self.stages = [_stage(name, record) for name, record in chain]
        self.images = sum(_images(record) for _, record in chain)


def _revision(start: Mapping[str, Any]) -> str:
    revision = str(start.get("git_revision") or "not recorded")
    return f"{revision} with uncommitted changes" if start.get("git_dirty") else revision


def _started_from(run: Mapping[str, Any]) -> str | None:
    for group in run.get("arguments", {}).values():
        if isinstance(group, Mapping) and isinstance(group.get("model"), str):
            return group["model"]
    return None


def _went_on_from(run: Mapping[str, Any]) -> str | None:
    """The output folder of the run before: of the adapter that was trained further, or else of the model."""
    for group in run.get("arguments", {}).values():
        if isinstance(group, Mapping) and isinstance(group.get("adapter"), str):
            return str(PurePosixPath(group["adapter"]).parent)
    return _started_from(run)


def _chain(folder: Path, run: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Records of this run and of those it went on from, the first stage first; they lie beside it as NAME_run.json."""
    if not run:
        return []
    earlier = {path.name: read_json(path) for path in sorted(folder.glob("*_run.json"))}
    chain, current = [("run.json", run)], run
    while (name := _made(earlier, _went_on_from(current))) is not None:
        current = earlier.pop(name)
        chain.insert(0, (name, current))
    return [(name, without_paths(record)) for name, record in chain]


def _made(records: Mapping[str, Mapping[str, Any]], folder: str | None) -> str | None:
    """The record of the run that wrote a folder: by its whole path, for many runs have one name in folders of their
    own; where one was typed from another folder, by the end of it; or else by what a push left of it."""
    if not folder:
        return None
    outputs = {name: output for name, record in records.items() if (output := _output_dir(record))}
    for alike in (_same_path, _same_end, lambda one, other: without_paths(one) == without_paths(other)):
        if found := [name for name, output in outputs.items() if alike(output, folder)]:
            # several where a push has cut their paths: then the one that was started from nothing was the first of all
            return next((name for name in found[::-1] if _went_on_from(records[name]) is not None), found[-1])
    return None


def _same_path(one: str, other: str) -> bool:
    return os.path.normpath(one) == os.path.normpath(other)  # runs/x, runs/x/ and ./runs/x


def _same_end(one: str, other: str) -> bool:
    """Whether an absolute path ends with a relative one, of a folder of its own and a name at least."""
    short, long = sorted((PurePath(os.path.normpath(path)) for path in (one, other)), key=PurePath.is_absolute)
    count = len(short.parts)
    return count > 1 and not short.is_absolute() and long.is_absolute() and long.parts[-count:] == short.parts


def _output_dir(run: Mapping[str, Any]) -> str | None:
    return run.get("arguments", {}).get("loop", {}).get("output_dir")


def _stage(name: str, record: Mapping[str, Any]) -> str:
    loop = record.get("arguments", {}).get("loop", {})
    steps, batch = loop.get("max_steps"), loop.get("per_device_train_batch_size")
    if not steps or not batch:
        return f"`{name}`"
    task = short(str((record.get("command") or [name])[0]))
    return f"`{name}` ({task}): {steps:,} steps, {_images(record):,} images"


def _images(record: Mapping[str, Any]) -> int:
    loop = record.get("arguments", {}).get("loop", {})
    per_step = loop.get("per_device_train_batch_size", 0) * loop.get("gradient_accumulation_steps", 1)
    return loop.get("max_steps", 0) * per_step * record.get("num_processes", 1)


def _validation_images(arguments: Mapping[str, Any], described: Any) -> int:
    wanted = arguments.get("validation_images") or 0
    held_out = described.get("validation") if isinstance(described, Mapping) else None
    there = held_out.get("images") if isinstance(held_out, Mapping) else None
    return min(wanted, there) if there else wanted


def _data(dataset: str | None, described: Any) -> str:
    named = dataset_id(dataset) or (short(dataset) if dataset else None)
    if not isinstance(described, Mapping):
        return named or "not recorded"
    parts = []
    for role, about in described.items():
        if isinstance(about, Mapping):
            count = f"{about['images']:,} images" if about.get("images") else "a stream of images"
            parts.append(f"{role} {count} (fingerprint {about.get('fingerprint')})")
        else:
            parts.append(f"{role} {about}")
    return ": ".join(filter(None, (named, ", ".join(parts))))


def _inline(record: Any) -> str:
    if not record:
        return "not recorded"
    return ", ".join(f"{name} {value}" for name, value in record.items() if value is not None)
