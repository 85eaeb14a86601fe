"""One way to the Hub for everything this package makes: models, adapters, records and pairs."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.repocard import RepoCard
from huggingface_hub.utils import validate_repo_id

from ..evaluation.results import read_results
from .cards import base_of_adapter, own_records, picture_captions, render_card
from .contents import check_for_leaks, operations_of
from .folders import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_RECORD,
    EVALUATION,
    IMAGE_PROCESSOR,
    PURIFIER,
    RESULT_FILES,
    RESULTS,
    Kind,
    kind_of,
    read_json,
)
from .outdated import README, outdated_operations, same_adapter
from .records import drop_outdated, merge_records
from .results import records_of
from .seal import renewed

logger = logging.getLogger(__name__)

_REFS = "refs/"


class PushError(OSError):
    """A push that the Hub refused or that was cut off; the message says why. The same call can be made again."""


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

    A purifier or adapter pushed without its records keeps those on the Hub that are of its weights. Those of other
    weights go, and with them their tables, the pictures of the card, and their results in an edited README's metadata;
    a warning says so, and no other file is deleted. An adapter's weights are compared with those on the Hub, since the
    fingerprints in its records, of merged weights, differ between processors. For the same reason records pushed to an
    adapter replace all that are there when the fingerprint is another: a table never mixes the two.

    Only listed files go (`folders.py`), without paths of this machine (`contents.py`). Whatever fails half-way can be
    repeated: files that are there already are not sent again. A README that a person edited keeps its text and only
    gets the results into its metadata (`seal.py`).

    Args:
        source: folder of a purifier, classifier, adapter, evaluation or pairs, or an object: a `MAEPModel`, an
            image classifier of transformers or of this package, a `PeftModel` around a purifier (its active adapter
            goes), a `MAEPImageProcessor`, a pipeline.
        repo_id: OWNER/NAME, or NAME under the account of the token. Made when missing.
        private: make it private; one that exists must be so. By default the account's own setting.
        revision: branch, made when missing, or `refs/pr/N`; `main` by default.
        tag: name for the last commit.
        create_pr: open a pull request with the files instead of changing `revision`.
        commit_message: of the files' commit.
        base_model: Hub id of the model this one was made from; needed for an adapter whose base is a local folder.
        repo_type: `"dataset"` gives evaluation records a repository of their own. By default they go to the repository
            of the purifier or adapter that they are of, merged with its records, tables and card.
        image_processor: goes with a model that is an object.
        token: instead of that of `hf auth login` or `HF_TOKEN`.

    Raises:
        ValueError: an argument that cannot be, before anything is sent; `LeakError`, a file that holds a token.
        PushError: no valid token, no such repository or revision, or the connection was cut.
    """
    if create_pr and (tag or (revision or "").startswith(_REFS)):
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
        push = _Push(api, repo_id, kind_type, revision, create_pr, token)
        what = kind
        cleared: list = []  # what takes figures of other weights off the Hub
        if kind is ADAPTER:
            base_model = _base(api, folder, base_model)
        elif kind is EVALUATION:
            staged = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="maep-push-")))
            if kind_type == "model":
                push.download_model(staged)
            kind, dropped = _with_records(staged, folder, repo_id)
            folder = staged
            if dropped:
                cleared = push.without(dropped, "with another fingerprint of the adapter")
        there: list[dict] | None = None  # records on the Hub, which the page goes on to show
        if what in (PURIFIER, ADAPTER) and not (folder / RESULTS).is_file():
            there, cleared = push.records_of(folder, what)
        # all that can be wrong is known before anything is sent
        card = None
        if kind is not IMAGE_PROCESSOR:
            card = render_card(folder, repo_id, base_model=base_model, kind=kind, results=there)
        operations: list = operations_of(folder, kind, base_model=base_model, token=token)
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
        how = push.card(card, folder, merge=there is None) if card is not None else "none"
        if how == "kept" and any(each.path_in_repo == README for each in cleared):
            how = "merged"
        push.tag(tag)
        return Pushed(repo_id, kind_type, push.url, push.oid, push.branch, how)


