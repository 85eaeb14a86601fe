"""`maep_hf.hub.push_to_hub`: what goes to the Hub, what never does, and what happens to pages that people edited."""

import contextlib
import io
import json
import os
import re
import tempfile
import time
from pathlib import Path
from unittest import mock

import local_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_helpers import (
    OTHER_TOKEN,
    classifier,
    failure,
    overwrite_readme,
    purifier,
    push,
    python_blocks,
    same,
    transformers_classifier,
    write_records,
)
from huggingface_hub import ModelCard
from local_hub import Blob, Commit, Refusal

from maep_hf.hub.cards import render_card
from maep_hf.hub.contents import LeakError, operations_of
from maep_hf.hub.folders import ADAPTER, ADAPTER_CONFIG, PAIRS, PLAIN_CLASSIFIER
from maep_hf.hub.seal import edited

pytest_plugins = ["hub_client"]
CODE = {"configuration_maep.py", "modeling_maep.py", "image_processing_maep.py", "pipeline_maep.py"}
MODEL = {"config.json", "model.safetensors", "preprocessor_config.json", *CODE}


# In the process of the client


def trained(folder: Path, seed: int = 0, results: tuple = (("gray-box", 82.3), ("white-box", 1.2))) -> Path:
    """What a run leaves, with records of these weights, and much that is nobody's business."""
    import torch
    from PIL import Image

    from maep_hf.evaluation.fingerprint import fingerprint

    model = purifier(seed)
    model.save_pretrained(folder)
    write_records(folder, fingerprint(model), results)
    paths = {"dataset": f"{folder.parent}/data/cifar10", "train_split": "train"}
    loop = {"output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4}
    run = {"arguments": {"data": paths, "loop": loop}, "command": ["pretrain.py", f"--output_dir={folder}"]}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.jsonl").write_text('{"step": 3, "loss": 0.5}\n')
    for name in ("attacks.png", "holiday.png"):  # the page shows the first
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "checkpoints/step-1").mkdir(parents=True, exist_ok=True)
    torch.save(torch.optim.AdamW(model.parameters()).state_dict(), folder / "checkpoints/step-1/optimizer.bin")
    for name in ("optimizer.pt", "token", "training_args.bin", ".env", "notes.txt", "events.out.tfevents"):
        (folder / name).write_bytes(b"private")
    return folder


def build_and_push(folder: Path, repo: str, seed: int = 0, **options) -> dict:
    return push(trained(folder, seed), repo, **options)


def load_everywhere(repo: str, seed: int) -> None:
    from transformers import AutoImageProcessor, AutoModel, pipeline

    from maep_hf import MAEPImageProcessor, MAEPModel

    assert same(MAEPModel.from_pretrained(repo), purifier(seed)) and same(
        AutoModel.from_pretrained(repo), purifier(seed)
    )
    assert type(AutoImageProcessor.from_pretrained(repo)) is MAEPImageProcessor
    pipeline("image-purification", model=repo, device="cpu")


def push_revisions(folder: Path, repo: str) -> dict:
    from huggingface_hub import HfApi

    from maep_hf import MAEPModel

    first = push(trained(folder / "a", 1), repo, private=True, tag="v1")
    again = push(folder / "a", repo, private=True, tag="v1")  # a repeated push changes nothing, and its tag is its own
    branch = push(trained(folder / "b", 2), repo, revision="experiment")
    request = push(trained(folder / "c", 3), repo, create_pr=True, commit_message="Better weights")
    more = push(trained(folder / "c", 4), repo, revision=request["branch"])
    revisions = {None: 1, "v1": 1, "experiment": 2, request["branch"]: 4, request["revision"]: 3}
    for revision, seed in revisions.items():
        assert same(MAEPModel.from_pretrained(repo, revision=revision), purifier(seed)), revision
    titles = [commit.title for commit in HfApi().list_repo_commits(repo, revision=request["branch"])]
    errors = [
        failure(push, folder / "b", repo, tag="v1"),
        failure(push, folder / "a", repo, private=False),
        failure(push, folder / "a", repo, create_pr=True, tag="v2"),
        failure(push, folder / "a", "no such/name/at all"),
    ]
    return {"first": first, "again": again, "branch": branch, "request": request, "more": more, "errors": errors,
            "titles": titles}  # fmt: skip


def push_during_an_edit(folder: Path, repo: str) -> str:
    """Somebody saves the README on the website between our reading and our writing of it."""
    from huggingface_hub import ModelCard

    def edit(card) -> None:
        overwrite_readme(repo, "edited in this moment")

    trained(folder, results=[("gray-box", 70.0)])
    with mock.patch.object(ModelCard, "validate", edit):
        return failure(push, folder, repo)


def push_records_beside_others(folder: Path, repo: str) -> str:
    """Somebody pushes records to the model between our reading and our writing of them."""
    from huggingface_hub import HfApi

    from maep_hf.evaluation.fingerprint import fingerprint
    from maep_hf.hub import page as module

    merge = module.merge_records

    def meanwhile(into: Path, new: Path) -> None:
        HfApi().upload_file(path_or_fileobj=b"theirs", path_in_repo="results.jsonl", repo_id=repo)
        merge(into, new)

    records_folder(folder / "mine", fingerprint(purifier()))
    with mock.patch.object(module, "merge_records", meanwhile):
        return failure(push, folder / "mine", repo)


