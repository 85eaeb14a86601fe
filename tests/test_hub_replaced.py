"""What of older weights and pairs would load in place of a newer push or beside it goes; a person's files stay."""

import json
from pathlib import Path
from unittest import mock

import pytest
from hub_helpers import (
    classifier,
    failure,
    overwrite_readme,
    purifier,
    push,
    same,
    transformers_classifier,
    warnings_of,
    write_records,
)
from local_hub import Blob, Commit

from maep_hf.hub.replaced import in_short, is_pairs_record, replaced_shards, replaced_weights

pytest_plugins = ["hub_client"]
INDEX = "model.safetensors.index.json"
MAKERS = {"purifier": purifier, "classifier": classifier, "transformers": transformers_classifier}
OWN = ("model-best-of-3.safetensors", "old/model.safetensors", "tf_model.h5", "model.onnx")  # a person's
OWN_DATA = ("data/extra.parquet", "data/validation-00000-of-00001.parquet", "old/train-00000-of-00004.parquet")
OWN_DATA += ("data/old/train-00000-of-00004.parquet", "data/train-00000-of-00004.csv")
RECORD = {"arguments": {"pairs": {"seed": 0}, "attack": {"eps_min": 2.0, "eps_max": 12.0}}, "result": {}}


# In the process of the client


def save_model(folder: Path, kind: str, seed: int, shard_size: int | None) -> list[str]:
    """Weights of a seed in one file, or in several of at most so many bytes; returns the names of the files."""
    import torch

    torch.manual_seed(seed)
    model = purifier(seed) if kind == "purifier" else MAKERS[kind]()
    model.save_pretrained(folder, **({} if shard_size is None else {"max_shard_size": shard_size}))
    return sorted(path.name for path in folder.glob("model*.safetensors*"))


def push_and_load(folder: Path, repo: str, kind: str, **options) -> tuple[dict, list[str]]:
    """Push, and see that what loads from there is what was pushed; returns the warnings as well."""
    from transformers import AutoModel, AutoModelForImageClassification

    auto = AutoModel if kind == "purifier" else AutoModelForImageClassification
    with warnings_of("maep_hf.hub.push") as warned:
        pushed = push(folder, repo, **options)
    assert same(auto.from_pretrained(repo, revision=pushed["branch"]), auto.from_pretrained(folder))
    return pushed, warned


def push_evaluation_of(seed: int, folder: Path, repo: str) -> None:
    from maep_hf.evaluation.fingerprint import fingerprint

    write_records(folder, fingerprint(purifier(seed)), (("gray-box", 82.3),))
    push(folder, repo)


def push_meanwhile(folder: Path, repo: str, name: str, repo_type: str) -> str:
    """Push while somebody else commits a file, after the files were listed."""
    from huggingface_hub import HfApi

    from maep_hf.hub.repository import Repository

    prepare = Repository.prepare

    def meanwhile(*args) -> None:
        HfApi().upload_file(path_or_fileobj=b"theirs", path_in_repo=name, repo_id=repo, repo_type=repo_type)
        prepare(*args)

    with mock.patch.object(Repository, "prepare", meanwhile):
        return failure(push, folder, repo)


def push_over_others(folder: Path, repo: str, theirs: Path) -> str:
    """Push to a repository with a README alone, while somebody else pushes a folder, after the files were listed."""
    from huggingface_hub import HfApi

    from maep_hf.hub.repository import Repository

    HfApi().create_repo(repo)
    overwrite_readme(repo, "# Mine")
    prepare = Repository.prepare

    def meanwhile(*args) -> None:
        HfApi().upload_folder(folder_path=theirs, repo_id=repo)
        prepare(*args)

    with mock.patch.object(Repository, "prepare", meanwhile):
        return failure(push, folder, repo)


def save_pairs(folder: Path, shards: int, first: int) -> Path:
    """Two pairs in each file, numbered in `index`."""
    import datasets
    from PIL import Image

    image = Image.new("RGB", (4, 4))
    images = datasets.Image()
    features = datasets.Features(image=images, adversarial_image=images, index=datasets.Value("int64"))
    for shard in range(shards):
        index = [first + 2 * shard, first + 2 * shard + 1]
        rows = {"image": [image] * 2, "adversarial_image": [image] * 2, "index": index}
        path = folder / f"data/train-{shard:05d}-of-{shards:05d}.parquet"
        datasets.Dataset.from_dict(rows, features).to_parquet(path)
    result = {"pairs": 2 * shards, "attacks": {"pgd": 2 * shards}}
    (folder / "make_pairs.json").write_text(json.dumps(RECORD | {"result": result}))
    return folder