def check_login(api: HfApi) -> str:
    """The account's name.

    Raises:
        PushError: there is no token, or it is not valid.
    """
    try:
        return api.whoami()["name"]
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status not in (None, 401, 403):
            raise
        why = "is not valid" if status else "is missing"
        said = f" ({status} {_reason(error)})" if status else ""
        raise PushError(f"the token of the Hub {why}{said}: log in with `hf auth login`, or set HF_TOKEN") from error


def with_owner(repo_id: str, user: str) -> str:
    """OWNER/NAME; a name alone is the user's.

    Raises:
        ValueError: it cannot be the name of a repository.
    """
    validate_repo_id(repo_id)
    return repo_id if "/" in repo_id else f"{user}/{repo_id}"


def check_visibility(api: HfApi, repo_id: str, private: bool | None, repo_type: str = "model") -> None:
    """Refuse a repository that exists and is public where it should be private, or the other way round.

    Raises:
        ValueError: it is.
    """
    if private is not None and api.repo_info(repo_id, repo_type=repo_type).private != private:
        is_now, wish = ("public", "private") if private else ("private", "public")
        raise ValueError(f"private={private}: {repo_id} exists and is {is_now}; make it {wish} in its settings")


class _Push:
    """The steps of a push to one repository."""

    def __init__(self, api: HfApi, repo_id: str, repo_type: str, revision: str | None, create_pr: bool, token: Any):
        self.api, self.repo_id, self.repo_type, self.token = api, repo_id, repo_type, token
        self.branch, self.create_pr = revision or "main", create_pr
        self.repo = {"repo_id": repo_id, "repo_type": repo_type}
        self.url, self.oid = "", ""
        self.read_at: str | None = None  # commit that records are merged with or taken from
        self.going = ""  # what is taken from it, in words

    def download_model(self, folder: Path) -> None:
        """The files of the model that records are of, which has to be there."""
        wanted = [*PURIFIER.files, *ADAPTER.files]
        try:
            downloaded = self.api.snapshot_download(**self.repo, revision=self.branch, allow_patterns=wanted)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise ValueError(
                f"{self.repo_id}: no such repository or revision ({self.branch}) for these records; push the purifier "
                "or adapter first, or give the records a repository of their own with repo_type='dataset'"
            ) from error
        self.read_at = Path(downloaded).name  # a stale copy, or a commit since, is then refused and not undone
        for path in Path(downloaded).iterdir():
            if path.is_file():
                shutil.copy(path, folder / path.name)

    def records_of(self, folder: Path, kind: Kind) -> tuple[list[dict], list]:
        """Records on the Hub that are of a model's weights; and, where all are of others, what takes them off it.

        A model that is pushed again without its records keeps those of an earlier push, unless its weights changed.
        """
        try:
            at = self.api.repo_info(**self.repo, revision=self.branch).sha
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return [], []
        path = self.file(RESULTS, at)
        if path is None:
            return [], []
        try:
            found = read_results(path)
            if kind is ADAPTER:
                records_of(found, None)
        except ValueError:  # not in our form: somebody's own file
            return [], []
        if kind is ADAPTER:
            known = same_adapter(folder, {n: self.file(n, at) for n in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, BASE_RECORD)})
        else:
            known = _are_of(folder, found)
        if known:
            return found, []
        self.read_at = at
        return [], self.without(found, "of other weights")

    def without(self, records: Sequence[Mapping[str, Any]], which: str) -> list:
        """What takes outdated records off the commit that was read."""
        names = self.api.list_repo_files(**self.repo, revision=self.read_at)
        self.going = f"{len(records)} records {which}"
        return outdated_operations(names, self.page(self.read_at), records)

    def file(self, name: str, revision: str | None) -> Path | None:
        """A file of the repository, or nothing where there is none."""
        try:
            return Path(self.api.hf_hub_download(**self.repo, filename=name, revision=revision))
        except RemoteEntryNotFoundError:  # and only then: one that could not be read may be a person's
            return None

    def page(self, revision: str | None) -> str | None:
        """The README with its line endings, if there is one."""
        path = self.file(README, revision)
        if path is None:
            return None
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return stream.read()

    def prepare(self, private: bool | None) -> None:
        """Make the repository and the branch where they are missing."""
        url = self.api.create_repo(**self.repo, private=private, exist_ok=True)
        self.url = str(url)
        check_visibility(self.api, self.repo_id, private, self.repo_type)
        if self.branch != "main" and not self.branch.startswith(_REFS):
            self.api.create_branch(**self.repo, branch=self.branch, exist_ok=True)

    def commit(self, operations: list, message: str, parent: str | None = None) -> None:
        """One commit on the branch, or the first on a pull request, where the next ones follow."""
        info: CommitInfo = self.api.create_commit(
            **self.repo,
            operations=operations,
            commit_message=message,
            revision=self.branch,
            create_pr=self.create_pr,
            parent_commit=parent,
        )
        self.oid = info.oid
        if self.create_pr and info.pr_revision:
            self.branch, self.create_pr, self.url = info.pr_revision, False, info.pr_url

    def card(self, fresh: RepoCard, folder: Path, merge: bool = True) -> str:
        """The README, last: it is read at the commit just made, and is refused if somebody changed it since.

        Without `merge`, an edited one is left as it is: the records are those that it was given before.
        """
        existing = self.page(self.oid)
        card, how = renewed(existing, fresh)
        if how == "merged" and not merge:
            return "kept"
        content = str(card)
        if how != "kept" and content != existing:
            if how == "written":
                check_for_leaks(README, content.encode(), folder, self.token)
            card.validate()
            operation = CommitOperationAdd(README, content.encode())
            message = "Add results to the model card" if how == "merged" else "Write the model card from the records"
            self.commit([operation], message, parent=None if self.create_pr else self.oid)
        return how

    def tag(self, tag: str | None) -> None:
        """Name the last commit; a repeated push finds its own tag."""
        if not tag:
            return
        try:
            self.api.create_tag(**self.repo, tag=tag, revision=self.oid)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            tags = {ref.name: ref.target_commit for ref in self.api.list_repo_refs(**self.repo).tags}
            if tags.get(tag) != self.oid:
                raise ValueError(
                    f"tag={tag!r} exists and marks another commit; the files are on {self.branch}, choose another tag"
                ) from error


