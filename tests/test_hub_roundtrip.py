"""`push_to_hub` and `from_pretrained` of the objects themselves, with the real client against a Hub on loopback.

Functions that talk to the Hub run in the client's process, see `hub_client.py`.
"""

from pathlib import Path

import torch
from hub_helpers import OTHER_TOKEN, failure, purifier, same
from PIL import Image

pytest_plugins = ["hub_client"]
CODE = {"configuration_maep.py", "modeling_maep.py"}


# In the process of the client


def pin_base(folder: Path, base: str, copy: str, repo: str) -> list[str | None]:
    import json

    from hub_helpers import push
    from huggingface_hub import hf_hub_download
    from peft import get_peft_model

    from maep_hf import MAEPModel
    from maep_hf.adaptation import add_lora, default_lora_config, save_adapter
    from maep_hf.checkpoints import load_purifier

    for name in (base, copy):
        purifier(1).push_to_hub(name, revision="v1" if name == base else "main")
    model = MAEPModel.from_pretrained(base, revision="v1")
    get_peft_model(model, default_lora_config(model), revision="v1").save_pretrained(folder / "peft")
    model = MAEPModel.from_pretrained(base, revision="v1")
    save_adapter(add_lora(model, default_lora_config(model)), folder / "ours")
    purifier(2).push_to_hub(base)
    pixels = torch.rand(1, 3, 16, 20)
    for adapter in ("peft", "ours"):
        expected = purifier(1).purify(pixels)
        torch.testing.assert_close(load_purifier(folder / adapter).purify(pixels), expected, atol=1e-6, rtol=0)
    found = []
    for named in (base, copy):
        pushed = f"{repo}-{named.split('/')[1]}"
        push(folder / "ours", pushed, base_model=named)
        found.append(json.loads(Path(hf_hub_download(pushed, "adapter_config.json")).read_text())["revision"])
        torch.testing.assert_close(load_purifier(pushed).purify(pixels), expected, atol=1e-6, rtol=0)
    return found