def push_without_waits(folder: Path, repo: str) -> str:
    with mock.patch.object(time, "sleep"):
        return failure(push, folder, repo)


def push_after_transformers(folder: Path, repo: str) -> tuple[str, dict]:
    from huggingface_hub import hf_hub_download

    purifier().push_to_hub(repo)
    before = Path(hf_hub_download(repo, "README.md")).read_text()
    return before, build_and_push(folder, repo)


def push_adapter(folder: Path, base: str, repo: str) -> dict:
    import torch
    from peft import PeftModel

    from maep_hf import MAEPModel
    from maep_hf.adaptation import add_lora, default_lora_config

    purifier().save_pretrained(folder / "base")
    model = add_lora(MAEPModel.from_pretrained(folder / "base"), default_lora_config(purifier(), rank=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "run/adapter")
    (folder / "run/run.json").write_text(json.dumps({"arguments": {"finetune": {"model": str(folder / "base")}}}))
    errors = [failure(push, folder / "run/adapter", repo), failure(push, folder / "run/adapter", repo, base_model=base)]
    push(folder / "base", base)
    pushed = push(folder / "run/adapter", repo, base_model=base.split("/")[1])  # a name alone is ours
    loaded = PeftModel.from_pretrained(MAEPModel.from_pretrained(base), repo).eval()
    pixels = torch.rand(1, 3, 16, 20)
    assert torch.equal(loaded.purify(pixels), model.eval().purify(pixels))
    assert not torch.equal(loaded.purify(pixels), purifier().purify(pixels))
    return {"errors": errors, "pushed": pushed, "object": push(model, repo, base_model=base)}


def push_named_adapter(base: str, repo: str) -> str:
    """An adapter under another name than PEFT's `default`, beside a second one that is not active."""
    import torch

    from maep_hf import MAEPModel
    from maep_hf.adaptation import add_lora, default_lora_config, load_adapter

    push(purifier(), base)
    model = add_lora(MAEPModel.from_pretrained(base), default_lora_config(purifier(), rank=2))
    model.add_adapter("photographs", default_lora_config(purifier(), rank=3))
    for name, parameter in model.named_parameters():
        if "lora_B.photographs" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.set_adapter("photographs")
    push(model, repo, base_model=base)
    loaded, pixels = load_adapter(MAEPModel.from_pretrained(base), repo).eval(), torch.rand(1, 3, 16, 20)
    assert torch.equal(loaded.purify(pixels), model.eval().purify(pixels))
    assert not torch.equal(loaded.purify(pixels), purifier().purify(pixels))
    return failure(load_adapter, purifier(1), repo)


def push_patterns(base: str, repo: str, options: dict) -> list[dict]:
    """An adapter whose layers are named by patterns; returns its configuration before and on the Hub."""
    import torch
    from huggingface_hub import hf_hub_download
    from peft import LoraConfig

    from maep_hf import MAEPModel
    from maep_hf.adaptation import add_lora, load_adapter

    push(purifier(), base)
    model = add_lora(MAEPModel.from_pretrained(base), LoraConfig(r=2, init_lora_weights=False, **options)).eval()
    push(model, repo, base_model=base)
    loaded, pixels = load_adapter(MAEPModel.from_pretrained(base), repo).eval(), torch.rand(1, 3, 16, 20)
    assert torch.equal(loaded.purify(pixels), model.purify(pixels))
    return [model.peft_config["default"].to_dict(), json.loads(Path(hf_hub_download(repo, ADAPTER_CONFIG)).read_text())]


def push_adapters_of_objects(base: str, repo: str) -> list[str]:
    """A pipeline around an adapted purifier, and a purifier with an adapter of its own; returns what is refused."""
    import torch
    from transformers import pipeline

    from maep_hf import MAEPModel
    from maep_hf.adaptation import add_lora, default_lora_config, load_adapter, save_adapter
    from maep_hf.checkpoints import load_purifier

    push(purifier(), base)
    made = add_lora(MAEPModel.from_pretrained(base), default_lora_config(purifier(), rank=2))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    pixels, refused = torch.rand(1, 3, 16, 20), []
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(made, folder)
        adapted = load_adapter(MAEPModel.from_pretrained(base), folder, "photographs").eval()
        own = MAEPModel.from_pretrained(base)
        own.load_adapter(folder, "photographs")
    sources = {"pipeline": pipeline("image-purification", model=adapted), "own": own.eval()}
    for name, source in sources.items():
        assert push(source, f"{repo}-{name}", base_model=base)["card"] == "written"
        purified = load_purifier(f"{repo}-{name}").purify(pixels)
        torch.testing.assert_close(purified, adapted.purify(pixels), atol=1e-5, rtol=0)
        assert (purified - purifier().purify(pixels)).abs().max() > 1e-3
        load_adapter(MAEPModel.from_pretrained(base), f"{repo}-{name}")
        refused.append(failure(load_adapter, purifier(1), f"{repo}-{name}"))
    return refused


def push_other_bases(folder: Path, repo: str) -> list[str]:
    """An adapter of one purifier with a classifier, an adapter and another purifier as its base."""
    from maep_hf.adaptation import add_lora, default_lora_config, save_adapter
    from maep_hf.hub.background import BackgroundPush

    save_adapter(add_lora(purifier(), default_lora_config(purifier(), rank=2)), folder)
    push(purifier(), f"{repo}-base")
    push(classifier(), f"{repo}-classifier")
    push(purifier(1), f"{repo}-other")
    push(folder, f"{repo}-adapter", base_model=f"{repo}-base")
    run = {"trains_adapter": True, "base_model": f"{repo}-classifier"}
    errors = [failure(push, folder, repo, base_model=f"{repo}-{name}") for name in ("classifier", "adapter", "other")]
    errors.append(failure(BackgroundPush, folder, repo, **run))
    (folder / "base_model.json").unlink()
    push(folder, repo, base_model=f"{repo}-other")  # nothing says that it is another
    return errors


def push_class_names(repo: str, names: list[str]) -> list[str]:
    from transformers import AutoConfig

    model = transformers_classifier()
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    push(model, repo)
    config = AutoConfig.from_pretrained(repo)
    assert config.label2id == model.config.label2id
    return list(config.id2label.values())


def push_classifier_of_transformers(repo: str) -> dict:
    from transformers import AutoModelForImageClassification, ViTImageProcessor

    model = transformers_classifier()
    pushed = push(model, repo, image_processor=ViTImageProcessor(size={"height": 32, "width": 32}))
    assert same(AutoModelForImageClassification.from_pretrained(repo), model)
    return pushed


def push_others(folder: Path, prefix: str) -> list[dict]:
    from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

    from maep_hf import MAEPImageProcessor

    model = classifier(3)
    pushed = [push(model, f"{prefix}classifier", image_processor=ViTImageProcessor(size={"height": 8, "width": 8}))]
    assert same(AutoModelForImageClassification.from_pretrained(f"{prefix}classifier"), model)
    processor = MAEPImageProcessor(do_resize=True, size={"height": 20, "width": 24})
    pushed.append(push(processor, f"{prefix}processor"))
    assert AutoImageProcessor.from_pretrained(f"{prefix}processor").to_dict() == processor.to_dict()
    return pushed


def push_records(folder: Path, repo: str, dataset: str) -> list:
    from maep_hf.evaluation.fingerprint import fingerprint
    from maep_hf.hub import load_records

    missing = failure(push, records_folder(folder / "none", "0" * 16), repo)
    push(trained(folder / "model", results=[("gray-box", 82.3)]), repo, tag="before")
    other = failure(push, records_folder(folder / "other", "0" * 16, [("white-box", 2.0)]), repo)
    pushed = push(records_folder(folder / "mine", fingerprint(purifier()), [("white-box", 1.5)]), repo)
    own = push(folder / "mine", dataset, repo_type="dataset")
    found = {name: len(load_records(*args, **options)) for name, args, options in (
        ("merged", (repo,), {}), ("before", (repo,), {"revision": "before"}),
        ("dataset", (dataset,), {"repo_type": "dataset"}), ("local", (folder / "mine",), {}),
    )}  # fmt: skip
    return [missing, other, pushed, own, found]


def push_records_to_a_branch(folder: Path, repo: str) -> dict:
    from maep_hf.evaluation.fingerprint import fingerprint

    push(trained(folder / "model", results=[("gray-box", 82.3)]), repo)
    records = records_folder(folder / "records", fingerprint(purifier()), [("white-box", 1.5)])
    return push(records, repo, revision="exp")


def push_run(folder: Path, repo: str, model: str, dataset: str, **options) -> dict:
    """Push a run that names its model and dataset so, from another folder than that of the run."""
    trained(folder, results=())
    (folder / "results.jsonl").unlink()
    run = {"arguments": {"finetune": {"model": model}, "data": {"dataset": dataset}, "loop": {}}}
    (folder / "run.json").write_text(json.dumps(run))
    return push(folder, repo, **options)


def push_again_without_records(folder: Path, repo: str) -> None:
    push(trained(folder / "measured", results=[("gray-box", 82.3)]), repo, tag="measured")
    for name, seed in (("same", 0), ("others", 1)):
        trained(folder / name, seed=seed)
        for file in ("results.jsonl", "attacks.png"):
            (folder / name / file).unlink()
        push(folder / name, repo, tag=name)


def records_folder(folder: Path, fingerprint: str, results=(("gray-box", 60.0),)) -> Path:
    write_records(folder, fingerprint, results)
    (folder / "attacked").mkdir(exist_ok=True)
    (folder / "attacked/batch.safetensors").write_bytes(b"large")
    return folder


def push_pairs(folder: Path, repo: str) -> dict:
    import datasets
    from PIL import Image

    images = [Image.effect_noise((8, 8), 20 + i).convert("RGB") for i in range(4)]
    columns = {
        "image": images, "adversarial_image": images, "label": [0, 1, 0, 1], "eps": [8.0, 0.0, 4.0, 2.0],
        "attack": ["pgd", "clean", "fgsm", "pgd"], "surrogate": [f"{folder}/resnet", None] * 2, "index": [0, 1, 2, 3],
    }  # fmt: skip
    features = datasets.Features(
        image=datasets.Image(), adversarial_image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]),
        eps=datasets.Value("float32"), attack=datasets.Value("string"), surrogate=datasets.Value("string"),
        index=datasets.Value("int64"),
    )  # fmt: skip
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_dict(columns, features).to_parquet(folder / "data/train-00000-of-00001.parquet")
    pairs = {"dataset": str(folder / "images"), "train_split": "train", "surrogates": [f"{folder}/resnet"], "seed": 0}
    attack = {"eps_min": 2.0, "eps_max": 12.0}
    result = {"pairs": 4, "attacks": {"clean": 1, "fgsm": 1, "pgd": 2}}
    made = {"arguments": {"pairs": pairs, "attack": attack}, "result": result, "git_revision": None}
    (folder / "make_pairs.json").write_text(json.dumps(made))
    pushed = push(folder, repo)
    loaded = datasets.load_dataset(repo, split="train")
    assert loaded.features == features and loaded["surrogate"][:2] == ["resnet", None]
    assert loaded[3]["image"].tobytes() == images[3].tobytes() and loaded["eps"] == columns["eps"]
    return pushed