def _with_records(folder: Path, records: Path, repo_id: str) -> tuple[Kind, list[Mapping[str, Any]]]:
    """Bring records into a folder, perhaps beside a model, with the tables and charts of all that are then there.

    Returns:
        What the folder then holds, and the records of an adapter's other weights that gave way.
    """
    from rich.console import Console

    from ..evaluation.report import report

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
    with open(os.devnull, "w") as silent:
        report(folder / RESULTS, folder, Console(file=silent))
    return kind, dropped


def _are_of(folder: Path, records: list[dict]) -> bool:
    """Whether any of the records is of a purifier's weights, or of a bare classifier alone."""
    try:
        own_records(folder, records)
    except ValueError:
        return False
    return True


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


@contextmanager
def as_push_errors(repo_id: str) -> Iterator[None]:
    """The client's errors, of the Hub and of the connection, with what to do."""
    try:
        yield
    except PushError:
        raise
    # an upload that ends midway is a RuntimeError because of the other, a download a LocalEntryNotFoundError
    except (HTTPError, RuntimeError, LocalEntryNotFoundError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error.__cause__, HTTPError):
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        what = f"the Hub answered {status}" if status else "the connection failed"
        raise PushError(
            f"{repo_id}: {what} ({_reason(error)}); what arrived stays, the same push can be repeated"
        ) from error


def _reason(error: Exception) -> str:
    message = getattr(error, "server_message", None) or str(error).strip() or type(error).__name__
    return message.splitlines()[0]
