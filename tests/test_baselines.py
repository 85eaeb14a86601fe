"""DISCO as a baseline: the network does what the paper says, trains on the purifier's pairs, and is evaluated alike."""

import importlib
import json
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, SIZE
from running import Interrupted, _raise, assert_same_run, losses, records, reset_accelerate, stop_at, words
from test_evaluate_command import invoke
from torch import nn

from maep_hf.attacks import AttackMixture
from maep_hf.records import read_jsonl
from maep_hf.training import DataArguments
from maep_hf.training.purification import PairDraw
from maep_hf.training.stages import AttackArguments

sys.path.insert(0, str(ROOT))  # as from the repository's root
disco = importlib.import_module("train.baselines.disco")
train_disco = importlib.import_module("train.baselines.train_disco")
TINY = {"encoder_channels": 8, "encoder_blocks": 2, "hidden_size": 16, "num_hidden_layers": 2}


def tiny(seed: int = 0, **changed):
    torch.manual_seed(seed)
    return disco.DiscoModel(disco.DiscoConfig(**TINY | changed)).eval()


# --- the network ---------------------------------------------------------------------------------------------------


def test_size_of_the_published_network():
    model = disco.untrained()
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    block = 2 * (64 * 64 * 9 + 64)
    assert count["encoder"] == (3 * 64 * 9 + 64) + 16 * block + block // 2 == 1_220_416
    assert count["implicit"] == (64 * 9 + 4 + 1) * 256 + 3 * 257 * 256 + 257 * 3 == 346_883


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 3, 1, 1), (1, 3, 7, 50), (0, 3, 8, 8)])
def test_any_size_in_range(shape):
    model, pixels = tiny(), torch.rand(shape)
    nn.init.normal_(model.implicit.last.weight, std=5)  # far out of range without clipping
    purified = model.purify(pixels)
    assert purified.shape == shape and purified.dtype == pixels.dtype
    if purified.numel() > 100:
        assert purified.min() == 0 and purified.max() == 1
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        model(torch.rand(2, 4, 8, 8))


def test_parts_of_a_batch_are_the_batch(monkeypatch):
    model, pixels = tiny(), torch.rand(5, 3, 6, 7)
    whole = model(pixels).purified_pixel_values
    monkeypatch.setattr(disco, "PIXELS_AT_ONCE", {"cpu": 2 * 6 * 7})
    torch.testing.assert_close(model.purify(pixels), whole)


def test_gradient_reaches_the_input_and_every_weight():
    model, pixels = tiny(), torch.rand(2, 3, 9, 8, requires_grad=True)
    model(pixels, torch.rand(2, 3, 9, 8)).loss.backward()
    assert (pixels.grad.abs().amax((0, 1)) > 0).all()  # of every pixel
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_loss_is_l1_of_the_prediction():
    model, pixels, clean = tiny(), torch.rand(2, 3, 6, 6), torch.rand(2, 3, 6, 6)
    output = model(pixels, clean)
    assert 0 < output.purified_pixel_values.min() and output.purified_pixel_values.max() < 1  # nothing is clipped here
    torch.testing.assert_close(output.loss, (output.purified_pixel_values - clean).abs().mean())
    assert model(pixels).loss is None


@pytest.mark.parametrize("ensemble", [True, False])
def test_saved_and_loaded(tmp_path, ensemble):
    model, pixels = tiny(local_ensemble=ensemble), torch.rand(1, 3, 8, 8)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "disco"
    loaded = disco.load(tmp_path)
    assert not loaded.training and loaded.config.local_ensemble is ensemble
    assert torch.equal(loaded.purify(pixels), model.purify(pixels))


