"""The loop and the purification task: runs go on exactly where they were stopped, and errors say what to do."""

import errno
import json
import logging
import math
import os
import re
import shutil
from collections import namedtuple
from dataclasses import fields

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import CLASSES, SIZE, TINY, image_rows, load_script, picture, save_classifier, tiny_purifier
from running import (
    assert_close_weights,
    assert_same_run,
    checkpoints,
    launch,
    losses,
    records,
    reset_accelerate,
    run,
    words,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor

from maep_hf import MAEPConfig, MAEPImageProcessor, MAEPModel, PixelClassifier, load_classifier
from maep_hf.adaptation import add_lora, default_lora_config
from maep_hf.data import DataError, load_image_dataset
from maep_hf.devices import available_cores, pick_precision
from maep_hf.preprocessing import PreprocessingSpec, preprocessing_text
from maep_hf.records import describe_environment
from maep_hf.training import DataArguments, LoopArguments, NonFiniteLossError, RunFolderError, train
from maep_hf.training import classification as classification_module
from maep_hf.training import loop as loop_module
from maep_hf.training import purification as purification_module
from maep_hf.training import stages as stages_module
from maep_hf.training.guidance import Guide
from maep_hf.training.purification import PurificationArguments
from maep_hf.training.run_folder import LOCK, RunFolder, preprocessing_of
from maep_hf.training.samples import Augmentation, collate
from maep_hf.training.stages import AttackArguments, purification_task


@pytest.fixture(scope="module")
def options(image_folder, classifier_folder, purifier_folder):
    """A function of the folder and of what is changed, to the words of a short run of `finetune.py`."""

    def build(output_dir, **changed) -> list[str]:
        usual = {
            "dataset": image_folder, "surrogates": [classifier_folder], "model": purifier_folder,
            "per_device_train_batch_size": 4, "max_steps": 8, "warmup_steps": 2, "learning_rate": 0.01,
            "ema_decay": 0.5, "mask_ratio": 0.5, "purification_loss_weight": 2, "guidance_weight": 0.1,
            "attack_steps": 2, "logging_steps": 1,
            "eval_steps": 4, "save_steps": 2, "validation_images": 5, "cpu_threads": 1, "output_dir": output_dir,
        }  # fmt: skip
        return words(**usual | changed)

    return build


@pytest.fixture(scope="module")
def whole_run(options, tmp_path_factory):
    """A run that nothing interrupted."""
    return run("finetune", options(tmp_path_factory.mktemp("whole") / "run"))


# --- what a run leaves ---------------------------------------------------------------------------------------------


def test_the_folder_tells_all_of_the_run(whole_run, image_folder, purifier_folder):
    record = json.loads((whole_run / "run.json").read_text())
    assert record["arguments"]["loop"]["max_steps"] == 8 and record["arguments"]["attack"]["attack_steps"] == 2
    assert record["arguments"]["data"]["dataset"] == str(image_folder)
    assert record["arguments"]["finetune"]["model"] == str(purifier_folder)
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["transformers"]
    assert "git_revision" in record and "command" in record and record["num_processes"] == 1
    expected = load_image_dataset(str(image_folder)).fingerprint
    assert record["data"]["train"] == {
        "fingerprint": expected, "images": 24, "image_column": "image", "label_column": "label"
    }  # fmt: skip
    assert record["data"]["validation"]["images"] == 9
    assert not list(whole_run.rglob("*.tmp"))


def test_losses_and_validation_are_recorded(whole_run):
    lines = records(whole_run)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 9))
    assert training[0].keys() > {"loss", "reconstruction_loss", "purification_loss", "guidance_loss", "learning_rate"}
    for line in training:
        parts = line["reconstruction_loss"] + 2 * line["purification_loss"] + 0.1 * line["guidance_loss"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
    # up in two steps and down to zero by half a cosine; one step of the schedule a step of the run
    rates = [0.005, *(0.005 * (1 + math.cos(math.pi * step / 6)) for step in range(7))]
    assert [line["learning_rate"] for line in training] == pytest.approx(rates, abs=1e-9)
    validations = {line["step"]: line["validation"] for line in lines if "validation" in line}
    assert list(validations) == [0, 4, 8]
    assert validations[0]["psnr_attacked"] == validations[8]["psnr_attacked"]  # one fixed, attacked subset
    assert validations[0]["psnr_purified"] != validations[8]["psnr_purified"]
    for name in ("accuracy_clean", "accuracy_attacked", "accuracy_clean_purified", "accuracy_attacked_purified"):
        assert 0 <= validations[8][name] <= 100
    assert sorted(path.name for path in (whole_run / "previews").iterdir()) == [
        "step-0000000.png", "step-0000004.png", "step-0000008.png"
    ]  # fmt: skip


def test_a_record_is_the_mean_since_the_one_before(whole_run, options, tmp_path):
    single = np.array(losses(whole_run))
    assert losses(run("finetune", options(tmp_path, logging_steps=4))) == pytest.approx(
        single.reshape(2, 4).mean(axis=1), rel=1e-5
    )


def test_checkpoints_are_rotated(whole_run):
    assert checkpoints(whole_run) == ["step-0000006", "step-0000008"]


def test_the_folder_loads_and_holds_the_averaged_weights(whole_run, options, tmp_path, task_of):
    model = MAEPModel.from_pretrained(whole_run)
    MAEPImageProcessor.from_pretrained(whole_run)
    raw = checkpoint_model(whole_run)
    assert any(not torch.equal(value, raw[key]) for key, value in model.state_dict().items())
    validated = [line["validation"] for line in records(whole_run) if "validation" in line][-1]
    again = task_of(validation_images=5).evaluate(model.eval())
    assert again == pytest.approx(validated, rel=1e-4)


def checkpoint_model(folder):
    return load_file(folder / "checkpoints" / checkpoints(folder)[-1] / "model.safetensors")


# --- going on exactly ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_twice_and_started_again_equals_uninterrupted(whole_run, options, tmp_path):
    words = options(tmp_path / "run")
    assert launch("finetune", words, stop=("log", 5)) == [-9]
    assert records(tmp_path / "run")[-1]["step"] == 5 and checkpoints(tmp_path / "run")[-1] == "step-0000004"
    assert launch("finetune", words, stop=("save", 6)) == [-9]
    assert "step-0000006.tmp" in checkpoints(tmp_path / "run")
    run("finetune", words)
    assert_same_run(whole_run, tmp_path / "run")


def test_killed_before_the_first_checkpoint_starts_over(whole_run, options, tmp_path):
    run("finetune", options(tmp_path / "run"), stop=("log", 1))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 1, "lo')  # the line that was being written
    run("finetune", options(tmp_path / "run"))
    assert_same_run(whole_run, tmp_path / "run")


@pytest.mark.parametrize(
    "changed",
    [
        {"streaming": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 3, "optimizer": "sgd"},
        {"model": "dropout"},
        {"start_share": 0.25, "ema_decay": 0.5},
    ],
    ids=["streaming", "accumulation", "dropout", "averaged with the start"],
)
def test_resumed_equals_uninterrupted(options, tmp_path, changed):
    changed = {"ema_decay": 0, "max_steps": 5, "eval_steps": 5} | changed
    if changed.get("model") == "dropout":
        changed["model"] = tmp_path / "purifier"
        tiny_purifier(hidden_dropout_prob=0.3).save_pretrained(changed["model"])
    run("finetune", options(tmp_path / "whole", **changed))
    words = options(tmp_path / "run", **changed)
    run("finetune", words, stop=("log", 5 if changed.get("logging_steps") else 3))
    run("finetune", words)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_share_of_the_start_is_kept(whole_run, options, purifier_folder, tmp_path):
    folder = run("finetune", options(tmp_path / "run", start_share=0.25))
    start, trained, kept = (load_file(path / "model.safetensors") for path in (purifier_folder, whole_run, folder))
    for name, weight in kept.items():
        torch.testing.assert_close(weight, 0.25 * start[name] + 0.75 * trained[name])
    assert any(not torch.equal(start[name], trained[name]) for name in kept)
    ends = [records(path)[-1]["validation"]["psnr_purified"] for path in (whole_run, folder)]
    assert ends[0] != ends[1]  # what is validated is what is kept


def test_a_share_of_an_earlier_purifier_is_kept_by_a_finished_run(whole_run, options, tmp_path):
    earlier = tmp_path / "earlier"
    tiny_purifier().save_pretrained(earlier)
    folder = shutil.copytree(whole_run, tmp_path / "run")
    lines = len(records(folder))
    run("finetune", options(folder, start_share=0.25, start_share_of=earlier))
    before, trained, kept = (load_file(path / "model.safetensors") for path in (earlier, whole_run, folder))
    for name, weight in kept.items():
        torch.testing.assert_close(weight, 0.25 * before[name] + 0.75 * trained[name])
    assert any(not torch.equal(weight, trained[name]) for name, weight in kept.items())
    [again] = records(folder)[lines:]  # what is kept now is validated, nothing is trained
    assert again["step"] == records(whole_run)[-1]["step"]
    assert again["validation"] != records(whole_run)[-1]["validation"]
    finetuned = json.loads((folder / "run.json").read_text())["arguments"]["finetune"]
    assert finetuned["start_share"] == 0.25 and finetuned["start_share_of"] == str(earlier)
    run("finetune", options(folder, start_share=0.25, start_share_of=earlier))
    assert len(records(folder)) == lines + 1  # nothing new to say


def test_a_later_start_with_other_arguments_tells_its_own_code_and_the_first_ones(whole_run, options, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    path, began = folder / "run.json", {"command": ["then.py"], "git_revision": "abc", "git_dirty": True}
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | began | {"versions": {"torch": "0.1"}}))
    for more in ({"save_steps": 3}, {"start_share": 0.5}):
        run("finetune", options(folder, **more))
        later = json.loads(path.read_text())
        assert later["first_start"].items() >= (began | {"versions": {"torch": "0.1"}}).items()
        now = describe_environment()
        assert later["first_start"].keys() == now.keys() and {name: later[name] for name in now} == now
        assert later["arguments"]["loop"]["save_steps"] == more.get("save_steps", 2)
    before = path.read_bytes()
    run("finetune", options(folder, **more))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"start_share": 1}, "start_share=1.0: must be"),
        ({"start_share": 0.5, "trainable": "decoder_lora"}, "trainable=all"),
        ({"start_share_of": "somewhere"}, "start_share_of='somewhere': give start_share"),
        ({"start_share": 0.5, "start_share_of": "wide"}, "start_share_of: its weights are not of the trained model's"),
    ],
)
def test_a_share_of_the_start_that_cannot_be(options, tmp_path, changed, message, capsys):
    if changed.get("start_share_of") == "wide":
        changed = changed | {"start_share_of": tmp_path / "wide"}
        tiny_purifier(local_branch_channels=12).save_pretrained(changed["start_share_of"])
    with pytest.raises((SystemExit, ValueError)) as refused:
        run("finetune", options(tmp_path / "run", **changed))
    assert message in capsys.readouterr().err + str(refused.value)


