"""Nothing is left on the CPU by mistake: on another device everything computes the same. No accelerator is needed."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"torch {torch.__version__} takes no device written in Python",
)
def test_another_device_computes_the_same(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "second_device_run.py"), str(tmp_path / "found.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    result = torch.load(tmp_path / "found.pt", weights_only=True)
    assert all(result["refused"]), result["refused"]
    there, here = result["there"], result["here"]
    assert min(there["operations"].values()) > 1000 and not any(here["operations"].values()), there["operations"]
    names = {check["name"] for check in here["found"]["evaluated"]["white-box"]["checks"]["results"]}
    assert {"gradient", "eps sweep", "transfer", "attack"} <= names
    compared = 0
    for one, other in zip(tree_leaves(there["found"]), tree_leaves(here["found"]), strict=True):
        if isinstance(other, float | torch.Tensor):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
            compared += 1
        else:
            assert one == other
    assert compared > 100
