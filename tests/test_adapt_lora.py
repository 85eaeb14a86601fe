"""`train/adapt_lora.py` from end to end: the base stays bit for bit, runs go on exactly, all kinds of data work."""

import io
import json
import shutil
import sys
import textwrap
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, load_script, picture, save_classifier, tiny_purifier
from peft import PeftModel
from PIL import Image
from running import assert_close_weights, assert_same_run, checkpoints, launch, losses, records, run, words
from safetensors.torch import load_file, save_file

from maep_hf import MAEPModel
from maep_hf.adaptation import load_adapter, trainable_share
from maep_hf.checkpoints import CheckpointError, load_purifier
from maep_hf.data import DataError
from maep_hf.storage import store_weights
from maep_hf.training import DataArguments, LoopArguments, parse_arguments
from maep_hf.training import purification as purification_module
from maep_hf.training.stages import AttackArguments, LoraArguments, load_trainable

LARGE = 40  # pixels: 3 x 3 windows of the tiny purifier


@pytest.fixture(scope="module")
def options(classifier_folder, purifier_folder):
    """A function of the folder and of what is changed, to the words of a short run on the 20 embedded images."""

    def build(output_dir, **changed) -> list[str]:
        usual = {
            "dataset": "embedded:imagenet", "validation_split": "test", "streaming": False, "image_size": LARGE,
            "model": purifier_folder, "surrogates": [classifier_folder], "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1, "max_steps": 4, "warmup_steps": 0, "learning_rate": 0.05,
            "ema_decay": 0.5, "lora_rank": 2,
            "attack_steps": 2, "logging_steps": 1, "eval_steps": 4, "save_steps": 2, "validation_images": 4,
            "cpu_threads": 1, "output_dir": output_dir,
        }  # fmt: skip
        return words(**usual | changed)

    return build


@pytest.fixture(scope="module")
def whole_run(options, tmp_path_factory):
    """A run that nothing interrupted."""
    return run("adapt_lora", options(tmp_path_factory.mktemp("adapt") / "run"))


def test_the_base_stays_bit_for_bit(whole_run, purifier_folder):
    base = load_file(purifier_folder / "model.safetensors")
    trained = load_file(whole_run / "checkpoints" / checkpoints(whole_run)[-1] / "model.safetensors")
    frozen = {}
    for name, value in trained.items():
        if ".lora_" not in name and ".modules_to_save." not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
            frozen[plain] = value
    assert frozen.keys() == base.keys()
    assert all(torch.equal(value, base[name]) for name, value in frozen.items())
    merged = load_file(whole_run / "model.safetensors")
    changed = {name for name, value in merged.items() if not torch.equal(value, base[name])}
    adapted = json.loads((whole_run / "adapter" / "adapter_config.json").read_text())["target_modules"]
    head = {"local_branch.head.weight", "local_branch.head.bias"}  # trained whole
    assert changed == {f"{name}.weight" for name in adapted} | head
    assert {name.split(".")[0] for name in changed} == {"encoder", "decoder", "local_branch"}


def test_the_adapter_on_its_base_is_the_merged_purifier(whole_run, purifier_folder):
    pixels = torch.rand(2, 3, 30, 50)
    with torch.no_grad():
        expected = MAEPModel.from_pretrained(whole_run).eval().purify(pixels)
        base = MAEPModel.from_pretrained(purifier_folder).eval()
        assert (base.purify(pixels) - expected).abs().max() > 1e-3
        ours = load_adapter(base, whole_run / "adapter").eval().get_base_model().purify(pixels)
        plain = PeftModel.from_pretrained(MAEPModel.from_pretrained(purifier_folder), whole_run / "adapter")
        transformers = MAEPModel.from_pretrained(purifier_folder)
        transformers.load_adapter(str(whole_run / "adapter"))
        for output in (ours, plain.eval().get_base_model().purify(pixels), transformers.purify(pixels)):
            torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="other weights"):
        load_adapter(MAEPModel.from_pretrained(whole_run), whole_run / "adapter")