def test_lora_options_are_of_an_adapter(options, tmp_path):
    with pytest.raises(ValueError, match="lora_rank: all weights are trained; give trainable=decoder_lora"):
        run("finetune", options(tmp_path / "run", lora_rank=8))


def test_a_run_from_before_an_argument_goes_on_where_it_was_off(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"arguments": {"attack": {"pgd": 0.35}}}))
    folder = RunFolder(tmp_path)
    folder.prepare({"attack": {"pgd": 0.35, "square": 0.0, "pgd_random_start": 1.0}}, {}, 0, 0, False)
    with pytest.raises(RunFolderError, match="attack.square: 0.0 there, 0.1 now"):
        folder.prepare({"attack": {"pgd": 0.35, "square": 0.1}}, {}, 0, 0, False)


def test_a_run_goes_on_from_the_weights_that_it_started_from(tmp_path):
    arguments = {"finetune": {"model": "base", "start_share_of": "earlier"}}
    data, start = {"train": {"fingerprint": "f"}}, {"model": "a", "start_share_of": "b"}
    record = tmp_path / "run.json"

    def prepare(start, **changed) -> None:
        now = {"finetune": arguments["finetune"] | changed}
        RunFolder(tmp_path).prepare(now, data, 0, 0, False, start=start)

    record.write_text(json.dumps({"arguments": arguments, "data": data}))
    prepare(start)  # that an older version wrote: they are not known
    RunFolder(tmp_path).take_over(arguments, start)
    assert "start" not in json.loads(record.read_text())
    record.write_text(json.dumps({"arguments": arguments, "data": data, "start": start}))
    prepare(start)
    for name in start:
        with pytest.raises(RunFolderError, match=f"{name}: its weights are not those.*{start[name]} there, c now"):
            prepare(start | {name: "c"})
    later = {"start_share_of": "another"}  # may change, and with it its weights
    prepare(start | {"start_share_of": "c"}, **later)
    RunFolder(tmp_path).take_over({"finetune": arguments["finetune"] | later}, start | {"start_share_of": "c"})
    assert json.loads(record.read_text())["start"] == {"model": "a", "start_share_of": "c"}


def test_a_purifier_that_changed_under_its_name_is_no_start_of_the_same_run(options, tmp_path):
    def save(name, shift) -> None:
        purifier = tiny_purifier()
        with torch.no_grad():
            purifier.decoder.head.weight.add_(shift)
        purifier.save_pretrained(tmp_path / name)

    save("base", 0.1)
    save("earlier", 0.2)
    changed = {"max_steps": 1, "model": tmp_path / "base", "start_share": 0.5, "start_share_of": tmp_path / "earlier"}
    words = options(tmp_path / "run", **changed)
    run("finetune", words)
    run("finetune", words)
    exported = (tmp_path / "run" / "model.safetensors").read_bytes()
    for name, argument, shift in (("base", "model", 0.1), ("earlier", "start_share_of", 0.2)):
        save(name, 0.3)
        with pytest.raises(RunFolderError, match=rf"other arguments \({argument}: its weights are not those"):
            run("finetune", words)
        save(name, shift)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == exported


@pytest.mark.parametrize("script", ["finetune", "pretrain"])
def test_a_surrogate_that_changed_under_its_name_is_no_part_of_the_same_run(options, tmp_path, script):
    surrogates = [save_classifier(tmp_path / name) for name in ("one", "other")]
    argv = options(tmp_path / "run", surrogates=surrogates, max_steps=2, eval_steps=2, save_steps=1)
    if script == "pretrain":
        model = {name: TINY[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "patch_size")}
        argv[argv.index("--model") : argv.index("--model") + 2] = words(image_size=16, **model)
    run(script, argv, stop=("log", 2))
    save_classifier(tmp_path / "other", seed=5)
    with pytest.raises(RunFolderError, match=r"other arguments \(surrogates\[\S*other\]: its weights are not those"):
        run(script, argv)
    record = tmp_path / "run" / "run.json"
    older = json.loads(record.read_text())
    assert len([name for name in older["start"] if name.startswith("surrogates")]) == 2
    older["start"] = {name: value for name, value in older["start"].items() if "surrogates" not in name}
    record.write_text(json.dumps(older))
    run(script, [*argv, "--save_total_limit", "1"])  # of an older version: they are not known, and stay so
    assert json.loads(record.read_text())["start"] == older["start"]


def test_a_surrogate_whose_preprocessing_changed_is_no_part_of_the_same_run(options, tmp_path):
    folder = save_classifier(tmp_path / "net")
    argv = options(tmp_path / "run", surrogates=[folder], max_steps=2, save_steps=1)
    run("finetune", argv, stop=("log", 2))
    record, processor = tmp_path / "run" / "run.json", folder / "preprocessor_config.json"
    older, said = json.loads(record.read_text()), processor.read_text()
    for change in ({"image_mean": [0.1, 0.2, 0.3]}, {"size": {"height": 12, "width": 12}}):
        processor.write_text(json.dumps(json.loads(said) | change))
        told = "mean=.0.1, 0.2, 0.3" if "image_mean" in change else r"size=.12, 12"
        with pytest.raises(
            RunFolderError, match=rf"\(preprocessing\[\S*net\]: it is not the one.* there, .*{told}.* now"
        ):
            run("finetune", argv)
    assert older["start"].pop(f"preprocessing[{folder}]").startswith("PreprocessingSpec(")
    record.write_text(json.dumps(older))
    run("finetune", argv)  # of an older version: what it was is not known, and stays so
    assert json.loads(record.read_text())["start"] == older["start"]


def test_what_is_done_to_pixels_is_told_of_all_that_say_it(classifier_folder):
    told = preprocessing_text(load_classifier(classifier_folder))
    inner = PixelClassifier(torch.nn.Flatten(), size=8, image_mean=0.5, image_std=1.0, always_resize=True)
    assert "size=(8, 8)" in preprocessing_text(inner) and preprocessing_text(inner).endswith(", always resized")
    outer = PixelClassifier(torch.nn.Sequential(inner))
    assert preprocessing_text(outer) == f"{preprocessing_text(inner)}; {PreprocessingSpec()!r}"
    assert told == preprocessing_text(load_classifier(classifier_folder)) != preprocessing_text(outer)
    assert preprocessing_of(["a", "b"], [torch.nn.Identity(), inner]) == {"preprocessing[b]": preprocessing_text(inner)}


