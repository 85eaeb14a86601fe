"""The connection to the Hub: who is logged in, which repository is meant, and errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RemoteEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_RECORD, MODEL_WEIGHTS, matching, read_own_json


class PushError(OSError):
    """A push that the Hub refused or that was cut off; the message says why. The same call can be made again."""


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


def check_no_other_weights(repo_id: str, names: Iterable[str], adapter: bool) -> None:
    """Refuse a model beside an adapter, which is loaded in its place, and an adapter beside a model that would stay.

    Args:
        repo_id: the repository.
        names: paths of its files, on the branch that is pushed to.
        adapter: whether an adapter is pushed, or else a model.

    Raises:
        ValueError: the other kind is there; nothing is deleted, since somebody may still need it.
    """
    here, there = ("an adapter", "a whole model") if adapter else ("a whole model", "an adapter")
    patterns = MODEL_WEIGHTS if adapter else (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    theirs = (*patterns, "config.json") if adapter else (*patterns, BASE_RECORD)
    names = sorted(names)
    if matching(names, patterns):
        found = ", ".join(matching(names, theirs))
        raise ValueError(
            f"repo_id: {repo_id} holds {there}, beside which {here} cannot lie, for the wrong weights would load: push "
            f"to another repo_id, or delete {found} there first"
        )


def check_no_other_model(
    api: HfApi, repo_id: str, names: Iterable[str], model_type: str | None, revision: str | None = None
) -> None:
    """Refuse a whole model over one of another type, whose records and image processor would stay as if they were its.

    Args:
        api, repo_id: the repository.
        names: paths of its files at the revision.
        model_type: of the model that is pushed; `None` is of none that is known, and passes.
        revision: of its `config.json`; `main` by default.

    Raises:
        ValueError: another type is there; nothing is deleted, since somebody may still need it.
    """
    names = set(names)
    if model_type is None or "config.json" not in names or not matching(names, MODEL_WEIGHTS):
        return
    there = read_own_json(Path(api.hf_hub_download(repo_id, "config.json", revision=revision))).get("model_type")
    if there not in (None, model_type):
        raise ValueError(
            f"repo_id: {repo_id} holds a model of type {there!r}, of which files and results would stay beside this "
            f"{model_type!r}: push to another repo_id, or delete its files there first"
        )


def check_is_purifier(api: HfApi, repo_id: str, argument: str) -> None:
    """Refuse anything else as the base of an adapter; the repository is there.

    Raises:
        ValueError: it is no purifier's; the message begins with `argument`.
    """
    try:
        path = Path(api.hf_hub_download(repo_id, "config.json"))
    except RemoteEntryNotFoundError:  # such as an adapter's
        path = None
    found = read_own_json(path).get("model_type")
    if found != "maep":
        raise ValueError(
            f"{argument}: {repo_id} is no purifier (model_type {found!r} in its config.json, not 'maep'), which an "
            "adapter needs as its base; name the purifier that it was trained on"
        )
