"""Saving and loading: bit-equal, through the Auto classes, without the package, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import save_classifier
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, ViTMAEConfig, ViTMAEModel

from maep_hf import MAEPConfig, MAEPImageProcessor, MAEPModel
from maep_hf.adaptation import add_lora, default_lora_config, save_adapter
from maep_hf.checkpoints import CheckpointError, load_purifier
from maep_hf.classifier import load_classifier
from maep_hf.training.stages import load_trainable

SMALL = {
    "image_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
    "local_branch_layers": 1,
    "local_branch_channels": 4,
}
PIXELS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = MAEPModel(MAEPConfig(**SMALL)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    MAEPImageProcessor().save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize("loader", [MAEPModel, AutoModel])
def test_round_trip_is_bit_equal(model, folder, loader):
    loaded = loader.from_pretrained(folder)
    assert type(loaded) is MAEPModel and not loaded.training
    for (name, first), (_, second) in zip(
        [*model.named_parameters(), *model.named_buffers()],
        [*loaded.named_parameters(), *loaded.named_buffers()],
        strict=True,
    ):
        assert torch.equal(first, second), name
    assert torch.equal(loaded(PIXELS).purified_pixel_values, model(PIXELS).purified_pixel_values)
    assert loaded.encoder.position_embeddings.std() > 0.1 and loaded.decoder.position_embeddings.std() > 0.1


def test_normalisation_comes_from_the_configuration(folder):
    loaded = MAEPModel.from_pretrained(folder, image_mean=[0.1, 0.2, 0.3])
    torch.testing.assert_close(loaded.image_mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))


def test_auto_classes(folder):
    assert type(AutoConfig.from_pretrained(folder)) is MAEPConfig
    assert type(AutoImageProcessor.from_pretrained(folder)) is MAEPImageProcessor


def test_loading_options_of_transformers_still_work(folder):
    loaded, info = MAEPModel.from_pretrained(folder, output_loading_info=True, dtype=torch.bfloat16)
    assert not info["missing_keys"] and loaded.dtype == torch.bfloat16
    eager = MAEPModel.from_pretrained(folder, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"


def test_construction_on_the_meta_device():
    with torch.device("meta"):
        model = MAEPModel(MAEPConfig(**SMALL))
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_the_code_travels_with_the_weights_even_when_saved_again(folder, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    MAEPModel.from_pretrained(folder).save_pretrained(again)
    for place in (folder, again):
        assert {"configuration_maep.py", "modeling_maep.py"} <= {path.name for path in place.iterdir()}
        auto_map = json.loads((place / "config.json").read_text())["auto_map"]
        assert auto_map == {"AutoConfig": "configuration_maep.MAEPConfig", "AutoModel": "modeling_maep.MAEPModel"}
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["auto_map"] == {"AutoImageProcessor": "image_processing_maep.MAEPImageProcessor"}


def test_loads_as_remote_code_without_the_package(model, folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    torch.save((PIXELS, model.purify(PIXELS).detach()), elsewhere / "expected.pt")
    script = f"""
import sys
sys.modules["maep_hf"] = None  # as if the package were not installed
import numpy, torch
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
pixels, expected = torch.load("expected.pt")
assert torch.equal(model.purify(pixels), expected)
assert model.purify(torch.rand(1, 3, 20, 30)).shape == (1, 3, 20, 30)
processor = AutoImageProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)
values = processor(numpy.full((9, 9), 255, numpy.uint8), return_tensors="pt").pixel_values
assert values.shape == (1, 3, 9, 9) and values.min() == 1
model.save_pretrained("copy"); processor.save_pretrained("copy")
AutoModel.from_pretrained("copy", trust_remote_code=True)
print(type(model).__module__)
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(elsewhere / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("transformers_modules.")


def test_missing_decoder_is_refused(folder):
    edit_weights(folder, lambda weights: {k: v for k, v in weights.items() if not k.startswith("decoder.")})
    for loader in (MAEPModel, AutoModel):
        with pytest.raises(ValueError, match=r"not a checkpoint of this purifier: \d+ weights missing \(decoder\."):
            loader.from_pretrained(folder)


def test_one_missing_weight_is_refused(folder):
    edit_weights(folder, lambda weights: {k: v for k, v in weights.items() if k != "decoder.mask_token"})
    with pytest.raises(ValueError, match="1 weights missing .decoder.mask_token"):
        MAEPModel.from_pretrained(folder, output_loading_info=True)


def test_weights_left_over_are_refused(folder):
    edit_config(folder, local_branch_layers=0)
    with pytest.raises(ValueError, match="not part of a purifier"):
        MAEPModel.from_pretrained(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    "changes", [{"num_channels": 1, "image_mean": [0.5], "image_std": [0.5]}, {"decoder_hidden_size": 24}]
)
def test_other_shapes_are_refused_unless_allowed(folder, changes):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match="of another shape"):
        MAEPModel.from_pretrained(folder)
    assert isinstance(MAEPModel.from_pretrained(folder, ignore_mismatched_sizes=True), MAEPModel)