def push_purifier(repo: str, folder: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel

    from maep_hf import MAEPImageProcessor, MAEPModel

    purifier().save_pretrained(folder)
    model = MAEPModel.from_pretrained(folder)  # knows the path of that folder from here on
    torch.save(torch.optim.AdamW(model.parameters()).state_dict(), folder / "optimizer.pt")
    model.push_to_hub(repo)
    processor = MAEPImageProcessor(do_resize=True, size={"height": 20, "width": 24})
    processor.push_to_hub(repo)
    for cls in (MAEPModel, AutoModel):
        assert same(cls.from_pretrained(repo), model)
    for cls in (MAEPImageProcessor, AutoImageProcessor):
        loaded = cls.from_pretrained(repo)
        assert type(loaded) is MAEPImageProcessor and loaded.to_dict() == processor.to_dict()


def push_classifier(repo: str) -> None:
    from transformers import AutoModelForImageClassification

    from maep_hf import CifarResNetConfig, CifarResNetForImageClassification

    model = CifarResNetForImageClassification(CifarResNetConfig(depth=8, width=4, id2label={0: "cat", 1: "dog"}))
    model.push_to_hub(repo)
    loaded = AutoModelForImageClassification.from_pretrained(repo)
    assert type(loaded) is CifarResNetForImageClassification and same(loaded, model)
    assert loaded.config.id2label == {0: "cat", 1: "dog"}


def push_revisions(repo: str) -> None:
    from huggingface_hub import HfApi

    from maep_hf import MAEPModel
    from maep_hf.checkpoints import load_purifier

    models = {"main": purifier(1), "experiment": purifier(2)}
    for branch, model in models.items():
        model.push_to_hub(repo, revision=None if branch == "main" else branch)
    HfApi().create_tag(repo, tag="v1", revision="experiment")
    request = purifier(3).push_to_hub(repo, create_pr=True)
    assert request.pr_revision == "refs/pr/1"
    purifier(4).push_to_hub(repo, revision="experiment")
    revisions = {None: 1, "main": 1, "v1": 2, "refs/pr/1": 3, "experiment": 4, request.oid: 3}
    for revision, seed in revisions.items():
        assert same(MAEPModel.from_pretrained(repo, revision=revision), purifier(seed)), revision
        assert same(load_purifier(repo, revision=revision), purifier(seed)), revision
    (weights,) = [file for file in HfApi().list_repo_tree(repo, revision="v1") if file.path == "model.safetensors"]
    assert weights.lfs.size == weights.size > 10_000
    refs = HfApi().list_repo_refs(repo)
    assert {ref.name for ref in refs.branches} == {"main", "experiment"} and [ref.name for ref in refs.tags] == ["v1"]


def push_again(repo: str, seed: int) -> None:
    from maep_hf import MAEPModel

    purifier(seed).push_to_hub(repo)
    assert same(MAEPModel.from_pretrained(repo), purifier(seed))


def push_refused(repo: str, private: str) -> list[str]:
    from maep_hf import MAEPImageProcessor, MAEPModel

    purifier().push_to_hub(private, private=True)
    errors = [
        failure(purifier().push_to_hub, repo, token=OTHER_TOKEN),
        failure(MAEPImageProcessor().push_to_hub, repo, token=OTHER_TOKEN),
        failure(MAEPModel.from_pretrained, private, token=False),
    ]
    assert same(MAEPModel.from_pretrained(private), purifier())  # with the token, and last: it is in the cache now
    return errors


def load_missing(repo: str) -> list[str]:
    from maep_hf import MAEPImageProcessor, MAEPModel

    purifier().push_to_hub(repo)
    return [
        failure(MAEPModel.from_pretrained, repo, revision="gone"),
        failure(MAEPImageProcessor.from_pretrained, repo, revision="gone"),
        failure(MAEPModel.from_pretrained, repo + "-gone"),
    ]


def push_adapter(base: str, repo: str) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    from maep_hf import MAEPModel

    purifier().push_to_hub(base)
    targets = ["q_proj", "fc1"]
    adapted = get_peft_model(
        MAEPModel.from_pretrained(base), LoraConfig(target_modules=targets, init_lora_weights=False)
    )
    adapted.push_to_hub(repo)
    loaded = PeftModel.from_pretrained(MAEPModel.from_pretrained(base), repo)
    pixels = torch.rand(1, 3, 16, 20)
    purified = loaded.eval().purify(pixels)
    assert torch.equal(purified, adapted.eval().purify(pixels))
    assert not torch.equal(purified, purifier().purify(pixels))


def push_pipeline(repo: str) -> None:
    from transformers import pipeline

    from maep_hf import ImagePurificationPipeline

    made = ImagePurificationPipeline(purifier(), task="image-purification")
    made.push_to_hub(repo)
    image = Image.effect_noise((30, 20), 60)
    for options in ({}, {"trust_remote_code": True}):
        loaded = pipeline("image-purification", model=repo, device="cpu", **options)
        assert type(loaded) is ImagePurificationPipeline and loaded(image).tobytes() == made(image).tobytes()


# Tests


def test_purifier_and_image_processor(client, hub, tmp_path):
    client(push_purifier, "someone/purifier", tmp_path)
    files = hub.files("someone/purifier")
    expected = {"config.json", "model.safetensors", "preprocessor_config.json", "image_processing_maep.py"}
    assert set(files) - {"README.md", ".gitattributes"} == CODE | expected
    assert files["model.safetensors"] in hub.objects.values()  # went through LFS


def test_classifier(client, hub):
    client(push_classifier, "someone/classifier")
    assert {"configuration_cifar_resnet.py", "modeling_cifar_resnet.py"} <= set(hub.files("someone/classifier"))


def test_branches_tags_and_pull_requests(client):
    client(push_revisions, "someone/revisions")


def test_repository_that_exists(client, hub):
    for seed in (1, 2, 2):
        client(push_again, "someone/again", seed)
    assert set(hub.files("someone/again")) - {"README.md", ".gitattributes"} == CODE | {
        "config.json",
        "model.safetensors",
    }


def test_upload_that_is_cut_off_can_be_repeated(client, hub):
    hub.cut_uploads = 1
    client(push_again, "someone/cut", 5)  # the client repeats it by itself
    assert hub.cut_uploads == 0 and "model.safetensors" in hub.files("someone/cut")


def test_wrong_token_and_private_repository(client, hub):
    model, processor, private = client(push_refused, "someone/refused", "someone/private")
    assert model.startswith("HfHubHTTPError") and "401" in model and "401" in processor
    assert "someone/private" in private
    assert ("model", "someone/refused") not in hub.repositories
    assert hub.repositories["model", "someone/private"].private


def test_missing_revision_and_repository(client):
    model, processor, repository = client(load_missing, "someone/missing")
    for message in (model, processor):
        assert message.startswith("OSError") and "gone" in message and "revision" in message
    assert repository.startswith("OSError") and "someone/missing-gone" in repository


def test_adapter(client, hub):
    client(push_adapter, "someone/base", "someone/adapter")
    files = set(hub.files("someone/adapter"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files and "model.safetensors" not in files


def test_an_adapter_is_loaded_on_its_bases_revision(client, tmp_path):
    pinned, moved = client(pin_base, tmp_path, "someone/moving", "someone/copy", "someone/pinned")
    assert (pinned, moved) == ("v1", None)


def test_pipeline(client, hub):
    client(push_pipeline, "someone/pipeline")
    assert CODE | {"pipeline_maep.py", "image_processing_maep.py"} <= set(hub.files("someone/pipeline"))


def test_no_secret_path_or_optimiser_was_pushed(client, hub, tmp_path_factory):
    client(push_purifier, "someone/clean", tmp_path_factory.mktemp("trained-here"))
    commits = [commit for repository in hub.repositories.values() for commit in repository.commits.values()]
    assert len(hub.received) + len(hub.objects) > 10 and len(commits) >= 3
    assert not hub.leaks(tmp_path_factory.getbasetemp())
    names = {path for commit in commits for path in commit.files}
    assert not [name for name in names if name.endswith((".pt", ".pth", ".bin", ".pkl")) or "optim" in name]
