"""LoRA on a purifier: the right weights move, the rest stay bit for bit, and the saved adapter is the merged model."""

import copy
import json
import shutil

import pytest
import torch
from conftest import ROOT, tiny_purifier
from peft import IA3Config, KasaConfig, LoraConfig, PeftModel, get_peft_model
from running import assert_same_run, checkpoints, run, words
from safetensors.torch import load_file, save_file
from torch import nn

from maep_hf import MAEPModel
from maep_hf.adaptation import (
    LINEAR_LAYERS,
    add_lora,
    default_lora_config,
    describe_base,
    is_untrained,
    load_adapter,
    merge_adapter,
    save_adapter,
    save_adapter_run,
    switch_adapter,
    trainable_share,
)
from maep_hf.checkpoints import CheckpointError, load_purifier
from maep_hf.storage import store_weights
from maep_hf.tensors import weights_fingerprint


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


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scope": "head"}, "scope='head'"),
        ({"rank": 0}, "rank=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"targets": []}, "targets: name at least one"),
        ({"targets": "q_proj"}, "targets='q_proj': must be a list"),
        ({"targets": ["q_proj", "query"]}, "no linear or convolution layer 'query'.*fc1, fc2, head, k_proj, .*q_proj"),
        ({"targets": ["projection"], "scope": "decoder"}, "none of encoder.projection is in scope 'decoder'"),
        ({"targets": ["layernorm"]}, "'layernorm'"),
        ({"targets": ["proj"]}, "'proj'"),
    ],
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        default_lora_config(tiny_purifier(), **options)


