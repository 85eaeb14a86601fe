"""Checkpoints that a power cut or a crash damaged: the one before is taken, and what was done is said."""

import errno
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import filelock
import pytest
import torch
from conftest import image_rows
from made_up_records import record
from rich.console import Console
from running import assert_same_run, checkpoints, run, words
from safetensors.torch import save_file

from maep_hf.evaluation.report import report
from maep_hf.training import RunFolder, RunFolderError
from maep_hf.training import checkpoint_files as checkpoint_files_module
from maep_hf.training import run_folder as run_folder_module
from maep_hf.training.checkpoint_files import MANIFEST, damage, numbered
from maep_hf.training.run_folder import LOCK

FILES = ("model.safetensors", "optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl")


def write_files(folder, ranks: int = 1) -> None:
    """What Accelerate leaves of a state, in small."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.rand(9)}, folder / FILES[0])
    for name in (*FILES[1:], *(f"random_states_{rank}.pkl" for rank in range(1, ranks))):
        torch.save(torch.rand(9), folder / name)


@pytest.fixture
def folder(tmp_path):
    """A run folder with whole checkpoints of steps 2, 4 and 6."""
    found = RunFolder(tmp_path / "run")
    for step in (2, 4, 6):
        found.save_checkpoint(step, write_files, lambda: None, True, 3)
    return found


def test_a_run_that_is_going_on_keeps_others_out_and_a_killed_one_does_not(tmp_path):
    held = RunFolder(tmp_path / "a" / "run")
    with (
        held.held(),
        pytest.raises(RunFolderError, match="output_dir='.*run': a run is still going on.*another folder"),
    ):
        with RunFolder(held.path).held():
            pytest.fail("two runs in one folder")
    assert not (tmp_path / "a").exists()  # as it was before
    (tmp_path / "a" / "run").mkdir(parents=True)
    code = "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
    code += "print(1, flush=True); time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", code, held.path / LOCK], stdout=subprocess.PIPE) as other:
        try:
            other.stdout.readline()
            with pytest.raises(RunFolderError, match="a run is still going on"), held.held():
                pytest.fail("two runs in one folder")
        finally:
            other.kill()
    assert (held.path / LOCK).exists()
    with held.held():
        held.record.write_text("{}")
    assert [path.name for path in held.path.iterdir()] == ["run.json"]


@pytest.mark.skipif(filelock.__version__ < "4.1", reason="its release itself takes away what has the name")
def test_the_lock_of_a_later_folder_of_the_name_is_not_taken_away(tmp_path):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    with first.held():
        first.path.rename(tmp_path / "moved")
        later = second.held()
        later.__enter__()
    assert (second.path / LOCK).exists()
    with pytest.raises(RunFolderError, match="a run is still going on"), first.held():
        pytest.fail("two runs in one folder")
    later.__exit__(None, None, None)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EACCES])
def test_where_no_folder_can_be_locked_runs_go_on_and_are_warned(tmp_path, monkeypatch, caplog, recwarn, number):
    def locks(*args) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.open" if number == errno.EACCES else "fcntl.flock", locks)
    (tmp_path / LOCK).write_text("1\nanother-host\n")  # as filelock leaves one that only its owner may remove
    with RunFolder(tmp_path).held():
        monkeypatch.undo()
        assert "nothing keeps a second run out of this folder" in caplog.text and str(tmp_path) in caplog.text
        (tmp_path / "run.json").write_text("{}")


def half(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path) -> None:
    path.write_bytes(b"")


def gone(path) -> None:
    path.unlink()


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "older version"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("spoil", [half, empty, gone])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(folder, caplog, spoil, name, manifest):
    for path in numbered(folder.checkpoints):
        if not manifest:
            (path / MANIFEST).unlink()
    assert folder.last_checkpoint().name == "step-0000006" and not caplog.text
    spoil(folder.checkpoints / "step-0000006" / name)
    if name == FILES[3] and spoil is gone and not manifest:  # how many there must be is known to the loading alone
        assert folder.last_checkpoint().name == "step-0000006"
        return
    assert folder.last_checkpoint().name == "step-0000004"
    assert "step-0000006" in caplog.text and name in caplog.text and caplog.records[0].levelname == "WARNING"


def test_all_ranks_must_have_left_their_random_states(folder, caplog):
    folder.save_checkpoint(8, lambda path: write_files(path, ranks=2), lambda: None, True, 4)
    assert folder.last_checkpoint(2).name == "step-0000008"
    (folder.checkpoints / "step-0000008" / "random_states_1.pkl").unlink()
    assert folder.last_checkpoint(1).name == "step-0000006"
    assert "random_states_1.pkl is missing" in caplog.text
    (folder.checkpoints / "step-0000006" / MANIFEST).unlink()  # it tells of one process
    with pytest.raises(RunFolderError, match="no checkpoint is whole: .*step-0000006 .random_states_1.pkl is missing"):
        folder.last_checkpoint(2)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_grew_is_not_the_one_that_was_written(folder, name):
    path = folder.checkpoints / "step-0000006" / name
    path.write_bytes(path.read_bytes() + bytes(8))
    assert damage(path.parent).startswith(f"{name} has ") and folder.last_checkpoint().name == "step-0000004"


def test_metrics_go_on_after_the_step_of_the_checkpoint(folder):
    for step in (2, 4, 6, 8):
        folder.append_metrics({"step": step, "loss": step / 10})
    with folder.metrics.open("a") as stream:
        stream.write('{"step": 10, "lo')  # being written when the run was killed
    folder.truncate_metrics(6)
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [2, 4, 6]
    folder.append_metrics({"step": 8})
    assert folder.metrics.read_text().endswith('"loss": 0.6}\n{"step": 8}\n')


def test_what_an_interrupted_export_left_is_not_taken_along(folder):
    (folder.path / "export.tmp").mkdir()
    (folder.path / "export.tmp" / "old.safetensors").write_text("of another step")
    (folder.path / "adapter").mkdir()
    (folder.path / "adapter" / "old.json").write_text("of another step")

    def save(path) -> None:
        (path / "adapter").mkdir()
        for name in ("model.safetensors", "adapter/adapter_config.json"):
            (path / name).write_text("new")

    folder.export(save)
    found = {path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*") if path.is_file()}
    assert {name for name in found if "checkpoints" not in name} == {"model.safetensors", "adapter/adapter_config.json"}


def test_room_is_needed_for_the_model_and_for_a_checkpoint_beside_the_kept_ones(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * 2**20))
    folder.prepare({}, {}, 2**20, 2, False)
    with pytest.raises(RunFolderError, match="4 MiB free, but 2 checkpoints and the model need about 4 MiB"):
        folder.prepare({}, {}, 2**20 + 1, 2, False)


def test_a_manifest_that_is_no_manifest(folder):
    path = folder.checkpoints / "step-0000006"
    for text in ("", "[]", '{"files": 3}', '{"files": {"model.safetensors": 1}}'):
        (path / MANIFEST).write_text(text)
        assert damage(path)


def test_without_a_whole_checkpoint_nothing_starts_over_by_itself(folder):
    for path in numbered(folder.checkpoints):
        empty(path / "optimizer.bin")
    with pytest.raises(RunFolderError, match="no checkpoint is whole: .*optimizer.bin.*--overwrite_output_dir"):
        folder.last_checkpoint()
    assert RunFolder(folder.path / "new").last_checkpoint() is None


@pytest.mark.parametrize("made", ["model.safetensors", "model-00001-of-00002.safetensors", "adapter"])
def test_a_model_without_its_checkpoints_is_not_trained_over_by_itself(folder, made):
    shutil.rmtree(folder.checkpoints)
    assert folder.last_checkpoint() is None  # of a run that was killed before the first
    (folder.path / "previews").mkdir()
    (folder.path / "metrics.jsonl").write_text("")
    assert folder.last_checkpoint() is None
    (folder.path / made).mkdir()
    with pytest.raises(RunFolderError, match=f"output_dir=.*{made}.*another output_dir.*--overwrite_output_dir"):
        folder.last_checkpoint()


@pytest.mark.parametrize("of_a_run", [True, False])
def test_overwriting_takes_the_results_of_the_old_weights_too(tmp_path, of_a_run):
    (tmp_path / "results.jsonl").write_text(json.dumps(record()) + "\n" + json.dumps(record(eps=4.0, attack="FGSM")))
    report(tmp_path / "results.jsonl", tmp_path, Console(quiet=True))
    results = {path.name for path in tmp_path.iterdir()}
    assert results == {"results.jsonl", "results.md", "results.csv", "attacks.png", "accuracy_against_eps.png"}
    (tmp_path / "notes.png").write_text("a person's")
    if of_a_run:
        (tmp_path / "run.json").write_text("{}")
        (tmp_path / "model.safetensors").write_text("old")
    RunFolder(tmp_path).prepare({}, {}, 0, 2, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.png"} | (set() if of_a_run else results)


def test_rotation_keeps_whole_checkpoints(folder):
    empty(folder.checkpoints / "step-0000006" / "optimizer.bin")
    folder.save_checkpoint(5, write_files, lambda: None, True, 1)
    assert checkpoints(folder.path) == ["step-0000005"]


def test_rotation_counts_no_damaged_checkpoint_and_none_of_later_steps(folder):
    empty(folder.checkpoints / "step-0000006" / "optimizer.bin")
    folder.save_checkpoint(8, write_files, lambda: None, True, 2)
    assert checkpoints(folder.path) == ["step-0000004", "step-0000008"]
    folder.save_checkpoint(6, write_files, lambda: None, True, 2)  # as after one that was damaged for its processes
    assert checkpoints(folder.path) == ["step-0000004", "step-0000006"]


def test_what_was_just_written_is_never_rotated_away(folder, monkeypatch):
    monkeypatch.setattr(run_folder_module, "damage", lambda path, processes=1: "a disk that lies")
    folder._rotate(6, 1)
    assert checkpoints(folder.path) == ["step-0000006"]


def test_a_state_in_shards_is_refused_at_the_first_save(folder):
    def write_shards(path) -> None:
        """As FSDP leaves them."""
        write_files(path)
        (path / "model.safetensors").unlink()
        (path / "pytorch_model_fsdp_0").mkdir()
        (path / "pytorch_model_fsdp_0" / "__0_0.distcp").write_text("a shard")

    before = checkpoints(folder.path)
    message = r"step 8 \(model.safetensors is missing\).*sharded state of FSDP.*is not supported"
    with pytest.raises(RunFolderError, match=message):
        folder.save_checkpoint(8, write_shards, lambda: None, True, 1)
    assert checkpoints(folder.path) == before


def test_a_copy_with_a_name_of_its_own_is_no_checkpoint(folder):
    for name in ("step-0000006-best", "step-best", "step-0000009 (copy)"):
        write_files(folder.checkpoints / name)
    (folder.checkpoints / "step-0000011").write_text("a file")
    assert folder.last_checkpoint().name == "step-0000006"
    for step in (9_999_999, 10_000_000):  # more digits than names are padded to
        folder.save_checkpoint(step, write_files, lambda: None, True, 2)
    assert folder.last_checkpoint().name == "step-10000000"
    assert checkpoints(folder.path) == [
        "step-0000006-best", "step-0000009 (copy)", "step-0000011", "step-10000000", "step-9999999", "step-best"
    ]  # fmt: skip


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, sync, replace = [], os.fsync, os.replace

    def noting(descriptor):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def renaming(source, target):
        synced.append("renamed")
        replace(source, target)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("what a descriptor is of is read from /proc")
    monkeypatch.setattr(checkpoint_files_module.os, "fsync", noting)
    monkeypatch.setattr(os, "replace", renaming)
    RunFolder(tmp_path).save_checkpoint(2, write_files, lambda: None, True, 1)
    assert synced == [
        *sorted(FILES), MANIFEST, "step-0000002.tmp", "renamed", "checkpoints"
    ]  # fmt: skip


def test_a_disk_that_fails_at_the_last_moment_leaves_the_checkpoint_before(folder, monkeypatch):
    def failing(path):
        raise OSError("the disk is gone")

    monkeypatch.setattr(checkpoint_files_module, "_sync", failing)
    with pytest.raises(RunFolderError, match="checkpoint of step 8.*the disk is gone.*last whole .* is step-0000006"):
        folder.save_checkpoint(8, write_files, lambda: None, True, 3)
    assert checkpoints(folder.path) == ["step-0000002", "step-0000004", "step-0000006"]


@pytest.mark.parametrize("name", FILES)
def test_only_a_file_that_cannot_be_read_is_a_fault_of_the_checkpoints(folder, name, monkeypatch):
    newest = folder.checkpoints / "step-0000006"
    path = newest / name
    whole = path.read_bytes()

    def loading(error: Exception) -> str:
        with pytest.raises(RunFolderError) as raised, folder.loading(newest):
            raise error
        return str(raised.value)

    for error in (RuntimeError("size mismatch for a"), RuntimeError("DefaultCPUAllocator: can't allocate")):
        said = loading(error)
        assert str(error) in said and "No file of it was found damaged" in said and "away" not in said
    spoiled = [bytes(len(whole)), whole[:-1]]
    if name != FILES[0]:  # safetensors have no checksums
        middle = whole.index(torch.load(path).numpy().tobytes())
        spoiled.append(whole[:middle] + b"????" + whole[middle + 4 :])
    for content in spoiled:
        path.write_bytes(content)
        said = loading(RuntimeError("what torch says"))
        assert f"({name}" in said and "Move this folder away" in said
    path.write_bytes(whole)
    opened = type(path).open

    def may_not(self, *args, **options):
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(self, *args, **options)

    monkeypatch.setattr(type(path), "open", may_not)
    said = loading(RuntimeError("what torch says"))
    assert "PermissionError" in said and name in said and "away" not in said


# --- with the loop -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A short run, and its command line for another folder."""
    base = tmp_path_factory.mktemp("whole")
    image_rows(12).to_parquet(base / "images" / "train.parquet")
    image_rows(4, first=12).to_parquet(base / "images" / "test.parquet")

    def argv(folder) -> list[str]:
        return words(
            dataset=base / "images", depth=8, width=4, image_size=16, padding=2, max_steps=3, warmup_steps=0,
            per_device_train_batch_size=4, validation_images=4, cpu_threads=1, logging_steps=1, save_steps=1,
            ema_decay=0.5, output_dir=folder,
        )  # fmt: skip

    return run("train_classifier", argv(base / "run")), argv


