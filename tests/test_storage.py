"""Weights in 16 bits on disk: read as float32, rounded once, nothing else changed."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from maep_hf import MAEPModel, load_classifier
from maep_hf.checkpoints import load_purifier
from maep_hf.storage import store_weights


@pytest.fixture
def folder(purifier_folder, tmp_path):
    return shutil.copytree(purifier_folder, tmp_path / "purifier")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_purifier_computes_in_float32_with_the_rounded_weights(folder, purifier_folder, dtype):
    (folder / "model.safetensors").chmod(0o644)
    before, others = load_file(folder / "model.safetensors"), contents(folder)
    store_weights(folder, dtype)
    stored, width = load_file(folder / "model.safetensors"), getattr(torch, dtype)
    assert {value.dtype for value in stored.values()} == {width} and stored.keys() == before.keys()
    assert (folder / "model.safetensors").stat().st_size < 0.6 * (purifier_folder / "model.safetensors").stat().st_size
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert contents(folder) == others  # and no file beside
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    for model in (MAEPModel.from_pretrained(folder), load_purifier(folder)):
        for name, value in model.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, before[name].to(width).float())
    again = (folder / "model.safetensors").read_bytes()
    store_weights(folder, dtype)
    assert (folder / "model.safetensors").read_bytes() == again


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "model.safetensors"}


def test_counters_of_a_classifier_stay_whole(classifier_folder, tmp_path):
    folder = shutil.copytree(classifier_folder, tmp_path / "classifier")
    store_weights(folder, "float16")
    stored, before = (load_file(place / "model.safetensors") for place in (folder, classifier_folder))
    counters = [name for name in stored if name.endswith("num_batches_tracked")]
    assert counters and all(torch.equal(stored[name], before[name]) for name in counters)
    assert {stored[name].dtype for name in counters} == {torch.int64}
    assert all(value.dtype == torch.float16 for name, value in stored.items() if name not in counters)
    pixels = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        found, expected = (load_classifier(str(place))(pixels) for place in (folder, classifier_folder))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0.01)


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        (None, "int8", "dtype='int8': must be one of float32, float16, bfloat16"),
        ("weights", "float16", "there is no .safetensors file"),
        ("config", "float16", "does not say its dtype"),
        ("value", "float16", "encoder.* 1e.05 is beyond float16; store it as bfloat16"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_stays(folder, change, dtype, message):
    weights = folder / "model.safetensors"
    if change == "weights":
        weights.unlink()
    elif change == "config":
        config = json.loads((folder / "config.json").read_text())
        del config["dtype"]
        (folder / "config.json").write_text(json.dumps(config))
    elif change == "value":
        tensors = load_file(weights)
        name = next(name for name in tensors if name.startswith("encoder"))
        tensors[name].view(-1)[0] = 1e5
        save_file(tensors, weights, metadata={"format": "pt"})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=message):
        store_weights(folder, dtype)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_full_disk_is_an_error_of_the_operating_system(folder):
    """Which the command line tells in one line; what was there stays, and nothing lies beside it."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    script = (
        "import resource, sys\nfrom maep_hf.storage import store_weights\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try: store_weights(sys.argv[1], 'float16')\nexcept OSError as error: print('OSError:', error)"
    )
    command = [sys.executable, "-c", script, str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert found.stdout.startswith(f"OSError: {folder / 'model.safetensors'}: it cannot be written"), found.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