@pytest.mark.parametrize("local", [1, 0])
def test_all_targets_every_layer_but_the_head_which_is_trained_whole(local):
    model = adapted(tiny_purifier(local_branch_layers=local), targets=["all"], rank=1)
    found = {name.removesuffix(".lora_A.default.weight") for name, _ in model.named_parameters() if ".lora_A" in name}
    base = tiny_purifier(local_branch_layers=local)
    layers = {f"base_model.model.{n}" for n, m in base.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    head = f"base_model.model.{'local_branch' if local else 'decoder'}.head"
    assert found == layers - {head}
    assert any(name.startswith(f"{head}.modules_to_save") for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("targets", "scope", "layers"),
    [
        (["q_proj", "v_proj"], "all", 4),
        (["q_proj", "v_proj"], "decoder", 2),
        (["q_proj", "projection"], "decoder", 1),
        (["decoder.embed", "encoder.layers.0.mlp.fc1"], "all", 2),
        (["conv1"], "decoder", 1),
        (["local_branch.head", "fc1"], "all", 3),
    ],
)
def test_targets_are_chosen_by_name(targets, scope, layers):
    model, pixels = adapted(tiny_purifier(), targets=targets, scope=scope, rank=2).eval(), torch.rand(1, 3, 16, 16)
    found = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(found) == layers
    assert all(any(name.endswith(f".{target}") for target in targets) for name in found)
    saved = any(".modules_to_save." in name for name, _ in model.named_parameters())
    assert saved == ("local_branch.head" not in targets)
    before = purified(model, pixels)
    nudge(model)
    assert (purified(model, pixels) - before).abs().max() > 1e-4


def test_an_untrained_purifier_is_refused():
    model = tiny_purifier(trained=False)
    assert is_untrained(model) and not is_untrained(tiny_purifier())
    with pytest.raises(ValueError, match="train/pretrain.py"):
        adapted(model)


def test_an_untrained_purifier_of_pixels_is_refused_too():
    with pytest.raises(ValueError, match="train/pretrain.py"):
        adapted(tiny_purifier(trained=False, residual=False))


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
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
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


def test_an_adapter_of_the_released_purifier_is_small(tmp_path):
    released = ROOT / "checkpoints" / "maep-tiny-cifar10"
    base = MAEPModel.from_pretrained(released)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    model = add_lora(base, default_lora_config(base))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable_share(model) == trainable / parameters
    assert 0.03 < trainable_share(model) < 0.05
    save_adapter(model, tmp_path)
    store_weights(tmp_path, "float16")  # as the released ones are
    whole = (released / "model.safetensors").stat().st_size
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 0.05 * whole


# --- adapters on a base --------------------------------------------------------------------------------------------


@torch.no_grad()
def purified(model, pixels):
    return (model.get_base_model() if isinstance(model, PeftModel) else model).purify(pixels)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """The folder of a base and two adapters of it, pixels, and what the base and each adapter makes of them."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny_purifier().save_pretrained(folder / "base")
    pixels = torch.rand(2, 3, 20, 33, generator=torch.Generator().manual_seed(0))
    outputs = {None: purified(MAEPModel.from_pretrained(folder / "base").eval(), pixels)}
    for name, rank in (("one", 2), ("two", 3)):
        model = adapted(MAEPModel.from_pretrained(folder / "base"), rank=rank)
        for _ in range(rank - 1):
            nudge(model)
        save_adapter(model, folder / name)
        outputs[name] = purified(model.eval(), pixels)
    for first, second in ((None, "one"), (None, "two"), ("one", "two")):
        assert (outputs[first] - outputs[second]).abs().max() > 1e-3
    return folder, pixels, outputs


def assert_purifies_to(model, pixels, expected) -> None:
    torch.testing.assert_close(purified(model, pixels), expected, atol=1e-6, rtol=0)


def by_peft(folder, names):
    model = PeftModel.from_pretrained(MAEPModel.from_pretrained(folder / "base"), folder / names[0], names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, name)
    return model.eval()


def by_transformers(folder, names):
    model = MAEPModel.from_pretrained(folder / "base")
    for name in names:
        model.load_adapter(str(folder / name), adapter_name=name)
    return model.eval()


def by_maep(folder, names):
    model = MAEPModel.from_pretrained(folder / "base")
    for name in names:
        model = load_adapter(model, folder / name, name)
    return model.eval()


every_loader = pytest.mark.parametrize("load", [by_peft, by_transformers, by_maep])


@every_loader
def test_every_way_of_loading_gives_the_adapters_output(adapters, load):
    folder, pixels, outputs = adapters
    for name in ("one", "two"):
        assert_purifies_to(load(folder, [name]), pixels, outputs[name])


def test_an_adapter_is_loaded_by_its_folder_alone(adapters, tmp_path, monkeypatch):
    """Merged into the base that its configuration names: by a path from here, or from the adapter's folder."""
    folder, pixels, outputs = adapters
    for base, here in (("base", folder), ("../base", tmp_path), (str(folder / "base"), tmp_path)):
        monkeypatch.chdir(here)
        adapter = folder / f"named-{len(base)}"
        shutil.copytree(folder / "one", adapter)
        config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        merged = load_purifier(adapter)
        assert type(merged) is MAEPModel and not any(parameter.requires_grad for parameter in merged.parameters())
        torch.testing.assert_close(merged.purify(pixels), outputs["one"], atol=1e-4, rtol=0)
        assert load_purifier(adapter, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("base", "message"), [(None, "does not say its base"), ("nowhere/at/all", "nowhere/at/all: no such folder")]
)
def test_an_adapter_without_its_base_is_refused(adapters, tmp_path, base, message):
    shutil.copytree(adapters[0] / "one", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(ValueError, match=message):
        load_purifier(tmp_path / "adapter")


def test_the_head_is_loaded_with_the_adapter(adapters):
    folder, pixels, outputs = adapters
    model = by_transformers(folder, ["one"])
    with torch.no_grad():
        model.local_branch.head.modules_to_save["one"].weight.copy_(model.local_branch.head.original_module.weight)
    assert (purified(model, pixels) - outputs["one"]).abs().max() > 1e-3


@every_loader
def test_adapters_are_switched_at_run_time(adapters, load):
    folder, pixels, outputs = adapters
    model = load(folder, ["one", "two"])
    for name in ("one", "two", None, "one", None, "two"):
        switch_adapter(model, name)
        assert_purifies_to(model, pixels, outputs[name])
        adapter_weights = [p for key, p in model.named_parameters() if ".lora_" in key or ".modules_to_save." in key]
        assert len(adapter_weights) == 2 * (2 * 12 + 2) and not any(p.requires_grad for p in adapter_weights)
    switch_adapter(model, "one", trainable=True)
    moving = {key for key, p in model.named_parameters() if p.requires_grad and (".one" in key or ".two" in key)}
    assert len(moving) == 2 * 12 + 2 and all(".one." in key for key in moving)
    with pytest.raises(ValueError, match="'three': this purifier has one, two"):
        switch_adapter(model, "three")


def test_the_adapter_loaded_last_is_active(adapters):
    folder, pixels, outputs = adapters
    for load in (by_maep, by_transformers):
        assert_purifies_to(load(folder, ["one", "two"]), pixels, outputs["two"])
        assert_purifies_to(load(folder, ["two", "one"]), pixels, outputs["one"])
    model = by_transformers(folder, ["one"])
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".lora_" in key)
    model.load_adapter(str(folder / "two"))  # by no name
    assert_purifies_to(model, pixels, outputs["two"])
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".lora_" in key)
    trained = MAEPModel.from_pretrained(folder / "base")
    trained.load_adapter(str(folder / "one"), "one", is_trainable=True)
    assert all(p.requires_grad for key, p in trained.named_parameters() if ".lora_" in key or "modules_to_save" in key)