def push_pairs(folder: Path, repo: str, shards: int, first: int, **options) -> tuple[dict, list[str]]:
    with warnings_of("maep_hf.hub.push") as warned:
        pushed = push(save_pairs(folder, shards, first), repo, **options)
    return pushed, warned


def loaded_pairs(repo: str) -> list[int]:
    import datasets

    return sorted(datasets.load_dataset(repo, split="train")["index"])


# Tests


def add_files(hub, repo: str, names, type: str = "model", content: bytes = b"theirs", drop=()) -> None:
    """Files that a person puts there, and those that they take away."""
    repository = hub.repositories[type, repo]
    files = repository.commits[repository.sha("main")].files | {name: Blob(content, False) for name in names}
    files = {name: blob for name, blob in files.items() if name not in drop}
    repository.add("refs/heads/main", Commit(files, "by hand", repository.sha("main")))


def weights(files) -> list[str]:
    return sorted(name for name in files if name.startswith("model") and name not in OWN and not name.endswith(".py"))


def removals(hub, repo: str, pushed: dict, type: str = "model") -> list[set[str]]:
    """What each commit up to a push took away, the last first, without those that took nothing."""
    commits, found = hub.repositories[type, repo].commits, []
    commit = commits[pushed["revision"]]
    while commit.parent is not None:
        found.append(set(commits[commit.parent].files) - set(commit.files))
        commit = commits[commit.parent]
    return [each for each in found if each]


@pytest.mark.parametrize("kind", MAKERS)
def test_the_weights_that_load_are_those_pushed_last(client, hub, tmp_path, kind):
    repo = f"someone/replaced-{kind}"
    before: list[str] = []
    sizes = {"purifier": (None, 8000, 20_000, None), "classifier": (None, 2000, 4000, None),
             "transformers": (None, 2000, 4000, None)}[kind]  # fmt: skip
    for seed, shard_size in enumerate(sizes):
        folder = tmp_path / str(seed)
        names = client(save_model, folder, kind, seed, shard_size)
        assert (INDEX in names) == (shard_size is not None) and names != before
        pushed, warned = client(push_and_load, folder, repo, kind)
        files = hub.files(repo)
        assert weights(files) == names
        gone = set(before) - set(names)
        if seed == 0:
            add_files(hub, repo, OWN)
            assert warned == []
        else:
            assert removals(hub, repo, pushed)[0] == gone and all(files[name] == b"theirs" for name in OWN)
            assert len(warned) == 1 and warned[0].startswith(f"{repo}: deleted, since") and min(gone) in warned[0]
        before = names
    assert client(push_and_load, folder, repo, kind)[1] == []  # once more: nothing is left to go


@pytest.mark.parametrize("where", ["trial", "request"])
def test_a_branch_and_a_pull_request_lose_what_they_started_with_and_main_nothing(client, hub, tmp_path, where):
    repo = f"someone/replaced-on-{where}"
    for seed, shard_size in enumerate((None, 8000, None)):
        client(save_model, tmp_path / str(seed), "purifier", seed, shard_size)
    client(push_and_load, tmp_path / "0", repo, "purifier")
    main = hub.files(repo)
    options = {"create_pr": True} if where == "request" else {"revision": where}
    pushed, warned = client(push_and_load, tmp_path / "1", repo, "purifier", **options)
    files = hub.files(repo, pushed["branch"])
    assert pushed["branch"] == {"trial": "trial", "request": "refs/pr/1"}[where] and len(warned) == 1
    assert INDEX in files and "model.safetensors" not in files and hub.files(repo) == main
    again, _ = client(push_and_load, tmp_path / "2", repo, "purifier", revision=pushed["branch"])
    assert weights(hub.files(repo, again["branch"])) == ["model.safetensors"] and hub.files(repo) == main


def test_a_push_without_weights_takes_none(client, hub, tmp_path):
    repo = "someone/replaced-by-none"
    client(save_model, tmp_path / "0", "classifier", 0, 2000)
    client(push_and_load, tmp_path / "0", repo, "classifier")
    before = weights(hub.files(repo))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text((tmp_path / "0/config.json").read_text())
    client(push, tmp_path / "bare", repo)
    assert weights(hub.files(repo)) == before and len(before) > 2


