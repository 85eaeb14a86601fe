"""What a program does with the memory it frees."""

import subprocess
import sys

import pytest

from maep_hf.memory import keep_freed_memory

# 64 MiB is above the size that glibc maps anew each time: kept, its pages are faulted in once, else in every round.
ROUNDS = 10
PROGRAM = f"""
import resource, sys, torch
from maep_hf.memory import keep_freed_memory
print(keep_freed_memory() if sys.argv[1:] else None)
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ROUNDS}):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is on Linux")


def page_faults(*words, **environment) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], env=environment, capture_output=True, text=True, check=True
    )
    arranged, faults = done.stdout.split()
    return arranged, int(faults)


@linux
def test_freed_memory_serves_the_next_tensor():
    arranged, kept = page_faults("keep")
    _, plain = page_faults()
    if arranged != "True":
        pytest.skip("no glibc here")
    assert kept < 2 / ROUNDS * plain  # at most once more, when the heap grows


@linux
def test_the_users_own_settings_are_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert keep_freed_memory() is False


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
