"""The repository around the package: dependencies, the Makefile's set-up, the CI script."""

import os
import re
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TESTS = "-m pytest -n auto --maxprocesses 4 --dist loadfile"
ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# `python -m venv DIR` makes an environment whose python is this file too; everything it is asked is written down.
FAKE_PYTHON = """#!/bin/bash
echo "$@" >> "$FAKE_LOG"
case "$*" in
  *version_info*) exit "${FAKE_TOO_OLD:-0}" ;;
  --version) echo "Python 3.11.0" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/made" ;;
  "-m pip install"*"${FAKE_FAILS_ON:-no such word}"*) exit 1 ;;
esac
"""


def requirements(extras: bool = True) -> dict[str, Requirement]:
    lines = list(PROJECT["dependencies"])
    for extra in PROJECT["optional-dependencies"].values() if extras else ():
        lines += extra
    parsed = map(Requirement, lines)
    return {canonicalize_name(entry.name): entry for entry in parsed if entry.name != PROJECT["name"]}


def test_every_dependency_is_bounded_and_the_checked_version_is_within():
    pins = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for name, requirement in requirements().items():
        operators = {specifier.operator for specifier in requirement.specifier}
        operators -= {"!="}  # a release in between that is broken
        assert operators == {"=="} or operators == {">=", "<"}, f"{name} is not bounded"
        assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} is not {requirement.specifier}"


def test_what_must_not_be_needed_is_not():
    forbidden = {"torchvision", "timm", "lpips"}
    assert not forbidden & set(requirements())
    assert not any(re.match(rf"{name}==", line) for name in forbidden for line in open(ROOT / "constraints.txt"))


def test_every_imported_package_is_declared():
    import ast
    import sys

    distributions = {"pil": "pillow", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
    local = {"maep_hf", *(path.stem for path in ROOT.glob("train/*.py"))}  # a script may call its neighbour
    allowed = {canonicalize_name(name) for name in requirements()} | {"maep-hf"}
    for path in [*ROOT.glob("maep_hf/**/*.py"), *ROOT.glob("train/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - local:
                assert canonicalize_name(distributions.get(name.lower(), name)) in allowed, f"{path}: imports {name}"


def test_licence_and_ci():
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200] and PROJECT["license"] == "Apache-2.0"
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines and "make test" in lines and "make lint" in lines
    readme = (ROOT / "README.md").read_text()
    assert 0 < readme.index("make demo") < readme.index("make test") < 2500


def test_recipe_files_are_packaged_or_beside_their_scripts():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    assert "*.yaml" in patterns
    for path in ROOT.glob("maep_hf/**/*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.suffix == ".py" or any(path.match(pattern) for pattern in patterns), f"{path} is not packaged"


@pytest.fixture
def clone(tmp_path):
    """A folder with a space in its path that holds the Makefile and a fake interpreter."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "fake-python").write_text(FAKE_PYTHON)
    (folder / "fake-python").chmod(0o755)
    return folder


def make(folder: Path, *targets: str, fails: bool = False, **environment: str) -> tuple[str, list[str]]:
    """Output of make, and what the fake interpreter was asked since the last call."""
    log = folder / "log"
    log.write_text("")
    inherited = ("MAKE", "MFLAGS", "VENV", "PYTHON", "PYTEST_ARGS")  # CI sets VENV for its own environment
    variables = {key: value for key, value in os.environ.items() if not key.startswith(inherited)}
    variables |= {"FAKE_LOG": str(log), **environment}
    arguments = ["make", "PYTHON=./fake-python", *targets]
    result = subprocess.run(arguments, cwd=folder, env=variables, capture_output=True, text=True)
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    return result.stdout + result.stderr, log.read_text().splitlines()


def test_first_call_sets_up_and_the_second_does_not(clone):
    _, calls = make(clone, "test")
    installs = [call for call in calls if "pip install" in call]
    assert "torch -c constraints.txt" in installs[0] and "-e .[dev] -c constraints.txt" in installs[1]
    assert calls[-1] == TESTS
    assert make(clone, "test")[1] == [TESTS]
    assert make(clone, "lint")[1] == ["-m ruff check ."]


def test_interrupted_set_up_is_begun_anew(clone):
    make(clone, "setup", fails=True, FAKE_FAILS_ON="[dev]")
    (clone / ".venv" / "half-written").touch()
    _, calls = make(clone, "test")
    assert any(call.startswith("-m venv") for call in calls) and calls[-1] == TESTS
    assert not (clone / ".venv" / "half-written").exists()
    assert not (clone / ".venv.incomplete").exists()


def test_changed_dependencies_are_installed_into_the_same_environment(clone):
    make(clone, "setup")
    (clone / ".venv" / "kept").touch()
    later = (clone / ".venv" / ".ready").stat().st_mtime + 10
    os.utime(clone / "constraints.txt", (later, later))
    _, calls = make(clone, "setup")
    assert sum("pip install" in call for call in calls) == 2 and (clone / ".venv" / "kept").exists()


def test_moved_clone_is_set_up_again(clone):
    make(clone, "setup")
    moved = clone.with_name("moved")
    clone.rename(moved)
    _, calls = make(moved, "test")
    assert any(call.startswith("-m venv") for call in calls)
    assert make(moved, "test")[1] == [TESTS]


def test_old_python_is_named_with_the_fix(clone):
    output, _ = make(clone, "test", fails=True, FAKE_TOO_OLD="1")
    assert "no Python 3.11 or newer found under the name './fake-python'" in output and "make PYTHON=" in output
    assert not (clone / ".venv").exists()
