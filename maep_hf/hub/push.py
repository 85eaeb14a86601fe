"""One way to the Hub for everything this package makes: models, adapters, records and pairs."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, HfApi
from huggingface_hub.errors import HTTPError
from huggingface_hub.repocard import RepoCard

from .cards import EXTENDED, base_of_adapter, render_card
from .connection import (
    as_push_errors,
    check_is_purifier,
    check_login,
    check_no_other_model,
    check_no_other_weights,
    with_owner,
)
from .contents import operations_of
from .folders import (
    ADAPTER,
    ADAPTER_CONFIG,
    BASE_RECORD,
    EVALUATION,
    IMAGE_PROCESSOR,
    MODEL_WEIGHTS,
    MODELS,
    RESULT_FILES,
    Kind,
    check_weights,
    kind_of,
    matching,
    read_json,
)
from .names import PUBLISHED
from .outdated import README
from .page import Page, page_of
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
    card, and their results in an edited README's metadata. An adapter's weights are compared with those on the Hub,
    since the fingerprints in its records, of merged weights, differ between processors. For the same reason records
    pushed to an adapter replace all that are there when the fingerprint is another: a table never mixes the two.

    A model's weights replace all that are there, in one file or in several: transformers loads the single file first,
    however old. Where weights change, the training records of those before (`run.json`, `NAME_run.json` and their
    metrics) go, unless the push brings its own; an image processor that a classifier's push does not bring stays, and a
    warning says so. Pairs replace older pairs of the same split, whose files have other names where they were more or
    fewer; without a `make_pairs.json` of ours beside them they are a person's and stay (`replaced.py`).

    All of this goes in the commit that brings the new files. It is refused if somebody committed since the repository
    was read, but for an image processor's. A warning says what goes; no other file is deleted.

    A repository holds a model or an adapter: one is not pushed beside the other, since other weights would load, nor a
    model over one of another type. Nor does either go without its weights, in safetensors and without a variant; but a
    model's configuration goes beside weights that are there. An adapter's base has to be a purifier on the Hub, with
    the weights that are recorded in the adapter's folder.

    Only listed files go (`folders.py`), without paths of this machine (`contents.py`). Whatever fails half-way can be
    repeated: files that are there already are not sent again. A README that a person edited keeps its text and only
    gets the results into its metadata (`seal.py`).

    Args:
        source: folder of a purifier, classifier, adapter, evaluation or pairs, or an object: a `MAEPModel`, an
            image classifier of transformers or of this package, a `PeftModel` around a purifier (its active adapter
            goes), a `MAEPImageProcessor`, a pipeline around a model or `PeftModel`.
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
        at = push.head()
        names = push.names(at) if at else []
        if kind is not IMAGE_PROCESSOR:  # it has no page, and stands beside anything
            push.read_at = at  # a commit since is neither checked nor merged, so that it stops the push
        check_weights(folder, kind, names)
        if kind in (*MODELS, ADAPTER):
            check_no_other_weights(repo_id, names, adapter=kind is ADAPTER)
        if kind in MODELS:
            check_no_other_model(api, repo_id, names, read_json(folder / "config.json").get("model_type"), at)
        if kind is ADAPTER:
            base_model = _base(api, folder, base_model)
        page = page_of(push, folder, kind, at, names, stack)
        # all that can be wrong is known before anything is sent
        card = None
        if page.kind is not IMAGE_PROCESSOR:
            shown = {"kind": page.kind, "results": page.records, "pictures": page.pictures}
            card = render_card(page.folder, repo_id, base_model=base_model, **shown)
            card = without_names(card, _not_there(api, card.data, base_model))
        operations = _operations(page, kind, card, base_model, token)
        outdated = push.without_outdated_files(folder, kind, at, names, operations)
        operations += push.without_replaced(at, names, {each.path_in_repo for each in operations}) + outdated
        for what in push.going:
            logger.warning("%s: %s", repo_id, what)
        push.prepare(private)
        push.commit(operations, commit_message or f"Upload {kind.name} with maep", parent=push.read_at)
        merge = page.has_own_records or page.records is None
        how = push.card(card, page.folder, merge) if card is not None else "none"
        if how == "kept" and any(each.path_in_repo == README for each in page.cleared):
            how = "merged"
        push.tag(tag)
        return Pushed(repo_id, kind_type, push.url, push.oid, push.branch, how)


def _operations(page: Page, kind: Kind, card: RepoCard | None, base_model: str | None, token: Any) -> list:
    """What the first commit does: the page's files, and what it takes off the repository."""
    operations: list = operations_of(page.folder, page.kind, base_model=base_model, token=token)
    if page.merged is not None:
        tables = operations_of(page.merged, EVALUATION, token=token)
        replaced = {each.path_in_repo for each in tables}
        operations = [each for each in operations if each.path_in_repo not in replaced] + tables
    if card is not None:  # a picture that the page does not show may be anybody's
        operations = [each for each in operations if _is_shown(each.path_in_repo, card.text)]
    if kind is EVALUATION:  # the model that they are merged with is there already
        operations = [each for each in operations if _is_result(each.path_in_repo)]
    new = {each.path_in_repo for each in operations}
    return operations + [each for each in page.cleared if each.path_in_repo not in new]


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
    """The adapter's base on the Hub: a purifier, which must be there and have the weights that the adapter was trained
    on, for nobody could load the adapter without it."""
    adapter = read_json(folder / ADAPTER_CONFIG)
    base = base_of_adapter(adapter, base_model)
    if not api.repo_exists(base):
        raise ValueError(
            f"base_model: {base} is not on the Hub (or not visible with this token); push the base first, or name it "
            "with base_model (--base-model OWNER/NAME)"
        )
    check_is_purifier(api, base, "base_model")
    pinned = adapter.get("revision") if adapter.get("base_model_name_or_path") == base else None
    _check_base_weights(api, folder, base, pinned)
    return base