def test_weights_of_another_form_are_not_left_behind_above_older_ones(client, hub, tmp_path):
    repo = "someone/replaced-by-variant"
    client(save_model, tmp_path / "0", "classifier", 0, None)
    client(push_and_load, tmp_path / "0", repo, "classifier")
    before = hub.files(repo)
    client(save_model, tmp_path / "1", "classifier", 1, None)
    (tmp_path / "1/model.safetensors").rename(tmp_path / "1/model.fp16.safetensors")
    error = client(failure, push, tmp_path / "1", repo)
    assert error.startswith("ValueError") and "model.fp16.safetensors, do not go to the Hub" in error
    assert hub.files(repo) == before


PROCESSOR = '{"image_processor_type": "ViTImageProcessorPil", "image_mean": [0.1, 0.2, 0.3]}'
NESTED = f'{{"image_processor": {PROCESSOR}}}'


def push_processed(folder: Path, repo: str, seed: int, **files: str) -> list[str]:
    """Push a classifier with files beside it, under names without `.json`; returns the warnings."""
    save_model(folder, "transformers", seed, None)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content)
    return push_and_load(folder, repo, "transformers")[1]


def loaded_mean(repo: str) -> list[float]:
    from transformers import AutoImageProcessor

    return list(AutoImageProcessor.from_pretrained(repo).image_mean)


def test_the_image_processor_that_loads_is_the_one_pushed_last(client, hub, tmp_path):
    repo, other = "someone/replaced-processor", PROCESSOR.replace("0.1", "0.9")
    assert client(push_processed, tmp_path / "0", repo, 0, processor_config=NESTED) == []
    assert client(loaded_mean, repo) == [0.1, 0.2, 0.3]
    (warned,) = client(push_processed, tmp_path / "1", repo, 0, preprocessor_config=other)
    assert "processor_config.json" not in hub.files(repo) and "read in place of preprocessor_config.json" in warned
    assert client(loaded_mean, repo) == [0.9, 0.2, 0.3]
    text = '{"processor_class": "CLIPProcessor"}'  # of no image processor
    add_files(hub, repo, ("processor_config.json",), content=text.encode())
    assert client(push_processed, tmp_path / "1", repo, 0, preprocessor_config=other) == []
    assert "processor_config.json" in hub.files(repo)


def test_an_image_processor_of_older_weights_stays_with_a_warning(client, hub, tmp_path):
    repo = "someone/old-processor"
    client(push_processed, tmp_path / "0", repo, 0, preprocessor_config=PROCESSOR)
    assert client(push_processed, tmp_path / "same", repo, 0) == []
    (warned,) = client(push_processed, tmp_path / "1", repo, 1)
    assert warned.startswith(f"{repo}: preprocessor_config.json stays") and "image_processor" in warned
    assert "preprocessor_config.json" in hub.files(repo)


def test_records_leave_the_weights_that_they_are_of(client, hub, tmp_path):
    repo = "someone/replaced-by-records"
    client(save_model, tmp_path / "0", "purifier", 0, 8000)
    client(push_and_load, tmp_path / "0", repo, "purifier")
    before = weights(hub.files(repo))
    client(push_evaluation_of, 0, tmp_path / "records", repo)
    files = hub.files(repo)
    assert "results.jsonl" in files and weights(files) == before and len(before) > 2


def test_remade_pairs_are_alone(client, hub, tmp_path):
    repo = "someone/replaced-pairs"
    client(push_pairs, tmp_path / "old", repo, 4, 100)
    add_files(hub, repo, OWN_DATA, "dataset")
    before = set(hub.files(repo, type="dataset"))
    pushed, warned = client(push_pairs, tmp_path / "new", repo, 2, 0)
    files = hub.files(repo, type="dataset")
    old = {f"data/train-0000{shard}-of-00004.parquet" for shard in range(4)}
    assert before - set(files) == old and removals(hub, repo, pushed, "dataset") == [old]
    assert all(files[name] == b"theirs" for name in OWN_DATA) and b"4 pairs" in files["README.md"]
    assert len(warned) == 1 and warned[0].endswith("data/train-00002-of-00004.parquet and 1 more")
    add_files(hub, repo, (), "dataset", drop=OWN_DATA)  # no parquet files, in truth
    assert client(loaded_pairs, repo) == [0, 1, 2, 3]
    client(push_pairs, tmp_path / "more", repo, 3, 50)
    assert client(loaded_pairs, repo) == [50, 51, 52, 53, 54, 55]
    assert client(push_pairs, tmp_path / "more", repo, 3, 50)[1] == []