def push_large(folder: Path, repo: str) -> str:
    """Weights of more than 60 MB; the Hub is told to cut every upload, and the client's waits are cut short."""
    wide = {"decoder_hidden_size": 256, "decoder_intermediate_size": 31_000}
    purifier(7, **wide).save_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_size > 60 * 2**20
    with mock.patch.object(time, "sleep"):
        return failure(push, folder, repo)


def load_large(folder: Path, repo: str) -> None:
    from maep_hf import MAEPModel

    assert same(MAEPModel.from_pretrained(repo), MAEPModel.from_pretrained(folder))


def push_without_right(folder: Path, repo: str) -> list[str]:
    trained(folder)
    errors = [failure(push, folder, repo, token=OTHER_TOKEN)]
    with mock.patch.dict(os.environ):
        del os.environ["HF_TOKEN"]
        errors.append(failure(push, folder, repo))
    return errors


def run_code(repo: str, folder: Path, **options) -> list[str]:
    """Execute the code of a page, as a reader would."""
    from huggingface_hub import hf_hub_download
    from PIL import Image

    text = Path(hf_hub_download(repo, "README.md", **options)).read_text()
    Image.effect_noise((30, 20), 60).save(folder / "cat.png")
    names: dict = {}
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        for block in python_blocks(text):
            exec(block, names)
    return sorted(names)


