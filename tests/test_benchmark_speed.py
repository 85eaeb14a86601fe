"""The benchmark script: what it counts is right, and it runs (its figures are not judged here)."""

import inspect
import json
import runpy
from pathlib import Path

import pytest
import torch

from maep_hf import MAEPConfig, MAEPModel

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parent.parent / "train" / "benchmark_speed.py"))


def test_operations_are_counted_as_in_the_network():
    config = MAEPConfig.tiny()
    model = MAEPModel(config).eval()
    tokens, flat = config.num_patches, config.num_channels * config.patch_size**2

    def blocks(width, inner, depth):
        return depth * (tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens**2 * width)

    encoder = tokens * flat * 128 + blocks(128, 512, 3)
    decoder = tokens * 128 * 96 + blocks(96, 384, 1) + tokens * 96 * 32 * config.patch_size**2
    local = 32 * 32 * 9 * (2 * 3 * 32 + 4 * 2 * 32 * 32)
    with torch.no_grad():
        counted = SCRIPT["count_flops"](model.purify, torch.rand(3, 3, 32, 32))
    assert counted == 3 * 2 * (encoder + decoder + local)


def test_ratios_are_formed_round_by_round():
    times = {"a": [1.0, 2.0], "b": [3.0, 3.0]}
    assert SCRIPT["ratios"](times, "a", "b") == [3.0, 1.5]
    assert SCRIPT["ratios"](times, "b", "a", scale=3) == [1.0, 2.0]


def test_contestants_take_turns_in_both_orders():
    order = []
    make = SCRIPT["Contestant"]
    contestants = [make(name, lambda name=name: order.append(name)) for name in "ab"]
    args = SCRIPT["BenchmarkArguments"](rounds=2, seconds=1e-9)
    results = SCRIPT["compete"](contestants, args, torch.device("cpu"))
    assert [len(results[name]) for name in "ab"] == [2, 2]
    assert order[6:] == ["a", "b", "b", "a"]


def test_training_contestants_have_the_same_sizes():
    vit, pure, local = SCRIPT["training_contestants"](MAEPConfig.tiny(), 2, torch.device("cpu"))
    assert (vit.images, pure.images, local.images) == (2, 2, 2)
    vit_model, pure_model = (inspect.getclosurevars(c.run).nonlocals["model"] for c in (vit, pure))
    assert pure_model.local_branch is None and vit_model.config.mask_ratio == 0.5

    def weights(module):  # matrices of the transformer blocks, whatever their names
        return sorted(tuple(p.shape) for name, p in module.named_parameters() if "layer" in name and p.ndim == 2)

    assert weights(vit_model) == weights(pure_model)


def test_script_runs_and_writes_its_record(tmp_path, capsys):
    out = tmp_path / "speed.json"
    words = "--rounds 1 --batch_size 2 --purify_batch_size 2 --large_image 40 --matmul_size 64 --seconds 1e-9"
    words += f" --cpu_threads {torch.get_num_threads()} --torch_compile false --device cpu --classifier nowhere"
    SCRIPT["main"]([*words.split(), "--out", str(out)])
    record = json.loads(out.read_text())
    assert [len(record[key]) for key in ("training_step", "purify")] == [3, 3]
    assert record["attack"]["classifier"].startswith("random") and record["versions"]["torch"]
    assert record["training_step"][0]["ratio"] == [1.0] and record["purify"][0]["share_of_matrix_product"] == [1.0]
    assert "share of the matrix product" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--clock", "sun"], ["--out", "no/such/folder/x.json"]])
def test_arguments_out_of_range(words, capsys):
    with pytest.raises(SystemExit):
        SCRIPT["main"](words)
    assert words[0].strip("-") in capsys.readouterr().err
