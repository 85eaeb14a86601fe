"""A grown purifier: the same function at first, every new weight reached by training, and finetune.py's words too."""

import json

import pytest
import torch
from conftest import load_script, tiny_purifier
from running import run, words

from maep_hf import MAEPModel
from maep_hf.adaptation import add_lora, default_lora_config, merge_adapter
from maep_hf.growth import grow_local_branch


def pixels_for(model):
    side = model.config.image_size
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("residual", "channels", "layers"), [(True, 9, None), (True, None, 3), (False, 8, 4), (True, None, None)]
)
def test_it_starts_as_the_same_function(residual, channels, layers):
    model = tiny_purifier(residual=residual)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grown = grow_local_branch(model, channels, layers)
    assert grown.config.local_branch_channels == (channels or model.config.local_branch_channels)
    assert len(grown.local_branch.layers) == (layers or model.config.local_branch_layers)
    x = pixels_for(model)
    noise = torch.rand(2, model.config.num_patches)
    for mask_ratio in (0.0, 0.5):
        options = {"mask_ratio": mask_ratio, "noise": noise}
        expected, found = (each(x, **options).purified_pixel_values for each in (model, grown))
        assert not torch.equal(expected, x)  # it does something
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_training_reaches_every_new_weight():
    model = tiny_purifier()
    grown = grow_local_branch(
        model, 2 * model.config.local_branch_channels, model.config.local_branch_layers + 1
    ).train()
    new = ("local_branch", "decoder.head")
    weights = {name: w for name, w in grown.named_parameters() if name.startswith(new) and name.endswith("weight")}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        grown(pixels_for(model), mask_ratio=0.5).purified_pixel_values.square().mean().backward()
        optimizer.step()
    moved = {name: (weight != start[name]).flatten(1).any(1).all() for name, weight in weights.items()}
    assert len(moved) > 4 and all(moved.values()), moved


def test_mode_precision_and_a_saved_copy(tmp_path):
    model = tiny_purifier().to(torch.bfloat16).eval()
    grown = grow_local_branch(model, 16)
    assert grown.dtype == torch.bfloat16 and not grown.training and grow_local_branch(model.train(), 16).training
    assert grown.config.dtype == torch.bfloat16
    model.set_attn_implementation("eager")
    assert grow_local_branch(model, 16).config._attn_implementation == "eager"
    grown.save_pretrained(tmp_path)
    again = MAEPModel.from_pretrained(tmp_path)
    assert again.config.local_branch_channels == 16
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in grown.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 1}, r"local_branch_channels=1: the purifier to start from has \d+"),
        ({"layers": 0}, r"local_branch_layers=0: the purifier to start from has \d+"),
    ],
)
def test_it_does_not_shrink(options, message):
    with pytest.raises(ValueError, match=message):
        grow_local_branch(tiny_purifier(), **options)


def test_nothing_to_grow():
    with pytest.raises(ValueError, match="local_branch_channels: this purifier has no local branch"):
        grow_local_branch(tiny_purifier(local_branch_layers=0), 8)


@pytest.mark.parametrize("targets", [None, ["conv1"]])  # those of the local branch are copied apart
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: model.get_base_model(), merge_adapter])
def test_an_adapter_is_merged_before_it_grows(targets, wrap):
    base = tiny_purifier()
    model = wrap(add_lora(base, default_lora_config(base, "decoder", targets=targets)))
    if wrap is merge_adapter:
        x = pixels_for(model)
        torch.testing.assert_close(grow_local_branch(model, 12).purify(x), model.purify(x), atol=1e-6, rtol=0)
    else:
        with pytest.raises(ValueError, match="not named as a plain purifier's .*merge the adapter first"):
            grow_local_branch(model, 12)


def test_a_compiled_purifier_is_passed_uncompiled():
    with pytest.raises(ValueError, match="_orig_mod.*pass the uncompiled model"):
        grow_local_branch(torch.compile(tiny_purifier(), backend="eager"), 12)


def test_finetuning_a_wider_one_and_going_on(image_folder, classifier_folder, purifier_folder, tmp_path):
    def arguments(folder):
        return words(
            dataset=image_folder, surrogates=[classifier_folder], model=purifier_folder, max_steps=4, save_steps=2,
            local_branch_channels=12, per_device_train_batch_size=2, warmup_steps=0, attack_steps=2, eval_steps=4,
            logging_steps=1, validation_images=2, cpu_threads=1, output_dir=folder,
        )  # fmt: skip

    whole = run("finetune", arguments(tmp_path / "whole"))
    model = MAEPModel.from_pretrained(whole)
    assert model.config.local_branch_channels == 12
    record = json.loads((whole / "run.json").read_text())["arguments"]["finetune"]
    assert record["local_branch_channels"] == 12 and record["local_branch_layers"] is None
    run("finetune", arguments(tmp_path / "parts"), stop=("log", 3))
    resumed = MAEPModel.from_pretrained(run("finetune", arguments(tmp_path / "parts")))
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in model.state_dict().items())


def test_an_adapter_does_not_grow():
    with pytest.raises(ValueError, match="local_branch_channels, local_branch_layers: need trainable=all"):
        load_script("finetune").FinetuneArguments(trainable="decoder_lora", local_branch_layers=6)
