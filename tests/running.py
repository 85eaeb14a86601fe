"""Runs of the training scripts, here and in processes that are killed, and what they leave in their folder."""

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import load_script
from safetensors.torch import load_file

from maep_hf.training import loop

TIMING = ("images_per_second", "attack_seconds", "model_seconds", "attack_time_share")


class Interrupted(Exception):
    """Stands for a kill, where one inside the test's process will do."""


def words(**options) -> list[str]:
    """Options as a command line."""
    found = []
    for name, value in options.items():
        found += [f"--{name}", *(str(each) for each in (value if isinstance(value, list) else [value]))]
    return found


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(script: str, argv: list[str], stop: tuple[str, int] | None = None) -> Path | None:
    """Call a script's `main`; `stop=("log", n)` interrupts it after step n, before anything of that step is saved."""
    reset_accelerate()
    if stop is None:
        return load_script(script).main(argv)
    restore = stop_at(*stop, how=_raise)
    try:
        load_script(script).main(argv)
    except Interrupted:
        return None
    finally:
        restore()
    raise AssertionError("the run was to be interrupted")


def _raise() -> None:
    raise Interrupted


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_at(where: str, step: int, how):
    """Let a run end at a step: after its record (`log`), or with its checkpoint half written (`save`)."""
    log, save = loop._Loop._log, torch.save

    def stopping_log(self):
        shown = log(self)
        if self.state.step == step:
            how()
        return shown

    def stopping_save(obj, target, *args, **kwargs):
        if f"step-{step:07d}.tmp" in str(target) and "optimizer" in str(target):
            Path(target).write_bytes(b"half a file")
            how()
        return save(obj, target, *args, **kwargs)

    def restore() -> None:
        loop._Loop._log, torch.save = log, save

    if where == "log":
        loop._Loop._log = stopping_log
    else:
        torch.save = stopping_save
    return restore


def _child(script: str, argv: list[str], stop: tuple[str, int] | None, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    if stop is not None:
        stop_at(*stop, how=_kill)
    load_script(script).main(argv)


def launch(script: str, argv: list[str], stop: tuple[str, int] | None = None, processes: int = 1) -> list[int]:
    """Run a script in one or several processes, with gloo; their exit codes (-9 after SIGKILL)."""
    context = multiprocessing.get_context("forkserver")  # one slow import for all of them
    context.set_forkserver_preload(["maep_hf.training.stages", "maep_hf.adaptation", "running"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(processes):
        environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        children.append(context.Process(target=_child, args=(script, argv, stop, environment)))
    for child in children:
        child.start()
    for child in children:
        child.join(240)
        if child.is_alive():
            child.kill()
            child.join()
    return [child.exitcode for child in children]


def records(folder: Path) -> list[dict]:
    """Lines of `metrics.jsonl` without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def losses(folder: Path) -> list[float]:
    """The loss of every record, in order."""
    return [line["loss"] for line in records(folder) if "loss" in line]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_same_run(first: Path, second: Path) -> None:
    """The same losses, the same weights bit for bit, and the same state to go on from."""
    assert records(first) == records(second)
    assert checkpoints(first) == checkpoints(second)
    last = Path("checkpoints") / checkpoints(first)[-1] / "model.safetensors"
    for name in ("model.safetensors", last):
        one, other = load_file(first / name), load_file(second / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def assert_close_weights(first: Path, second: Path, atol: float) -> None:
    one, other = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=atol, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