def test_an_adapter_in_16_bits_goes_on_the_same_base(whole_run, options, purifier_folder, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    run("adapt_lora", options(folder, export_dtype="float16"))
    for name in ("adapter/adapter_model.safetensors", "model.safetensors"):
        exact, stored = load_file(whole_run / name), load_file(folder / name)
        assert all(torch.equal(value, exact[key].half()) for key, value in stored.items())
    assert (folder / "adapter" / "base_model.json").read_text() == (
        whole_run / "adapter" / "base_model.json"
    ).read_text()
    adapted = load_adapter(MAEPModel.from_pretrained(purifier_folder), folder / "adapter")
    assert {value.dtype for value in adapted.state_dict().values()} == {torch.float32}
    pixels = torch.rand(2, 3, 30, 50)
    with torch.no_grad():
        expected = MAEPModel.from_pretrained(whole_run).eval().purify(pixels)
        torch.testing.assert_close(adapted.eval().get_base_model().purify(pixels), expected, atol=2e-3, rtol=0)


def test_an_adapter_fits_a_base_that_was_rounded(options, purifier_folder, tmp_path):
    base = shutil.copytree(purifier_folder, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.startswith("encoder.layers") and name.endswith("weight"))
    weights[name].view(-1)[:2] = torch.tensor([-1e-9, 1e-9])  # of 16 bits, -0 and 0; their mean is 0
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    store_weights(base, "float16")
    folder = run("adapt_lora", options(tmp_path / "run", model=base, ema_decay=0.9))
    load_adapter(MAEPModel.from_pretrained(base), folder / "adapter")


def test_the_record_tells_all_of_the_run(whole_run, purifier_folder, caplog):
    record = json.loads((whole_run / "run.json").read_text())["arguments"]
    assert record["adapt"] == {
        "model": str(purifier_folder), "adapter": None, "lora_scope": "all", "pixel_loss": None,
        "purification_loss_weight": None,
    }  # fmt: skip
    assert record["lora"]["lora_rank"] == 2
    assert record["purification"]["attack_labels"] == "predicted" and record["purification"]["mask_ratio"] == 0
    assert record["data"]["image_size"] == LARGE
    lines = records(whole_run)
    assert len(losses(whole_run)) == 4 and "guidance_loss" in lines[1]
    validations = [line["validation"] for line in lines if "validation" in line]
    assert "agreement_attacked_purified" in validations[0] and "accuracy_clean" not in validations[0]
    assert validations[0]["psnr_purified"] != validations[1]["psnr_purified"]
    assert (whole_run / "previews" / "step-0000004.png").stat().st_size > 1000


def test_resumed_equals_uninterrupted(whole_run, options, tmp_path):
    run("adapt_lora", options(tmp_path / "run"), stop=("log", 3))
    assert checkpoints(tmp_path / "run") == ["step-0000002"]
    run("adapt_lora", options(tmp_path / "run"))
    assert_same_run(whole_run, tmp_path / "run")
    for name in ("adapter_model.safetensors", "base_model.json"):
        assert (whole_run / "adapter" / name).read_bytes() == (tmp_path / "run" / "adapter" / name).read_bytes()


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_accumulation_equals_a_larger_batch(options, tmp_path, mask_ratio):
    usual = {"max_steps": 2, "optimizer": "sgd", "learning_rate": 0.1, "mask_ratio": mask_ratio}
    run("adapt_lora", options(tmp_path / "four", **usual))
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    run("adapt_lora", options(tmp_path / "one", **usual, **one))
    assert_close_weights(tmp_path / "four", tmp_path / "one", atol=1e-6)
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(options, tmp_path):
    usual = {"max_steps": 2, "optimizer": "sgd", "learning_rate": 0.1}
    run("adapt_lora", options(tmp_path / "one", **usual))
    shared = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert launch("adapt_lora", options(tmp_path / "two", **usual, **shared), processes=2) == [0, 0]
    assert_close_weights(tmp_path / "one", tmp_path / "two", atol=1e-6)


def test_activation_checkpointing_changes_nothing(whole_run, options, tmp_path):
    run("adapt_lora", options(tmp_path / "run", gradient_checkpointing=True))
    assert_close_weights(whole_run, tmp_path / "run", atol=1e-5)


def test_windows_of_the_native_size_as_before(options, tmp_path):
    folder = run("adapt_lora", options(tmp_path / "run", image_size=16, crop="native", lora_scope="decoder"))
    base = load_file(Path(json.loads((folder / "run.json").read_text())["arguments"]["adapt"]["model"])
                     / "model.safetensors")  # fmt: skip
    merged = load_file(folder / "model.safetensors")
    changed = {name.split(".")[0] for name, value in merged.items() if not torch.equal(value, base[name])}
    assert changed == {"decoder", "local_branch"}


def test_windows_overlap_as_asked(options, tmp_path, monkeypatch):
    overlaps = []
    windows = purification_module.MAEPWindows

    def record(height, width, size, overlap, **where):
        overlaps.append(overlap)
        return windows(height, width, size, overlap, **where)

    monkeypatch.setattr(purification_module, "MAEPWindows", record)
    recipe = (ROOT / "train" / "configs" / "adapt_lora_imagenet.yaml").read_text().splitlines(keepends=True)
    silent = tmp_path / "silent.yaml"
    silent.write_text("".join(line for line in recipe if not line.startswith("window_overlap")))
    for changed, expected in (({"window_overlap": 0.5}, 0.5), ({}, 0.0), ({"config": silent}, 0.25)):
        run("adapt_lora", options(tmp_path / f"run-{expected}", max_steps=1, **changed))
        assert set(overlaps) == {expected}
        overlaps.clear()


def test_layers_are_chosen_on_the_command_line(options, tmp_path):
    folder = run("adapt_lora", options(tmp_path / "run", max_steps=1, lora_targets=["q_proj", "fc2"], lora_alpha=7))
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"q_proj", "fc2"}
    assert config["lora_alpha"] == 7 and config["modules_to_save"] == ["local_branch.head"]