@pytest.mark.parametrize("changed", [{"unfold_size": 4}, {"hidden_size": 0}, {"patch_size": 5}])
def test_configuration_out_of_range(changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        disco.DiscoConfig(**changed)


# --- the local implicit function -----------------------------------------------------------------------------------


def by_definition(function, features: torch.Tensor, rows, columns, ensemble: bool) -> np.ndarray:
    """LIIF's equations, one position at a time in double precision: (C, R, S)."""
    _, channels, height, width = features.shape
    padded = np.pad(features[0].double().numpy(), ((0, 0), (1, 1), (1, 1)))
    layers = [function.first, *function.hidden, function.last]
    weights = [(layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()) for layer in layers]

    def predict(row: int, column: int, position) -> np.ndarray:
        # coordinates go from -1 to 1 over the image; offsets and the size of a pixel are stretched by its size
        offset = [2 / n * (p - q) * n for n, p, q in zip((height, width), position, (row, column), strict=True)]
        seen = padded[:, row : row + 3, column : column + 3].reshape(-1)
        value = np.concatenate([seen, offset, [2 / height * height, 2 / width * width]])
        for index, (weight, bias) in enumerate(weights):
            value = weight @ value + bias
            value = np.maximum(value, 0) if index < len(weights) - 1 else value
        return value

    out = np.zeros((len(function.last.bias), len(rows), len(columns)))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if not ensemble:
                out[:, i, j] = predict(round(row), round(column), (row, column))
                continue
            corners = [(np.floor(row) + a, np.floor(column) + b) for a in (0, 1) for b in (0, 1)]
            corners = [(int(min(a, height - 1)), int(min(b, width - 1))) for a, b in corners]
            areas = [4 * abs((row - a) * (column - b)) + 1e-9 for a, b in corners]
            for corner, area in zip(corners, reversed(areas), strict=True):  # the rectangle opposite
                out[:, i, j] += predict(*corner, (row, column)) * area / sum(areas)
    return out


@pytest.mark.parametrize("ensemble", [True, False])
@pytest.mark.parametrize("positions", [None, ([0.0, 0.3, 1.25, 3.6], [0.75, 2.0, 2.2])])
def test_it_is_the_published_function(ensemble, positions):
    function = tiny(local_ensemble=ensemble).implicit
    features = torch.randn(1, 8, 5, 4)
    rows, columns = positions or (range(5), range(4))
    given = [torch.tensor(each) for each in positions] if positions else []
    with torch.no_grad():
        colours = function(features, *given)
    expected = by_definition(function, features, rows, columns, ensemble)
    torch.testing.assert_close(colours[0], torch.from_numpy(expected).float(), atol=2e-6, rtol=1e-5)


def test_ensemble_weights_sum_to_one_and_the_nearest_weighs_most():
    positions = torch.tensor([0.0, 0.4, 1.9, 3.0])
    rows = [offset for _, offset in disco.neighbours(positions[:, None], 4, True)]
    columns = [offset for _, offset in disco.neighbours(positions[None, :], 4, True)]
    weights = torch.stack(disco.ensemble_weights(rows, columns))
    torch.testing.assert_close(weights.sum(0), torch.ones(4, 4))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights[:, 1, 2], torch.tensor([0.6 * 0.1, 0.6 * 0.9, 0.4 * 0.1, 0.4 * 0.9]))
    torch.testing.assert_close(weights[:, 0, 0], torch.tensor([1.0, 0, 0, 0]))  # at a centre, its own feature alone


def test_neighbours_are_within_and_nearest():
    [(nearest, offset)] = disco.neighbours(torch.tensor([0.2, 2.7, -0.4, 3.4]), 4, False)
    assert nearest.tolist() == [0, 3, 0, 3]
    torch.testing.assert_close(offset, 2 * torch.tensor([0.2, -0.3, -0.4, 0.4]))
    (before, _), (after, _) = disco.neighbours(torch.tensor([0.0, 1.0 - 1e-6, 2.5, 3.0]), 4, True)
    assert before.tolist() == [0, 1, 2, 3] and after.tolist() == [1, 2, 3, 3]


