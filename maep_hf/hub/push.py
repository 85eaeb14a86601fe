"""One way to the Hub for everything this package makes: models, adapters, records and pairs."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, HfApi
from huggingface_hub.errors import HTTPError

from ..evaluation.results import read_results
from .cards import EXTENDED, base_of_adapter, own_records, picture_captions, render_card
from .connection import as_push_errors, check_login, check_no_other_weights, with_owner
from .contents import operations_of
from .folders import (
    ADAPTER,
    ADAPTER_CONFIG,
    CLASSIFIER,
    EVALUATION,
    IMAGE_PROCESSOR,
    PLAIN_CLASSIFIER,
    PURIFIER,
    RESULT_FILES,
    RESULT_TEXTS,
    RESULTS,
    Kind,
    kind_of,
    read_json,
)
from .names import PUBLISHED
from .outdated import README, outdated_records
from .records import drop_outdated, merge_records, merged_folder, write_report
from .repository import PULL_REQUESTS, Repository
from .seal import without_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pushed:
    """What a push left on the Hub.

    Attributes:
        repo_id, repo_type: the repository.
        url: its page, or that of the pull request.
        revision: hash of the last commit.
        branch: the branch or `refs/pr/N` that the commit is on.
        card: `"written"`, `"merged"` (an edited README got the results into its metadata, or lost those of other
            weights there), `"kept"` (an edited README, no results) or `"none"` (an image processor has none).
    """

    repo_id: str
    repo_type: str
    url: str
    revision: str
    branch: str
    card: str


def push_to_hub(
    source: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    base_model: str | None = None,
    repo_type: str | None = None,
    image_processor: Any = None,
    token: str | None = None,
) -> Pushed:
    """Push a model, image processor, adapter, evaluation records or stored pairs, and their card as the last step.

    A purifier or adapter keeps the records on the Hub that are of its weights; those of its folder come beside them, or
    in place of those of the same protocol. Those of other weights go, and with them their tables, the pictures of the
    card, and their results in an edited README's metadata; a warning says so, and no other file is deleted. An
    adapter's weights are compared with those on the Hub, since the fingerprints in its records, of merged weights,
    differ between processors. For the same reason records pushed to an adapter replace all that are there when the
    fingerprint is another: a table never mixes the two.

    A repository holds a model or an adapter: one is not pushed beside the other, since other weights would load.

    Only listed files go (`folders.py`), without paths of this machine (`contents.py`). Whatever fails half-way can be
    repeated: files that are there already are not sent again. A README that a person edited keeps its text and only
    gets the results into its metadata (`seal.py`).

    Args:
        source: folder of a purifier, classifier, adapter, evaluation or pairs, or an object: a `MAEPModel`, an
            image classifier of transformers or of this package, a `PeftModel` around a purifier (its active adapter
            goes), a `MAEPImageProcessor`, a pipeline.
        repo_id: OWNER/NAME, or NAME under the account of the token. Made when missing.
        private: make it private; one that exists must be so. By default the account's own setting.
        revision: branch, made from `main` when missing, or `refs/pr/N`; `main` by default.
        tag: name for the last commit.
        create_pr: open a pull request with the files instead of changing `revision`.
        commit_message: of the files' commit.
        base_model: Hub id of the model this one was made from; needed for an adapter whose base is a local folder.
        repo_type: `"dataset"` gives evaluation records a repository of their own, where later ones are merged with
            them. By default they go to the repository of the purifier or adapter that they are of, merged with its
            records, tables and card.
        image_processor: goes with a model that is an object.
        token: instead of that of `hf auth login` or `HF_TOKEN`.

    Raises:
        ValueError: an argument that cannot be, before anything is sent; `LeakError`, a file that holds a token.
        PushError: no valid token, no such repository or revision, or the connection was cut.
    """
    if create_pr and (tag or (revision or "").startswith(PULL_REQUESTS)):
        raise ValueError("create_pr: a pull request has no tag, and is not opened on another; push to its revision")
    if repo_type not in (None, "model", "dataset"):
        raise ValueError(f"repo_type={repo_type!r}: must be model or dataset")
    with ExitStack() as stack:
        stack.enter_context(as_push_errors(repo_id))
        folder = stack.enter_context(_folder_of(source, image_processor))
        kind = kind_of(folder)
        api = HfApi(token=token)
        user = check_login(api)
        repo_id = with_owner(repo_id, user)
        base_model = with_owner(base_model, user) if base_model else None
        kind_type = repo_type if kind is EVALUATION and repo_type else kind.repo_type
        if repo_type not in (None, kind_type):
            raise ValueError(f"repo_type={repo_type!r}: a {kind.name} goes to a {kind_type} repository")
        push = Repository(api, repo_id, kind_type, revision, create_pr, token)
        what = kind
        cleared: list = []  # what takes figures of other weights off the Hub
        dropped: list = []  # records of an adapter's other weights that give way
        pictures: list[str] = []  # files on the Hub that the page may show
        at = push.head()
        names = push.names(at) if at else []
        if what in (PURIFIER, CLASSIFIER, PLAIN_CLASSIFIER, ADAPTER):
            check_no_other_weights(repo_id, names, adapter=what is ADAPTER)
        if kind is ADAPTER:
            base_model = _base(api, folder, base_model)
        elif kind is EVALUATION:
            staged = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="maep-push-")))
            if kind_type == "model":
                push.download_model(staged)
            elif at and (path := push.file(RESULTS, at)):
                shutil.copy(path, staged / RESULTS)
                push.read_at = at  # records that somebody adds meanwhile are not lost
                pictures = names
            kind, dropped = _with_records(staged, folder, repo_id)
            folder = staged
        there: list[dict] | None = None  # records on the Hub, which the page goes on to show
        merged: Path | None = None  # with the records of the folder too, and their tables
        own = (folder / RESULTS).is_file()
        if what in (PURIFIER, ADAPTER):
            there, cleared = push.records_of(folder, what, at)
            pictures = names if there else []
            if own:
                push.read_at = at  # records that somebody adds meanwhile are not lost
                there, dropped = _beside_own(folder, what, there or [], pictures)
                if there is not None:
                    merged = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="maep-push-")))
                    there = merged_folder(merged, folder / RESULTS, there)
        if dropped:
            cleared = push.without(dropped, "with another fingerprint of the adapter")
        # all that can be wrong is known before anything is sent
        card = None
        if kind is not IMAGE_PROCESSOR:
            card = render_card(folder, repo_id, base_model=base_model, kind=kind, results=there, pictures=pictures)
            card = without_names(card, _not_there(api, card.data, base_model))
        operations: list = operations_of(folder, kind, base_model=base_model, token=token)
        if merged is not None:
            tables = operations_of(merged, EVALUATION, token=token)
            replaced = {each.path_in_repo for each in tables}
            operations = [each for each in operations if each.path_in_repo not in replaced] + tables
        if card is not None:  # a picture that the page does not show may be anybody's
            operations = [each for each in operations if _is_shown(each.path_in_repo, card.text)]
        if what is EVALUATION:  # the model that they are merged with is there already
            operations = [each for each in operations if _is_result(each.path_in_repo)]
        new = {each.path_in_repo for each in operations}
        operations += [each for each in cleared if each.path_in_repo not in new]
        if push.going:
            logger.warning("%s: %s go, with their tables and pictures", repo_id, push.going)
        push.prepare(private)
        push.commit(operations, commit_message or f"Upload {what.name} with maep", parent=push.read_at)
        how = push.card(card, folder, merge=own or there is None) if card is not None else "none"
        if how == "kept" and any(each.path_in_repo == README for each in cleared):
            how = "merged"
        push.tag(tag)
        return Pushed(repo_id, kind_type, push.url, push.oid, push.branch, how)


def _with_records(folder: Path, records: Path, repo_id: str) -> tuple[Kind, list[Mapping[str, Any]]]:
    """Bring records into a folder, perhaps beside a model, with the tables and charts of all that are then there.

    Returns:
        What the folder then holds, and the records of an adapter's other weights that gave way.
    """
    kind = kind_of(folder) if any(folder.iterdir()) else EVALUATION
    if kind not in (PURIFIER, ADAPTER, EVALUATION):
        raise ValueError(f"{repo_id} is the repository of a {kind.name}, not of what these records measured")
    if kind is PURIFIER:
        own_records(folder, read_results(records / RESULTS))  # of other weights, they are refused
    dropped = drop_outdated(folder / RESULTS, records / RESULTS) if kind is ADAPTER else []
    for name in picture_captions(dropped) if dropped else ():
        (folder / name).unlink(missing_ok=True)
    merge_records(folder / RESULTS, records / RESULTS)
    for picture in records.glob("*.png"):
        shutil.copy(picture, folder / picture.name)
    write_report(folder)
    return kind, dropped


def _beside_own(
    folder: Path, kind: Kind, there: list[dict], names: Collection[str]
) -> tuple[list[dict] | None, list[Mapping[str, Any]]]:
    """Records on the Hub that go on beside those of a model's folder, and those of an adapter that give way to them.

    `None` in place of the former where what is in the folder says all, its tables included.
    """
    mine = read_results(folder / RESULTS)
    if kind is PURIFIER:
        own_records(folder, mine)  # of other weights, they are refused
    dropped = outdated_records(there, mine) if kind is ADAPTER else []
    left = [record for record in there if record not in dropped]
    known = {record["key"] for record in mine}
    more = any(record["key"] not in known for record in left)
    stale = any(name in names and not (folder / name).is_file() for name in RESULT_TEXTS)
    return (left if more or (left and stale) else None), dropped


def _not_there(api: HfApi, data: CardData, base_model: str | None) -> set[str]:
    """Names that a run's records gave a card as Hub ids, and that the Hub does not know: folders, such as `data/mine`.

    What the Hub does not answer for stays, and so does the base model that was given.
    """
    missing = set()
    for field, repo_type in (("base_model", "model"), ("datasets", "dataset"), ("source_datasets", "dataset")):
        value = data.get(field) or []
        for name in [value] if isinstance(value, str) else value:
            repo_id = name.removeprefix(EXTENDED)
            if repo_id in (base_model, *PUBLISHED.values()):
                continue
            with suppress(HTTPError, OSError):
                if not api.repo_exists(repo_id, repo_type=repo_type):
                    missing.add(name)
    return missing


def _is_shown(name: str, page: str) -> bool:
    return not name.endswith(".png") or f"({name})" in page


def _is_result(name: str) -> bool:
    return "/" not in name and any(Path(name).match(pattern) for pattern in RESULT_FILES)


def _base(api: HfApi, folder: Path, base_model: str | None) -> str:
    """The adapter's base on the Hub, which must be there: nobody could load the adapter without it."""
    base = base_of_adapter(read_json(folder / ADAPTER_CONFIG), base_model)
    if not api.repo_exists(base):
        raise ValueError(
            f"base_model: {base} is not on the Hub (or not visible with this token); push the base first, or name it "
            "with base_model (--base-model OWNER/NAME)"
        )
    return base


@contextmanager
def _folder_of(source: Any, image_processor: Any) -> Iterator[Path]:
    """The source's folder; an object is saved into one that goes again."""
    if isinstance(source, str | os.PathLike):
        if image_processor is not None:
            raise ValueError("image_processor: it goes with a model that is an object; a folder brings its own")
        yield Path(source)
        return
    if not callable(getattr(source, "save_pretrained", None)):
        raise ValueError(f"source: {type(source).__name__} is neither a folder nor has it save_pretrained")
    from peft import PeftModel

    from ..adaptation import save_adapter

    with tempfile.TemporaryDirectory(prefix="maep-push-") as temporary:
        if isinstance(source, PeftModel):
            save_adapter(source, temporary)
        else:
            source.save_pretrained(temporary)
        if image_processor is not None:
            image_processor.save_pretrained(temporary)
        yield Path(temporary)