def test_normalised_patch_weights_are_refused(folder):
    edit_config(folder, norm_pix_loss=True)
    for loader in (MAEPModel, AutoModel):
        with pytest.raises(ValueError, match="norm_pix_loss"):
            loader.from_pretrained(folder)


@pytest.mark.parametrize("share", [0.3, 0.7, 1.5])
def test_a_model_is_split_over_devices(folder, tmp_path, share):
    model, pixels = MAEPModel.from_pretrained(folder).eval(), torch.rand(1, 3, 20, 40)
    most = {"cpu": int(share * sum(value.nbytes for value in model.state_dict().values()))}
    split = MAEPModel.from_pretrained(
        folder, device_map="auto", max_memory=most, offload_folder=tmp_path / "disk", offload_buffers=False
    )
    assert ("disk" in getattr(split, "hf_device_map", {}).values()) == (share < 1)
    with torch.no_grad():
        assert torch.equal(split.purify(pixels), model.purify(pixels))


def test_buffers_may_lie_on_the_disk_too(folder, tmp_path):
    model, pixels = MAEPModel.from_pretrained(folder).eval(), torch.rand(1, 3, 16, 16)
    places = {name: "disk" for name, _ in model.named_children()}
    split = MAEPModel.from_pretrained(folder, device_map=places, offload_folder=tmp_path, offload_buffers=True)
    assert split.encoder.position_embeddings.is_meta
    with torch.no_grad():
        assert torch.equal(split.purify(pixels), model.purify(pixels))


def test_another_model_is_refused(tmp_path):
    sizes = {k: v for k, v in SMALL.items() if not k.startswith("local")}
    ViTMAEModel(ViTMAEConfig(**sizes, patch_size=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a checkpoint of this purifier"):
        MAEPModel.from_pretrained(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n"


@pytest.mark.parametrize("content", [POINTER, None], ids=["git-lfs", "cut off"])
def test_weights_that_cannot_be_read_are_named(folder, tmp_path_factory, content):
    base, adapter, resnet = (tmp_path_factory.mktemp(name) for name in ("base", "adapter", "classifier"))
    shutil.copytree(folder, base, dirs_exist_ok=True)
    adapted = MAEPModel.from_pretrained(base)
    save_adapter(add_lora(adapted, default_lora_config(adapted)), adapter)
    save_classifier(resnet)
    whole = {path.parent: path.read_bytes() for path in (*adapter.glob("*.safetensors"), *resnet.glob("*.safetensors"))}
    whole[folder] = (folder / "model.safetensors").read_bytes()
    for place, weights in whole.items():
        (path,) = place.glob("*.safetensors")
        path.write_bytes(weights[:1000] if content is None else content)
        loaders = {resnet: [load_classifier], folder: [load_purifier, load_trainable]}
        for load in loaders.get(place, [load_purifier]):
            with pytest.raises(CheckpointError, match=f"^{place}: its weights cannot be read .*git lfs pull"):
                load(place)


def test_a_whole_model_beside_an_adapter_is_refused(folder):
    adapted = MAEPModel.from_pretrained(folder)
    save_adapter(add_lora(adapted, default_lora_config(adapted)), folder)
    with pytest.raises(CheckpointError, match=r"holds a whole model .model.safetensors. and an adapter"):
        load_purifier(folder)


def test_a_folder_has_no_revision(folder):
    with pytest.raises(ValueError, match="revision='v1': .* is a folder and has none; leave it out, or name a Hub id"):
        load_purifier(folder, revision="v1")


def test_what_is_wrong_with_an_adapter_on_the_hub_is_said(monkeypatch):
    with pytest.raises(CheckpointError, match="^me/adapter: no such folder, and not found on the Hub"):
        load_purifier("me/adapter")
    found = SimpleNamespace(base_model_name_or_path="me/base", revision=None)
    monkeypatch.setattr("peft.PeftConfig.from_pretrained", lambda *args, **options: found)
    with pytest.raises(CheckpointError, match="^me/base: no such folder, and not found on the Hub"):
        load_purifier("me/adapter")
