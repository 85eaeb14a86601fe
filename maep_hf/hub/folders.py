"""What lies in a folder, by the files that only one kind of folder has."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..checkpoints import ADAPTER_CONFIG, BASE_RECORD

MODEL_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
_WEIGHTS = ("config.json", *MODEL_WEIGHTS)
_OTHER_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "tf_model*.h5", "flax_model*.msgpack")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_RUN = ("run.json", "*_run.json", "metrics.jsonl", "*_metrics.jsonl", "LICENSE")
RESULTS = "results.jsonl"
TABLE = "results.csv"
RESULT_TEXTS = (RESULTS, "results.md", TABLE)
RESULT_FILES = (*RESULT_TEXTS, "*.png")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PAIRS_RECORD = "make_pairs.json"
PURIFIER_CODE = ("configuration_maep.py", "modeling_maep.py", "image_processing_maep.py", "pipeline_maep.py")
CLASSIFIER_CODE = ("configuration_cifar_resnet.py", "modeling_cifar_resnet.py")


@dataclass(frozen=True)
class Kind:
    """What may leave a folder of this kind: nothing that is not listed is ever pushed.

    Attributes:
        name: as in messages.
        files: names and patterns, relative to the folder. The README is not among them: see `seal.py`.
        code: modules of this package that stand beside the weights, for people without it.
        repo_type: of the Hub repository.
    """

    name: str
    files: tuple[str, ...]
    code: tuple[str, ...] = ()
    repo_type: str = "model"


PURIFIER = Kind("purifier", (*_WEIGHTS, *_RUN, *RESULT_FILES, "preprocessor_config.json"), PURIFIER_CODE)
CLASSIFIER = Kind("classifier", (*_WEIGHTS, *_RUN, *PROCESSORS), CLASSIFIER_CODE)
PLAIN_CLASSIFIER = Kind("classifier of transformers", CLASSIFIER.files)  # its code is in transformers
ADAPTER = Kind("adapter", (ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_RECORD, *_RUN, *RESULT_FILES))
IMAGE_PROCESSOR = Kind("image processor", ("preprocessor_config.json",), ("image_processing_maep.py",))
PAIRS = Kind("pairs", (PAIRS_RECORD, "data/*.parquet"), repo_type="dataset")
EVALUATION = Kind("evaluation", RESULT_FILES)
MODELS = (PURIFIER, CLASSIFIER, PLAIN_CLASSIFIER)  # whole ones
_OF_MODEL_TYPE = {"maep": PURIFIER, "cifar_resnet": CLASSIFIER}


def kind_of(folder: str | os.PathLike) -> Kind:
    """The kind of a folder.

    Raises:
        ValueError: there is no such folder, or it is of no kind that this package writes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if (folder / ADAPTER_CONFIG).is_file():
        return ADAPTER
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        if (kind := _kind_of_config(config)) is None:
            raise ValueError(
                f"{folder}: config.json has model_type {config.get('model_type')!r}, not one of "
                f"{', '.join(_OF_MODEL_TYPE)}, and is of no image classifier of transformers"
            )
        return kind
    if (folder / PAIRS_RECORD).is_file():
        if not any((folder / "data").glob("*.parquet")):
            raise ValueError(f"{folder}: its pairs are not complete; run train/make_pairs.py again to go on")
        return PAIRS
    if (folder / RESULTS).is_file():
        return EVALUATION
    if (folder / "preprocessor_config.json").is_file():
        return IMAGE_PROCESSOR
    raise ValueError(
        f"{folder} holds no config.json, adapter_config.json, {PAIRS_RECORD} or {RESULTS}: it is not the folder of a "
        "model, an adapter, pairs or an evaluation"
    )


def kind_of_model(model: Any) -> Kind:
    """The kind of the folder that a model's `save_pretrained` makes.

    Raises:
        ValueError: none that can be pushed.
    """
    config = getattr(model, "config", None)
    described = config.to_dict() if hasattr(config, "to_dict") else {}
    kind = _kind_of_config(described | {"architectures": [type(model).__name__]})
    if kind is None:
        raise ValueError(
            f"push_to_hub: a {type(model).__name__} is neither a purifier of this package nor an image classifier of "
            "transformers, and has no page on the Hub; leave out --push_to_hub"
        )
    return kind


def _kind_of_config(config: Mapping[str, Any]) -> Kind | None:
    if config.get("model_type") in _OF_MODEL_TYPE:
        return _OF_MODEL_TYPE[config["model_type"]]
    classifies = any("ForImageClassification" in str(name) for name in config.get("architectures") or ())
    # code of its own (auto_map) would not be on the Hub
    return PLAIN_CLASSIFIER if classifies and not config.get("auto_map") else None


def files_of(folder: Path, kind: Kind) -> list[Path]:
    """The folder's files that may be pushed, in order of their names."""
    found = {path for pattern in kind.files for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def check_weights(folder: Path, kind: Kind, there: Collection[str]) -> None:
    """Refuse a model or adapter whose weights would stay behind: none would load, or older ones under its page.

    Args:
        folder, kind: the source.
        there: paths of the repository's files. Beside a model's weights its configuration may go alone.

    Raises:
        ValueError: its weights have a name or form that is not pushed, or there are none.
    """
    if kind not in (*MODELS, ADAPTER):
        return
    patterns, name = (ADAPTER_WEIGHTS,), ADAPTER_WEIGHTS
    if kind is not ADAPTER:
        patterns, name = MODEL_WEIGHTS, "model.safetensors (or its shards)"
    own = sorted(path.name for path in folder.iterdir())
    if matching(own, patterns):
        return
    found = matching(own, _OTHER_WEIGHTS)
    if not found and kind is not ADAPTER and matching(there, patterns):
        return
    has = f"the weights in it, {', '.join(found)}, do not go to the Hub" if found else "there are no weights in it"
    raise ValueError(f"{folder}: {has}; save them as {name}, by save_pretrained without a variant")


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that are of one of the patterns."""
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def run_record(folder: Path) -> dict[str, Any]:
    """The run's `run.json`; of an adapter also the one of the run that it lies in."""
    for path in (folder / "run.json", folder.resolve().parent / "run.json"):
        if path.is_file() and (path.parent == folder or (folder / ADAPTER_CONFIG).is_file()):
            return read_json(path)
    return {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file holds none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def read_own_json(path: Path | None) -> dict[str, Any]:
    """A JSON object that may be somebody's own file: empty where it is none, or there is no file."""
    try:
        return {} if path is None else read_json(path)
    except ValueError:
        return {}