@pytest.mark.parametrize("trainable", [False, True])
def test_it_is_active_alone_beside_one_that_the_base_loaded_by_itself(adapters, trainable):
    folder, pixels, outputs = adapters
    model = load_adapter(by_transformers(folder, ["one"]), folder / "two", "two", trainable=trainable).eval()
    moving = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert bool(moving) == trainable and all(".two." in name for name in moving)
    assert_purifies_to(model, pixels, outputs["two"])
    for name in ("one", None, "two"):
        switch_adapter(model, name)
        assert_purifies_to(model, pixels, outputs[name])


def test_loading_to_go_on_training(adapters):
    folder = adapters[0]
    for again in (False, True):
        model = load_adapter(MAEPModel.from_pretrained(folder / "base"), folder / "one", "one", trainable=again)
        assert (trainable_share(model) > 0) == again
    model = load_adapter(model, folder / "two", "two", trainable=True)
    moving = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moving and all(".two." in name for name in moving)


@every_loader
def test_no_adapters_and_a_taken_name(adapters, load):
    folder = adapters[0]
    with pytest.raises(ValueError, match="no adapters"):
        switch_adapter(MAEPModel.from_pretrained(folder / "base"), "one")
    with pytest.raises(ValueError, match="name='one'.*give another"):
        load_adapter(load(folder, ["one"]), folder / "two", "one")


@every_loader
def test_a_second_adapter_is_loaded_and_not_added(adapters, load):
    model = load(adapters[0], ["one"])
    config = default_lora_config(model, rank=2)
    with pytest.raises(ValueError, match="model: it has an adapter already; merge_adapter it, or load_adapter"):
        add_lora(model, config)


def test_after_merging_an_adapter_another_is_added_or_loaded(adapters):
    folder, pixels, outputs = adapters
    base = merge_adapter(by_maep(folder, ["one"]))
    torch.testing.assert_close(purified(adapted(base).eval(), pixels), outputs["one"], atol=1e-4, rtol=0)
    base = merge_adapter(by_maep(folder, ["one"]))
    assert list(load_adapter(base, folder / "two", "one", allow_other_base=True).peft_config) == ["one"]


def test_an_adapter_that_is_switched_off_is_neither_saved_nor_merged(adapters, tmp_path):
    folder, pixels, outputs = adapters
    model = by_maep(folder, ["one"])
    switch_adapter(model, None)
    for refused in (lambda: save_adapter(model, tmp_path / "saved"), lambda: merge_adapter(model)):
        with pytest.raises(ValueError, match=r"model: no adapter is active; switch_adapter\(model, NAME\) first"):
            refused()
    assert not (tmp_path / "saved").exists()
    switch_adapter(model, "one")
    torch.testing.assert_close(purified(merge_adapter(model), pixels), outputs["one"], atol=1e-4, rtol=0)


