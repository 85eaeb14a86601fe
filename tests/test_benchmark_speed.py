"""The benchmark script: what it counts is right, and it runs (its figures are not judged here)."""

import inspect
import json
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn

from maep_hf import MAEPConfig, MAEPModel

SCRIPT = runpy.run_path(str(ROOT / "train" / "benchmark_speed.py"))
peers = SCRIPT["benchmark_peers"]
QUICK = "--rounds 1 --seconds 1e-9 --matmul_size 64 --purify_batch_size 2 --torch_compile false --device cpu"


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


# --- against the peers ---------------------------------------------------------------------------------------------


class SmallNetwork(nn.Module):
    """Takes the place of the diffusion network, with its signature."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)

    def forward(self, sample, timestep):
        assert timestep.shape == sample.shape[:1]
        return SimpleNamespace(sample=self.conv(sample))


def test_peers_are_compared_in_one_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers, "diffusion_network", SmallNetwork)
    monkeypatch.chdir(tmp_path)  # the baselines are found from any working directory
    out = tmp_path / "peers.json"
    words = [*QUICK.split(), "--part", "peers", "--sizes", "tiny", "--cpu_threads", str(torch.get_num_threads())]
    SCRIPT["main"]([*words, "--diffusion_batch_size", "1", "--out", str(out)])
    record = json.loads(out.read_text())
    assert [part["batch_size"] for part in record["peers"]] == [2, 1]
    rows = {row["name"]: row for row in record["peers"][0]["rows"]}
    assert list(rows) == ["MAEP tiny", "DISCO", "DISCO without zero weights", peers.DIFFUSION]
    own, disco, diffusion = rows["MAEP tiny"], rows["DISCO"], rows[peers.DIFFUSION]
    assert (own["images_at_once"], diffusion["images_at_once"], diffusion["evaluations"]) == (2, 1, 100)
    assert disco["parameters"] == 1_567_299 and diffusion["parameters"] == 81
    assert diffusion["gflop_per_image"] == pytest.approx(100 * 2 * 81 * 32 * 32 / 1e9)
    assert own["gflop_per_image"] < rows["DISCO without zero weights"]["gflop_per_image"] < disco["gflop_per_image"]
    assert disco["maep_times_as_fast"] == {"MAEP tiny": [disco["seconds"][0] / own["seconds"][0]]}
    assert own["maep_times_as_fast"] == {}
    against = {target["what"]: target for target in record["targets"]}
    target = against["MAEP tiny against DISCO"]
    assert target["measured"] == disco["maep_times_as_fast"]["MAEP tiny"][0] and target["target"] == 5
    assert target["met"] == (target["measured"] >= 5) and len(against) == 3
    assert "multiplied by DiffPure's 100" in record["how"] and "at most 1 images" in record["how"]
    table = (tmp_path / "peers.md").read_text()
    assert "| batch 2 |" in table and "| batch 1 |" in table and record["how"] in table
    with Image.open(tmp_path / "peers.png") as picture:
        assert min(picture.size) > 300 and len(picture.convert("L").getcolors(256)) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peers.json", "peers.md", "peers.png"]
    assert "DISCO without zero weights" in capsys.readouterr().out


def test_time_of_an_image_counts_all_evaluations():
    times = {"mark": [1.0, 2.0], peers.DIFFUSION: [4.0, 2.0], "MAEP tiny": [1.0, 1.0]}
    make = SCRIPT["Contestant"]
    mark, diffusion = make("mark", None, 1, 100), make(peers.DIFFUSION, None, 8, 50)
    row = peers._row(diffusion, times, mark)
    assert row["seconds"] == [50.0, 25.0] and row["ms_per_image"] == 37_500
    assert row["share_of_matrix_product"] == [0.125, 0.5]  # half of the arithmetic in 4 times, then once, the time
    assert peers._row(make("MAEP tiny", None, 8, 50), times, mark)["seconds"] == [0.125, 0.125]


def test_a_missing_library_is_named_with_the_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'maep-hf\[peers\]'"):
        SCRIPT["main"]([*QUICK.split(), "--part", "peers"])


def test_the_diffusion_network_has_the_published_size():
    pytest.importorskip("diffusers")
    network = peers.diffusion_network()
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307


@pytest.mark.parametrize(
    "words",
    [
        ["--rounds", "0"],
        ["--clock", "sun"],
        ["--out", "no/such/folder/x.json"],
        ["--part", "piers"],
        ["--dtype", "float8"],
        ["--sizes", "tiny", "huge"],
        ["--diffusion_batch_size", "-1"],
    ],
)
def test_arguments_out_of_range(words, capsys):
    with pytest.raises(SystemExit):
        SCRIPT["main"](words)
    assert words[0].strip("-") in capsys.readouterr().err


def test_a_device_that_is_not_there_is_told(capsys):
    with pytest.raises(ValueError, match="--device xpu cannot be used here"):
        SCRIPT["main"](["--device", "xpu"])