# Tests


def test_a_run_goes_with_card_and_code_and_nothing_else(client, hub, tmp_path):
    pushed = client(build_and_push, tmp_path / "run", "someone/run")
    assert (pushed["repo_id"], pushed["branch"], pushed["card"]) == ("someone/run", "main", "written")
    files = hub.files("someone/run")
    records = {"run.json", "metrics.jsonl", "results.jsonl", "attacks.png"}
    assert set(files) - {".gitattributes"} == MODEL | records | {"README.md"}
    assert files["model.safetensors"] in hub.objects.values()
    client(load_everywhere, "someone/run", 0)
    last = hub.repositories["model", "someone/run"].commits[pushed["revision"]]
    assert "card" in last.title and last.parent is not None  # a commit of its own, after the files
    package = Path(__file__).parent.parent / "maep_hf"
    assert all(files[name] == (package / name).read_bytes() for name in CODE)
    run = json.loads(files["run.json"])
    assert run["arguments"]["data"]["dataset"] == "cifar10" and run["command"] == ["pretrain.py", "--output_dir=run"]
    assert [r["protocol"]["classifier"]["name"] for r in map(json.loads, files["results.jsonl"].splitlines())] == [
        "resnet56"
    ] * 2
    card = files["README.md"].decode()
    assert 'MAEPModel.from_pretrained("someone/run")' in card and "1.2 (" in card and "![" in card


def test_revisions_private_and_repeated(client, hub, tmp_path):
    found = client(push_revisions, tmp_path, "someone/revisions-of-folders")
    repository = hub.repositories["model", "someone/revisions-of-folders"]
    assert repository.private and set(repository.refs) == {
        "refs/heads/main", "refs/heads/experiment", "refs/tags/v1", "refs/pr/1",
    }  # fmt: skip
    assert found["again"]["revision"] == found["first"]["revision"]
    assert found["request"]["branch"] == "refs/pr/1" and "discussions/1" in found["request"]["url"]
    assert found["request"]["card"] == "written" and "Better weights" in found["titles"]
    tag, private, both, name = found["errors"]
    assert "tag='v1' exists" in tag and "private=False" in private and "create_pr" in both
    assert name.startswith("HFValidationError")


