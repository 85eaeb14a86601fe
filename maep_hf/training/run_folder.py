"""A run's folder: what is needed to repeat it, its metrics, and its checkpoints, all written atomically."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from safetensors import SafetensorError
from torch import nn

from ..adaptation import ADAPTER_FOLDER
from ..checkpoints import expanded
from ..locks import locked
from ..preprocessing import preprocessing_text
from ..records import describe_environment, write_json
from .arguments import ADDED_LATER, FREE_ARGUMENTS, KEPT_ARGUMENTS, SOURCE_ARGUMENTS
from .checkpoint_files import CHECKPOINT_PREFIX, damage, numbered, seal, step_of, sync_folder, unreadable

logger = logging.getLogger(__name__)

LOCK = ".lock"  # hidden, and there only while a run is going on or where one was killed
_PREPROCESSING = "preprocessing"
# What Accelerate, torch and safetensors raise over a file that is not what it was.
_LOAD_ERRORS = (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError)


class RunFolderError(RuntimeError):
    """The folder cannot be used for this run; the message says what to do."""


class RunFolder:
    """Layout: `run.json`, `metrics.jsonl`, `previews/`, `checkpoints/step-N/`, and the model's own files on top."""

    def __init__(self, path: str | Path):
        self.path = Path(expanded(path))
        self.record = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.previews = self.path / "previews"
        self.checkpoints = self.path / "checkpoints"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep any other run out of the folder meanwhile, in this process or another; the lock goes with the process.

        What this makes of the folder is gone afterwards, where nothing else was put there. Where the file system has no
        locks, a warning says so.

        Raises:
            RunFolderError: another run holds the folder, or it cannot be made.
        """
        try:
            made = [path for path in (self.path, *self.path.absolute().parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        given = f"output_dir={str(self.path)!r}"
        unguarded = f"{given}: nothing keeps a second run out of this folder, for it takes no lock"
        try:
            with ExitStack() as stack:
                try:
                    stack.enter_context(locked(self.path / LOCK, unguarded, "start none", timeout=0))
                except Timeout as error:
                    raise RunFolderError(
                        f"{given}: a run is still going on in this folder; wait for it, stop it, or give another folder"
                    ) from error
                yield
        finally:
            with suppress(OSError):  # it holds a run now
                for path in made:
                    path.rmdir()

    def prepare(
        self,
        arguments: dict[str, Any],
        data: dict[str, Any],
        checkpoint_bytes: int,
        kept: int,
        overwrite: bool,
        num_processes: int = 1,
        precision: str | None = None,
        start: Mapping[str, str] | None = None,
        checked: Callable[[], None] | None = None,
    ) -> None:
        """Check that the run can be written here and is the same run as the one already here, and make the folder.

        To be called while it is `held`.

        Args:
            arguments: the run's arguments by group, as recorded in `run.json`.
            data: the data's description, likewise.
            checkpoint_bytes: estimated size of one checkpoint.
            kept: checkpoints that exist side by side.
            overwrite: remove a run that is already here; a folder without a record holds none.
            num_processes: processes of the run, where their number is a part of what is computed.
            precision: what `mixed_precision` means on this machine, likewise.
            start: fingerprints of the weights that the run starts from and is trained against, by the argument that
                names them, and what surrogates do to pixels (`preprocessing_of`); a record of an older version lacks
                them.
            checked: called between the checks and the first change; if it raises, everything is as it was.

        Raises:
            RunFolderError: not writable, too little disk, another run's folder, or one of other files without a run.
        """
        try:
            there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
            with tempfile.TemporaryFile(dir=there) as probe:
                probe.write(b"0" * 4096)
        except OSError as error:
            raise self._unwritable(error) from error
        free, needed = shutil.disk_usage(there).free, checkpoint_bytes * (kept + 2)
        if free < needed:
            raise RunFolderError(
                f"output_dir={str(self.path)!r}: {free / 2**20:.0f} MiB free, but {kept} checkpoints and the model "
                f"need about {needed / 2**20:.0f} MiB. Free some space, give another folder, or lower save_total_limit."
            )
        if kept or overwrite:  # without checkpoints these are no run's: `make_pairs` has a check of its own
            self._refuse_other_content()
        if self.record.is_file() and not overwrite:
            self._refuse_other_run(arguments, data, num_processes, precision, start or {})
        if overwrite:
            self.refuse_overwriting(arguments, [*self._content(), *self._results()])
        if checked is not None:
            checked()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        if overwrite:
            self._remove_run()
        for stale in self.checkpoints.glob("*.tmp"):  # of a run that was killed while it wrote them
            shutil.rmtree(stale, ignore_errors=True)

    def _unwritable(self, error: OSError) -> RunFolderError:
        return RunFolderError(f"output_dir={str(self.path)!r} cannot be written: {error}. Give another folder.")

    def _content(self) -> list[Path]:
        """What is here of all that a run writes or removes, but for its record and what trackers log."""
        names = ("checkpoints", "previews", ADAPTER_FOLDER, "export.tmp", "removed.tmp", "metrics.jsonl", "config.json",
                 "preprocessor_config.json")  # fmt: skip
        found = [path for path in map(self.path.joinpath, names) if path.exists()]
        return found + sorted(self.path.glob("*.safetensors"))

    def _results(self) -> list[Path]:
        """An evaluation of the run's weights beside them, which a push would refuse beside others; without a run it is
        an evaluation's own folder."""
        from ..evaluation.results import CHARTS
        from ..hub.folders import RESULT_TEXTS

        names = (*RESULT_TEXTS, *CHARTS) if self.record.is_file() else ()
        return [path for path in map(self.path.joinpath, names) if path.is_file()]

    def _refuse_other_content(self) -> None:
        """Neither a run nor an overwrite may take away files that no run wrote."""
        if not self.record.is_file() and (found := self._content()):
            raise RunFolderError(
                f"output_dir={str(self.path)!r} holds files that a run would replace "
                f"({', '.join(path.name for path in found[:3])}) and no {self.record.name}: give a new folder"
            )

    def refuse_overwriting(self, arguments: Mapping[str, Mapping[str, Any]], doomed: Collection[Path]) -> None:
        """Neither may an overwrite take away what the run is made from.

        Args:
            arguments: of the run, by group.
            doomed: files and folders of this one that are to be removed.

        Raises:
            RunFolderError: an argument names this folder, or something in it that is to be removed.
        """
        own, lost = self.path.resolve(), [path.resolve() for path in doomed]
        for name, value in ((name, value) for group in arguments.values() for name, value in group.items()):
            for source in (value if isinstance(value, list) else [value]) if name in SOURCE_ARGUMENTS else ():
                path = Path(source or "/").expanduser().resolve()
                if lost and (path == own or any(path.is_relative_to(each) for each in lost)):
                    raise RunFolderError(
                        f"output_dir={str(self.path)!r}: overwrite_output_dir would remove what {name}={source!r} is "
                        "to be read from; give another output_dir"
                    )

    def _remove_run(self) -> None:
        # The record goes last: whatever an interruption leaves is still known as the old run's.
        # The weights go too: until the first save the folder would hold the old ones under the new record.
        doomed = self.path / "removed.tmp"
        for stale in [*self._content(), *self._results()]:
            if stale == doomed:
                continue
            if stale.is_dir():
                shutil.rmtree(doomed, ignore_errors=True)
                os.replace(stale, doomed)
            else:
                stale.unlink()
        shutil.rmtree(doomed, ignore_errors=True)
        self.record.unlink(missing_ok=True)

    def _refuse_other_run(
        self,
        arguments: dict[str, Any],
        data: dict[str, Any],
        num_processes: int,
        precision: str | None,
        start: Mapping[str, str],
    ) -> None:
        try:
            record = json.loads(self.record.read_text())
            stored = record["arguments"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(
                f"{self.record} is not the record of a run ({type(error).__name__}: {error}). "
                "Give another folder, or start over with --overwrite_output_dir."
            ) from error
        changes = _changes(stored, _as_stored(arguments))
        different = [
            f"{group}.{name}: {there!r} there, {now!r} now"
            for group, name, there, now in changes
            if name not in FREE_ARGUMENTS
        ]
        if record.get("data", data) != _as_stored(data):
            different.append(f"the data: {record['data']} there, {data} now")
        different += _other_start(record.get("start", {}), start, {name for _, name, _, _ in changes})
        before = record.get("num_processes", num_processes)
        if before != num_processes:
            different.append(f"num_processes: {before} there, {num_processes} now")
        before = record.get("mixed_precision", precision)
        if before != precision and not any(text.startswith("loop.mixed_precision") for text in different):
            different.append(f"mixed_precision on this machine: {before} there, {precision} now")
        if different:
            raise RunFolderError(
                f"output_dir={str(self.path)!r} holds a run with other arguments ({'; '.join(different)}). "
                "Give another folder, or start over with --overwrite_output_dir."
            )

    def take_over(self, arguments: dict[str, Any], start: Mapping[str, str] | None = None) -> bool:
        """Record what a later start of the run changed; whether it changed which of its weights are kept.

        Where arguments changed, command, versions and revision become the later start's as well; those that the run
        began with stay under `first_start`.
        """
        record = json.loads(self.record.read_text())
        before, record["arguments"] = record["arguments"], _as_stored(arguments)
        if before != record["arguments"]:
            now = describe_environment()
            record.setdefault("first_start", {name: record[name] for name in now if name in record})
            if start and "start" in record:  # a share of other weights, perhaps; of what was not known nothing is told
                changed = {name for _, name, _, _ in _changes(before, record["arguments"])}
                known = {name: start[name] for name in start if name in record["start"] or name in changed}
                record["start"] = known
            write_json(self.record, record | now)
        return any(name in KEPT_ARGUMENTS for _, name, _, _ in _changes(before, record["arguments"]))

    def truncate_metrics(self, step: int) -> None:
        """Drop the records that an interrupted run wrote after its last checkpoint."""
        if not self.metrics.is_file():
            return
        kept = []
        for line in self.metrics.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:  # the line that was being written when the run was killed
                continue
        temporary = self.metrics.with_name("metrics.jsonl.tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, self.metrics)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to `metrics.jsonl`."""
        with self.writing(self.metrics.name), self.metrics.open("a") as stream:
            stream.write(json.dumps(record) + "\n")

    def export(self, save: Callable[[Path], None]) -> None:
        """Let `save` write the model beside its place, then move every file there whole."""
        temporary = self.path / "export.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save(temporary)
        for entry in sorted(temporary.iterdir()):
            target = self.path / entry.name
            if entry.is_dir():
                shutil.rmtree(target, ignore_errors=True)
            os.replace(entry, target)
        temporary.rmdir()

    def last_checkpoint(self, num_processes: int = 1) -> Path | None:
        """The newest whole checkpoint, or `None` where there is none at all; newer ones that are damaged are warned of.

        Args:
            num_processes: processes of the run, each with random states of its own.

        Raises:
            RunFolderError: there are checkpoints, but all are damaged; or there are none, but a model that they made.
        """
        damaged = []
        for path in reversed(numbered(self.checkpoints)):
            wrong = damage(path, num_processes)
            if wrong is None:
                if damaged:
                    logger.warning("going on from %s, for a newer checkpoint is damaged: %s", path, "; ".join(damaged))
                return path
            damaged.append(f"{path} ({wrong})")
        if damaged:  # to start over by itself would take away the model that is here
            raise RunFolderError(
                f"output_dir={str(self.path)!r}: no checkpoint is whole: {'; '.join(damaged)}. Bring back the files, "
                "give another folder, or start over with --overwrite_output_dir."
            )
        exported = [*sorted(self.path.glob("*.safetensors")), self.path / ADAPTER_FOLDER]
        if found := [path.name for path in exported if path.exists()]:  # they are written after a checkpoint
            raise RunFolderError(
                f"output_dir={str(self.path)!r} holds what a run made ({', '.join(found[:3])}), and no checkpoint to "
                "go on from: give another output_dir to keep it, or start over with --overwrite_output_dir."
            )
        return None

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turn what a full or failing disk raises into a [`RunFolderError`] that says what is safe."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own
            last = next(iter(self._whole_checkpoints()[::-1]), None)
            raise RunFolderError(
                f"output_dir={str(self.path)!r}: {what} could not be written: {error}. "
                + (f"The last whole checkpoint is {last.name}; " if last else "There is no checkpoint yet; ")
                + "with space on the disk, the same command goes on from there."
            ) from error

    @contextmanager
    def loading(self, checkpoint: Path) -> Iterator[None]:
        """Turn what loading a checkpoint raises into a [`RunFolderError`] that says whether it is damaged after all."""
        try:
            yield
        except torch.OutOfMemoryError:  # which is no fault of the checkpoint's
            raise
        except _LOAD_ERRORS as raised:
            error: Exception = raised
            try:
                wrong = unreadable(checkpoint)
            except OSError as unread:
                wrong, error = None, unread
            if wrong is not None:
                raise RunFolderError(
                    f"the checkpoint {checkpoint} cannot be loaded ({wrong}). Move this folder away and start the same "
                    "command again: it goes on from the checkpoint before; without one, give another output_dir, or "
                    "start over with --overwrite_output_dir."
                ) from error
            raise RunFolderError(
                f"the checkpoint {checkpoint} cannot be loaded ({type(error).__name__}: {error}). No file of it was "
                "found damaged: mend what is said here (a model of other shapes, memory, a permission) and start the "
                "same command again."
            ) from error

    def save_checkpoint(
        self, step: int, save: Callable[[Path], None], wait: Callable[[], None], main: bool, limit: int
    ) -> None:
        """Write a checkpoint beside the others and give it its name only when it is whole, then rotate.

        Raises:
            RunFolderError: it could not be written, or not in the form that it is looked for when the run goes on; the
                checkpoints before it are whole.
        """
        target = self.checkpoints / f"{CHECKPOINT_PREFIX}{step:07d}"
        temporary = target.with_name(target.name + ".tmp")
        try:
            with self.writing(f"the checkpoint of step {step}"):
                if main:
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir(parents=True)
                wait()
                save(temporary)
                wait()
                if main:
                    seal(temporary)
            if main and (wrong := damage(temporary)):
                raise RunFolderError(
                    f"output_dir={str(self.path)!r}: no run could go on from the checkpoint of step {step} ({wrong}). "
                    "The sharded state of FSDP, DeepSpeed and such is not supported: start without them, on one device "
                    "or with `accelerate launch --multi_gpu`."
                )
        except RunFolderError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if main:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            sync_folder(self.checkpoints)
            self._rotate(step, limit)
        wait()

    def _rotate(self, step: int, limit: int) -> None:
        """Keep the newest whole checkpoints up to this step: those after it were damaged, or it would not be saved.

        The one of this step stays whatever is found of it, for nothing newer is there.
        """
        whole = [path for path in self._whole_checkpoints() if step_of(path) <= step][-limit:]
        for stale in numbered(self.checkpoints):
            if stale not in whole and step_of(stale) != step:
                shutil.rmtree(stale, ignore_errors=True)

    def _whole_checkpoints(self) -> list[Path]:
        return [path for path in numbered(self.checkpoints) if damage(path) is None]


def preprocessing_of(names: Iterable[str], surrogates: Iterable[nn.Module]) -> dict[str, str]:
    """What each surrogate does to its pixels first, for `run.json`: its weights' fingerprint does not tell.

    Args:
        names: what the surrogates are called, in their order.
        surrogates: one that says nothing has no entry.
    """
    told = ((name, preprocessing_text(surrogate)) for name, surrogate in zip(names, surrogates, strict=True))
    return {f"{_PREPROCESSING}[{name}]": text for name, text in told if text is not None}


def _as_stored(value: Any) -> Any:
    """As it comes back from a record."""
    return json.loads(json.dumps(value, default=str))


def _other_start(before: Mapping[str, str], now: Mapping[str, str], changed: Collection[str]) -> list[str]:
    """Arguments of the same value whose weights, or preprocessing, are others than a run started from, in words.

    The checkpoint would bring back the old ones: an adapter would be saved as one of the new base, and a share of the
    new ones be mixed into what was trained from the old.
    """
    different = []
    for name, found in now.items():
        if name not in changed and before.get(name, found) != found:
            if name.startswith(_PREPROCESSING):
                what, there = "it is not the one that the run started with", before[name]
            else:
                what, there = "its weights are not those that the run started from", f"fingerprint {before[name]}"
            different.append(f"{name}: {what} ({there} there, {found} now)")
    return different


def _changes(stored: dict[str, Any], current: dict[str, Any]) -> list[tuple[str, str, Any, Any]]:
    """Where the arguments of a later start differ from the stored ones: (group, name, there, now)."""
    return [
        (group, name, there, now)
        for group, values in current.items()
        for name, now in values.items()
        if (there := stored.get(group, {}).get(name, ADDED_LATER.get(name))) != now
    ]