def test_a_purifier_with_adapters_of_its_own_is_neither_saved_nor_merged(adapters, tmp_path):
    for model in (by_transformers(adapters[0], ["one"]), tiny_purifier()):
        with pytest.raises(ValueError, match="model: a MAEPModel itself.*load_adapter of maep_hf.adaptation"):
            save_adapter(model, tmp_path / "saved")
        with pytest.raises(ValueError, match="model: a MAEPModel itself.*load_adapter of maep_hf.adaptation"):
            merge_adapter(model)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_a_merge_has_one_thread_and_gives_the_others_back(fails):
    class Adapted(nn.Module):
        def merge_and_unload(self):
            if fails:
                raise ValueError("cannot be merged")
            return torch.get_num_threads()

    torch.set_num_threads(2)
    if fails:
        with pytest.raises(ValueError, match="cannot be merged"):
            merge_adapter(Adapted())
    else:
        assert merge_adapter(Adapted()) == 1
    assert torch.get_num_threads() == 2


@every_loader
def test_the_base_below_is_known_by_its_weights(adapters, load):
    folder = adapters[0]
    base = MAEPModel.from_pretrained(folder / "base")
    expected = json.loads((folder / "one" / "base_model.json").read_text())
    assert describe_base(base) == expected == describe_base(load(folder, ["one", "two"]))
    assert describe_base(tiny_purifier(window_overlap=0.5)) == expected  # options are not weights
    with torch.no_grad():
        base.encoder.layernorm.bias[0] += 1e-6
    assert describe_base(base)["fingerprint"] != expected["fingerprint"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"hidden_size": 32}, r"its encoder.layers.0.* is \(32, 32\), the adapter's lora_A \(2, 16\)"),
        ({"local_branch_channels": 16}, r"local_branch.head.weight is \(3, 16, 3, 3\)"),
        ({"num_hidden_layers": 2}, "nothing for encoder.layers.1"),
        ({"decoder_num_hidden_layers": 2}, "nothing for decoder.layers.1"),
    ],
)
def test_a_base_of_another_shape_is_refused(adapters, changed, named):
    with pytest.raises(ValueError, match=f"not the base.*{named}"):
        load_adapter(tiny_purifier(**changed), adapters[0] / "one")


def test_an_adapter_with_more_layers_than_the_base_is_refused(tmp_path):
    save_adapter(adapted(tiny_purifier(num_hidden_layers=2), rank=2), tmp_path)
    with pytest.raises(ValueError, match="not the base.*it has no encoder.layers.1"):
        load_adapter(tiny_purifier(), tmp_path)


def test_a_base_with_other_weights_is_refused_unless_asked(adapters):
    folder, pixels, outputs = adapters
    other = tiny_purifier().eval()
    with torch.no_grad():
        other.encoder.projection.weight.mul_(1.5)
    with pytest.raises(ValueError, match="other weights than these.*allow_other_base"):
        load_adapter(other, folder / "one")
    assert not any("lora" in name for name, _ in other.named_parameters())  # nothing was put on it
    model = load_adapter(other, folder / "one", allow_other_base=True).eval()
    assert (purified(model, pixels) - outputs["one"]).abs().max() > 1e-4


def test_half_precision_is_the_same_base(adapters, caplog):
    folder, pixels, outputs = adapters
    model = load_adapter(MAEPModel.from_pretrained(folder / "base", dtype=torch.bfloat16), folder / "one").eval()
    assert "its weights cannot be compared" in caplog.text
    torch.testing.assert_close(purified(model, pixels), outputs["one"], atol=0.05, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_is_known_however_it_came_there(adapters, tmp_path, dtype):
    folder, pixels, _ = adapters
    model = varied(MAEPModel.from_pretrained(folder / "base", dtype=dtype), {})
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "base_model.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    for base in (
        MAEPModel.from_pretrained(folder / "base", dtype=dtype),
        MAEPModel.from_pretrained(folder / "base").to(dtype),
    ):
        torch.testing.assert_close(purified(load_adapter(base, tmp_path).eval(), pixels), purified(model, pixels))
    other = MAEPModel.from_pretrained(folder / "base", dtype=dtype)
    with torch.no_grad():
        other.encoder.projection.weight.mul_(1.5)
    with pytest.raises(ValueError, match="other weights than these"):
        load_adapter(other, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(folder / "base")})
    )
    assert load_purifier(tmp_path).dtype == dtype


