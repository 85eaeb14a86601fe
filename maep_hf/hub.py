"""The model card of a purifier, written from the records beside its weights and from nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .evaluation.results import attack_name
from .evaluation.threat_models import ADAPTIVE
from .records import read_jsonl

THREAT_MODELS = ("gray-box", "bpda", "white-box", "black-box")
TEMPLATE = Path(__file__).resolve().parent.parent / "model_card.md"
_PRIVATE = ("output_dir",)  # where it lay on the machine that trained it


def render_model_card(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    results: Sequence[Mapping[str, Any]] | None = None,
    template: str | os.PathLike = TEMPLATE,
) -> ModelCard:
    """Render a purifier's card from its folder: `config.json`, the run's `run.json`, the evaluation's `results.jsonl`.

    What was not recorded is named as such: a missing `run.json` as no record of training, each threat model without a
    result as not measured.

    Args:
        folder: of `MAEPModel.save_pretrained` or of a training run.
        repo_id: Hub id for the card's code; by default the folder's name.
        results: records of `benchmark`; by default those of `results.jsonl`, if it is there.
        template: Jinja template in the form of `model_card.md`.

    Raises:
        ValueError: no purifier's folder, or a result without one of its protocol's fields.
        OSError: the template cannot be read.
    """
    from jinja2 import Environment, StrictUndefined

    from .checkpoints import check_model, load_purifier

    folder = Path(folder)
    check_model(folder.resolve(), model_type="maep", kind="a purifier")
    purifier = load_purifier(folder.resolve())
    run = _read_json(folder / "run.json") or {}
    if results is None:
        results = read_jsonl(folder / "results.jsonl")
    rows = [_row(record) for record in results if record.get("protocol", {}).get("purifier") is not None]
    measured = {row["threat_model"] for row in rows}
    repo_id = repo_id or folder.resolve().name
    card_data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-to-image",
        tags=["maep", "adversarial-robustness", "adversarial-purification", "masked-autoencoder"],
    )
    # strict: a field that the template asks for and nobody gives is an error, not an empty place in the card
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    content = environment.from_string(Path(template).read_text(encoding="utf-8")).render(
        card_data=card_data.to_yaml(),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        parameters=purifier.num_parameters(),
        image_size=purifier.config.image_size,
        channels=purifier.config.num_channels,
        results=rows,
        not_measured=[name for name in THREAT_MODELS if name not in measured],
        recipe=_recipe(run.get("arguments", {})),
        data=_inline(run.get("data")),
        revision=run.get("git_revision") or "not recorded",
        versions=_inline(run.get("versions")),
    )
    return ModelCard(content)


def _row(record: Mapping[str, Any]) -> dict[str, str]:
    try:
        protocol, accuracy = record["protocol"], record["accuracy"]
        threat_model, data, attack = protocol["threat_model"], protocol["dataset"], protocol["attack"]
        if threat_model not in THREAT_MODELS and threat_model != "transfer":
            raise ValueError(f"results: threat model {threat_model!r} is not one of {THREAT_MODELS} or transfer")
        low, high = accuracy["purified_attacked"]["interval_95"]
        percent = {name: f"{accuracy[name]['percent']:.1f}" for name in ("clean", "purified_clean", "attacked")}
        if threat_model != "gray-box" and not attack.get("control"):
            percent["attacked"] = "–"  # images attacked through the purifier say nothing of the bare classifier
        mark = ""
        if record["checks"] is None and threat_model in ADAPTIVE:
            mark = " (not checked for gradient masking)"
        elif record["checks"] and record["checks"]["failed"]:
            mark = f" ⚠ unreliable: {', '.join(record['checks']['failed'])} failed"
        robust = f"{accuracy['purified_attacked']['percent']:.1f} ({low:.1f} to {high:.1f})"
        return percent | {
            "threat_model": threat_model,
            "attack": attack_name(attack),
            "data": f"{data['name']} {data['split'] or ''}, {data['images']} (n = {data['n']})".replace(" ,", ","),
            "classifier": PurePath(protocol["classifier"]["name"]).name,
            "purified_attacked": robust + mark,
        }
    except KeyError as error:
        raise ValueError(f"results: a record has no {error}; a result is shown with its full protocol only") from error


def _recipe(arguments: Mapping[str, Mapping[str, Any]]) -> str:
    import yaml

    groups = {
        group: {name: _without_folders(value) for name, value in values.items() if name not in _PRIVATE}
        for group, values in arguments.items()
    }
    return yaml.safe_dump(groups, sort_keys=False).strip() if groups else ""


def _without_folders(value: Any) -> Any:
    """Paths of the training machine say nothing elsewhere: their last part is kept."""
    if isinstance(value, str) and PurePath(value).is_absolute():
        return PurePath(value).name
    if isinstance(value, list):
        return [_without_folders(entry) for entry in value]
    return value


def _inline(record: Any) -> str:
    if not record:
        return "not recorded"
    if isinstance(record, Mapping):
        return ", ".join(f"{name} {_without_folders(value)}" for name, value in record.items() if value is not None)
    return str(record)


def _read_json(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