def test_an_edited_readme_keeps_its_text_and_gets_the_results(client, hub, tmp_path):
    repo = "someone/edited"
    client(build_and_push, tmp_path / "run", repo)
    written = hub.files(repo)["README.md"].decode()
    mine = written.replace("## Use", "## My own words\r\n\r\nDo not touch.\n\n## Use").replace("- maep\n", "- mine\n")
    body = mine.split("\n---\n", 1)[1]
    own_result = (
        "  - task:\n      type: x\n    dataset:\n      type: y\n      name: z\n    metrics:\n    - type: accuracy\n"
    )
    mine = mine.replace("  results:\n", f"  results:\n{own_result}      value: 12.5\n", 1)
    client(overwrite_readme, repo, mine)
    (tmp_path / "run/results.jsonl").unlink()
    assert client(push, tmp_path / "run", repo)["card"] == "kept"
    assert hub.files(repo)["README.md"].decode() == mine
    client(trained, tmp_path / "run", 0, [("gray-box", 55.5), ("black-box", 44.4)])
    assert client(push, tmp_path / "run", repo)["card"] == "merged"
    merged = hub.files(repo)["README.md"].decode()
    assert merged.split("\n---\n", 1)[1] == body and "- mine\n" in merged and "value: 12.5" in merged
    assert "value: 55.5" in merged and "value: 44.4" in merged and "value: 82.3" not in merged
    assert client(push, tmp_path / "run", repo)["card"] == "merged" and hub.files(repo)["README.md"].decode() == merged
    repository = hub.repositories["model", repo]
    broken = {
        **repository.commits[repository.sha("main")].files,
        "README.md": Blob(b"---\nlicense: [\n---\n# x", False),
    }
    repository.add("refs/heads/main", Commit(broken, "by hand, past the client's validation", repository.sha("main")))
    assert "README.md: its metadata cannot be read" in client(failure, push, tmp_path / "run", repo)


def test_an_edit_in_the_same_moment_wins(client, hub, tmp_path):
    client(build_and_push, tmp_path / "run", "someone/moment")
    assert "PushError: someone/moment: the Hub answered 412" in client(
        push_during_an_edit, tmp_path / "run", "someone/moment"
    )
    assert hub.files("someone/moment")["README.md"] == b"edited in this moment"


def test_a_readme_that_cannot_be_read_is_not_taken_for_none(client, hub, tmp_path, monkeypatch):
    client(build_and_push, tmp_path / "run", "someone/unread")
    client(overwrite_readme, "someone/unread", "# By hand")

    def refuse(*args, **groups):
        raise Refusal(500, "", "out of order")

    route = ("GET", re.compile("/someone/unread/resolve/.*/README.md"), refuse)
    monkeypatch.setattr(local_hub, "ROUTES", [route, *local_hub.ROUTES])
    error = client(push_without_waits, tmp_path / "run", "someone/unread")
    assert error.startswith("PushError: someone/unread: the connection failed") and "can be repeated" in error
    assert hub.files("someone/unread")["README.md"] == b"# By hand"


def test_records_of_others_in_the_same_moment_stay(client, hub, tmp_path):
    client(build_and_push, tmp_path / "run", "someone/shared")
    error = client(push_records_beside_others, tmp_path, "someone/shared")
    assert error.startswith("PushError: someone/shared: the Hub answered 412")
    assert hub.files("someone/shared")["results.jsonl"] == b"theirs"


def test_pages_of_placeholders_are_replaced(client, hub, tmp_path):
    before, pushed = client(push_after_transformers, tmp_path / "run", "someone/placeholders")
    assert "More Information Needed" in before and pushed["card"] == "written"
    assert "More Information Needed" not in hub.files("someone/placeholders")["README.md"].decode()


def test_a_licence_chosen_on_the_website_stays(client, hub, tmp_path):
    client(push, client(trained, tmp_path / "run"), "someone/licensed")
    client(overwrite_readme, "someone/licensed", "---\nlicense: mit\n---\n")
    assert client(push, tmp_path / "run", "someone/licensed")["card"] == "written"
    card = hub.files("someone/licensed")["README.md"].decode()
    assert "license: mit" in card and "# licensed" in card
    client(trained, tmp_path / "run", 1)
    assert client(push, tmp_path / "run", "someone/licensed")["card"] == "written"
    card = hub.files("someone/licensed")["README.md"].decode()
    assert "license: mit" in card and "Weights: mit." in card and "weights: Apache-2.0" not in card


def test_a_folder_that_looks_like_a_hub_id_is_not_named_as_one(client, hub, tmp_path, monkeypatch):
    def metadata(name: str, *names: str, **options) -> tuple:
        client(push_run, tmp_path / name, f"someone/{name}", *names, **options)
        page = hub.files(f"someone/{name}")["README.md"].decode()
        assert not edited(ModelCard(page)) and "seal: " in page
        data = ModelCard(page).data
        return data.base_model, data.get("base_model_relation"), data.datasets

    assert metadata("from-folders", "experiments/stage1", "mydata/photos") == (None, None, None)
    there = ("someone/from-folders", "finetune")
    assert metadata("from-hub", "someone/from-folders", "uoft-cs/cifar10") == (*there, ["uoft-cs/cifar10"])
    given = {"base_model": "experiments/stage1"}  # a person says so: perhaps one that is not visible here
    assert metadata("named", "runs/x", "mydata/photos", **given) == ("experiments/stage1", "finetune", None)

    def refuse(*args, **groups):
        raise Refusal(403, "", "not now")

    routes = [("GET", re.compile(f"/api/{name}"), refuse) for name in ("models/experiments/.*", "datasets/.*")]
    monkeypatch.setattr(local_hub, "ROUTES", [*routes, *local_hub.ROUTES])
    unknown = ("experiments/stage1", "finetune", ["mydata/photos"])
    assert metadata("unanswered", "experiments/stage1", "mydata/photos") == unknown