def test_a_linear_function_of_position_is_represented_exactly():
    """Features that hold their own place plus the offset to it give the place, from whichever neighbour."""
    model = tiny(num_hidden_layers=1, hidden_size=4)
    function, height, width = model.implicit, 6, 5
    with torch.no_grad():
        for parameter in function.parameters():
            parameter.zero_()
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        features = torch.zeros(1, 8, height, width)
        features[0, 0], features[0, 1] = row, column
        centre = 9 // 2  # of the 3 x 3 square, channel by channel
        for unit, feature, offset in ((0, centre, -4), (1, 9 + centre, -3)):
            function.first.weight[unit, feature], function.first.weight[unit, offset] = 1, 0.5
            function.first.bias[unit], function.last.weight[unit, unit], function.last.bias[unit] = 10, 1, -10
        rows, columns = torch.tensor([0.0, 0.25, 2.0, 4.9]), torch.tensor([0.5, 3.75])
        colours = function(features, rows, columns)[0]
    torch.testing.assert_close(colours[0], rows[:, None].expand(4, 2))
    torch.testing.assert_close(colours[1], columns[None].expand(4, 2))


def test_ensemble_only_matters_in_the_last_row_and_column():
    with_it, without = tiny(), tiny(local_ensemble=False)
    pixels = torch.rand(1, 3, 8, 6)
    difference = (with_it.purify(pixels) - without.purify(pixels)).abs().amax((0, 1))
    assert difference[:-1, :-1].max() < 1e-6 < difference[-1].max()


# --- training and evaluation ---------------------------------------------------------------------------------------


@pytest.fixture
def options(image_folder, classifier_folder):
    def build(output_dir, **changed) -> list[str]:
        usual = {
            "dataset": image_folder, "surrogates": [classifier_folder], "image_size": SIZE, "encoder_channels": 8,
            "encoder_blocks": 1, "per_device_train_batch_size": 3, "max_steps": 4, "warmup_steps": 1,
            "learning_rate": 0.01, "ema_decay": 0.5, "attack_steps": 2, "logging_steps": 1, "eval_steps": 2,
            "save_steps": 2, "validation_images": 4, "cpu_threads": 1, "output_dir": output_dir,
        }  # fmt: skip
        return words(**usual | changed)

    return build


def start(argv):
    reset_accelerate()
    return train_disco.main(argv)


def test_trained_saved_and_resumed(options, tmp_path):
    whole = start(options(tmp_path / "whole"))
    restore = stop_at("log", 3, how=_raise)
    try:
        with pytest.raises(Interrupted):
            start(options(tmp_path / "run"))
    finally:
        restore()
    start(options(tmp_path / "run"))
    assert_same_run(whole, tmp_path / "run")
    assert len(losses(whole)) == 4
    validations = [line["validation"] for line in records(whole) if "validation" in line]
    assert validations[0]["psnr_purified"] != validations[-1]["psnr_purified"]
    assert all(line["loss"] == line["purification_loss"] for line in records(whole) if "loss" in line)
    run = json.loads((whole / "run.json").read_text())
    assert run["arguments"]["disco"]["encoder_blocks"] == 1
    assert disco.load(whole).config.encoder_channels == 8
    assert list((whole / "previews").glob("*.png"))


def test_it_learns(options, tmp_path):
    """Attacks of constant size on few images: the loss falls well below that of the first steps."""
    folder = start(options(tmp_path / "run", max_steps=40, eval_steps=40, save_steps=40, ema_decay=0.0))
    found = losses(folder)
    assert sum(found[-5:]) < 0.5 * sum(found[:5])