@pytest.mark.parametrize("where", ["trial", "request"])
def test_remade_pairs_on_a_branch_and_a_pull_request(client, hub, tmp_path, where):
    repo = f"someone/replaced-pairs-on-{where}"
    client(push_pairs, tmp_path / "old", repo, 2, 100)
    main = hub.files(repo, type="dataset")
    options = {"create_pr": True} if where == "request" else {"revision": where}
    pushed, _ = client(push_pairs, tmp_path / "new", repo, 1, 0, **options)
    files = hub.files(repo, pushed["branch"], "dataset")
    assert [name for name in files if "-of-" in name] == ["data/train-00000-of-00001.parquet"]
    assert hub.files(repo, type="dataset") == main


@pytest.mark.parametrize("record", [None, b"theirs", b"[]", b'{"arguments": {"steps": 3}}'])
def test_shards_without_a_record_of_pairs_are_a_persons(client, hub, tmp_path, record):
    repo = f"someone/own-shards-{len(record or b'')}"
    client(push_pairs, tmp_path / "old", repo, 2, 100)
    if record is None:
        add_files(hub, repo, (), "dataset", drop=("make_pairs.json",))
    else:
        add_files(hub, repo, ("make_pairs.json",), "dataset", record)
    before = set(hub.files(repo, type="dataset"))
    assert client(push_pairs, tmp_path / "new", repo, 1, 0)[1] == []
    assert before < set(hub.files(repo, type="dataset"))


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_nothing_goes_that_was_committed_since(client, hub, tmp_path, repo_type):
    repo = f"someone/meanwhile-{repo_type}"
    if repo_type == "model":
        client(save_model, tmp_path / "old", "classifier", 0, None)
        client(save_model, tmp_path / "new", "classifier", 1, 2000)
        name = "model.safetensors"
    else:
        client(save_pairs, tmp_path / "old", 2, 100)
        client(save_pairs, tmp_path / "new", 1, 0)
        name = "data/train-00000-of-00002.parquet"
    client(push, tmp_path / "old", repo)
    before = hub.files(repo, type=repo_type)
    error = client(push_meanwhile, tmp_path / "new", repo, name, repo_type)
    assert error.startswith("PushError") and "412" in error and "can be repeated" in error
    assert hub.files(repo, type=repo_type) == before | {name: b"theirs"}
    client(push, tmp_path / "new", repo)
    assert name not in hub.files(repo, type=repo_type)


@pytest.mark.parametrize("theirs", ["adapter", "one file"])
def test_nothing_goes_beside_weights_that_were_committed_since(client, hub, tmp_path, theirs):
    repo = f"someone/beside-{theirs.split()[0]}"
    client(save_model, tmp_path / "new", "purifier", 1, 8000)
    if theirs == "adapter":
        (tmp_path / "theirs").mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / "theirs" / name).write_text("theirs")
    else:
        client(save_model, tmp_path / "theirs", "purifier", 0, None)
    error = client(push_over_others, tmp_path / "new", repo, tmp_path / "theirs")
    assert error.startswith("PushError") and "412" in error and "can be repeated" in error
    assert set(hub.files(repo)) >= {path.name for path in (tmp_path / "theirs").iterdir()}
    assert INDEX not in hub.files(repo)


def test_names_of_weights_and_shards():
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    there = [
        "model.safetensors",
        INDEX,
        *shards,
        *OWN,
        "config.json",
        "adapter_model.safetensors",
        "x/model.safetensors",
    ]
    assert replaced_weights(there, {"model.safetensors", "config.json"}) == [*shards, INDEX]
    assert replaced_weights(there, {INDEX, shards[0], "model-00001-of-00001.safetensors"}) == [
        shards[1], "model.safetensors",
    ]  # fmt: skip
    for new in (set(), {"config.json"}, {"x/model.safetensors"}, {"adapter_model.safetensors"}):
        assert replaced_weights(there, new) == [], new
    old = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"]
    there = [*old, *OWN_DATA, "data/train-0-of-2.parquet", "train-00000-of-00002.parquet"]
    assert replaced_shards(there, {"data/train-00000-of-00001.parquet"}) == old[:2]
    assert replaced_shards(there, {old[0]}) == [old[1]]
    assert replaced_shards(there, {"data/test-00000-of-00003.parquet", old[0]}) == [old[2], old[1]]
    assert replaced_shards(there, {"data/mine.parquet", "model.safetensors"}) == []


def test_the_record_of_pairs_is_known_by_its_form(tmp_path):
    assert not is_pairs_record(None)
    path = tmp_path / "make_pairs.json"
    for text, ours in ((json.dumps(RECORD), True), ("{}", False), ("theirs", False), ('{"arguments": [1]}', False)):
        path.write_text(text)
        assert is_pairs_record(path) is ours, text


def test_many_names_in_short():
    assert in_short(["a", "b", "c"]) == "a, b, c" and in_short(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
