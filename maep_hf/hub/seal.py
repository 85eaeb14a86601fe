"""How a card that this package wrote is told from one that a person edited, and how results get into the latter.

A written card ends in an HTML comment with a hash of its metadata, as data, and of its text. While both are as they
were, the card is replaced by a newer one; once a person (or a bot) has changed either, the page is theirs and only
results are merged into its metadata. Saving the same metadata in another YAML style changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import re

import yaml
from huggingface_hub import ModelCard, ModelCardData, RepoCard

RECORD = "record"  # in a result's metric_args: the key of its evaluation record, which marks it as written by us
_SEAL = re.compile(r"\s*<!-- Written by maep\b[^>]*\bseal: ([0-9a-f]{16}) -->\s*$")
_COMMENT = (
    "\n\n<!-- Written by maep from the records beside the weights. Change anything and the page is yours: from then on "
    "only results are merged into its metadata. seal: {} -->\n"
)
_LICENCE = ("license", "license_name", "license_link")
_BOILERPLATE = re.compile(r"### Framework versions|- PEFT \S+")


def sealed(card: RepoCard) -> RepoCard:
    """The card with the comment that says it is as this package wrote it."""
    card = type(card)(str(card))  # as a reader parses it
    card.text = card.text.rstrip() + _COMMENT.format(_hash(card))
    return card


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
    if not card.text.strip():  # a repository made on the website with a licence and nothing else: that choice stays
        for name, value in card.data.to_dict().items():
            if name != "model-index" and value:
                setattr(fresh.data, name, value)
        fresh.text = _SEAL.sub("", fresh.text)
        return sealed(fresh), "written"
    if not edited(card):
        if not _SEAL.search(card.text):  # placeholders, perhaps with a licence that a person chose on the website
            for name in _LICENCE:
                if value := card.data.get(name):
                    setattr(fresh.data, name, value)
            fresh.text = _SEAL.sub("", fresh.text)
            return sealed(fresh), "written"
        return fresh, "written"
    results = getattr(fresh.data, "eval_results", None)
    if not results:
        return card, "kept"
    card.data.eval_results = _others(card) + results
    card.data.model_name = card.data.model_name or fresh.data.model_name
    return type(fresh)(str(card)), "merged"


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
