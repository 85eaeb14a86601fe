"""Cards for the Hub, written from the records in a folder and from nothing else."""

from __future__ import annotations

import logging
import os
import site
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import RepoCard

from ..evaluation.results import ATTACKS_CHART, CHARTS, EPS_CHART, check_record
from ..paths import short, without_paths
from ..records import read_jsonl
from .folders import (
    ADAPTER,
    ADAPTER_CONFIG,
    CLASSIFIER,
    EVALUATION,
    PAIRS,
    PAIRS_RECORD,
    PLAIN_CLASSIFIER,
    PURIFIER,
    RESULTS,
    TABLE,
    Kind,
    kind_of,
    read_json,
)
from .names import hub_id
from .recipe import Recipe
from .results import (
    ATTACKERS,
    CardResults,
    fingerprints_as_measured,
    fingerprints_of,
    is_outdated_report,
    records_of,
    validation_results,
    without_other_weights,
)
from .seal import LICENCE, licence_sentence, renewed, sealed

logger = logging.getLogger(__name__)
PAPER = "arxiv:2501.16904"  # as a tag, the Hub links it
EXTENDED = "extended|"  # in a dataset card, the dataset that it was made from
_TEMPLATES = Path(__file__).parent / "templates"
_TAGS = ["maep", "adversarial-robustness", "adversarial-purification", "masked-autoencoder", PAPER]


def render_card(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    *,
    base_model: str | None = None,
    results: Sequence[Mapping[str, Any]] | None = None,
    template: str | os.PathLike | None = None,
    kind: Kind | None = None,
    pictures: Collection[str] = (),
) -> RepoCard:
    """Render the card of a folder: purifier, LoRA adapter, classifier, stored pairs or evaluation records.

    What was not recorded is named as such: a missing `run.json` as no record of training, each threat model without a
    result as not measured.

    Args:
        folder: of a model, of a training run, of an adapter, of `make_pairs` or of `maep evaluate`.
        repo_id: Hub id for the card's code; by default the folder's name.
        base_model: Hub id of the model this one was made from; by default what the records say, if that is a Hub id.
        results: records of `benchmark`; by default those of `results.jsonl`, if it is there.
        template: Jinja template in place of the kind's own (`model_card.md` for a purifier).
        kind: by default what the folder holds.
        pictures: files beside the page that are not in the folder; the card shows those of its records.

    Returns:
        A `ModelCard`, or a `DatasetCard` for pairs and evaluation records, that carries its seal (see `seal.py`).

    Raises:
        ValueError: a folder of no known kind, results that lack their protocol or are of other weights (of an adapter,
            where its base lies here), an adapter without a Hub id of its base, or a template that is no Jinja or asks
            for what there is not.
        OSError: the template cannot be read.
    """
    folder = Path(folder)
    kind = kind or kind_of(folder)
    if kind not in _CARDS:
        raise ValueError(f"{folder}: an {kind.name} has no card of its own; push it beside its purifier")
    records = without_paths(read_jsonl(folder / RESULTS) if results is None else list(results))
    repo_id = repo_id or folder.resolve().name
    describe, file_name = _CARDS[kind]
    context = describe(folder, repo_id, base_model, records)
    if "pictures" in context:
        beside = {path.name for path in folder.iterdir()}
        if (charts := beside & {*CHARTS} - {*pictures}) and _other_charts(folder, records, context):
            beside -= charts
            logger.warning(
                "%s: %s not shown, since the charts there are of other records than the card's: run `maep report` on "
                "%s, without records of other weights",
                folder, ", ".join(sorted(charts)), RESULTS,
            )  # fmt: skip
        beside |= {*pictures}
        context["pictures"] = [(name, caption) for name, caption in context["pictures"].items() if name in beside]
    path = Path(template) if template else _template(file_name)
    data = context["card_data"]
    names = {"name": short(repo_id), "repo_id": repo_id}
    content = _rendered(path, context | names | {"card_data": data.to_yaml(), "licence": licence_sentence(data)})
    card = DatasetCard(content) if isinstance(data, DatasetCardData) else ModelCard(content)
    return sealed(card)


def _other_charts(folder: Path, records: Sequence[Mapping[str, Any]], context: Mapping[str, Any]) -> bool:
    """Whether the charts in a folder are of other records than a card's, or of some of other weights too."""
    if not records:
        return False
    own = context["results"].records if "results" in context else records
    return len(without_other_weights(records, own)) < len(records) or is_outdated_report(folder, records)


def write_card(
    folder: str | os.PathLike, repo_id: str | None = None, *, overwrite: bool = False, **options: Any
) -> str:
    """Write FOLDER/README.md; one that a person edited keeps its text, and gets the results into its metadata.

    Args:
        folder, repo_id, options: of [`render_card`].
        overwrite: replace an edited one too.

    Returns:
        `"written"`, or `"merged"` where an edited README only got the results.

    Raises:
        FileExistsError: there is an edited README, and no results to merge into it.
        ValueError: as of [`render_card`], or a README whose metadata cannot be read.
    """
    path = Path(folder) / "README.md"
    fresh = render_card(folder, repo_id, **options)
    card, how = fresh, "written"
    if path.exists() and not overwrite:
        with path.open(encoding="utf-8-sig", newline="") as stream:  # its line endings stay
            card, how = renewed(stream.read(), fresh)
    if how == "kept":
        raise FileExistsError(
            f"{path} was edited by hand and there are no results to merge into it; --overwrite replaces it"
        )
    temporary = path.with_name("README.md.tmp")
    card.save(temporary)
    os.replace(temporary, path)
    return how