def _check_base_weights(api: HfApi, folder: Path, base: str, revision: str | None) -> None:
    """Compare a base on the Hub with what the adapter's folder says of its own, as `load_adapter` does."""
    from ..adaptation import base_dtype, describe_base
    from ..checkpoints import is_other_base, load_purifier

    dtype = base_dtype(os.fspath(folder.resolve()))
    if dtype is None:  # PEFT alone saved it, or the base was in several
        return
    record = read_json(folder / BASE_RECORD)
    wanted = ["config.json", *MODEL_WEIGHTS]
    there = Path(api.snapshot_download(base, revision=revision, allow_patterns=wanted))
    if not matching((path.name for path in there.iterdir()), MODEL_WEIGHTS):  # in another form
        return
    found = describe_base(load_purifier(there, dtype=dtype))
    if is_other_base(found, record):
        raise ValueError(
            f"base_model: {base} has other weights than those that the adapter was trained on; push that base to a "
            f"repository of its own and name it with base_model (--base-model OWNER/NAME), or take {BASE_RECORD} out "
            "of the adapter's folder if you mean it"
        )


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
    from transformers import Pipeline

    if isinstance(source, Pipeline):  # its own way of saving knows nothing of adapters
        image_processor = image_processor or source.image_processor
        source = source.model
    with tempfile.TemporaryDirectory(prefix="maep-push-") as temporary:
        folder = Path(temporary)
        _save(source, folder)
        if image_processor is not None:
            kind_of(folder)  # of the model: without one, the image processor would go alone
            image_processor.save_pretrained(folder)
        yield folder


def _save(source: Any, folder: Path) -> None:
    from peft import PeftConfig, PeftModel

    from ..adaptation import changes_base, describe_base, save_adapter, write_base_record

    if isinstance(source, PeftModel):
        save_adapter(source, folder)
        return
    source.save_pretrained(folder)
    if (folder / ADAPTER_CONFIG).is_file():  # of a purifier with adapters of its own, without a record of the base
        if not changes_base(PeftConfig.from_pretrained(folder)):
            write_base_record(folder, describe_base(source))