def test_a_purifier_stored_in_16_bits_is_trained_in_32(options, tmp_path):
    tiny_purifier().to(torch.bfloat16).save_pretrained(tmp_path / "stored")
    before = load_file(tmp_path / "stored" / "model.safetensors")
    assert {value.dtype for value in before.values()} == {torch.bfloat16}
    changed = {"max_steps": 2, "eval_steps": 2, "learning_rate": 1e-5, "ema_decay": 0}
    folder = run("finetune", options(tmp_path / "run", model=tmp_path / "stored", **changed))
    after = load_file(folder / "model.safetensors")
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    moved = torch.cat([(before[name].float() != value).flatten() for name, value in after.items()])
    assert moved.float().mean() > 0.5  # steps that bfloat16 would round away


def test_dropout_is_on_in_training(options, tmp_path):
    changed = {"max_steps": 1, "guidance_weight": 0}
    tiny_purifier(hidden_dropout_prob=0.3).save_pretrained(tmp_path / "dropout")
    with_dropout = run("finetune", options(tmp_path / "with", model=tmp_path / "dropout", **changed))
    without = run("finetune", options(tmp_path / "without", **changed))
    assert losses(with_dropout) != losses(without)


def test_accumulation_equals_a_larger_batch(options, tmp_path):
    usual = {"max_steps": 3, "optimizer": "sgd", "learning_rate": 0.1}
    run("finetune", options(tmp_path / "one", per_device_train_batch_size=8, **usual))
    run("finetune", options(tmp_path / "eight", per_device_train_batch_size=1, gradient_accumulation_steps=8, **usual))
    assert_close_weights(tmp_path / "one", tmp_path / "eight", atol=1e-6)
    assert len(losses(tmp_path / "one")) == 3
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "eight"), rel=1e-5)


@pytest.fixture(scope="module")
def torn_folder(tmp_path_factory):
    """24 training images of which two are broken, and the test images."""
    folder = tmp_path_factory.mktemp("torn")
    rows = image_rows(24)
    cells = list(rows.cast_column("image", datasets.Image(decode=False))["image"])
    for index in (3, 10):
        cells[index] = {"bytes": cells[index]["bytes"][:40], "path": None}
    torn = datasets.Dataset.from_dict({"image": cells, "label": rows["label"]}, features=rows.features)
    torn.to_parquet(folder / "train.parquet")
    image_rows(9, first=24).to_parquet(folder / "test.parquet")
    return folder


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(options, tmp_path, torn_folder):
    usual = {"dataset": torn_folder, "max_steps": 6, "optimizer": "sgd", "learning_rate": 0.1, "mask_ratio": 0}
    run("finetune", options(tmp_path / "one", **usual))
    shared = usual | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert launch("finetune", options(tmp_path / "two", **shared), processes=2) == [0, 0]
    assert_close_weights(tmp_path / "one", tmp_path / "two", atol=1e-6)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)
    assert records(tmp_path / "one")[-2]["broken_images"] == records(tmp_path / "two")[-2]["broken_images"] == 2

    words = options(tmp_path / "killed", **shared)
    assert launch("finetune", words, stop=("log", 5), processes=2)[0] == -9
    with pytest.raises(RunFolderError, match="num_processes: 2 there, 1 now"):
        run("finetune", words)
    assert launch("finetune", words, processes=2) == [0, 0]
    assert_same_run(tmp_path / "two", tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_share_a_stream(options, tmp_path, torn_folder):
    usual = {"dataset": torn_folder, "streaming": True, "max_steps": 6, "optimizer": "sgd", "learning_rate": 0.1}
    run("finetune", options(tmp_path / "one", **usual))
    shared = usual | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "dataloader_num_workers": 1}
    assert launch("finetune", options(tmp_path / "two", **shared), processes=2) == [0, 0]
    assert_close_weights(tmp_path / "one", tmp_path / "two", atol=1e-6)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)
    assert records(tmp_path / "one")[-2]["broken_images"] == records(tmp_path / "two")[-2]["broken_images"] == 2


def test_broken_images_are_counted_and_warned_of(options, tmp_path, torn_folder, caplog):
    words = options(tmp_path / "run", dataset=torn_folder, max_steps=6)
    run("finetune", words, stop=("log", 5))
    run("finetune", words)
    assert [line["broken_images"] for line in records(tmp_path / "run") if "loss" in line][-1] == 2
    assert "2 images could not be decoded" in caplog.text


@pytest.mark.slow
def test_a_worker_changes_nothing(options, tmp_path):
    run("finetune", options(tmp_path / "none", max_steps=2))
    run("finetune", options(tmp_path / "one", max_steps=2, dataloader_num_workers=1))
    assert_same_run(tmp_path / "none", tmp_path / "one")


def test_activation_checkpointing_changes_nothing(whole_run, options, tmp_path):
    run("finetune", options(tmp_path / "run", gradient_checkpointing=True))
    assert_close_weights(whole_run, tmp_path / "run", atol=1e-6)


def test_bf16_trains_the_averaged_weights_it_validates(options, tmp_path, task_of):
    folder = run("finetune", options(tmp_path / "run", mixed_precision="bf16", ema_decay=0.9))
    # laid out in memory as in the loop, for another convolution kernel rounds bf16 differently
    model = MAEPModel.from_pretrained(folder).eval().to(memory_format=torch.channels_last)
    assert model.dtype == torch.float32
    task = task_of(validation_images=5)
    task.to(torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        again = task.evaluate(model)
    validated = [line["validation"] for line in records(folder) if "validation" in line][-1]
    assert again["purification_loss"] == pytest.approx(validated["purification_loss"], rel=1e-3)
    assert again["psnr_purified"] == pytest.approx(validated["psnr_purified"], rel=1e-3)


# --- the folder is guarded -----------------------------------------------------------------------------------------


def test_other_arguments_are_refused_by_name(options, tmp_path):
    folder = tmp_path / "run"
    run("finetune", options(folder, max_steps=1))
    with pytest.raises(
        RunFolderError, match=r"loop.learning_rate: 0.01 there, 0.5 now; .*overwrite|overwrite"
    ) as error:
        run("finetune", options(folder, max_steps=1, learning_rate=0.5, eps_max=9))
    for part in ("loop.learning_rate: 0.01 there, 0.5 now", "attack.eps_max: 12.0 there, 9.0 now"):
        assert part in str(error.value)
    assert "seed" not in str(error.value)


def test_what_changes_no_result_may_change(options, tmp_path):
    words = options(tmp_path / "run", max_steps=4)
    run("finetune", words, stop=("log", 3))
    run("finetune", options(tmp_path / "run", max_steps=4, save_steps=1, save_total_limit=5))
    assert checkpoints(tmp_path / "run") == ["step-0000002", "step-0000003", "step-0000004"]


def test_a_finished_run_is_stored_in_16_bits(whole_run, tmp_path, options):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    run("finetune", options(folder, export_dtype="float16"))
    exact, stored = load_file(whole_run / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(value, exact[name].half()) for name, value in stored.items())
    assert {value.dtype for value in MAEPModel.from_pretrained(folder).state_dict().values()} == {torch.float32}
    assert all(value.dtype == torch.float32 for value in checkpoint_model(folder).values())
    run("finetune", options(folder))
    assert (folder / "model.safetensors").read_bytes() == (whole_run / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="export_dtype='int8': must be one of float32, float16, bfloat16"):
        LoopArguments(export_dtype="int8")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (AttackArguments, {"attack_steps": 1}, "attack_steps=1: at least 2"),
        (DataArguments, {"validation_images": 0}, "validation_images=0: must be at least 1"),
        (LoopArguments, {"cpu_threads": -1}, "cpu_threads=-1: must not be negative"),
    ],
)
def test_values_out_of_range_name_their_argument(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(**options)


def test_another_precision_than_the_runs_is_refused(options, tmp_path, monkeypatch):
    argv = options(tmp_path / "run", max_steps=4, mixed_precision="auto")
    monkeypatch.setattr(loop_module, "pick_precision", lambda name, device: "bf16")
    run("finetune", argv, stop=("log", 3))
    monkeypatch.setattr(loop_module, "pick_precision", lambda name, device: "no")
    with pytest.raises(RunFolderError, match="mixed_precision on this machine: bf16 there, no now"):
        run("finetune", argv)


def test_an_overwritten_run_leaves_no_old_weights(whole_run, options, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    run("finetune", options(folder, overwrite_output_dir=True, seed=7), stop=("log", 1))
    assert not (folder / "model.safetensors").exists() and not (folder / "config.json").exists()


@pytest.mark.parametrize("name", ["model", "start_share_of", "dataset", "surrogates"])
def test_an_overwrite_does_not_remove_what_the_run_reads(whole_run, options, tmp_path, name):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    for path in (folder, folder / "checkpoints" / "deeper" / ".."):
        groups = {"group": {name: [str(path)] if name == "surrogates" else str(path), "output_dir": str(folder)}}
        with pytest.raises(
            RunFolderError, match=rf"output_dir='.*run': overwrite_output_dir would remove what {name}='"
        ):
            RunFolder(folder).prepare(groups, {}, 0, 1, True)
    if name == "model":
        with pytest.raises(RunFolderError, match="overwrite_output_dir would remove what model="):
            run("finetune", options(folder, model=folder, overwrite_output_dir=True))
    assert (folder / "model.safetensors").read_bytes() == (whole_run / "model.safetensors").read_bytes()
    kept = {"group": {name: str(folder / "images"), "model": str(folder.parent), "adapter": None}}
    RunFolder(folder).prepare(kept, {}, 0, 1, True)  # that is not removed
    assert not (folder / "model.safetensors").exists()


def test_overwriting_starts_over(whole_run, options, tmp_path):
    folder = tmp_path / "run"
    run("finetune", options(folder, max_steps=3, seed=5))
    (folder / "adapter").mkdir()
    run("finetune", options(folder, overwrite_output_dir=True))
    assert_same_run(whole_run, folder)
    assert len(list((folder / "previews").iterdir())) == 3 and not (folder / "adapter").exists()


def test_a_finished_run_says_so_and_stays(options, tmp_path, caplog):
    words = options(tmp_path / "run", max_steps=2)
    folder = run("finetune", words)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with caplog.at_level(logging.INFO):
        assert run("finetune", words) == folder
    assert "this run is finished" in caplog.text and "overwrite_output_dir" in caplog.text
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_changed_data_are_refused(options, tmp_path, image_folder):
    shutil.copytree(image_folder, tmp_path / "data")
    words = options(tmp_path / "run", max_steps=3, dataset=tmp_path / "data")
    run("finetune", words, stop=("log", 3))
    image_rows(24, first=1).to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(RunFolderError, match="the data: .*fingerprint"):
        run("finetune", words)
    shutil.copy(image_folder / "train.parquet", tmp_path / "data" / "train.parquet")  # the same data, a newer file
    run("finetune", words)


def test_a_foreign_record_is_refused(options, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RunFolderError, match="run.json.*overwrite_output_dir"):
        run("finetune", options(tmp_path))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["checkpoints/a/model.safetensors", "model.safetensors", "config.json", "previews/a.png", "adapter/b"]
)
def test_files_that_no_run_wrote_are_kept(tmp_path, name, overwrite):
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / name).write_text("a release")
    with pytest.raises(RunFolderError, match=f"output_dir=.*{name.split('/')[0]}.* no run.json: give a new folder"):
        RunFolder(tmp_path).prepare({}, {}, 0, 1, overwrite)
    assert (tmp_path / name).read_text() == "a release"


