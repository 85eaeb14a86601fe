"""`--push_to_hub` of the training scripts: in the background, with a retry, and never the reason that a run ends."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from hub_helpers import OTHER_TOKEN, classifier, failure, purifier, same, transformers_classifier, warnings_of
from transformers import ViTConfig, ViTModel

from maep_hf.hub.folders import kind_of_model

pytest_plugins = ["hub_client"]
BACKGROUND = "maep_hf.hub.background"
TINY_VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
ROOT = Path(__file__).resolve().parent.parent


# In the process of the client


def prepare(folder: Path) -> None:
    """Images, a surrogate and a purifier to start from."""
    import datasets
    from PIL import Image
    from transformers import ViTImageProcessor

    images = [Image.effect_noise((16, 16), 10 + 10 * index).convert("RGB") for index in range(8)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 4}, features=features)
    for split in ("train", "test"):
        rows.to_parquet(folder / f"images/{split}.parquet")
    classifier().save_pretrained(folder / "surrogate")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "surrogate")
    purifier().save_pretrained(folder / "base")


def train(folder: Path, name: str, script: str = "finetune", **options) -> Path:
    """Run a script of `train/` for two steps, with a checkpoint after each."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    of_script = {
        "finetune": {"surrogates": folder / "surrogate", "model": folder / "base", "attack_steps": 2},
        "baselines.train_disco": {"surrogates": folder / "surrogate", "encoder_channels": 4, "encoder_blocks": 1},
        "train_classifier": {},
    }[script]
    usual = of_script | {
        "dataset": folder / "images", "per_device_train_batch_size": 2, "max_steps": 2, "warmup_steps": 0,
        "validation_images": 2, "eval_steps": 9, "save_steps": 1, "logging_steps": 1, "cpu_threads": 1,
        "output_dir": folder / name,
    }  # fmt: skip
    if "." in script:  # a module of a package, with neighbours
        module = importlib.import_module(f"train.{script}")
    else:
        spec = importlib.util.spec_from_file_location(f"train_{script}", ROOT / f"train/{script}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return module.main([word for key, value in (usual | options).items() for word in (f"--{key}", str(value))])


def train_and_push(folder: Path, name: str, fails: int = 0, **options) -> dict:
    """Train; the first so many pushes fail. The order in which checkpoints were written and pushes ended is noted."""
    from maep_hf.hub import background

    pushes, push = [], background.push_to_hub

    def failing(*args, **kwargs):
        pushes.append(kwargs["commit_message"])
        if len(pushes) <= fails:
            raise ConnectionError("the network is down")
        return push(*args, **kwargs)

    with (
        warnings_of(BACKGROUND) as warned,
        mock.patch.object(background, "push_to_hub", failing),
        mock.patch.object(time, "sleep"),
    ):
        run = train(folder, name, **options)
    left = sorted(path.name for path in run.iterdir())
    return {"pushes": pushes, "warned": warned, "left": left}


def loads(repo: str, folder: Path, adapter_base: str | None = None) -> None:
    from peft import PeftModel

    from maep_hf import MAEPModel

    trained = MAEPModel.from_pretrained(folder)
    assert not same(trained, purifier())
    if adapter_base is None:
        assert same(MAEPModel.from_pretrained(repo), trained)
    else:
        loaded = PeftModel.from_pretrained(MAEPModel.from_pretrained(adapter_base), repo)
        assert same(loaded.merge_and_unload(), trained)


def push_base(folder: Path, repo: str) -> None:
    from maep_hf.hub import push_to_hub

    push_to_hub(folder / "base", repo)


def train_with_token(folder: Path, name: str, token: str, **options) -> str:
    with mock.patch.dict("os.environ", {"HF_TOKEN": token}):
        return failure(train, folder, name, push_to_hub="true", **options)


def without_the_hub(folder: Path) -> str:
    """What a run is told when nobody answers."""
    import httpx2
    from huggingface_hub import HfApi

    from maep_hf.hub.background import BackgroundPush

    with mock.patch.object(HfApi, "whoami", side_effect=httpx2.ConnectError("nobody there")):
        return failure(BackgroundPush, folder, "nobody")


def push_what_cannot_be_copied(folder: Path, repo: str) -> tuple[list[str], list[str]]:
    """A background push of a folder that is broken, and of one that does not fit on the disk."""
    from maep_hf.hub.background import BackgroundPush

    push = BackgroundPush(folder, repo)
    with warnings_of(BACKGROUND) as warned:
        push.start(1)  # there is no config.json
        purifier().save_pretrained(folder)
        with mock.patch("shutil.copy", side_effect=OSError("no space left")):
            push.start(2)
    assert push.running is None
    return warned, sorted(path.name for path in folder.iterdir() if path.name.startswith(".push"))


# Tests


@pytest.fixture(scope="module")
def ready(client, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    client(prepare, folder)
    return folder


def test_every_save_in_the_background_and_the_end(client, hub, ready):
    options = {"push_to_hub": "true", "hub_model_id": "every-save", "hub_strategy": "every_save", "hub_private": "true"}
    found = client(train_and_push, ready, "every", **options)
    assert found["pushes"] == ["Training, step 1", "End of training, step 2"] and found["warned"] == []
    assert not [name for name in found["left"] if name.startswith(".push")]
    client(loads, "someone/every-save", ready / "every")
    repository = hub.repositories["model", "someone/every-save"]
    assert repository.private and {"Training, step 1", "End of training, step 2"} <= {
        commit.title for commit in repository.commits.values()
    }
    files = hub.files("someone/every-save")
    assert {"run.json", "metrics.jsonl", "pipeline_maep.py", "README.md"} <= set(files)
    assert not [name for name in files if "checkpoint" in name or "preview" in name]
    assert "white-box | purifier and classifier together | **not measured**" in files["README.md"].decode()


def test_failing_pushes_warn_and_are_repeated_at_the_end(client, hub, ready):
    found = client(train_and_push, ready, "flaky", fails=2, push_to_hub="true", hub_strategy="every_save")
    assert len(found["pushes"]) == 3 and len(found["warned"]) == 2
    assert all("the network is down" in line for line in found["warned"])
    client(loads, "someone/flaky", ready / "flaky")


def test_a_run_without_the_hub_at_its_end_is_whole(client, hub, ready):
    found = client(train_and_push, ready, "offline", fails=99, push_to_hub="true", hub_model_id="never-there")
    assert "maep push" in found["warned"][-1] and "never-there" in found["warned"][-1] and len(found["pushes"]) == 3
    assert "model.safetensors" in found["left"]
    assert set(hub.files("someone/never-there")) == {".gitattributes"}
    found = client(train_and_push, ready, "offline", push_to_hub="true", hub_model_id="never-there")  # once more
    assert found["pushes"] == ["End of training, step 2"]
    client(loads, "someone/never-there", ready / "offline")


def test_a_folder_that_cannot_be_copied_is_a_warning(client, tmp_path):
    warned, left = client(push_what_cannot_be_copied, tmp_path, "someone/uncopied")
    assert "holds no config.json" in warned[0] and "no space left" in warned[1] and left == []


def test_nothing_is_pushed_without_being_asked(client, hub, ready):
    before = len(hub.received)
    client(train, ready, "quiet", hub_model_id="someone/quiet")
    assert len(hub.received) == before


def test_an_adapter_is_pushed_with_its_base(client, hub, ready):
    lora = {"trainable": "decoder_lora", "lora_rank": 2, "hub_model_id": "trained-adapter"}
    error = client(train_with_token, ready, "lora", hub.token, **lora)
    assert "hub_base_model: the adapter's base, 'base', is a local model" in error
    error = client(train_with_token, ready, "lora", hub.token, hub_base_model="someone/nowhere", **lora)
    assert "hub_base_model: someone/nowhere is not on the Hub" in error and not (ready / "lora").exists()
    client(push_base, ready, "someone/trained-base")
    client(train, ready, "lora", push_to_hub="true", hub_base_model="someone/trained-base", **lora)
    files = hub.files("someone/trained-adapter")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "someone/trained-base"
    assert "base_model_relation: adapter" in files["README.md"].decode() and "model.safetensors" not in files
    assert json.loads(files["run.json"])["arguments"]["finetune"]["model"] == "base"
    client(loads, "someone/trained-adapter", ready / "lora", "someone/trained-base")


def test_a_classifier_of_transformers_is_pushed(client, hub, ready):
    small = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4}
    options = {"script": "train_classifier", "architecture": "regnet", "architecture_options": json.dumps(small)}
    found = client(train_and_push, ready, "regnet", push_to_hub="true", hub_strategy="every_save", **options)
    assert found["pushes"] == ["Training, step 1", "End of training, step 2"] and found["warned"] == []
    files = hub.files("someone/regnet")
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "run.json", "metrics.jsonl"} <= set(files)
    assert b"`regnet`, for 2 classes" in files["README.md"] and b"| white-box | PGD-10" in files["README.md"]
    assert files["model.safetensors"] == (ready / "regnet/model.safetensors").read_bytes()


