"""How a card that this package wrote is told from one that a person edited, and how results get into the latter.

A written card ends in an HTML comment with a hash of its metadata, as data, and of its text. While both are as they
were, the card is replaced by a newer one; once a person (or a bot) has changed either, the page is theirs and only
results are merged into its metadata. Saving the same metadata in another YAML style changes nothing.

A licence or other metadata that stood there before the first card was chosen by a person: each newer card takes it
over. The comment lists the names of these fields.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

import yaml
from huggingface_hub import CardData, ModelCard, ModelCardData, RepoCard

LICENCE = "apache-2.0"  # of the code, and of weights that were trained with it
RECORD = "record"  # in a result's metric_args: the key of its evaluation record, which marks it as written by us
_SEAL = re.compile(r"\s*<!-- Written by maep\b[^>]*\bseal: ([0-9a-f]{16}) -->\s*$")
_KEPT = re.compile(r"\bkept: ([^.>]*)\. seal: ")
_COMMENT = (
    "\n\n<!-- Written by maep from the records beside the weights. Change anything and the page is yours: from then on "
    "only results are merged into its metadata. {}seal: {} -->\n"
)
_LICENCE = ("license", "license_name", "license_link")
_BOILERPLATE = re.compile(r"### Framework versions|- PEFT \S+")


def sealed(card: RepoCard, kept: Collection[str] = ()) -> RepoCard:
    """The card with the comment that says it is as this package wrote it, but for a person's metadata, named `kept`."""
    card = type(card)(str(card))  # as a reader parses it
    names = f"kept: {', '.join(kept)}. " if kept else ""
    card.text = _SEAL.sub("", card.text).rstrip() + _COMMENT.format(names, _hash(card))
    return card


def licence_sentence(data: CardData) -> str:
    """What a card's section on the licence begins with: a licence in its metadata is of the weights."""
    licence = data.get("license")
    if not licence:
        origin = "these weights come without the record of a training run, and have the terms of their origin"
        return f"Not recorded: {origin}."
    if licence == LICENCE:
        return "Code and weights: Apache-2.0."
    name = str(data.get("license_name") or (", ".join(map(str, licence)) if isinstance(licence, list) else licence))
    link = data.get("license_link")
    return f"Code: Apache-2.0. Weights: {f'[{name}]({link})' if link else name}."


def edited(card: RepoCard) -> bool:
    """Whether anything was changed since the card was written, or it was written by a person in the first place.

    The pages full of "More Information Needed" that transformers and PEFT push by themselves are nobody's work.
    """
    found = _SEAL.search(card.text)
    if found:
        return found[1] != _hash(card)
    default = ModelCard.from_template(ModelCardData(), model_description="_").text
    known = {line.strip() for line in default.splitlines()}
    lines = [line.strip() for line in card.text.splitlines()]
    ours = [line for line in lines if line and "automatically generated" not in line and line not in known]
    return len(lines) < 20 or any(not _BOILERPLATE.fullmatch(line) for line in ours)


def renewed(existing: str | None, fresh: RepoCard) -> tuple[RepoCard, str]:
    """What is to stand in place of `existing`, the README that is there.

    Returns:
        The card, and what it is: `"written"`, the new one; `"merged"`, the one that was edited with the new results in
        its metadata; `"kept"`, the one that was edited, for there are no results.

    Raises:
        ValueError: the metadata of `existing` cannot be read, so nothing can be merged into it.
    """
    if existing is None or not existing.strip():
        return fresh, "written"
    card = _parsed(existing, type(fresh))
    found = _SEAL.search(card.text)
    if not card.text.strip():  # a repository made on the website with a licence and nothing else: that choice stays
        names = [name for name in card.data.to_dict() if name != "model-index"]
    elif edited(card):
        names = None
    elif found:
        listed = _KEPT.search(found[0])
        names = listed[1].split(", ") if listed else []
    else:  # placeholders, perhaps with a licence that a person chose on the website
        names = list(_LICENCE)
    if names is not None:
        return _with_metadata(fresh, {name: value for name in names if (value := card.data.get(name))}), "written"
    results = getattr(fresh.data, "eval_results", None)
    if not results:
        return card, "kept"
    card.data.eval_results = _others(card) + results
    card.data.model_name = card.data.model_name or fresh.data.model_name
    return type(fresh)(str(card)), "merged"


def _with_metadata(card: RepoCard, kept: Mapping[str, Any]) -> RepoCard:
    """A sealed card with metadata of a person, which its section on the licence then agrees with."""
    if not kept:
        return card
    before = licence_sentence(card.data)
    if "license" in kept:  # name and link are of that licence alone
        for name in _LICENCE:
            card.data.pop(name, None)
    for name, value in kept.items():
        setattr(card.data, name, value)
    card.text = card.text.replace(before, licence_sentence(card.data))
    return sealed(card, kept)


def without_names(card: RepoCard, names: Collection[str]) -> RepoCard:
    """A sealed card whose metadata does not name these models and datasets."""
    if not names:
        return card
    if card.data.get("base_model") in names:
        card.data.pop("base_model")
        card.data.pop("base_model_relation", None)
    for field in ("datasets", "source_datasets"):
        if value := card.data.get(field):
            setattr(card.data, field, [name for name in value if name not in names] or None)
    return sealed(card)


def edited_card(existing: str | None) -> ModelCard | None:
    """The model card that is there, if a person wrote or changed it; one that a push writes anew is none.

    Raises:
        ValueError: its metadata cannot be read.
    """
    if existing is None or not existing.strip():
        return None
    card = _parsed(existing, ModelCard)
    return card if card.text.strip() and edited(card) else None


def without_results(card: ModelCard) -> ModelCard | None:
    """The card without the results that this package put into its metadata; `None` if it has none."""
    others = _others(card)
    if len(others) == len(card.data.eval_results or []):
        return None
    card.data.eval_results = others or None
    if not others:  # it is the name of the list of results
        card.data.model_name = None
    return type(card)(str(card))


def _others(card: RepoCard) -> list:
    """The results in a card's metadata that are not from evaluation records."""
    return [each for each in card.data.eval_results or [] if RECORD not in (each.metric_args or {})]


def _parsed(text: str, kind: type[RepoCard]) -> RepoCard:
    try:
        return kind(text)
    except (ValueError, TypeError, yaml.YAMLError) as error:  # a TypeError: names that are no text
        reason = " ".join(str(error).split())
        raise ValueError(f"README.md: its metadata cannot be read, mend it or remove the file ({reason})") from error


def _hash(card: RepoCard) -> str:
    text = "\n".join(line.rstrip() for line in _SEAL.sub("", card.text).strip().splitlines())
    metadata = json.dumps(card.data.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(f"{metadata}\n{text}".encode()).hexdigest()[:16]
