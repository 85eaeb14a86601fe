"""Pushes while a run trains: in the background, never in its way, and never the reason that it ends."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..adaptation import ADAPTER_FOLDER
from ..paths import short
from .connection import (
    PushError,
    as_push_errors,
    check_is_purifier,
    check_login,
    check_no_other_model,
    check_no_other_weights,
    check_visibility,
    with_owner,
)
from .folders import ADAPTER, Kind, files_of, kind_of, kind_of_model
from .names import hub_id
from .push import push_to_hub

logger = logging.getLogger(__name__)

WAITS = (0, 5, 30)  # seconds before each try at the end of a run
_SNAPSHOT = ".push-"


class BackgroundPush:
    """Pushes a run's folder: its adapter where it trains one, else its model, with the card.

    Args:
        folder: of the run.
        repo_id: OWNER/NAME, or NAME under the token's account; by default the folder's name.
        private: for a repository that is made now.
        base_model: Hub id of an adapter's base, where it was loaded from a folder.
        trains_adapter: whether the run leaves an adapter in `FOLDER/adapter`.
        base_path: what that adapter's base was loaded from.
        model: what the run trains, where that is no adapter.

    Raises:
        PushError: no valid token, the Hub cannot be reached, or the account may not make the repository. All of this
            and what follows is raised here, before anything is trained.
        ValueError: a model that cannot be pushed, a name that no repository can have, one that exists and is public
            though `private` is asked for, an adapter whose base is on no Hub or no purifier, or a repository that holds
            an adapter where a model is trained, or the other way round, or a model of another type.
    """

    def __init__(
        self,
        folder: Path,
        repo_id: str | None = None,
        *,
        private: bool | None = None,
        base_model: str | None = None,
        trains_adapter: bool = False,
        base_path: str | None = None,
        model: Any = None,
    ):
        if model is not None and not trains_adapter:
            kind_of_model(model)
        for name in ("httpx", "httpx2"):  # a line for every request
            logging.getLogger(name).setLevel(logging.WARNING)
        self.api = HfApi()
        self.folder, self.private = folder, private
        with as_push_errors(repo_id or folder.resolve().name):
            self._prepare(repo_id, base_model, trains_adapter, base_path, model)
        self.source = folder / ADAPTER_FOLDER if trains_adapter else folder
        for stale in folder.glob(f"{_SNAPSHOT}*"):  # of a run that was killed
            shutil.rmtree(stale, ignore_errors=True)
        self.running: Future | None = None

    def _prepare(
        self, repo_id: str | None, base_model: str | None, trains_adapter: bool, base_path: str | None, model: Any
    ) -> None:
        folder, private = self.folder, self.private
        user = check_login(self.api)
        self.repo_id = with_owner(repo_id or folder.resolve().name, user)
        self.base_model = with_owner(base_model, user) if base_model else None
        if trains_adapter:
            base = self.base_model or hub_id(base_path)
            if base is None:
                raise ValueError(
                    f"hub_base_model: the adapter's base, {short(base_path or 'unnamed')!r}, is a local model; push it "
                    "and give its Hub id with --hub_base_model"
                )
            if not self.api.repo_exists(base):
                raise ValueError(f"hub_base_model: {base} is not on the Hub; push the base before an adapter of it")
            check_is_purifier(self.api, base, "hub_base_model")
        try:
            self.api.create_repo(self.repo_id, private=private, exist_ok=True)
        except OSError as error:
            raise PushError(f"hub_model_id: {self.repo_id} cannot be made or written ({error})") from error
        check_visibility(self.api, self.repo_id, private)
        names = self.api.list_repo_files(self.repo_id)
        check_no_other_weights(self.repo_id, names, adapter=trains_adapter)
        if not trains_adapter:
            model_type = getattr(getattr(model, "config", None), "model_type", None)
            check_no_other_model(self.api, self.repo_id, names, model_type)

    def start(self, step: int) -> None:
        """Push the folder as it is now, unless the push before is still at it: then the next one takes this along."""
        if self.running is not None and not self.running.done():
            return
        self._warn_of_failure()
        try:
            snapshot = self._snapshot()
        except Exception as error:  # such as a full disk
            logger.warning("push to %s failed, to be repeated with the next: %s", self.repo_id, error)
            return
        self.running = self.api.run_as_future(self._push, snapshot, f"Training, step {step}")

    def finish(self, step: int) -> bool:
        """Wait for the background, then push what the run ends with, in several tries.

        Returns:
            Whether it is on the Hub; if not, a warning said so, and how to push by hand.
        """
        if self.running is not None:
            self.running.exception()  # waits
            self._warn_of_failure()
        for number, seconds in enumerate(WAITS, 1):
            time.sleep(seconds)
            try:
                pushed = self._push(self._snapshot(), f"End of training, step {step}")
            except Exception as error:
                logger.warning("push to %s failed, try %d of %d: %s", self.repo_id, number, len(WAITS), error)
            else:
                logger.info("pushed to %s", pushed.url)
                return True
        logger.warning(
            "the run is whole in %s, but not on the Hub; push it with: maep push %s %s",
            self.folder, self.source, self.repo_id,
        )  # fmt: skip
        return False

    def _warn_of_failure(self) -> None:
        if self.running is not None and self.running.exception() is not None:
            logger.warning(
                "push to %s failed, to be repeated with the next: %s", self.repo_id, self.running.exception()
            )
        self.running = None

    def _snapshot(self) -> Path:
        """The files as they are now: training replaces them while they are sent."""
        kind = kind_of(self.source)
        snapshot = Path(tempfile.mkdtemp(prefix=_SNAPSHOT, dir=self.folder))
        try:
            self._fill(snapshot, kind)
        except BaseException:  # half of one would only take the space that was missing
            shutil.rmtree(snapshot, ignore_errors=True)
            raise
        return snapshot

    def _fill(self, snapshot: Path, kind: Kind) -> None:
        for path in files_of(self.source, kind):
            target = snapshot / path.relative_to(self.source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".safetensors":  # is never written in place, so a link keeps its content
                try:
                    os.link(path, target)
                    continue
                except OSError:  # a file system without links
                    pass
            shutil.copy(path, target)
        if kind is ADAPTER and (self.folder / "run.json").is_file():
            shutil.copy(self.folder / "run.json", snapshot / "run.json")

    def _push(self, snapshot: Path, message: str) -> Any:
        try:
            return push_to_hub(
                snapshot, self.repo_id, private=self.private, base_model=self.base_model, commit_message=message
            )
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)