def test_what_is_no_lora_adapter_is_refused(adapters, tmp_path):
    for source in (adapters[0] / "base", tmp_path):
        with pytest.raises(ValueError, match="neither a folder nor a Hub id with a PEFT adapter"):
            load_adapter(tiny_purifier(), source)
    config = IA3Config(target_modules=["fc2"], feedforward_modules=["fc2"])
    get_peft_model(tiny_purifier(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="IA3, not LoRA"):
        load_adapter(tiny_purifier(), tmp_path)


def test_an_adapter_of_peft_alone_loads_too(adapters, tmp_path):
    """Without the record of its base only shapes can be compared."""
    folder, pixels, _ = adapters
    model = get_peft_model(MAEPModel.from_pretrained(folder / "base"), LoraConfig(r=2, target_modules=["fc1"]))
    nudge(model)
    model.save_pretrained(tmp_path)
    expected = purified(model.eval(), pixels)
    loaded = load_adapter(MAEPModel.from_pretrained(folder / "base"), tmp_path).eval()
    assert_purifies_to(loaded, pixels, expected)


@pytest.mark.parametrize("load", [by_peft, by_maep])
def test_merging_keeps_the_output(adapters, load):
    folder, pixels, outputs = adapters
    merged = load(folder, ["one"]).merge_and_unload()
    assert isinstance(merged, MAEPModel) and not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(purified(merged, pixels), outputs["one"], atol=1e-4, rtol=0)


def test_the_active_adapter_is_saved_flat_whatever_its_name(adapters, tmp_path):
    folder, pixels, outputs = adapters
    model = by_maep(folder, ["one", "two"])
    for name in ("one", "two"):
        switch_adapter(model, name)
        save_adapter(model, tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            "adapter_config.json", "adapter_model.safetensors", "base_model.json",
        }  # fmt: skip
        loaded = load_adapter(MAEPModel.from_pretrained(folder / "base"), tmp_path / name).eval()
        assert_purifies_to(loaded, pixels, outputs[name])
        other = tiny_purifier().eval()
        with torch.no_grad():
            other.encoder.projection.weight.mul_(1.5)
        with pytest.raises(ValueError, match="other weights than these"):
            load_adapter(other, tmp_path / name)


def test_several_active_adapters_are_not_saved_into_one_folder(tmp_path):
    model = get_peft_model(tiny_purifier(), LoraConfig(target_modules=["fc1"]), "one")
    model.add_adapter("two", LoraConfig(target_modules=["fc1"]))
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="2 adapters are active .one, two.*switch_adapter"):
        save_adapter(model, tmp_path / "both")
    assert not (tmp_path / "both").exists()


# --- what a base was before its adapters changed it ----------------------------------------------------------------


def varied(base, changed, **options):
    """A trained adapter with PEFT's settings in place of ours, and what it makes of the pixels."""
    config = default_lora_config(base, rank=2, **options)
    for name, value in changed.items():
        setattr(config, name, value)
    model = add_lora(base, config)
    nudge(model)
    return model.eval()


def of_peft_alone(folder, **options):
    """A trained adapter of which this package knows no base."""
    model = get_peft_model(MAEPModel.from_pretrained(folder / "base"), LoraConfig(r=2, **options))
    nudge(model)
    return model.eval()


def merge(model):
    model.merge_adapter()
    return model


def merge_and_unmerge(model):
    merge(model).unmerge_adapter()
    return model


def merge_a_copy(model):
    return merge(copy.deepcopy(model))


def by_add_lora(folder, names):
    return adapted(MAEPModel.from_pretrained(folder / "base"))


