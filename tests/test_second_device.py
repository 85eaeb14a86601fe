"""Nothing is left on the CPU by mistake: on another device everything computes the same. No accelerator is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves

TESTS = Path(__file__).parent


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"torch {torch.__version__} takes no device written in Python",
)
def test_another_device_computes_the_same(tmp_path):
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(TESTS / "second_device_run.py"), str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    there, here = json.loads((tmp_path / "figures.json").read_text())
    assert there.pop("mixed") == "an error"
    assert there.keys() == here.keys() == {"purified", "evaluated", "trained"}
    for part, figures in here.items():
        leaves = tree_leaves(figures)
        assert len(leaves) > 10
        for one, other in zip(tree_leaves(there[part]), leaves, strict=True):
            assert one == (pytest.approx(other, rel=1e-3, abs=1e-6) if isinstance(other, float) else other), part