def test_adapter(client, hub, tmp_path):
    found = client(push_adapter, tmp_path, "someone/base-of-adapter", "someone/my-adapter")
    local, absent = found["errors"]
    assert "base_model: the adapter was trained on 'base', which is no Hub id" in local
    assert "someone/base-of-adapter is not on the Hub" in absent
    files = hub.files("someone/my-adapter")
    assert set(files) - {".gitattributes"} == {
        "adapter_config.json", "adapter_model.safetensors", "base_model.json", "run.json", "README.md",
    }  # fmt: skip
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "someone/base-of-adapter"
    card = files["README.md"].decode()
    lines = card.splitlines()
    assert {"base_model: someone/base-of-adapter", "base_model_relation: adapter", "library_name: peft"} <= set(lines)
    assert card.count("**not measured**") == 4
    assert "merged" in client(run_code, "someone/my-adapter", tmp_path)


def test_classifier_and_image_processor(client, hub, tmp_path):
    pushed = client(push_others, tmp_path, "someone/other-")
    assert [each["card"] for each in pushed] == ["written", "none"]
    files = set(hub.files("someone/other-classifier")) - {".gitattributes"}
    assert files == {"config.json", "model.safetensors", "preprocessor_config.json", "configuration_cifar_resnet.py",
                     "modeling_cifar_resnet.py", "README.md"}  # fmt: skip
    assert "pipeline_tag: image-classification" in hub.files("someone/other-classifier")["README.md"].decode()
    assert set(hub.files("someone/other-processor")) - {".gitattributes"} == {
        "preprocessor_config.json", "image_processing_maep.py",
    }  # fmt: skip
    assert "logits" in client(run_code, "someone/other-classifier", tmp_path)


def test_an_adapter_of_any_name_goes_with_the_record_of_its_base(client, hub):
    error = client(push_named_adapter, "someone/base-of-named", "someone/named-adapter")
    assert error.startswith("ValueError") and "other weights than these" in error
    assert set(hub.files("someone/named-adapter")) - {".gitattributes"} == {
        "adapter_config.json", "adapter_model.safetensors", "base_model.json", "README.md",
    }  # fmt: skip


def test_adapters_inside_other_objects_go_with_the_record_of_their_base(client, hub):
    repo = "someone/adapter-of"
    refused = client(push_adapters_of_objects, "someone/base-of-objects", repo)
    assert all("other weights than these" in error for error in refused)
    for name in ("pipeline", "own"):
        assert set(hub.files(f"{repo}-{name}")) - {".gitattributes"} == {
            "adapter_config.json", "adapter_model.safetensors", "base_model.json", "README.md",
        }  # fmt: skip


def test_an_adapter_does_not_go_to_a_base_that_it_does_not_fit(client, hub, tmp_path):
    repo = "someone/misfit"
    classifier, adapter, other, run = client(push_other_bases, tmp_path / "adapter", repo)
    assert f"base_model: {repo}-classifier is no purifier (model_type 'cifar_resnet'" in classifier
    assert f"base_model: {repo}-adapter is no purifier (model_type None" in adapter
    assert f"base_model: {repo}-other has other weights than those that the adapter was trained on" in other
    assert f"hub_base_model: {repo}-classifier is no purifier" in run


def push_in_another_form(folder: Path, form: str, repo: str) -> str:
    model = {"purifier": purifier, "classifier": classifier}.get(form.split()[0], transformers_classifier)()
    model.save_pretrained(folder, **({"variant": "fp16"} if form.endswith("variant") else {}))
    if form.endswith("pickled"):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    if form.endswith("absent"):
        (folder / "model.safetensors").unlink()
    return failure(push, folder, repo)


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ("purifier variant", "the weights in it, model.fp16.safetensors, do not go"),
        ("classifier variant", "the weights in it, model.fp16.safetensors, do not go"),
        ("transformers pickled", "the weights in it, pytorch_model.bin, do not go"),
        ("transformers absent", "there are no weights in it"),
    ],
)
def test_a_model_whose_weights_would_stay_behind_is_refused(client, hub, tmp_path, form, named):
    repo = f"someone/without-weights-{form.replace(' ', '-')}"
    error = client(push_in_another_form, tmp_path / "model", form, repo)
    assert error.startswith("ValueError: ") and named in error and "save them as model.safetensors" in error
    assert ("model", repo) not in hub.repositories


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r"(encoder|decoder)\.layers\.0\.attention\.(q_proj|v_proj)"},
        {"target_modules": r".*\.(q_proj|fc1)", "exclude_modules": r"(encoder)\.layers\.\d+\.attention\.q_proj"},
    ],
)
def test_patterns_of_layers_are_no_paths(client, options):
    number = len(options)
    before, there = client(push_patterns, f"someone/base-of-pattern-{number}", f"someone/pattern-{number}", options)
    assert {name: there[name] for name in options} == {name: before[name] for name in options} == options


def test_names_of_classes_are_no_paths(client):
    names = ["/m/01g317", "~/cat", "left/right \\a\\b"]
    assert client(push_class_names, "someone/class-names", names) == names


def test_fields_of_configurations_that_hold_paths_lose_them(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text(
        json.dumps({"_name_or_path": "/data/a/base", "backbone": {"_name_or_path": "/data/b"}, "size": [{"x_file": 1}]})
    )
    content = {each.path_in_repo: each.path_or_fileobj for each in operations_of(tmp_path, PLAIN_CLASSIFIER)}
    assert json.loads(content["config.json"]) == {
        "_name_or_path": "base", "backbone": {"_name_or_path": "b"}, "size": [{"x_file": 1}],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"backbone": f"{tmp_path}/backbone"}))
    with pytest.raises(LeakError, match="config.json in .* names a path of this machine"):
        operations_of(tmp_path, PLAIN_CLASSIFIER)