def test_an_adapter_is_trained_further(whole_run, options, tmp_path, purifier_folder):
    folder = run("adapt_lora", options(tmp_path / "run", adapter=whole_run / "adapter", lora_rank=1, seed=1))
    before, after = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (whole_run, folder))
    assert before.keys() == after.keys()  # rank 2, as it was
    assert all(before[name].shape == value.shape for name, value in after.items())
    assert sum(not torch.equal(before[name], value) for name, value in after.items()) > len(after) / 2
    first = [next(each for each in records(each) if "validation" in each)["validation"] for each in (whole_run, folder)]
    last = [each for each in records(whole_run) if "validation" in each][-1]["validation"]
    assert first[1]["psnr_clean"] == pytest.approx(last["psnr_clean"], abs=1e-4) != first[0]["psnr_clean"]
    assert load_adapter(MAEPModel.from_pretrained(purifier_folder), folder / "adapter")
    record = json.loads((folder / "run.json").read_text())["arguments"]
    assert record["lora"]["lora_rank"] == 2 and record["lora"]["lora_alpha"] == 4  # its own, not what was asked for
    assert record["adapt"]["lora_scope"] is None and len(record["lora"]["lora_targets"]) >= 1


def test_an_adapter_of_a_base_in_16_bits_is_loaded_as_it_was_trained(options, tmp_path, caplog):
    tiny_purifier().to(torch.bfloat16).save_pretrained(tmp_path / "stored")
    folder = run("adapt_lora", options(tmp_path / "run", model=tmp_path / "stored", max_steps=2, eval_steps=2))
    adapted, merged = load_purifier(folder / "adapter"), MAEPModel.from_pretrained(folder).state_dict()
    assert "cannot be compared" not in caplog.text
    assert all(torch.equal(value, merged[name]) for name, value in adapted.state_dict().items())


def test_what_cannot_be_adapted_is_refused_before_anything_is_written(options, tmp_path, classifier_folder):
    tiny_purifier(trained=False).save_pretrained(tmp_path / "untrained")
    for changed, error, named in (
        ({"model": tmp_path / "untrained"}, ValueError, "train/pretrain.py"),
        ({"model": classifier_folder}, CheckpointError, "not a purifier"),
        ({"model": tmp_path / "nowhere"}, CheckpointError, "no such folder"),
        ({"lora_targets": ["query"]}, ValueError, "'query'; there are conv1, .*q_proj"),
        ({"lora_scope": "head"}, ValueError, "scope='head'"),
        ({"lora_rank": 0}, ValueError, "rank=0"),
        ({"image_size": -1}, ValueError, "image_size=-1"),
        ({"attack_labels": "true"}, DataError, "attack_labels=predicted"),  # labels to 1000, a classifier of 3
    ):
        with pytest.raises(error, match=named):
            run("adapt_lora", options(tmp_path / "run", **changed))
    assert not (tmp_path / "run").exists()


# --- data ----------------------------------------------------------------------------------------------------------