def test_the_pairs_are_those_of_the_purifier(options, tmp_path, monkeypatch):
    """The task draws as the purifier's does: the same numbers for the same seed and position."""
    seen = {}
    monkeypatch.setattr(train_disco, "train", lambda task, loop, groups: seen.update(task=task))
    start(options(tmp_path / "run", patch_size=4))
    drawn = seen["task"].draw()(np.random.default_rng((0, 5)), {})
    mixture = AttackMixture(max_steps=2)
    expected = PairDraw(mixture, SIZE, (SIZE // 4) ** 2)(np.random.default_rng((0, 5)), {})
    assert drawn.keys() == expected.keys() and all(torch.equal(drawn[key], expected[key]) for key in drawn)


def test_the_recipe_is_read(monkeypatch):
    seen = {}
    monkeypatch.setattr(train_disco, "train", lambda task, loop, groups: seen.update(groups))
    start(["--dataset", "embedded:cifar10", "--surrogates", "checkpoints/resnet20-cifar10"])
    assert seen["loop"]["max_steps"] * seen["loop"]["per_device_train_batch_size"] == 462_080
    assert seen["disco"] == {"encoder_channels": 64, "encoder_blocks": 16, "local_ensemble": True, "patch_size": 4}
    assert seen["purification"]["guidance_weight"] == 0 and seen["data"]["dataset"] == "embedded:cifar10"


def test_its_recipe_of_the_ablation_sees_the_ablations_pairs(monkeypatch):
    seen = {}
    monkeypatch.setattr(train_disco, "train", lambda task, loop, groups: seen.update(groups))
    recipe = ROOT / "train" / "configs" / "disco_ablation.yaml"
    start(["--config", str(recipe), "--dataset", "embedded:cifar10"])
    common = yaml.safe_load((recipe.parent / "ablation.yaml").read_text())["both"]
    found = seen["loop"] | seen["attack"] | seen["purification"] | seen["data"]
    shared = set(common) - {"learning_rate"}  # its own, as published
    assert {name: found[name] for name in shared} == {name: common[name] for name in shared}
    assert seen["attack"] == asdict(AttackArguments(attack_steps=common["attack_steps"]))
    usual = DataArguments(dataset="embedded:cifar10", validation_images=common["validation_images"])
    assert seen["data"] == asdict(usual)
    assert found["seed"] == 0 and found["max_steps"] == 200
    assert found["mask_ratio"] == 0 and found["guidance_weight"] == 0 and not seen["disco"]["local_ensemble"]


def test_its_guided_recipe_sees_the_purifiers_pairs(monkeypatch):
    seen = {}
    monkeypatch.setattr(train_disco, "train", lambda task, loop, groups: seen.update(groups))
    configs = ROOT / "train" / "configs"
    path = configs / "disco_guided_cifar10.yaml"
    start(["--config", str(path), "--dataset", "embedded:cifar10", "--surrogates", "checkpoints/resnet20-cifar10"])
    found = seen["loop"] | seen["attack"] | seen["purification"] | seen["data"] | seen["disco"]
    baseline = yaml.safe_load(path.read_text())
    purifier = yaml.safe_load((configs / "pretrain_guided_tiny_cifar10.yaml").read_text())
    # its rate and decay as published; the surrogates that are not in the repository were left out above
    own = {"output_dir", "learning_rate", "weight_decay", "local_ensemble"}
    assert {name: value for name, value in baseline.items() if name not in own} == {
        name: purifier[name] for name in baseline.keys() - own
    }
    assert all(found[name] == baseline[name] for name in baseline.keys() - {"dataset", "surrogates"})
    assert purifier.keys() - baseline.keys() == {"size", "residual", "pixel_loss", "purification_loss_weight"}


def test_evaluated_by_the_command(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path / "some disco")
    monkeypatch.chdir(ROOT)
    given = ["--dataset", "embedded:cifar10", "--classifier", "checkpoints/resnet20-cifar10", "--device", "cpu"]
    given += ["--purifier", f"python:train.baselines.disco:load:{tmp_path / 'some disco'}", "--attack", "fgsm"]
    given += ["--threat-model", "gray-box", "--threat-model", "white-box", "--no-checks"]
    code, output = invoke("evaluate", *given, "--out", tmp_path / "out")
    assert code == 0, output
    gray, white = read_jsonl(tmp_path / "out" / "results.jsonl")
    assert gray["protocol"]["dataset"]["n"] == 20 and gray["protocol"]["purifier"]["name"] == "some disco"
    assert white["protocol"]["threat_model"] == "white-box" and gray["ms_per_image"]["purify"] > 0
    assert not gray["protocol"]["purifier"]["randomised"]