@pytest.mark.parametrize("load", [by_maep, by_add_lora])
@pytest.mark.parametrize("change", [merge, merge_and_unmerge, merge_a_copy])
def test_an_adapter_is_saved_while_or_after_it_is_merged(adapters, tmp_path, load, change):
    folder, pixels, _ = adapters
    model = load(folder, ["one"])
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # large, so that the sum rounds
            torch.nn.init.normal_(parameter, std=0.3)
    expected = purified(model.eval(), pixels)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model = change(model)
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items() if "base_layer" in key)
    save_adapter(model, tmp_path)
    recorded = json.loads((tmp_path / "base_model.json").read_text())
    assert recorded == json.loads((folder / "one" / "base_model.json").read_text())
    assert_purifies_to(load_adapter(MAEPModel.from_pretrained(folder / "base"), tmp_path).eval(), pixels, expected)


def test_the_bases_description_outlives_switches_and_copies(adapters, tmp_path):
    folder, pixels, outputs = adapters
    model = by_maep(folder, ["one", "two"])
    for name in (None, "two", "one"):
        switch_adapter(model, name)
    model = copy.deepcopy(merge_and_unmerge(model))
    assert describe_base(model) == describe_base(MAEPModel.from_pretrained(folder / "base"))
    save_adapter(model, tmp_path)
    loaded = load_adapter(MAEPModel.from_pretrained(folder / "base"), tmp_path).eval()
    assert_purifies_to(loaded, pixels, outputs["one"])


def test_the_bases_description_is_of_the_weights_that_a_checkpoint_brought(adapters):
    folder = adapters[0]
    model = by_add_lora(folder, [])
    before, state = describe_base(model), {name: value.clone() for name, value in model.state_dict().items()}
    own = {name: value for name, value in state.items() if ".lora_" in name or ".modules_to_save." in name}
    nudge(model)
    merge(model).load_state_dict(own, strict=False)
    assert describe_base(model) == before  # an adapter alone says nothing of the base
    model.unmerge_adapter()
    model.load_state_dict({name: value + 0.01 if "base_layer" in name else value for name, value in state.items()})
    changed = describe_base(model)
    assert changed != before and describe_base(merge_and_unmerge(model)) == changed
    model.load_state_dict(state)
    assert describe_base(merge(model)) == before
    model.load_state_dict(state)
    with pytest.raises(ValueError, match=r"merged.*model.unmerge_adapter\(\) first"):
        describe_base(model)
    with_biases = varied(MAEPModel.from_pretrained(folder / "base"), {"bias": "all"})
    with_biases.load_state_dict(with_biases.state_dict())  # its biases are trained: they are not the base's own
    assert describe_base(with_biases) == before


def test_a_merged_purifier_is_another_base(adapters):
    folder = adapters[0]
    merged = by_maep(folder, ["one"]).merge_and_unload()
    assert describe_base(merged) != describe_base(MAEPModel.from_pretrained(folder / "base"))
    with pytest.raises(ValueError, match="other weights than these"):
        load_adapter(merged, folder / "two")


def test_an_adapter_is_swapped_for_another_while_it_is_merged(adapters):
    folder, pixels, outputs = adapters
    model = merge(by_maep(folder, ["one"]))
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model = load_adapter(model, folder / "two", "two").eval()
    assert_purifies_to(model, pixels, outputs["two"])
    switch_adapter(model, "one")
    assert_purifies_to(model, pixels, outputs["one"])


def test_a_merged_adapter_of_peft_alone_is_to_be_unmerged_first(adapters, tmp_path):
    folder, pixels, outputs = adapters
    model = merge(by_peft(folder, ["one"]))
    with pytest.raises(ValueError, match=r"merged.*model.unmerge_adapter\(\) first"):
        save_adapter(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match=r"merged.*model.unmerge_adapter\(\) first"):
        load_adapter(model, folder / "two", "two")
    assert list(model.peft_config) == ["one"]
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model = load_adapter(model, folder / "two", "two", allow_other_base=True).eval()
    assert_purifies_to(model, pixels, outputs["two"])


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_an_initialisation_that_changes_the_base_is_refused(start):
    base = tiny_purifier()
    config, before = default_lora_config(base, rank=2), describe_base(base)
    config.init_lora_weights = start
    with pytest.raises(ValueError, match=f"config: init_lora_weights='{start}' moves a part of the base"):
        add_lora(base, config)
    assert describe_base(base) == before and not any("lora" in name for name, _ in base.named_parameters())