@pytest.mark.parametrize(
    ("named", "base", "revision"),
    [("a/base", "a/base", "v1"), ("a/base", "b/copy", None), ("/home/me/base", "a/base", None)],
)
def test_the_revision_of_a_base_is_of_its_own_repository_alone(tmp_path, named, base, revision):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    config = {"base_model_name_or_path": named, "revision": "v1", "r": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    content = {each.path_in_repo: each.path_or_fileobj for each in operations_of(tmp_path, ADAPTER, base_model=base)}
    pushed = json.loads(content["adapter_config.json"])
    assert pushed == {"base_model_name_or_path": base, "revision": revision, "r": 4}


def test_pairs_of_several_groups_of_rows_lose_paths_and_no_row(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "make_pairs.json").write_text("{}")
    table = pa.table({"surrogate": ["a/b", None, "/home/me/net", "/home/me/net"], "index": [0, 1, 2, 3]})
    table = table.replace_schema_metadata({"huggingface": "features"})
    pq.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet", row_group_size=2)
    content = {each.path_in_repo: each.path_or_fileobj for each in operations_of(tmp_path, PAIRS)}
    pushed = pq.ParquetFile(io.BytesIO(content["data/train-00000-of-00001.parquet"]))
    assert pushed.read().to_pydict() == {"surrogate": ["a/b", None, "net", "net"], "index": [0, 1, 2, 3]}
    assert pushed.num_row_groups == 2 and pushed.schema_arrow.metadata == {b"huggingface": b"features"}


def test_classifier_of_transformers(client, hub, tmp_path):
    assert client(push_classifier_of_transformers, "someone/regnet-classifier")["card"] == "written"
    files = hub.files("someone/regnet-classifier")
    assert set(files) - {".gitattributes"} == {"config.json", "model.safetensors", "preprocessor_config.json",
                                               "README.md"}  # fmt: skip
    assert b"pipeline_tag: image-classification" in files["README.md"]
    assert {"logits", "defended_or_attacked"} <= set(client(run_code, "someone/regnet-classifier", tmp_path))


def test_evaluation_records(client, hub, tmp_path):
    missing, other, pushed, own, found = client(push_records, tmp_path, "someone/measured", "someone/records")
    assert "someone/measured: no such repository" in missing and "push the purifier" in missing
    assert other.startswith("ValueError") and "other weights" in other
    assert found == {"merged": 2, "before": 1, "dataset": 1, "local": 1}
    assert pushed["card"] == "written" and own["repo_type"] == "dataset"
    files = hub.files("someone/measured")
    assert {"results.csv", "results.md"} <= set(files) and "white-box" in files["results.md"].decode()
    card = files["README.md"].decode()
    assert "82.3 (" in card and "1.5 (" in card
    files = hub.files("someone/records", type="dataset")
    assert set(files) - {".gitattributes"} == {"README.md", "results.jsonl", "results.csv", "results.md"}
    assert "records" in client(run_code, "someone/records", tmp_path, repo_type="dataset")


def test_records_go_to_a_new_branch_beside_the_model_of_main(client, hub, tmp_path):
    repo = "someone/measured-on-a-branch"
    assert client(push_records_to_a_branch, tmp_path, repo)["branch"] == "exp"
    assert b"1.5" not in hub.files(repo)["results.jsonl"]
    found = hub.files(repo, revision="exp")
    assert len(found["results.jsonl"].splitlines()) == 2 and b"1.5 (" in found["README.md"]


def test_a_page_goes_on_to_show_the_records_of_its_weights_and_of_no_others(client, hub, tmp_path):
    client(push_again_without_records, tmp_path, "someone/without-records")
    same, others = (hub.files("someone/without-records", revision=name) for name in ("same", "others"))
    assert b"82.3 (" in same["README.md"] and b"82.3" in same["results.jsonl"]
    assert b"82.3" not in others["README.md"] and b"Nothing was measured" in others["README.md"]
    assert not {"results.jsonl", "attacks.png"} & set(others) and "run.json" in others


def test_stored_pairs(client, hub, tmp_path):
    client(push_pairs, tmp_path / "pairs", "someone/pairs")
    files = hub.files("someone/pairs", type="dataset")
    assert set(files) - {".gitattributes"} == {"README.md", "make_pairs.json", "data/train-00000-of-00001.parquet"}
    assert "4 pairs" in files["README.md"].decode()
    assert "attacked" in client(run_code, "someone/pairs", tmp_path, repo_type="dataset")


def test_surrogates_of_one_name_stay_two(tmp_path):
    import datasets
    import pyarrow.parquet as pq

    a, b, c = "/nets/a/best", "python:nets:make:/home/a b/best.pth", "/nets/b/best"

    def pushed(recorded, *shards):
        pairs = {
            "arguments": {"pairs": {"surrogates": recorded, "seed": 0}, "attack": {"eps_min": 2.0, "eps_max": 12.0}}
        }
        (tmp_path / "make_pairs.json").write_text(json.dumps(pairs | {"result": {"pairs": 1, "attacks": {}}}))
        for number, column in enumerate(shards):
            path = tmp_path / f"data/train-{number:05d}-of-00003.parquet"
            path.parent.mkdir(exist_ok=True)
            datasets.Dataset.from_dict({"surrogate": column, "index": [0] * len(column)}).to_parquet(path)
        content = {each.path_in_repo: each.path_or_fileobj for each in operations_of(tmp_path, PAIRS)}
        record = json.loads(content.pop("make_pairs.json"))["arguments"]["pairs"]["surrogates"]
        files = [io.BytesIO(each) if isinstance(each, bytes) else each for each in content.values()]
        return record, [pq.read_table(each).column("surrogate").to_pylist() for each in files]

    names, kept = [a, b, c], ["best", "python:nets:make:best.pth", "best (2)"]
    assert pushed(names, [c, None, b]) == (kept, [[kept[2], None, kept[1]]])
    assert pushed(names, [c, None, b], [b, a, c]) == (kept, [[kept[2], None, kept[1]], [kept[1], kept[0], kept[2]]])
    assert f"surrogates {', '.join(kept)}, gray-box" in render_card(tmp_path).text
    assert pushed(kept, kept, [None]) == (kept, [kept, [None]])  # what was downloaded from there stays as it is
    assert pushed([a], ["best", a], [c]) == (["best"], [["best", "best"], ["best (2)"]])
    assert pushed(["best"], [a], [c]) == (["best"], [["best"], ["best (2)"]])


def test_sixty_megabytes_through_a_connection_that_is_cut(client, hub, tmp_path):
    repo = "someone/large"
    hub.cut_uploads = 1000
    error = client(push_large, tmp_path, repo)
    assert hub.cut_uploads < 1000 and error.startswith("PushError: someone/large") and "can be repeated" in error
    assert set(hub.files(repo)) == {".gitattributes"}  # half a push is none
    hub.cut_uploads = 1  # once more, and then it holds
    assert client(push, tmp_path, repo)["card"] == "written" and hub.cut_uploads == 0
    assert len(hub.files(repo)["model.safetensors"]) > 60 * 2**20
    client(load_large, tmp_path, repo)


def test_wrong_and_missing_tokens(client, hub, tmp_path):
    wrong, missing = client(push_without_right, tmp_path, "someone/forbidden")
    assert wrong.startswith("PushError") and "401" in wrong and "hf auth login" in wrong
    assert missing.startswith("PushError") and "token of the Hub is missing" in missing
    assert ("model", "someone/forbidden") not in hub.repositories


@pytest.mark.parametrize(
    ("name", "content"), [("run.json", {"note": "hf_" + "A" * 34}), ("metrics.jsonl", {"step": 1, "note": "TOKEN"})]
)
def test_a_token_in_a_record_is_refused(client, hub, tmp_path, name, content):
    client(trained, tmp_path / "run")
    (tmp_path / "run" / name).write_text(json.dumps(content).replace("TOKEN", hub.token) + "\n")
    error = client(failure, push, tmp_path / "run", "someone/leak")
    assert error.startswith(f"LeakError: {name}") and ("model", "someone/leak") not in hub.repositories


def test_what_is_no_folder_of_ours_is_named(client, tmp_path):
    def refused(folder, **options) -> str:
        return client(failure, push, folder, "someone/nothing", **options)

    assert "no such folder" in refused(tmp_path / "gone")
    assert "holds no config.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "model_type 'bert'" in refused(tmp_path)
    assert "repo_type='space'" in refused(tmp_path, repo_type="space")
    assert "neither a folder nor" in refused(3)
    (tmp_path / "config.json").unlink()
    (tmp_path / "make_pairs.json").write_text("{}")
    assert "not complete" in refused(tmp_path)
    write_records(tmp_path / "records", "0" * 16, [("gray-box", 1.0)])
    client(trained, tmp_path / "run")
    assert "goes to a model repository" in refused(tmp_path / "run", repo_type="dataset")


def test_code_of_a_purifiers_page_runs(client, tmp_path):
    client(build_and_push, tmp_path / "run", "someone/page")
    client(push_as_google, "google/vit-base-patch16-224")
    assert {"clean", "logits", "purify"} <= set(client(run_code, "someone/page", tmp_path))
    assert (tmp_path / "cat-purified.png").is_file()


def push_as_google(repo: str) -> None:
    """A tiny classifier under the name that the page takes as its example."""
    from transformers import ViTImageProcessor

    classifier().push_to_hub(repo)
    ViTImageProcessor(size={"height": 32, "width": 32}).push_to_hub(repo)


def test_no_secret_path_or_optimiser_was_pushed(client, hub, home, tmp_path):
    """Over everything that any test of this file sent."""
    client(build_and_push, tmp_path / "run", "someone/last")
    forbidden = [hub.token, OTHER_TOKEN, str(tmp_path.parent), str(home), str(Path(__file__).parent.parent)]
    commits = [commit for repository in hub.repositories.values() for commit in repository.commits.values()]
    contents = [blob.data for commit in commits for blob in commit.files.values()] + [*hub.objects.values()]
    for secret in forbidden:
        found = [body[max(0, body.index(secret.encode()) - 80) :][:240] for body in contents if secret.encode() in body]
        assert not found, secret
    names = {path for commit in commits for path in commit.files}
    assert not [name for name in names if name.endswith((".pt", ".pth", ".bin", ".pkl", ".txt")) or "optim" in name]