def _purifier(folder: Path, repo_id: str, base_model: str | None, records: list) -> dict[str, Any]:
    from ..checkpoints import load_purifier

    context = _trained(folder, own_records(folder, records))
    purifier = load_purifier(folder.resolve())
    recipe = context["recipe"]
    base = base_model or recipe.base_model
    card_data = _model_data(
        repo_id,
        pipeline_tag="image-to-image",
        base_model=base,
        base_model_relation="finetune" if base else None,
        datasets=recipe.datasets,
        metadata=context["results"].metadata,
    )
    return context | {
        "card_data": card_data,
        "parameters": purifier.num_parameters(),
        "image_size": purifier.config.image_size,
        "channels": purifier.config.num_channels,
    }


def own_records(folder: Path, records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records that were measured on a purifier's weights.

    Raises:
        ValueError: there are records, and all of them are of other weights.
    """
    return records_of(records, _fingerprints(folder, records)) if records else []


def _fingerprints(folder: Path, records: Sequence[Mapping[str, Any]]) -> set[str]:
    """Of the purifier in a folder, also as records say that it was used, and of what it was before a push."""
    from ..checkpoints import load_purifier

    for index, record in enumerate(records):
        check_record(record, f"results, record {index + 1}")
    purifier = load_purifier(folder.resolve())
    fingerprints = fingerprints_as_measured(purifier, records)
    if vars(purifier.config).pop("custom_pipelines", None):  # a push adds it, and changes no output
        fingerprints |= fingerprints_as_measured(purifier, records)
    return fingerprints


def _adapted_fingerprints(folder: Path, base: str | None, records: Sequence[Mapping[str, Any]]) -> set[str] | None:
    """Of an adapter merged into its base; unknown without a folder of that base."""
    from ..checkpoints import base_folder

    if not base or base_folder(folder, base) is None:
        return None
    try:
        return _fingerprints(folder, records)
    except (ValueError, OSError) as error:
        logger.warning("%s: whether its records are of these weights is not known: %s", folder, error)
        return None


def _adapter(folder: Path, repo_id: str, base_model: str | None, records: list) -> dict[str, Any]:
    adapter = read_json(folder / ADAPTER_CONFIG)
    base = base_of_adapter(adapter, base_model)
    records = records_of(records, None)
    if fingerprints_of(records):  # a rescaled or randomised purifier's is another one
        stored = adapter.get("base_model_name_or_path")
        records = records_of(records, _adapted_fingerprints(folder, stored, records))
    context = _trained(folder, records)
    card_data = _model_data(
        repo_id,
        library_name="peft",
        pipeline_tag="image-to-image",
        base_model=base,
        base_model_relation="adapter",
        datasets=context["recipe"].datasets,
        tags=[*_TAGS, "lora"],
        metadata=context["results"].metadata,
    )
    head = ", ".join(adapter.get("modules_to_save") or [])
    return context | {"card_data": card_data, "base_model": base, "hub_base": hub_id(base), "rank": adapter.get("r"),
                      "alpha": adapter.get("lora_alpha"), "saved_modules": head}  # fmt: skip


def base_of_adapter(adapter: Mapping[str, Any], base_model: str | None) -> str:
    """Hub id of an adapter's base: the one given, or the one in its `adapter_config.json`.

    Raises:
        ValueError: that one is a local path, so the base has to be named.
    """
    stored = adapter.get("base_model_name_or_path")
    found = base_model or hub_id(stored)
    if not found:
        raise ValueError(
            f"base_model: the adapter was trained on {short(stored) if stored else 'an unnamed model'!r}, which is no "
            "Hub id; push that model and name it with base_model (--base-model OWNER/NAME)"
        )
    return found


def _classifier(folder: Path, repo_id: str, base_model: str | None, records: list) -> dict[str, Any]:
    from transformers import AutoConfig

    from ..checkpoints import check_model

    check_model(folder.resolve(), kind="a classifier")
    config, recipe = AutoConfig.from_pretrained(folder.resolve()), Recipe(folder)
    ours = config.model_type == "cifar_resnet"
    trained_here = recipe.known  # of other weights, also of converted ones, neither licence nor defence is known
    validation = validation_results(folder, recipe)
    card_data = _model_data(
        repo_id,
        license=LICENCE if trained_here else None,
        pipeline_tag="image-classification",
        base_model=base_model,
        datasets=recipe.datasets,
        tags=["maep", config.model_type.replace("_", "-"), "image-classification"],
        metadata=[row["metadata"] for row in validation],
    )
    return {
        "card_data": card_data,
        "recipe": recipe,
        "ours": ours,
        "trained_here": trained_here,
        "depth": getattr(config, "depth", None),
        "model_type": config.model_type,
        "channels": getattr(config, "num_channels", 3),
        "size": 32 if ours else _input_size(folder, config),
        "classes": [str(config.id2label[index]) for index in sorted(config.id2label)],
        "validation": validation,
    }


def _input_size(folder: Path, config: Any) -> int:
    """Side of the images that a classifier of transformers takes, pixels."""
    path = folder / "preprocessor_config.json"
    resized = read_json(path).get("size") if path.is_file() else None
    sizes = (getattr(config, "image_size", None), resized.get("height") if isinstance(resized, dict) else None)
    return next((size for size in sizes if isinstance(size, int)), 224)


def _pairs(folder: Path, repo_id: str, base_model: str | None, records: list) -> dict[str, Any]:
    record = without_paths(read_json(folder / PAIRS_RECORD))
    arguments, result = record.get("arguments", {}), record.get("result", {})
    pairs, attack = arguments.get("pairs", {}), arguments.get("attack", {})
    source = pairs.get("dataset")
    card_data = DatasetCardData(
        pretty_name=short(repo_id),
        task_categories=["image-to-image"],
        tags=["maep", "adversarial-robustness", "adversarial-examples"],
        source_datasets=[f"{EXTENDED}{found}"] if (found := hub_id(source)) else None,
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    )
    return {
        "card_data": card_data,
        "pairs": pairs,
        "attack": attack,
        "result": result,
        "source": source or "unnamed",
        "surrogates": pairs.get("surrogates", []),
        "revision": record.get("git_revision") or "not recorded",
    }


def _evaluation(folder: Path, repo_id: str, base_model: str | None, records: list) -> dict[str, Any]:
    from ..evaluation.tables import markdown_table

    for index, record in enumerate(records):
        check_record(record, f"results, record {index + 1}")
    purifiers = sorted({(record["protocol"]["purifier"] or {"name": "none"})["name"] for record in records})
    measured = {record["protocol"]["threat_model"] for record in records if record["protocol"]["purifier"]}
    card_data = DatasetCardData(
        pretty_name=short(repo_id),
        license=LICENCE,
        tags=["maep", "adversarial-robustness", "evaluation"],
        configs=[{"config_name": "default", "data_files": [{"split": "results", "path": TABLE}]}],
    )
    return {"card_data": card_data, "table": markdown_table(records).rstrip(), "count": len(records),
            "purifiers": purifiers, "missing": [name for name in ATTACKERS if name not in measured],
            "pictures": picture_captions(records)}  # fmt: skip


def _trained(folder: Path, records: list) -> dict[str, Any]:
    recipe = Recipe(folder)
    return {
        "results": CardResults(records),
        "recipe": recipe,
        "pictures": picture_captions(records),
    }


def _model_data(repo_id: str, *, metadata: list[EvalResult], datasets: list[str], **fields: Any) -> ModelCardData:
    fields = {"license": LICENCE, "library_name": "transformers", "tags": _TAGS} | fields
    return ModelCardData(
        datasets=datasets or None,
        metrics=["accuracy"],
        model_name=short(repo_id) if metadata else None,
        eval_results=metadata or None,
        **{name: value for name, value in fields.items() if value},
    )


def picture_captions(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """File -> caption of all pictures that a page shows of records; each names its threat model in its title."""
    classifiers = dict.fromkeys(short(record["protocol"]["classifier"]["name"]) for record in records)
    return {
        f"{name}.png": f"clean, attacked and purified images and the magnified difference, in front of {name}"
        for name in classifiers
    } | {
        ATTACKS_CHART: "accuracy under every attack, each threat model in a panel of its own",
        EPS_CHART: "accuracy against the radius, a line for each threat model",
    }


_CARDS: dict[Kind, tuple[Callable[..., dict[str, Any]], str]] = {
    PURIFIER: (_purifier, "model_card.md"),
    ADAPTER: (_adapter, "adapter.md"),
    CLASSIFIER: (_classifier, "classifier.md"),
    PLAIN_CLASSIFIER: (_classifier, "classifier.md"),
    PAIRS: (_pairs, "pairs.md"),
    EVALUATION: (_evaluation, "evaluation.md"),
}


def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # strict: a field that a template asks for and nobody gives is an error, not an empty place in the card
    return Environment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def _rendered(path: Path, context: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    try:
        return _environment().from_string(path.read_text(encoding="utf-8")).render(context)
    except TemplateError as error:
        raise ValueError(f"template {path}: {type(error).__name__}, {error}") from error


def _template(name: str) -> Path:
    """A template of the package. The purifier's own lies at the top of a clone, where people find and change it, and in
    `share/` of an installation, where the `data-files` of pyproject.toml put it."""
    top = Path(__file__).resolve().parents[2]
    shared = Path("share", "maep_hf")
    places = [_TEMPLATES, top, top / shared, Path(sys.prefix) / shared, Path(site.getuserbase()) / shared]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise FileNotFoundError(f"the template {name} is not part of this installation; install maep-hf again")