def test_kasa_which_truncates_the_base_is_refused():
    config = default_lora_config(tiny_purifier(), rank=2)
    config.kasa_config = KasaConfig()
    with pytest.raises(ValueError, match="config: kasa_config moves a part of the base"):
        add_lora(tiny_purifier(), config)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", False])
def test_other_initialisations_leave_the_base(adapters, tmp_path, start):
    folder, pixels, _ = adapters
    model = varied(MAEPModel.from_pretrained(folder / "base"), {"init_lora_weights": start})
    save_adapter(model, tmp_path)
    loaded = load_adapter(MAEPModel.from_pretrained(folder / "base"), tmp_path).eval()
    assert_purifies_to(loaded, pixels, purified(model, pixels))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_pissa_of_peft_alone_is_loaded_alone_and_not_saved(adapters, tmp_path, start):
    folder, pixels, _ = adapters
    model = of_peft_alone(folder, target_modules=["fc1", "q_proj"], init_lora_weights=start)
    with pytest.raises(ValueError, match=f"'{start}' moved a part.*path_initial_model_for_weight_conversion"):
        save_adapter(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "peft")
    loaded = load_adapter(MAEPModel.from_pretrained(folder / "base"), tmp_path / "peft", start).eval()
    assert_purifies_to(loaded, pixels, purified(model, pixels))
    with pytest.raises(ValueError, match=f"{start} .init_lora_weights='{start}'. changes weights of the base"):
        load_adapter(loaded, folder / "one", "one")
    with pytest.raises(ValueError, match=f"this one .init_lora_weights='{start}'. changes weights of the base"):
        load_adapter(by_maep(folder, ["one"]), tmp_path / "peft", start)
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}' changed weights of the base itself"):
        switch_adapter(loaded, None)
    switch_adapter(loaded, start)


KINDS = [
    {"use_dora": True}, {"bias": "lora_only"}, {"bias": "all"}, {"bias": "all", "use_dora": True},
    {"lora_bias": True}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 1}},
]  # fmt: skip


@pytest.mark.parametrize("targets", [None, ["all"]])  # those of every layer are convolutions too
@pytest.mark.parametrize("changed", KINDS, ids=str)
def test_every_kind_of_lora_loads_as_by_peft_alone(adapters, tmp_path, changed, targets):
    folder, pixels, _ = adapters
    model = varied(MAEPModel.from_pretrained(folder / "base"), changed, targets=targets)
    expected = purified(model, pixels)
    save_adapter(model, tmp_path)
    loaded = load_adapter(MAEPModel.from_pretrained(folder / "base"), tmp_path).eval()
    by_peft_alone = PeftModel.from_pretrained(MAEPModel.from_pretrained(folder / "base"), tmp_path).eval()
    assert torch.equal(purified(by_peft_alone, pixels), expected)
    assert torch.equal(purified(loaded, pixels), expected)
    torch.testing.assert_close(load_purifier(tmp_path).purify(pixels), expected, atol=1e-4, rtol=0)
    save_adapter(loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "base_model.json").read_text()) == describe_base(
        MAEPModel.from_pretrained(folder / "base")
    )


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"use_dora": True}, r"its encoder.layers.0.* is \(32, 16\), the adapter's lora_magnitude_vector \(16,\)"),
        ({"bias": "all"}, r"its .*bias is \(32,\), the adapter's own \(16,\)"),
    ],
)
def test_magnitudes_and_biases_of_another_shape_are_refused(adapters, tmp_path, changed, named):
    save_adapter(varied(MAEPModel.from_pretrained(adapters[0] / "base"), changed), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    part = "lora_magnitude_vector" if "use_dora" in changed else "base_layer.bias"
    name = f"base_model.model.encoder.layers.0.mlp.fc1.{part}"
    save_file(weights | {name: weights[name][:16].clone()}, path)
    with pytest.raises(ValueError, match=f"not the base.*{named}"):
        load_adapter(MAEPModel.from_pretrained(adapters[0] / "base"), tmp_path)


def test_weights_unlike_the_adapters_configuration_are_refused(adapters, tmp_path):
    folder = adapters[0]
    for name in ("headless", "rank"):
        shutil.copytree(folder / "two", tmp_path / name)
    path = tmp_path / "headless" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "head" not in name}, path)
    path = tmp_path / "rank" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 8}))
    base = MAEPModel.from_pretrained(folder / "base")
    with pytest.raises(ValueError, match=r"headless: .*nothing for local_branch.head.*modules_to_save.*save it again"):
        load_adapter(base, tmp_path / "headless")
    with pytest.raises(ValueError, match=r"rank: its weights are not those of its adapter_config.json: r=8, .*\(3, "):
        load_adapter(base, tmp_path / "rank")
    assert not any("lora" in name for name, _ in base.named_parameters())  # nothing was put on it