def test_a_model_that_cannot_be_pushed_is_refused_before_training(client, hub, ready):
    error = client(train_with_token, ready, "disco", hub.token, script="baselines.train_disco")
    assert error.startswith("ValueError: push_to_hub: a DiscoModel is neither a purifier") and "leave out" in error
    assert not (ready / "disco").exists() and ("model", "someone/disco") not in hub.repositories


def test_a_folder_that_cannot_be_used_leaves_no_repository(client, hub, ready, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    options = {"output_dir": tmp_path, "hub_model_id": "never-made"}
    error = client(train_with_token, ready, "unused", hub.token, **options)
    assert error.startswith("RunFolderError") and "holds files that a run would replace" in error
    assert ("model", "someone/never-made") not in hub.repositories


def test_a_refused_push_leaves_the_run_that_was_to_be_overwritten(client, ready, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.json").write_text("old")
    options = {"output_dir": tmp_path, "overwrite_output_dir": "true"}
    assert client(train_with_token, ready, "refused", OTHER_TOKEN, **options).startswith("PushError")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "run.json"]


def test_every_kind_of_model_that_can_be_trained_is_known():
    assert [kind_of_model(model()).name for model in (purifier, classifier, transformers_classifier)] == [
        "purifier", "classifier", "classifier of transformers",
    ]  # fmt: skip
    for model in (torch.nn.Linear(1, 1), ViTModel(ViTConfig(**TINY_VIT))):
        with pytest.raises(ValueError, match=f"a {type(model).__name__} is neither"):
            kind_of_model(model)


def test_what_cannot_be_pushed_is_known_before_training(client, hub, ready):
    error = client(train_with_token, ready, "refused", OTHER_TOKEN)
    assert error.startswith("PushError") and "401" in error and not (ready / "refused").exists()
    error = client(without_the_hub, ready / "refused")
    assert error.startswith("PushError: nobody: the connection failed (nobody there)")
    client(push_base, ready, "someone/public-already")
    error = client(train_with_token, ready, "refused", hub.token, hub_model_id="public-already", hub_private="true")
    assert "private=True: someone/public-already exists and is public" in error and not (ready / "refused").exists()
    assert "hub_strategy='sometimes'" in failure(_loop_arguments, hub_strategy="sometimes")


def _loop_arguments(**options) -> None:
    from maep_hf.training import LoopArguments

    LoopArguments(**options)
