"""A new user's path: the lines of README.md between the quickstart marks, in a fresh environment, against a Hub."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from fresh_environment import clean_variables, make_environment, required
from PIL import Image

pytest_plugins = ["hub_client"]
ROOT = Path(__file__).resolve().parent.parent


def lines() -> list[str]:
    """The commands, each with its continuations."""
    (section,) = re.findall(r"<!-- quickstart -->(.*?)<!-- /quickstart -->", (ROOT / "README.md").read_text(), re.S)
    (block,) = re.findall(r"```bash\n(.*?)```", section, re.S)
    return block.strip().splitlines()


@pytest.fixture
def clone(tmp_path):
    """What a clone holds, with a picture in it."""
    folder = tmp_path / "clone"
    unwanted = shutil.ignore_patterns("__pycache__", "*.tmp")
    for name in ("maep_hf", "train", "checkpoints"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE", "model_card.md"):
        shutil.copy(ROOT / name, folder)
    Image.effect_noise((40, 32), 60).convert("RGB").save(folder / "cat.png")
    return folder


def needed() -> dict:
    """What `pip install ".[attacks]"` would bring, and what pip and setuptools need to build the package itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["attacks"]
    return required("pip", "setuptools", *wanted)


def _on_one_core() -> None:
    """Training takes a thread for each core; on a busy machine they would wait for each other, tens of times slower."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


@pytest.mark.slow
@pytest.mark.checkpoint
@pytest.mark.timeout(900)  # five processes that each import everything, on a machine that may be busy
def test_every_line_of_the_path_runs(hub, clone, tmp_path):
    written = lines()
    assert len(written) <= 10 and written[0].startswith("pip install ")
    python = make_environment(tmp_path / "environment", needed())
    variables = clean_variables(**hub.environment(str(tmp_path / "home")))
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    variables |= offline | {"PATH": f"{python.parent}:/usr/bin:/bin", "ACCELERATE_USE_CPU": "true"}
    # a line at a time, as they are typed; `\` goes on in the next
    script = "set -euo pipefail\n" + "\n".join(written) + "\n"
    done = subprocess.run(
        ["bash", "-c", script], cwd=clone, env=variables, preexec_fn=_on_one_core, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    purified = Image.open(clone / "purified/cat.png")
    assert purified.size == (40, 32) and purified.tobytes() != Image.open(clone / "cat.png").tobytes()
    base, adapter = hub.files("someone/my-purifier"), hub.files("someone/my-adapter")
    assert "# my-purifier" in base["README.md"].decode() and "pipeline_maep.py" in base
    assert json.loads(adapter["adapter_config.json"])["base_model_name_or_path"] == "someone/my-purifier"
    assert "base_model_relation: adapter" in adapter["README.md"].decode()

    site = next((tmp_path / "environment/lib").glob("python*/site-packages"))
    assert (site / "maep_hf/hub/cards.py").is_file() and not (site / "model_card.md").exists()
    # the card above came from the installed template
    installed = tmp_path / "environment/share/maep_hf/model_card.md"
    assert installed.read_text() == (ROOT / "model_card.md").read_text()