def test_an_adapter_may_have_the_name_of_a_part(adapters):
    model = load_adapter(by_maep(adapters[0], ["one"]), adapters[0] / "two", "decoder", trainable=True)
    moving = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(moving) == 2 * 12 + 2 and not any(".one." in name for name in moving)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_the_adapters_and_not_another_base(adapters, tmp_path, bias):
    folder, pixels, _ = adapters
    base = load_file(folder / "base" / "model.safetensors")
    model = varied(MAEPModel.from_pretrained(folder / "base"), {"bias": bias})
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    model(
        pixel_values=pixels[:, :, :16, :16], clean_pixel_values=pixels[:, :, :16, :16], mask_ratio=0.0
    ).loss.backward()
    optimizer.step()
    now = {key.removeprefix("base_model.model.").replace(".base_layer", ""): v for key, v in model.state_dict().items()}
    moved = {name for name, value in base.items() if name in now and not torch.equal(now[name], value)}
    assert moved and all(name.endswith(".bias") for name in moved)
    save_adapter(model, tmp_path)
    assert (tmp_path / "base_model.json").read_text() == (folder / "one" / "base_model.json").read_text()
    loaded = load_adapter(MAEPModel.from_pretrained(folder / "base"), tmp_path, bias).eval()
    assert torch.equal(purified(loaded, pixels), purified(model, pixels))
    other = tiny_purifier()
    with torch.no_grad():
        other.encoder.layernorm.bias.add_(0.1)  # a base that differs in a bias alone is another one still
    with pytest.raises(ValueError, match="other weights than these"):
        load_adapter(other, tmp_path)
    with pytest.raises(ValueError, match=f"{bias} .bias='{bias}'. changes weights of the base"):
        load_adapter(loaded, folder / "one", "one")
    with pytest.raises(ValueError, match=f"this one .bias='{bias}'. changes weights of the base"):
        load_adapter(by_maep(folder, ["one"]), tmp_path, bias)
    with pytest.raises(ValueError, match=f"bias='{bias}' changed weights of the base itself"):
        switch_adapter(loaded, None)
    with pytest.raises(ValueError, match=r"merged into its base; call model.unmerge_adapter\(\) first"):
        save_adapter(merge(loaded), tmp_path / "merged")


def test_trained_biases_over_an_unknown_base_are_not_saved(adapters, tmp_path):
    model = of_peft_alone(adapters[0], target_modules=["fc1"], bias="lora_only")
    with pytest.raises(ValueError, match="bias='lora_only' trains the base's own biases.*add_lora or load_adapter"):
        save_adapter(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_digests_of_weights_stay_what_records_hold():
    """Of fixed weights, in words of today: who changes a digest makes every record one of other weights."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    with torch.no_grad():
        for index, value in enumerate(model.state_dict().values()):
            value.copy_((torch.arange(value.numel()) - index).reshape(value.shape) / 8)
        model[0].bias[0] = -0.0
    assert describe_base(model) == {"fingerprint": "b64cc9b9db4b2119", "dtype": "float32,int64"}
    assert weights_fingerprint(model) == "bcbf5ea4c6ce320b"
    assert describe_base(model.half()) == {"fingerprint": "837cd619e247d34f", "dtype": "float16,int64"}
    assert weights_fingerprint(model) == "048006265f628120"


# --- stage 2: LoRA on the decoder ----------------------------------------------------------------------------------


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