def test_logs_and_notes_beside_a_run_are_kept_and_its_own_files_are_not(tmp_path):
    for name in ("logs/events", "notes.txt", "run.json", "preprocessor_config.json", "removed.tmp/a", "checkpoints/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    RunFolder(tmp_path).prepare({}, {}, 0, 1, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "notes.txt"]
    RunFolder(tmp_path).prepare({}, {}, 0, 1, overwrite=True)  # what was interrupted here may go on
    RunFolder(tmp_path).prepare({}, {}, 0, 1, overwrite=False)


def test_a_second_start_leaves_a_run_that_is_going_on_alone(options, tmp_path, monkeypatch):
    argv, log, refused = options(tmp_path / "run", max_steps=3, save_steps=1), loop_module._Loop._log, []

    def start_another(self):
        step = self.state.step
        if step > 1:
            before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
            for more in ([], ["--overwrite_output_dir", "true"]):
                with pytest.raises(RunFolderError, match="a run is still going on in this folder"):
                    load_script("finetune").main([*argv, *more])
                refused.append(step)
            assert {path: path.read_bytes() for path in before} == before
        if step == 2 and len(refused) == 2:
            raise KeyboardInterrupt
        return log(self)

    monkeypatch.setattr(loop_module._Loop, "_log", start_another)
    with pytest.raises(KeyboardInterrupt):
        run("finetune", argv)
    assert run("finetune", argv) == tmp_path / "run"  # the lock went with the run
    assert refused == [2, 2, 2, 2, 3, 3] and checkpoints(tmp_path / "run") == ["step-0000002", "step-0000003"]
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_folder_that_cannot_be_written(options, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFolderError, match="output_dir=.*cannot be written"):
        run("finetune", options(tmp_path / "file" / "run"))


def test_what_refuses_after_the_checks_leaves_everything_as_it_is(tmp_path):
    class Refused(Exception):
        pass

    def refuse() -> None:
        raise Refused

    with pytest.raises(Refused):
        RunFolder(tmp_path / "a" / "run").prepare({}, {}, 0, 1, False, checked=refuse)
    assert not list(tmp_path.iterdir())
    for name in ("run.json", "config.json", "checkpoints/step-0000001.tmp/a"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"arguments": {}}')
    before = sorted(tmp_path.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(Refused):
            RunFolder(tmp_path).prepare({}, {}, 0, 1, overwrite, checked=refuse)
    assert sorted(tmp_path.rglob("*")) == before


def test_too_little_disk_is_said_before_training(options, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30, 2**10))
    with pytest.raises(RunFolderError, match="output_dir=.*MiB free.*save_total_limit"):
        run("finetune", options(tmp_path / "run"))
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")])
def test_a_full_disk_leaves_the_checkpoint_before(whole_run, options, tmp_path, monkeypatch, error):
    save, words = torch.save, options(tmp_path / "run")

    def full(obj, target, *args, **kwargs):
        if "step-0000004" in str(target):
            raise error
        save(obj, target, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunFolderError, match="checkpoint of step 4.*last whole checkpoint is step-0000002"):
        run("finetune", words)
    assert checkpoints(tmp_path / "run") == ["step-0000002"]
    monkeypatch.undo()
    run("finetune", words)
    assert_same_run(whole_run, tmp_path / "run")


def test_a_full_disk_at_the_model_leaves_the_checkpoint(options, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(MAEPModel, "save_pretrained", full)
    with pytest.raises(RunFolderError, match="the model could not be written.*step-0000002"):
        run("finetune", options(tmp_path / "run"))


# --- what goes wrong in training -----------------------------------------------------------------------------------


def test_divergence_names_step_and_fixes(options, tmp_path):
    wild = {"optimizer": "sgd", "learning_rate": 1e30, "max_grad_norm": 0, "warmup_steps": 0}
    with pytest.raises(NonFiniteLossError, match="loss is not finite at step [234];.*learning_rate.*warmup_steps"):
        run("finetune", options(tmp_path / "run", **wild))


def test_a_surrogate_that_cannot_be_attacked_is_named(task_of, classifier_folder, tmp_path):
    broken = shutil.copytree(classifier_folder, tmp_path / "broken") / "model.safetensors"
    weights = load_file(broken)
    save_file(weights | {"classifier.bias": weights["classifier.bias"] * np.nan}, broken, metadata={"format": "pt"})
    task = task_of(surrogates=[classifier_folder, tmp_path / "broken"])
    with pytest.raises(ValueError, match="logits or gradients of .*broken are not finite.*give other surrogates"):
        batch_of(task)
    task = task_of(surrogates=[tmp_path / "broken"], attack_labels="predicted")
    with pytest.raises(ValueError, match="logits or gradients of .*broken are not finite.*give other surrogates"):
        task.evaluate(task.model.eval())


def test_an_infinite_gradient_is_never_saved(options, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *args, **kwargs: torch.tensor(float("inf")))
    with pytest.raises(NonFiniteLossError, match="gradient is not finite at step 1"):
        run("finetune", options(tmp_path / "run", save_steps=1))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(("amx", "precision"), [(True, "bf16"), (False, "no")])
def test_auto_precision_is_bf16_where_the_processor_multiplies_in_it(options, tmp_path, monkeypatch, amx, precision):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    folder = run("finetune", options(tmp_path / "run", max_steps=1, mixed_precision="auto"))
    assert json.loads((folder / "run.json").read_text())["mixed_precision"] == precision
    assert pick_precision("no", torch.device("cpu")) == "no" and pick_precision("bf16", torch.device("cpu")) == "bf16"
    for native in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert pick_precision("auto", torch.device("cuda")) == ("bf16" if native else "no")


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert available_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert available_cores() == 8


def test_fp16_needs_a_gpu(options, tmp_path):
    with pytest.raises(ValueError, match="mixed_precision='fp16'.*bf16"):
        run("finetune", options(tmp_path / "run", mixed_precision="fp16"))


class SaysFp16(Accelerator):
    """Casts to bf16 and says fp16, which takes a GPU."""

    mixed_precision = "fp16"


@pytest.mark.parametrize(("script", "attacks"), [("finetune", ["perturb", "pgd"]), ("train_classifier", ["pgd"])])
@pytest.mark.parametrize(("accelerator", "precision"), [(Accelerator, torch.bfloat16), (SaysFp16, torch.float32)])
def test_attacks_have_no_fp16(options, image_folder, tmp_path, monkeypatch, script, attacks, accelerator, precision):
    convolve, attacking, found = torch.nn.Conv2d.forward, [], {}

    def convolved(self, pixels):
        out = convolve(self, pixels)
        found.setdefault(attacking[-1] if attacking else "training", set()).add(out.dtype)
        return out

    def spied(name, attack):
        def wrapper(*args, **kwargs):
            attacking.append(name)
            try:
                return attack(*args, **kwargs)
            finally:
                attacking.pop()

        return wrapper

    monkeypatch.setattr(torch.nn.Conv2d, "forward", convolved)
    monkeypatch.setattr(loop_module, "Accelerator", accelerator)
    module = purification_module if script == "finetune" else classification_module
    for name in attacks:
        monkeypatch.setattr(module, name, spied(name, getattr(module, name)))
    argv = options(tmp_path / "run", max_steps=1, mixed_precision="bf16", clean=0, fgsm=0.35, max_grad_norm=0)
    if script == "train_classifier":
        argv = words(
            dataset=image_folder, depth=8, width=4, image_size=16, max_steps=1, warmup_steps=0, ema_decay=0.5,
            per_device_train_batch_size=4, validation_images=4, cpu_threads=1, mixed_precision="bf16",
            output_dir=tmp_path / "run",
        )  # fmt: skip
    run(script, argv)
    assert {name: found[name] for name in attacks} == dict.fromkeys(attacks, {precision})
    assert torch.bfloat16 in found["training"]


def test_a_tracker_gets_the_figures(options, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run("finetune", options(tmp_path / "run", max_steps=2, report_to="tensorboard"))
    events = EventAccumulator(str(next(folder.rglob("events.out*")).parent)).Reload()
    assert {"train/loss", "validation/psnr_purified"} <= set(events.Tags()["scalars"])


def test_a_run_in_the_home_of_the_user_is_not_in_a_folder_named_tilde(options, tmp_path, monkeypatch, caplog):
    place = tmp_path / "elsewhere"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    kept, projects = loop_module.Accelerator, []
    monkeypatch.setattr(
        loop_module, "Accelerator", lambda *args, **options: projects.append(options["project_dir"]) or kept(**options)
    )
    argv = options("~/runs/t", max_steps=1)
    for _ in range(2):
        with caplog.at_level(logging.INFO):
            assert run("finetune", argv) == tmp_path / "home" / "runs" / "t"
    assert "this run is finished" in caplog.text and projects == [str(tmp_path / "home" / "runs" / "t")] * 2
    assert not list(place.iterdir())  # nor do trackers log there
    record = json.loads((tmp_path / "home" / "runs" / "t" / "run.json").read_text())
    assert record["arguments"]["loop"]["output_dir"] == "~/runs/t"  # as typed: a later stage names its model so


# --- the other scripts ---------------------------------------------------------------------------------------------


def test_pretraining_makes_a_new_purifier(image_folder, classifier_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(MAEPConfig, "tiny", classmethod(lambda cls, **fields: cls(**TINY | fields)))
    argv = words(
        dataset=image_folder, surrogates=[classifier_folder], output_dir=tmp_path / "run", max_steps=2,
        warmup_steps=0, per_device_train_batch_size=4, validation_images=4, attack_steps=2, cpu_threads=1,
    )  # fmt: skip
    folder = run("pretrain", argv)
    model = MAEPModel.from_pretrained(folder)
    assert model.config.mask_ratio == 0.5 and bool(model.local_branch.head.weight.any())
    assert [line["step"] for line in records(folder) if "validation" in line] == [0, 2]


def test_training_a_classifier_repeats_and_loads(image_folder, tmp_path):
    argv = words(
        dataset=image_folder, depth=8, width=4, image_size=16, padding=2, max_steps=4, warmup_steps=1,
        per_device_train_batch_size=8, validation_images=9, ema_decay=0.5, cpu_threads=1, logging_steps=1,
        save_steps=2,
    )  # fmt: skip
    run("train_classifier", argv + words(output_dir=tmp_path / "first"))
    torch.rand(3)  # the process's random state is not the run's
    run("train_classifier", argv + words(output_dir=tmp_path / "second"), stop=("log", 3))
    run("train_classifier", argv + words(output_dir=tmp_path / "second"))
    assert_same_run(tmp_path / "first", tmp_path / "second")
    classifier = load_classifier(str(tmp_path / "first"))
    assert list(classifier.id2label.values()) == CLASSES
    assert classifier(torch.rand(2, 3, 16, 16)).shape == (2, 3)
    validated = [line["validation"] for line in records(tmp_path / "first") if "validation" in line][-1]
    assert {"accuracy_clean", "accuracy_pgd10_8"} < validated.keys()


def test_a_model_without_activation_checkpointing_is_refused_before_anything_is_written(image_folder, tmp_path):
    argv = words(dataset=image_folder, output_dir=tmp_path / "run", depth=8, max_steps=1, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="gradient_checkpointing: a CifarResNetForImageClassification cannot"):
        run("train_classifier", argv)
    assert not (tmp_path / "run").exists()


def test_a_classifier_of_any_architecture_trains_and_loads(image_folder, tmp_path):
    argv = words(
        dataset=image_folder, output_dir=tmp_path / "run", architecture="regnet", image_size=16, padding=2, max_steps=1,
        warmup_steps=0, per_device_train_batch_size=8, validation_images=9, cpu_threads=1,
        architecture_options='{"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4}',
    )  # fmt: skip
    classifier = load_classifier(str(run("train_classifier", argv)))
    assert classifier.config.model_type == "regnet" and classifier.config.hidden_sizes == [8, 16]
    assert list(classifier.id2label.values()) == CLASSES
    assert classifier(torch.rand(2, 3, 16, 16)).shape == (2, 3)


DINO = '{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}'


@pytest.mark.parametrize(("architecture", "unused"), [("cifar_resnet", False), ("dinov2", True)])
def test_processes_look_for_unused_weights_where_there_may_be_some(
    image_folder, tmp_path, monkeypatch, architecture, unused
):
    monkeypatch.setattr(loop_module._Loop, "run", lambda self: self.accelerator.ddp_handler.find_unused_parameters)
    argv = words(dataset=image_folder, output_dir=tmp_path / "run", depth=8, image_size=16, architecture=architecture)
    assert run("train_classifier", argv + words(architecture_options=DINO if unused else "{}")) == unused


def test_purifiers_use_all_their_weights(options, tmp_path, monkeypatch):
    monkeypatch.setattr(loop_module._Loop, "run", lambda self: self.accelerator.ddp_handler.find_unused_parameters)
    assert run("finetune", options(tmp_path / "run")) is False


@pytest.mark.slow
def test_two_processes_train_a_classifier_with_a_weight_that_is_never_used(image_folder, tmp_path):
    def argv(folder, **batch) -> list[str]:
        return words(
            dataset=image_folder, output_dir=folder, architecture="dinov2", architecture_options=DINO, image_size=16,
            max_steps=3, warmup_steps=0, validation_images=4, cpu_threads=1, logging_steps=1, optimizer="sgd", **batch,
        )  # fmt: skip

    run("train_classifier", argv(tmp_path / "one", per_device_train_batch_size=4))
    assert launch("train_classifier", argv(tmp_path / "two", per_device_train_batch_size=2), processes=2) == [0, 0]
    assert_close_weights(tmp_path / "one", tmp_path / "two", atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("regnetz", "{}", "architecture='regnetz'"),
        ("bert", "{}", "architecture='bert'"),
        ("regnet", "{depths: 1}", "architecture_options: no JSON"),
        ("regnet", "[1]", "architecture_options: must be"),
        ("regnet", '{"height": 3}', "RegNetConfig has no height"),
        ("regnet", '{"layer_type": "q"}', "architecture='regnet' makes no image classifier"),
        ("cifar_resnet", "{}", "max_zoom=0.5"),
    ],
)
def test_a_classifier_that_there_is_not(image_folder, tmp_path, architecture, options, message):
    argv = words(dataset=image_folder, output_dir=tmp_path / "run", max_steps=1, max_zoom=0.5)
    with pytest.raises(ValueError, match=re.escape(message)):
        run("train_classifier", [*argv, "--architecture", architecture, "--architecture_options", options])


def test_vision_transformers_take_the_size_of_the_images():
    module = load_script("train_classifier")
    options = '{"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}'
    arguments = module.ClassifierArguments(architecture="vit", architecture_options=options)
    model = module.make_classifier(arguments, CLASSES, 32)
    assert model(pixel_values=torch.rand(2, 3, 32, 32)).logits.shape == (2, 3)


def test_a_classifier_takes_pictures_of_any_mode(image_folder, tmp_path):
    sizes = {"depth": 8, "width": 4, "max_steps": 1, "per_device_train_batch_size": 4, "validation_images": 4}
    folder = run("train_classifier", words(dataset=image_folder, output_dir=tmp_path / "run", **sizes))
    processor = AutoImageProcessor.from_pretrained(folder)
    for mode in ("L", "RGBA", "P"):
        assert processor(picture(0).convert(mode), return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)
    rows = image_rows(6).map(lambda row, index: {"label": -1 if index == 3 else row["label"]}, with_indices=True)
    rows.save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match="an image has no label"):
        run(
            "train_classifier",
            words(dataset=tmp_path / "data", output_dir=tmp_path / "none", **sizes | {"max_steps": 3}),
        )


def test_a_classifier_needs_labels(tmp_path):
    image_rows(6, labelled=False).save_to_disk(tmp_path / "data")
    argv = words(dataset=tmp_path / "data", output_dir=tmp_path / "run")
    with pytest.raises(DataError, match="label_column"):
        run("train_classifier", argv)


# --- the purification task -----------------------------------------------------------------------------------------


def test_a_classifier_needs_labels_of_its_classes(tmp_path, image_folder):
    rows = image_rows(24).cast_column("label", datasets.Value("int64")).sort("label")
    rows.save_to_disk(tmp_path / "numbers")
    usual = {
        "depth": 8, "width": 4, "image_size": 16, "max_steps": 1, "warmup_steps": 0, "validation_images": 9,
        "per_device_train_batch_size": 4, "cpu_threads": 1, "output_dir": tmp_path / "run",
        "dataset": tmp_path / "numbers", "validation_dataset": image_folder,
    }  # fmt: skip
    with pytest.raises(
        DataError, match="of the validation dataset has the class index 2, and the classifier has the 2 "
    ):
        run("train_classifier", words(**usual, max_train_images=12))
    run("train_classifier", words(**usual | {"output_dir": tmp_path / "whole"}))


@pytest.mark.parametrize("words", [["--label_smoothing", "2"], ["--label_smoothing", "-0.1"], ["--padding", "-1"]])
def test_arguments_of_a_classifier_out_of_range(words, capsys):
    with pytest.raises(SystemExit):
        load_script("train_classifier").main(words)
    assert f"error: {words[0].strip('-')}={words[1]}" in capsys.readouterr().err


@pytest.fixture
def task_of(image_folder, classifier_folder):
    """A function of what is changed, to a task on the tiny purifier."""

    def build(dataset=image_folder, surrogates=None, data=None, model=None, validation_images=4, **loss):
        names = [str(folder) for folder in surrogates or [classifier_folder]]
        return purification_task(
            model or tiny_purifier(),
            DataArguments(**{
                "dataset": str(dataset), "validation_dataset": str(image_folder),
                "validation_images": validation_images,
            } | (data or {})),
            AttackArguments(attack_steps=2),
            PurificationArguments(surrogates=names, **loss),
        )  # fmt: skip

    return build


def test_weights_are_trained_in_training_mode_and_validated_in_the_other(task_of, tmp_path):
    task, modes = task_of(), []

    def watched(name, method):
        def call(model, *rest):
            modes.append((name, model.training))
            return method(model, *rest)

        return call

    task.loss, task.evaluate = watched("loss", task.loss), watched("evaluate", task.evaluate)
    options = {"max_steps": 2, "eval_steps": 1, "per_device_train_batch_size": 2, "cpu_threads": 1, "ema_decay": 0}
    reset_accelerate()
    train(task, LoopArguments(str(tmp_path), **options), {})
    assert modes == [("evaluate", False), *[("loss", True), ("evaluate", False)] * 2]


def test_a_classifier_learns_from_normalised_pixels_and_smoothed_labels(image_folder, classifier_folder):
    data = load_image_dataset(str(image_folder))
    frozen = load_classifier(str(classifier_folder))
    processor = AutoImageProcessor.from_pretrained(classifier_folder)
    task = classification_module.ClassificationTask(
        frozen.classifier, processor, data, data, Augmentation(SIZE), label_smoothing=0.3
    )
    batch = collate([task.samples(total=6, start=0, seed=0)[i] for i in range(6)])
    target = torch.nn.functional.one_hot(batch["labels"], 3) * 0.7 + 0.1
    expected = -(target * frozen(batch["pixel_values"]).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(task.loss(frozen.classifier, batch)["loss"], expected)


def test_a_surrogate_with_weights_of_five_dimensions_can_be_moved(task_of):
    task = task_of()
    flat = torch.nn.Conv2d(3, 3, 3).to(memory_format=torch.channels_last)
    task.surrogates = [flat, torch.nn.Conv3d(1, 2, 3)]
    task.to(torch.device("cpu"))
    assert flat.weight.is_contiguous(memory_format=torch.channels_last)  # as it was loaded


def batch_of(task, count: int = 12) -> dict[str, torch.Tensor]:
    samples = task.samples(total=count, start=0, seed=0)
    return task.prepare(collate([samples[i] for i in range(count)]))


def test_every_argument_of_the_attacks_and_the_crops_arrives(task_of):
    changed = {each.name: each.default / 2 + 0.1 for each in fields(AttackArguments) if each.name != "attack_steps"}
    mixture = AttackArguments(**changed, attack_steps=3).mixture(5)
    assert vars(mixture) == changed | {"max_steps": 3, "num_surrogates": 5}
    crops = {"crop": "native", "flip": False, "max_zoom": 2.0, "zoom_share": 0.25, "resize": 20}
    assert task_of(data=crops).augmentation == Augmentation(SIZE, **crops)


def test_guidance_reaches_the_purifier_and_only_it(task_of):
    task = task_of(guidance_weight=0.5)
    task.model.config.reconstruction_loss_weight = task.model.config.purification_loss_weight = 0
    losses = task.loss(task.model, batch_of(task))
    torch.testing.assert_close(losses["loss"], 0.5 * losses["guidance_loss"])
    losses["loss"].backward()
    assert losses["guidance_loss"] > 0
    assert task.model.encoder.projection.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in task.surrogates[0].parameters())
    assert "guidance_loss" not in task_of().loss(task.model, batch_of(task_of()))


def test_guidance_is_the_distance_to_the_clean_logits(task_of):
    task = task_of(guidance_weight=1)
    batch = batch_of(task)
    loss = task.loss(task.model, batch)["guidance_loss"]
    with torch.no_grad():
        purified = task.model(batch["attacked"], mask_ratio=0.5, noise=batch["mask_noise"]).purified_pixel_values
        surrogate = task.surrogates[0]
        expected = (surrogate(purified) - surrogate(batch["pixel_values"])).abs().mean()
    torch.testing.assert_close(loss.detach(), expected)


def test_guidance_by_divergence_alone_and_beside_the_distance(task_of):
    task = task_of(guidance_kl_weight=0.5, mask_ratio=0.0)
    task.model.config.reconstruction_loss_weight = task.model.config.purification_loss_weight = 0
    batch = batch_of(task)
    losses = task.loss(task.model, batch)
    with torch.no_grad():
        purified = task.model(batch["attacked"], mask_ratio=0.0).purified_pixel_values
        p, q = (task.surrogates[0](x).double().softmax(-1) for x in (batch["pixel_values"], purified))
    torch.testing.assert_close(losses["guidance_kl_loss"].double(), (p * (p / q).log()).sum(-1).mean())
    torch.testing.assert_close(losses["loss"], 0.5 * losses["guidance_kl_loss"])
    assert "guidance_loss" not in losses
    losses["loss"].backward()
    assert losses["guidance_kl_loss"] > 0 and task.model.encoder.projection.weight.grad.abs().sum() > 0
    task.arguments.guidance_weight = 0.25
    both = task.loss(task.model, batch)
    torch.testing.assert_close(both["loss"], 0.5 * both["guidance_kl_loss"] + 0.25 * both["guidance_loss"])


def test_divergence_needs_the_same_classes_and_logits(task_of, classifier_folder, tmp_path):
    surrogates = [classifier_folder, save_classifier(tmp_path / "other", classes=5)]
    with pytest.raises(ValueError, match="guidance_kl_weight: the surrogates have 3 and 5 classes"):
        task_of(surrogates=surrogates, guidance_kl_weight=1, attack_labels="predicted")
    with pytest.raises(ValueError, match="guidance_kl_weight=1: features make no probabilities"):
        PurificationArguments(guidance_kl_weight=1, guidance_by="features")
    with pytest.raises(ValueError, match="guidance_kl_weight=-1: must not be negative"):
        PurificationArguments(guidance_kl_weight=-1)


def test_guidance_by_features_is_the_distance_before_the_last_layer(task_of):
    task = task_of(guidance_weight=1, guidance_by="features")
    batch = batch_of(task)
    loss = task.loss(task.model, batch)["guidance_loss"]
    purified = task.model(batch["attacked"], mask_ratio=0.5, noise=batch["mask_noise"]).purified_pixel_values
    surrogate = task.surrogates[0]
    features = [
        surrogate.classifier(surrogate.preprocessing(images), output_hidden_states=True).hidden_states[-1].mean((2, 3))
        for images in (purified, batch["pixel_values"])
    ]
    torch.testing.assert_close(loss, (features[0] - features[1]).abs().mean())
    loss.backward()
    assert task.model.encoder.projection.weight.grad.abs().sum() > 0
    assert not surrogate.classifier.classifier._forward_pre_hooks


class Unused(torch.nn.Module):
    """Logits without a linear layer, and one that is never run."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = torch.nn.Conv2d(3, 4, 1), torch.nn.Linear(4, 4)

    def forward(self, pixel_values):
        return self.conv(pixel_values).mean((2, 3))


def test_features_of_several_surrogates_are_of_one_width(task_of, classifier_folder, tmp_path):
    surrogates = [classifier_folder, save_classifier(tmp_path / "wide", width=8)]
    with pytest.raises(ValueError, match="guidance_by=features: the surrogates have 16 and 32 features"):
        task_of(surrogates=surrogates, guidance_weight=1, guidance_by="features")


def test_features_of_tokens_are_averaged():
    tokens = torch.nn.Sequential(torch.nn.Flatten(2), torch.nn.Linear(16, 5))
    head = torch.nn.Sequential(tokens, torch.nn.Linear(5, 2), torch.nn.Flatten())
    pixels = torch.rand(2, 3, 4, 4)
    expected = tokens(pixels).mean(dim=1)
    torch.testing.assert_close(Guide(PixelClassifier(head), 6, "features")(pixels), expected)


def test_features_need_a_linear_layer():
    with pytest.raises(ValueError, match="guidance_by=features: Flatten has no linear layer"):
        Guide(PixelClassifier(torch.nn.Flatten()), 10, "features")
    unused = PixelClassifier(Unused())
    with pytest.raises(ValueError, match="last linear layer of Unused does not see its features"):
        Guide(unused, 4, "features")(torch.rand(2, 3, 4, 4))
    assert Guide(unused, 4)(torch.rand(2, 3, 4, 4)).shape == (2, 4)
    with pytest.raises(ValueError, match="guidance_by='middle'"):
        PurificationArguments(guidance_by="middle")


def test_surrogates_stay_as_they_are(task_of, classifier_folder, tmp_path, monkeypatch):
    # with batch normalisation, which CIFAR ResNets would have folded away
    monkeypatch.setattr(stages_module, "load_surrogates", lambda names: [load_classifier(name) for name in names])
    task = task_of(guidance_weight=1)
    before = {key: value.clone() for key, value in task.surrogates[0].state_dict().items()}
    assert any("running_mean" in key for key in before)
    reset_accelerate()
    train(task, LoopArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=4, cpu_threads=1), {})
    assert not task.surrogates[0].training
    for key, value in task.surrogates[0].state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("guide", ["attacked", "any"])
def test_samples_are_spread_over_several_surrogates(task_of, classifier_folder, tmp_path, guide):
    other = save_classifier(tmp_path / "other", classes=5, seed=1)
    chosen = {} if guide == "attacked" else {"guidance_surrogate": guide}
    task = task_of(surrogates=[classifier_folder, other], guidance_weight=1, attack_labels="predicted", **chosen)
    batch = batch_of(task, 24)
    pairs = set(zip(batch["attack_surrogate"].tolist(), batch["guidance_surrogate"].tolist(), strict=True))
    assert pairs == ({(0, 0), (1, 1)} if guide == "attacked" else {(0, 0), (0, 1), (1, 0), (1, 1)})
    assert batch["clean_values"].shape == (24, 5)
    for index, surrogate in enumerate(task.surrogates):
        rows = batch["guidance_surrogate"] == index
        logits = surrogate(batch["pixel_values"][rows])
        torch.testing.assert_close(batch["clean_values"][rows, : logits.shape[1]], logits)
        assert not batch["clean_values"][rows, logits.shape[1] :].any()
    assert torch.isfinite(task.loss(task.model, batch)["loss"])


def test_the_guide_is_attacked_or_any():
    with pytest.raises(ValueError, match="guidance_surrogate='both'"):
        PurificationArguments(guidance_surrogate="both")


def test_attacks_start_from_the_labels_or_the_predictions(task_of, tmp_path):
    def attacked(**options):
        return batch_of(task_of(**options))["attacked"]

    assert not torch.equal(attacked(), attacked(attack_labels="predicted"))
    image_rows(24, labelled=False).save_to_disk(tmp_path)
    unlabelled = task_of(dataset=tmp_path, attack_labels="predicted")
    assert torch.equal(attacked(attack_labels="predicted"), batch_of(unlabelled)["attacked"])
    judged = unlabelled.evaluate(unlabelled.model)  # by the predictions too, and named so
    assert {name for name in judged if "acc" in name or "agree" in name} == {
        "agreement_attacked", "agreement_clean_purified", "agreement_attacked_purified"
    }  # fmt: skip
    with pytest.raises(DataError, match="label_column.*attack_labels=predicted"):
        task_of(dataset=tmp_path)


def test_validation_needs_every_label_unless_it_goes_by_predictions(task_of, tmp_path):
    rows = image_rows(4)
    rows.map(lambda row, index: {"label": -1 if index == 3 else row["label"]}, with_indices=True).save_to_disk(tmp_path)
    data = {"validation_dataset": str(tmp_path), "validation_split": "train"}
    task = task_of(data=data)
    with pytest.raises(DataError, match="validation dataset has no label: leave .* or use attack_labels=predicted"):
        task.evaluate(task.model.eval())
    for options in ({"attack_labels": "predicted"}, {"validation_images": 3}):
        task = task_of(data=data, **options)
        assert task.evaluate(task.model.eval())


@pytest.mark.parametrize("role", ["training", "validation"])
def test_labels_beyond_the_classes_are_told(task_of, tmp_path, role, classifier_folder):
    rows = image_rows(4).cast_column("label", datasets.Value("int64"))
    rows.map(lambda row, index: {"label": 3 if index == 2 else 0}, with_indices=True).save_to_disk(tmp_path / "rows")
    data = {"validation_dataset": str(tmp_path / "rows"), "validation_split": "train"}
    if role == "training":  # a stream does not say how many classes it has
        data = {"dataset": str(tmp_path / "rows"), "streaming": True}
    refused = f"of the {role} dataset has the class index 3, and a surrogate only 3 classes .0 to 2.*=predicted"

    def use(task) -> None:
        task.prepare(collate(list(task.samples(total=4, start=0, seed=0)))) if role == "training" else task.evaluate(
            task.model.eval()
        )

    with pytest.raises(DataError, match=refused):
        use(task_of(data=data))
    use(task_of(data=data, attack_labels="predicted"))


@pytest.mark.parametrize("labels", [["cat", "dog"], [0.0, 1.0]])
def test_labels_that_are_no_indices_are_told_at_once(task_of, tmp_path, labels):
    rows = image_rows(2).remove_columns("label").add_column("label", labels)
    rows.save_to_disk(tmp_path)
    with pytest.raises(DataError, match="training dataset .* 'label' holds Value.*cast_column.*attack_labels=predict"):
        task_of(dataset=tmp_path)
    classifier = words(dataset=tmp_path, validation_split="train", output_dir=tmp_path / "run", max_steps=1)
    with pytest.raises(DataError, match="has no labels; its column 'label' holds Value.*cast_column"):
        run("train_classifier", classifier)


@pytest.mark.parametrize("named", [True, False])
def test_a_surrogate_must_know_every_class(task_of, tmp_path, named):
    few = save_classifier(tmp_path / "few", classes=2)
    rows = image_rows(24)
    if not named:
        rows = rows.cast_column("label", datasets.Value("int64"))
    rows.save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match="3 classes and a surrogate only 2.*attack_labels=predicted"):
        task_of(dataset=tmp_path / "data", surrogates=[few])
    task_of(dataset=tmp_path / "data", surrogates=[few], attack_labels="predicted")


@pytest.mark.parametrize("named", [True, False])
def test_a_surrogate_of_more_classes_is_of_another_dataset(task_of, tmp_path, named):
    many = save_classifier(tmp_path / "many", classes=5)
    rows = image_rows(24)
    if not named:
        rows = rows.cast_column("label", datasets.Value("int64"))
    rows.save_to_disk(tmp_path / "data")
    if named:
        with pytest.raises(DataError, match="3 classes and a surrogate 5.*attack_labels=predicted"):
            task_of(dataset=tmp_path / "data", surrogates=[many])
        task_of(dataset=tmp_path / "data", surrogates=[many], attack_labels="predicted")
    else:  # bare numbers may be some of the surrogate's classes
        task_of(dataset=tmp_path / "data", surrogates=[many])


def test_classes_of_another_order_are_matched_by_name(task_of, tmp_path, caplog):
    usual = load_classifier(str(save_classifier(tmp_path / "usual")))
    turned, names = ["class2", "class0", "class1"], ["class0", "class1", "class2"]
    rows = image_rows(24)
    rows.cast_column("label", datasets.ClassLabel(names=names)).save_to_disk(tmp_path / "straight")
    rows = rows.map(lambda row: {"label": turned.index(names[row["label"]])}, load_from_cache_file=False)
    rows.cast_column("label", datasets.ClassLabel(names=turned)).save_to_disk(tmp_path / "turned")
    options = {"surrogates": [tmp_path / "usual"], "guidance_weight": 0.1}
    both = {}
    for name in ("straight", "turned"):
        caplog.clear()
        task = task_of(dataset=tmp_path / name, data={"validation_dataset": str(tmp_path / name)}, **options)
        assert ("another order" in caplog.text) == (name == "turned")
        batch, surrogate = batch_of(task), task.surrogates[0]
        both[name] = batch["attacked"], task.evaluate(task.model.eval())
    torch.testing.assert_close(both["turned"][0], both["straight"][0])
    assert both["turned"][1] == pytest.approx(both["straight"][1])
    pixels = torch.rand(5, 3, 16, 16)
    torch.testing.assert_close(surrogate(pixels), usual(pixels)[:, [2, 0, 1]], atol=1e-4, rtol=1e-4)
    assert list(surrogate.id2label.values()) == turned and not surrogate.match_classes(turned)
    assert surrogate.match_classes(names) and not surrogate.match_classes(["a", "b", "c"])
    torch.testing.assert_close(surrogate(pixels), usual(pixels), atol=1e-4, rtol=1e-4)
    with pytest.raises(DataError, match="the training dataset's classes in another order"):
        task_of(dataset=tmp_path / "straight", data={"validation_dataset": str(tmp_path / "turned")}, **options)


def test_labels_of_another_order_are_warned_of(task_of, caplog):
    task = task_of(validation_images=9)
    images = torch.stack([sample["pixel_values"] for sample in _samples(task, 9)]).float() / 255
    surrogate = task.surrogates[0]
    right = surrogate(images).argmax(-1)
    for shift, warned in ((0, False), (1, True)):
        task._validation = None
        task.validation_batch = lambda shift=shift: {"pixel_values": images, "labels": (right + shift) % 3}
        caplog.clear()
        task.evaluate(task.model.eval())
        assert ("attack_labels=predicted" in caplog.text) == warned


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_on_one_class_of_several_is_warned_of(task_of, tmp_path, caplog, streaming):
    image_rows(12).sort("label").save_to_disk(tmp_path)
    by_class = {"validation_dataset": str(tmp_path), "validation_split": "train", "streaming": streaming}
    for images, warned in ((4, True), (5, False), (1, False)):
        caplog.clear()
        task = task_of(data=by_class | {"validation_images": images})
        labels = [task.validation_batch()["labels"].tolist() for _ in range(2)][0]
        assert labels == [0, 0, 0, 0, 1][:images]  # the first ones, warned or not
        said = [line for line in caplog.messages if "all of one class of 3" in line]
        assert len(said) == warned and all("shuffled validation_dataset" in line for line in said)


def _samples(task, count: int) -> list:
    samples = task.samples(total=count, start=0, seed=0)
    return [samples[i] for i in range(count)]


def _save_pairs(folder, surrogates: list[str | None] | None) -> None:
    """24 stored pairs; the `surrogates` they name in turn, or no such column."""
    count = range(24)
    columns = {"image": [picture(i, 16, 16) for i in count], "label": [i % 3 for i in count],
               "adversarial_image": [picture(99 - i, 16, 16) for i in count]}  # fmt: skip
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES),
                "adversarial_image": datasets.Image()}  # fmt: skip
    if surrogates:
        columns["surrogate"] = [surrogates[i % len(surrogates)] for i in count]
        features["surrogate"] = datasets.Value("string")
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(folder)


def test_stored_pairs_take_the_place_of_attacks(task_of, tmp_path, monkeypatch):
    _save_pairs(tmp_path, None)

    def refuse(*args, **kwargs):
        raise AssertionError("no attack is needed")

    monkeypatch.setattr(purification_module, "perturb", refuse)
    task = task_of(dataset=tmp_path, data={"flip": False})
    batch = batch_of(task, 24)
    stored = {content(picture(99 - i, 16, 16)) for i in range(24)}
    assert {content(image) for image in batch["attacked"]} == stored and "attack_start" not in batch
    assert {content(image) for image in batch["pixel_values"]}.isdisjoint(stored)
    assert torch.isfinite(task.loss(task.model, batch)["loss"])


def test_stored_pairs_are_guided_by_the_surrogate_they_were_made_on(task_of, classifier_folder, tmp_path):
    names = [str(classifier_folder), str(save_classifier(tmp_path / "other", seed=1))]
    made_on = [*names, None]
    _save_pairs(tmp_path / "pairs", made_on)
    named = {content(picture(99 - i, 16, 16)): made_on[i % 3] for i in range(24)}

    def guides(**chosen) -> set[tuple[str | None, int]]:
        task = task_of(dataset=tmp_path / "pairs", surrogates=names, data={"flip": False}, guidance_weight=1, **chosen)
        batch = batch_of(task, 72)
        return {
            (named[content(image)], index)
            for image, index in zip(batch["attacked"], batch["guidance_surrogate"].tolist(), strict=True)
        }

    drawn = {(name, index) for name in made_on for index in (0, 1)}
    assert guides(guidance_surrogate="any") == drawn
    assert guides() == drawn - {(names[0], 1), (names[1], 0)}


def test_guides_that_do_not_fit_stored_pairs_are_warned_of(task_of, classifier_folder, tmp_path, caplog):
    mine = save_classifier(tmp_path / "mine", seed=1)

    def warnings(surrogates, **chosen) -> list[str]:
        caplog.clear()
        task_of(dataset=tmp_path / "pairs", surrogates=surrogates, **{"guidance_weight": 1} | chosen)
        return [record.getMessage() for record in caplog.records if "guides stored images" in record.getMessage()]

    both = [classifier_folder, mine]
    _save_pairs(tmp_path / "pairs", [None, str(mine), "theirs"])
    assert len(found := warnings(both)) == 1 and "attacked on theirs: name the same ones in surrogates" in found[0]
    for quiet in ({"guidance_weight": 0}, {"guidance_surrogate": "any"}):
        assert not warnings(both, **quiet)
    assert not warnings([mine])
    shutil.rmtree(tmp_path / "pairs")
    _save_pairs(tmp_path / "pairs", [None, str(mine)])
    assert not warnings(both)
    shutil.rmtree(tmp_path / "pairs")
    _save_pairs(tmp_path / "pairs", None)
    assert len(found := warnings(both)) == 1 and "no column `surrogate`" in found[0]


def content(image) -> bytes:
    """The bytes of a picture, or of a (3, S, S) tensor in [0, 1]."""
    if isinstance(image, torch.Tensor):
        image = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return np.asarray(image).tobytes()


def test_other_sizes_need_windows(task_of):
    with pytest.raises(ValueError, match="window_overlap=0.95"):
        PurificationArguments(window_overlap=0.95)
    task_of(data={"image_size": 32})
    with pytest.raises(ValueError, match="image_size=0"):
        task_of(data={"image_size": 0})
    with pytest.raises(ValueError, match="image_size=32.*purify_mode='interpolate'"):
        task_of(data={"image_size": 32}, model=tiny_purifier(purify_mode="interpolate"))


def test_a_surrogate_is_needed(task_of):
    with pytest.raises(ValueError, match="surrogates"):
        purification_module.PurificationTask(tiny_purifier(), None, [], None, None, None, None, None)


def test_steps_of_accumulation_are_those_that_were_asked_for(options, tmp_path, monkeypatch):
    plain = run("finetune", options(tmp_path / "plain", max_steps=2))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert_same_run(plain, run("finetune", options(tmp_path / "set", max_steps=2)))


@pytest.mark.parametrize("rank", [1, 2])
def test_weight_decay_is_on_matrices_of_any_rank(rank):
    model = add_lora(tiny_purifier(), default_lora_config(tiny_purifier(), rank=rank))
    decayed, free = loop_module.build_optimizer(model, LoopArguments()).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sum(".lora_" in names[id(parameter)] for parameter in decayed["params"]) > 10
    assert not any(".lora_" in names[id(parameter)] for parameter in free["params"])


def test_weight_decay_leaves_vectors_alone():
    model = tiny_purifier()
    decayed, free = loop_module.build_optimizer(model, LoopArguments(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0 and decayed["betas"] == (0.9, 0.95)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(names[id(parameter)].endswith("weight") for parameter in decayed["params"])
    assert {"decoder.mask_token", "encoder.layernorm.weight"} <= {names[id(parameter)] for parameter in free["params"]}
    assert len(decayed["params"]) + len(free["params"]) == len(names)