def test_a_run_goes_on_from_the_checkpoint_before(whole_run, tmp_path, caplog):
    whole, argv = whole_run
    folder = shutil.copytree(whole, tmp_path / "run")
    manifest = json.loads((folder / "checkpoints" / "step-0000003" / MANIFEST).read_text())
    assert {*FILES, "custom_checkpoint_1.pkl", "custom_checkpoint_2.pkl"} == set(manifest["files"])
    half(folder / "checkpoints" / "step-0000003" / "model.safetensors")
    run("train_classifier", argv(folder))
    assert_same_run(whole, folder)
    assert "step-0000002, for a newer checkpoint is damaged" in caplog.text and "step-0000003 (model" in caplog.text


def test_what_cannot_be_loaded_after_all_names_the_folder_and_the_fix(whole_run, tmp_path):
    whole, argv = whole_run
    folder = shutil.copytree(whole, tmp_path / "run")
    newest = folder / "checkpoints" / "step-0000003"
    for name in ("optimizer.bin", "custom_checkpoint_0.pkl"):
        (newest / name).write_bytes(bytes((newest / name).stat().st_size))  # of the right size, but zeros
        message = f"checkpoint .*step-0000003 cannot be loaded .{name}.*Move this folder away"
        with pytest.raises(RunFolderError, match=message):
            run("train_classifier", argv(folder))
        shutil.copy(whole / "checkpoints" / "step-0000003" / name, newest)
    shutil.rmtree(newest)
    run("train_classifier", argv(folder))
    assert_same_run(whole, folder)


def test_a_finished_run_whose_checkpoints_were_deleted_is_left_as_it_is(whole_run, tmp_path):
    whole, argv = whole_run
    folder = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError, match="no checkpoint to go on from: give another output_dir"):
        run("train_classifier", argv(folder))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    run("train_classifier", [*argv(folder), "--overwrite_output_dir", "true"])
    assert_same_run(whole, folder)
