"""The steps of a push to one repository of the Hub."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.repocard import RepoCard

from ..evaluation.results import read_results
from .cards import own_records
from .connection import check_visibility
from .contents import check_for_leaks
from .folders import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_RECORD,
    MODELS,
    PAIRS_RECORD,
    PROCESSORS,
    PURIFIER,
    RESULTS,
    Kind,
)
from .outdated import README, outdated_operations, outdated_runs, same_adapter
from .replaced import (
    files_of_weights,
    hides_processor,
    in_short,
    is_pairs_record,
    replaced_shards,
    replaced_weights,
)
from .results import records_of
from .seal import renewed

PULL_REQUESTS = "refs/"


class Repository:
    """One repository of a Hub: what is read of it before a push, and the commits of the push itself."""

    def __init__(self, api: HfApi, repo_id: str, repo_type: str, revision: str | None, create_pr: bool, token: Any):
        self.api, self.repo_id, self.repo_type, self.token = api, repo_id, repo_type, token
        self.branch, self.create_pr = revision or "main", create_pr
        self.repo = {"repo_id": repo_id, "repo_type": repo_type}
        self.url, self.oid = "", ""
        self.read_at: str | None = None  # commit that what is checked, merged or taken away was read at
        self.going: list[str] = []  # what is taken from it, or stays though it may be of other weights, in words

    def download_model(self, folder: Path, at: str | None) -> None:
        """The files of the model that records are of, which has to be at the commit that the push goes on top of."""
        wanted = [*PURIFIER.files, *ADAPTER.files]
        try:
            downloaded = self.api.snapshot_download(**self.repo, revision=at or self.branch, allow_patterns=wanted)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise ValueError(
                f"{self.repo_id}: no such repository or revision ({self.branch}) for these records; push the purifier "
                "or adapter first, or give the records a repository of their own with repo_type='dataset'"
            ) from error
        for path in Path(downloaded).iterdir():
            if path.is_file():
                shutil.copy(path, folder / path.name)

    def head(self) -> str | None:
        """The commit that the push goes on top of, if there is one: a new branch starts from `main`."""
        for revision in [self.branch] if self.branch.startswith(PULL_REQUESTS) else [self.branch, "main"]:
            try:
                return self.api.repo_info(**self.repo, revision=revision).sha
            except RevisionNotFoundError:
                continue
            except RepositoryNotFoundError:
                break
        return None

    def records_of(self, folder: Path, kind: Kind, at: str | None) -> tuple[list[dict], list]:
        """Records of a commit that are of a model's weights; and, where all are of others, what takes them off it.

        A model that is pushed again without its records keeps those of an earlier push, unless its weights changed.
        """
        if at is None:
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
            known = self._has_adapter(folder, at)
        else:
            known = _are_of(folder, found)
        if known:
            return found, []
        return [], self.without(found, "of other weights")

    def without(self, records: Sequence[Mapping[str, Any]], which: str) -> list:
        """What takes outdated records off the commit that was read."""
        self.going.append(f"{len(records)} records {which} go, with their tables and pictures")
        return outdated_operations(self.names(self.read_at), self.page(self.read_at), records)

    def without_replaced(self, at: str | None, names: Collection[str], new: Collection[str]) -> list:
        """What takes weights and pairs off a commit that new ones do not write over.

        Args:
            at, names: the commit that the push goes on top of, if any, and its files.
            new: paths that are pushed.
        """
        replaced = replaced_weights(names, new)
        if (shards := replaced_shards(names, new)) and is_pairs_record(self.file(PAIRS_RECORD, at)):
            replaced += shards
        if replaced:
            self.going.append(f"deleted, since what is pushed replaces it: {in_short(replaced)}")
        return [CommitOperationDelete(name) for name in replaced]

    def without_outdated_files(
        self, folder: Path, kind: Kind, at: str | None, names: Collection[str], operations: Sequence[Any]
    ) -> list:
        """What takes the training records of other weights than those of a push off a commit, and an image processor
        that would be read in place of the one that is pushed.

        One stays where none is pushed, since it may have been pushed by itself; then a warning says so.

        Args:
            folder, kind: the source.
            at, names: the commit that the push goes on top of, if any, and its files.
            operations: the push.
        """
        if at is None or kind not in (*MODELS, ADAPTER):
            return []
        new = {each.path_in_repo for each in operations}
        going = []
        other_weights = self._changes_weights(folder, kind, at, names, operations)
        if other_weights and (going := outdated_runs(names, new, lambda name: self.file(name, at))):
            self.going.append(f"deleted, since it is of the training of other weights: {in_short(going)}")
        own, nested = PROCESSORS
        if own in new and nested in set(names) - new and hides_processor(self.file(nested, at)):
            going.append(nested)
            self.going.append(f"deleted, since it would be read in place of {own}: {nested}")
        stay = [name for name in PROCESSORS if name in names]
        if other_weights and kind is not ADAPTER and stay and not new & set(PROCESSORS):
            self.going.append(
                f"{in_short(stay)} stays, of the weights before, and goes on to normalise the images: push the image "
                "processor with the model (image_processor), or delete it there"
            )
        return [CommitOperationDelete(name) for name in going]

    def _changes_weights(
        self, folder: Path, kind: Kind, at: str, names: Collection[str], operations: Sequence[Any]
    ) -> bool:
        """Whether a push brings weights in place of others, as the files are; not whether there were none before."""
        if kind is ADAPTER:
            return ADAPTER_WEIGHTS in names and not self._has_adapter(folder, at)
        there = files_of_weights(names)
        added = {each.path_in_repo: each for each in operations if isinstance(each, CommitOperationAdd)}
        new = {name: added[name].upload_info.sha256.hex() for name in files_of_weights(added)}
        if not there or not new:
            return False
        found = self.api.get_paths_info(**self.repo, paths=there, revision=at)
        return new != {each.path: each.lfs.sha256 if each.lfs else None for each in found}

    def _has_adapter(self, folder: Path, at: str) -> bool:
        """Whether a commit has the adapter of a folder."""
        return same_adapter(folder, {n: self.file(n, at) for n in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, BASE_RECORD)})

    def names(self, revision: str | None) -> list[str]:
        """Paths of the repository's files."""
        return self.api.list_repo_files(**self.repo, revision=revision)

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
        if self.branch != "main" and not self.branch.startswith(PULL_REQUESTS):
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


def _are_of(folder: Path, records: list[dict]) -> bool:
    """Whether any of the records is of a purifier's weights, or of a bare classifier alone."""
    try:
        own_records(folder, records)
    except ValueError:
        return False
    return True
