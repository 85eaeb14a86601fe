"""LoRA on a purifier: the right weights move, the rest stay bit for bit, and the saved adapter is the merged model."""

import json

import pytest
import torch
from conftest import tiny_purifier
from peft import PeftModel
from running import assert_same_run, checkpoints, run, words
from safetensors.torch import load_file

from maep_hf import MAEPModel
from maep_hf.adaptation import LINEAR_LAYERS, add_lora, default_lora_config, is_untrained, save_adapter_run
from maep_hf.checkpoints import CheckpointError


def adapted(model, **options):
    return add_lora(model, default_lora_config(model, **options))


def nudge(model) -> None:
    """Move the trainable weights, as training would."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


@pytest.mark.parametrize(("scope", "layers"), [("decoder", 1), ("all", 2)])
def test_lora_finds_its_targets(scope, layers):
    model = adapted(tiny_purifier(), scope=scope, rank=2)
    targets = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(targets) == 6 * layers
    assert any("encoder" in name for name in targets) == (scope == "all")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or "local_branch.head.modules_to_save" in name for name in trainable)
    assert any("head" in name for name in trainable)


def test_without_a_local_branch_the_decoders_head_is_trained():
    model = tiny_purifier(trained=False, local_branch_layers=0)
    assert is_untrained(model)
    torch.nn.init.normal_(model.decoder.head.weight, std=0.02)
    trainable = [name for name, p in adapted(model, scope="decoder").named_parameters() if p.requires_grad]
    assert any("decoder.head.modules_to_save" in name for name in trainable)


def test_scale_is_twice_the_rank_by_default():
    assert default_lora_config(tiny_purifier(), rank=4).lora_alpha == 8
    assert default_lora_config(tiny_purifier(), rank=4, alpha=1, dropout=0.1).lora_alpha == 1
    assert LINEAR_LAYERS in default_lora_config(tiny_purifier()).target_modules


@pytest.mark.parametrize(("options", "named"), [({"scope": "head"}, "scope='head'"), ({"rank": 0}, "rank=0")])
def test_bad_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        default_lora_config(tiny_purifier(), **options)


def test_an_untrained_purifier_is_refused():
    model = tiny_purifier(trained=False)
    assert is_untrained(model) and not is_untrained(tiny_purifier())
    with pytest.raises(ValueError, match="train/pretrain.py"):
        adapted(model)


def test_a_fresh_adapter_changes_nothing():
    model, x = tiny_purifier().eval(), torch.rand(2, 3, 16, 16)
    before = model.purify(x)
    torch.testing.assert_close(adapted(model).eval().purify(x), before, atol=1e-6, rtol=0)


def test_activation_checkpointing_reaches_the_adapter():
    gradients = []
    for recompute in (False, True):
        model = adapted(tiny_purifier(), scope="all", rank=2)
        nudge(model)
        if recompute:
            model.activation_checkpointing_enable()
        x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        model.train()(pixel_values=x, clean_pixel_values=1 - x, mask_ratio=0.0).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, recomputed = gradients
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-4)


def test_saved_adapter_equals_merged_purifier(tmp_path):
    tiny_purifier().save_pretrained(tmp_path / "base")
    model = adapted(MAEPModel.from_pretrained(tmp_path / "base"), scope="all", rank=2)
    nudge(model)
    model.eval()
    x = torch.rand(3, 3, 20, 40)
    before = model.purify(x)
    save_adapter_run(model, tmp_path / "run")
    torch.testing.assert_close(model.purify(x), before, atol=0, rtol=0)  # the model itself was not merged
    base = MAEPModel.from_pretrained(tmp_path / "base")
    assert (base.eval().purify(x) - before).abs().max() > 1e-3
    loaded = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    torch.testing.assert_close(loaded.purify(x), before, atol=1e-6, rtol=0)
    merged = MAEPModel.from_pretrained(tmp_path / "run").eval()
    torch.testing.assert_close(merged.purify(x), before, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def lora_words(image_folder, classifier_folder, purifier_folder):
    def build(output_dir, **changed) -> list[str]:
        usual = {
            "dataset": image_folder, "surrogates": [classifier_folder], "model": purifier_folder,
            "trainable": "decoder_lora", "lora_rank": 2, "per_device_train_batch_size": 4, "max_steps": 4,
            "warmup_steps": 0, "learning_rate": 0.05, "ema_decay": 0.5, "mask_ratio": 0, "attack_steps": 2,
            "logging_steps": 1, "eval_steps": 4, "save_steps": 2, "validation_images": 4, "cpu_threads": 1,
            "output_dir": output_dir,
        }  # fmt: skip
        return words(**usual | changed)

    return build


@pytest.fixture(scope="module")
def lora_run(lora_words, tmp_path_factory):
    return run("finetune", lora_words(tmp_path_factory.mktemp("lora") / "run"))


def test_finetuning_leaves_the_base_weights_alone(lora_run, purifier_folder):
    base = load_file(purifier_folder / "model.safetensors")
    trained = load_file(lora_run / "checkpoints" / checkpoints(lora_run)[-1] / "model.safetensors")
    frozen = {}
    for name, value in trained.items():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
        frozen[plain] = value
    assert frozen.keys() == base.keys()
    assert all(torch.equal(value, base[name]) for name, value in frozen.items())
    merged = load_file(lora_run / "model.safetensors")
    changed = {name for name, value in merged.items() if not torch.equal(value, base[name])}
    assert changed and all(name.startswith(("decoder.layers", "local_branch.head")) for name in changed)


def test_the_runs_adapter_equals_its_purifier(lora_run, purifier_folder):
    base = MAEPModel.from_pretrained(purifier_folder).eval()
    merged = MAEPModel.from_pretrained(lora_run).eval()
    x = torch.rand(4, 3, 16, 16)
    expected = merged.purify(x)
    assert (base.purify(x) - expected).abs().max() > 1e-3
    config = json.loads((lora_run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(purifier_folder)
    loaded = PeftModel.from_pretrained(base, lora_run / "adapter").eval()
    torch.testing.assert_close(loaded.purify(x), expected, atol=1e-4, rtol=0)


def test_resuming_keeps_the_adapter(lora_run, lora_words, tmp_path):
    run("finetune", lora_words(tmp_path / "run"), stop=("log", 3))
    run("finetune", lora_words(tmp_path / "run"))
    assert_same_run(lora_run, tmp_path / "run")
    one, other = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (lora_run, tmp_path / "run")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_finetuning_refuses_what_is_no_trained_purifier(lora_words, tmp_path, classifier_folder):
    tiny_purifier(trained=False).save_pretrained(tmp_path / "untrained")
    with pytest.raises(ValueError, match="train/pretrain.py"):
        run("finetune", lora_words(tmp_path / "run", model=tmp_path / "untrained"))
    with pytest.raises(CheckpointError, match="not a purifier"):
        run("finetune", lora_words(tmp_path / "run", model=classifier_folder))
    with pytest.raises(CheckpointError, match="no such folder"):
        run("finetune", lora_words(tmp_path / "run", model=tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()