def unlike_pictures(folder: Path) -> Path:
    """Images in files, as people have them: other sizes and shapes, grey, transparent, 16 bits, and a broken one."""
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
        cat, dog = folder / split / "cat", folder / split / "dog"
        picture(0, 90, 60).save(cat / "a.png")
        picture(1, 30, 70).save(cat / "b.jpg")
        picture(2, 12, 12).save(cat / "smaller_than_a_window.png")
        picture(3, 50, 41).convert("L").save(dog / "grey.png")
        picture(4, 44, 44).convert("RGBA").save(dog / "alpha.png")
        picture(5, 45, 64).convert("P").save(dog / "palette.png")
        Image.fromarray(np.full((48, 48), 40_000, dtype=np.uint16)).save(dog / "deep.png")
        (dog / "torn.png").write_bytes((cat / "a.png").read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory) -> Path:
    return unlike_pictures(tmp_path_factory.mktemp("mixed"))


@pytest.mark.parametrize("streaming", [False, True])
def test_images_of_every_kind(options, tmp_path, mixed_folder, streaming, caplog):
    changed = {"dataset": mixed_folder, "streaming": streaming, "max_steps": 3, "validation_images": 8}
    folder = run("adapt_lora", options(tmp_path / "run", **changed))
    assert len(losses(folder)) == 3 and np.isfinite(losses(folder)).all()
    assert [line["broken_images"] for line in records(folder) if "loss" in line][-1] >= 1
    assert "could not be decoded" in caplog.text


def test_a_parquet_file_resumes_while_it_is_streamed(options, tmp_path):
    cells = []
    for index in range(9):
        buffer = io.BytesIO()
        picture(index, 50 + index, 44).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"picture": datasets.Image()})  # no labels at all
    datasets.Dataset.from_dict({"picture": cells}, features=features).to_parquet(tmp_path / "some.parquet")
    changed = {"dataset": tmp_path / "some.parquet", "validation_split": "train", "streaming": True, "max_steps": 3}
    changed |= {"save_steps": 1, "eval_steps": 3}
    run("adapt_lora", options(tmp_path / "whole", **changed))
    run("adapt_lora", options(tmp_path / "run", **changed), stop=("log", 2))
    run("adapt_lora", options(tmp_path / "run", **changed))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_labels_that_fit_a_surrogate_are_used(options, tmp_path, mixed_folder):
    fitting = save_classifier(tmp_path / "two", classes=2)
    changed = {"dataset": mixed_folder, "attack_labels": "true", "max_steps": 1}
    folder = run("adapt_lora", options(tmp_path / "run", surrogates=[fitting], **changed))
    assert "accuracy_clean" in [line["validation"] for line in records(folder) if "validation" in line][0]
    for classes, named in ((1, "2 classes and a surrogate only 1"), (3, "2 classes and a surrogate 3")):
        other = save_classifier(tmp_path / str(classes), classes=classes)
        with pytest.raises(DataError, match=f"{named}.*attack_labels=predicted"):
            run("adapt_lora", options(tmp_path / "refused", surrogates=[other], **changed))


def test_a_surrogate_made_by_a_function(options, tmp_path, monkeypatch, classifier_folder):
    """A bare network, which does not say how many classes it has, beside one that does."""
    (tmp_path / "some_network.py").write_text(
        textwrap.dedent(
            """
            import torch

            class Network(torch.nn.Module):
                def __init__(self):
                    super().__init__()
                    torch.manual_seed(0)
                    self.layer = torch.nn.Conv2d(3, 7, 5, stride=3)

                def forward(self, pixel_values):
                    return self.layer(pixel_values).mean(dim=(2, 3))
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_network", raising=False)
    surrogates = ["python:some_network:Network", classifier_folder]
    folder = run("adapt_lora", options(tmp_path / "run", surrogates=surrogates, max_steps=2, guidance_kl_weight=0.0))
    assert len(losses(folder)) == 2 and records(folder)[1]["guidance_loss"] > 0


@pytest.mark.parametrize("path", sorted((ROOT / "train" / "configs").glob("adapt*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses(path):
    script = load_script("adapt_lora")
    kinds = (script.AdaptArguments, LoraArguments, DataArguments, AttackArguments, script.UnlabelledArguments,
             LoopArguments)  # fmt: skip
    adapt, lora, data, _, purification, loop = parse_arguments(*kinds, argv=["--config", str(path)])
    assert (ROOT / adapt.model).is_dir() and data.image_size > 32
    assert trainable_share(lora.adapt(load_trainable(str(ROOT / adapt.model)), adapt.lora_scope)) < 0.05
    assert purification.attack_labels == "predicted" and purification.mask_ratio == 0 and loop.max_steps < 1000
