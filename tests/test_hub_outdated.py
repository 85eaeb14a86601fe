"""What goes from the Hub with older weights: the figures of this package, and nobody's own files."""

import json
from pathlib import Path

import pytest
from hub_helpers import (
    classifier,
    failure,
    overwrite_readme,
    purifier,
    push,
    transformers_classifier,
    warnings_of,
    write_records,
)
from local_hub import Blob, Commit
from made_up_records import failed, record

from maep_hf.hub.outdated import outdated_operations, outdated_records, same_adapter

pytest_plugins = ["hub_client"]
OWN = ("banner.png", "assets/logo.png", "previews/attacks.png", "old/results.csv")  # a person's
OWN_RESULT = """\
  - task:
      type: x
    dataset:
      type: y
      name: z
    metrics:
    - type: accuracy
      value: 12.5
"""
ADAPTER = {"r": 2, "lora_alpha": 4, "base_model_name_or_path": "someone/base", "peft_version": "0.21"}


# In the process of the client


def push_purifier(folder: Path, repo: str, seed: int, results: tuple = (), branch: str = "main") -> dict:
    """Push weights, by default without records; with them, two pictures go as well."""
    from PIL import Image

    from maep_hf.evaluation.fingerprint import fingerprint

    model = purifier(seed)
    model.save_pretrained(folder)
    if results:
        write_records(folder, fingerprint(model), results)
        for name in ("attacks.png", "resnet56.png"):
            Image.new("RGB", (8, 8)).save(folder / name)
    return push(folder, repo, revision=branch)


def save_adapter_folder(folder: Path, seed: int) -> Path:
    import torch

    from maep_hf.adaptation import add_lora, default_lora_config, save_adapter

    model = add_lora(purifier(), default_lora_config(purifier(), rank=2))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, folder)
    return folder


def push_adapter(folder: Path, repo: str, seed: int) -> dict:
    push(purifier(), f"{repo}-base")
    return push(save_adapter_folder(folder, seed), repo, base_model=f"{repo}-base")


def push_evaluation(folder: Path, repo: str, fingerprint: str, *results) -> list[str]:
    """Push records of merged weights, and the picture in front of their classifier; returns the warnings."""
    from PIL import Image

    write_records(folder, fingerprint, results)
    if fingerprint.startswith("a"):
        Image.new("RGB", (8, 8)).save(folder / "resnet56.png")
    with warnings_of("maep_hf.hub.push") as found:
        push(folder, repo)
    return found


def push_with_records(folder: Path, repo: str, seed: int, *results) -> dict:
    """Push weights with records, and no tables or pictures."""
    from maep_hf.evaluation.fingerprint import fingerprint

    model = purifier(seed)
    model.save_pretrained(folder)
    write_records(folder, fingerprint(model), results)
    return push(folder, repo)


def push_more_records(folder: Path, repo: str, seed: int, *results) -> None:
    from maep_hf.evaluation.fingerprint import fingerprint

    push_evaluation(folder, repo, fingerprint(purifier(seed)), *results)


def push_adapter_with_records(folder: Path, repo: str, fingerprint: str, *results) -> dict:
    write_records(folder, fingerprint, results)
    return push(folder, repo, base_model=f"{repo}-base")


def push_with_report_of(
    folder: Path, repo: str, reported: list, measured: list, apart: Path | None = None
) -> list[str]:
    """Push weights with records of them ("new") and of others ("old"), and tables and charts of a part of them.

    Records are (weights, figure, attack), in a folder of their own where one is given; returns the warnings.
    """
    from maep_hf.evaluation.fingerprint import fingerprint
    from maep_hf.hub.records import write_report
    from maep_hf.records import as_jsonl

    model = purifier(1)
    model.save_pretrained(folder)
    marks = {"old": fingerprint(purifier(0)), "new": fingerprint(model)}
    if apart is not None:
        push(folder, repo)
        apart.mkdir()
        folder = apart
    for part in (reported, measured):
        records = []
        for weights, figure, attack in part:
            made = record(figure, attack=attack)
            made["protocol"]["purifier"] = made["protocol"]["purifier"] | {"fingerprint": marks[weights]}
            records.append(made | {"key": f"{weights} {made['key']}"})
        (folder / "results.jsonl").write_text(as_jsonl(records))
        if part is reported:
            write_report(folder)
    with warnings_of("maep_hf.hub.push") as found:
        push(folder, repo)
    return found


def push_unchecked(folder: Path, repo: str) -> None:
    """Push a figure that failed its checks, and the same without checks."""
    from maep_hf.evaluation.fingerprint import fingerprint
    from maep_hf.records import as_jsonl

    model = purifier()
    model.save_pretrained(folder)
    for checks in (failed("gradient"), None):
        made = record(60, "white-box", checks=checks)
        made["protocol"]["purifier"] = made["protocol"]["purifier"] | {"fingerprint": fingerprint(model)}
        (folder / "results.jsonl").write_text(as_jsonl([made]))
        push(folder, repo)


def push_dataset(folder: Path, repo: str, *results) -> dict:
    write_records(folder, "a" * 16, results)
    return push(folder, repo, repo_type="dataset")


def push_one_over_the_other(folder: Path, repo: str) -> list[str]:
    """A model over an adapter, there and on a new branch, and an adapter over its base; then a run of each."""
    from maep_hf.hub.background import BackgroundPush

    push_adapter(folder / "adapter", repo, 0)
    (folder / "new").mkdir()
    purifier(1).save_pretrained(folder / "new")
    return [
        failure(push, folder / "new", repo),
        failure(push, folder / "new", repo, revision="trial"),
        failure(push, folder / "adapter", f"{repo}-base", base_model=f"{repo}-base"),
        failure(BackgroundPush, folder / "new", repo),
        failure(BackgroundPush, folder, f"{repo}-base", trains_adapter=True, base_model=f"{repo}-base"),
    ]


def push_types_over_each_other(folder: Path, repo: str) -> list[str]:
    """A classifier over a purifier, there and on a new branch, a purifier over a classifier; then a run of each."""
    from maep_hf.hub.background import BackgroundPush

    push_purifier(folder / "purifier", repo, 0)
    push(classifier(), f"{repo}-classifier")
    return [
        failure(push, classifier(), repo),
        failure(push, classifier(), repo, revision="trial"),
        failure(push, transformers_classifier(), repo),
        failure(push, folder / "purifier", f"{repo}-classifier"),
        failure(BackgroundPush, folder, repo, model=classifier()),
        failure(BackgroundPush, folder, f"{repo}-classifier", model=purifier()),
    ]


def push_over_own_configuration(repo: str, content: str) -> dict:
    from huggingface_hub import HfApi

    push(classifier(), repo)
    HfApi().upload_file(path_or_fileobj=content.encode(), path_in_repo="config.json", repo_id=repo)
    return push(classifier(), repo)


RUN = {"arguments": {"data": {"dataset": "mine"}, "loop": {"output_dir": "runs/old"}}, "git_revision": "OLDREVISION"}


def push_trained(folder: Path, repo: str, kind: str, seed: int, names: tuple = ()) -> list[str]:
    """Push weights with the records of their training; returns the warnings."""
    import torch

    torch.manual_seed(seed)
    base = {}
    if kind == "adapter":
        push(purifier(), f"{repo}-base")
        save_adapter_folder(folder, seed)
        base = {"base_model": f"{repo}-base"}
    else:
        (purifier(seed) if kind == "purifier" else classifier()).save_pretrained(folder)
    for name in names:
        (folder / name).write_text(json.dumps(RUN if name.endswith(".json") else {"step": 1}))
    with warnings_of("maep_hf.hub.push") as found:
        push(folder, repo, **base)
    return found


# Tests


def add_files(hub, repo: str, names) -> None:
    """Files that a person puts there."""
    repository = hub.repositories["model", repo]
    files = repository.commits[repository.sha("main")].files | {name: Blob(b"theirs", False) for name in names}
    repository.add("refs/heads/main", Commit(files, "by hand", repository.sha("main")))


def test_new_weights_take_the_old_figures_along_and_no_file_of_a_person(client, hub, tmp_path):
    repo = "someone/own-files"
    client(push_purifier, tmp_path / "old", repo, 0, (("gray-box", 82.3),))
    add_files(hub, repo, (*OWN, "results.csv", "results.md"))
    before = set(hub.files(repo))
    assert client(push_purifier, tmp_path / "new", repo, 1)["card"] == "written"
    files = hub.files(repo)
    assert before - set(files) == {"results.jsonl", "results.csv", "results.md", "attacks.png", "resnet56.png"}
    assert all(files[name] == b"theirs" for name in OWN) and b"82.3" not in files["README.md"]


@pytest.mark.parametrize("branch", ["main", "trial"])
def test_the_same_weights_without_records_leave_the_page_and_its_pictures(client, hub, tmp_path, branch):
    repo = f"someone/again-on-{branch}"
    client(push_purifier, tmp_path / "old", repo, 0, (("gray-box", 82.3),), branch)
    before = hub.files(repo, branch)
    assert b"(attacks.png)" in before["README.md"] and b"(resnet56.png)" in before["README.md"]
    client(push_purifier, tmp_path / "again", repo, 0, (), branch)
    assert hub.files(repo, branch) == before


@pytest.mark.parametrize("seed", [0, 1])
def test_a_new_branch_takes_the_records_of_main_for_the_same_weights_alone(client, hub, tmp_path, seed):
    repo = f"someone/new-branch-{seed}"
    client(push_purifier, tmp_path / "old", repo, 0, (("gray-box", 82.3),))
    main = hub.files(repo)
    client(push_purifier, tmp_path / "new", repo, seed, (), "trial")
    files = hub.files(repo, "trial")
    assert hub.files(repo) == main
    if seed == 0:
        assert files == main
    else:
        assert set(main) - set(files) == {"results.jsonl", "attacks.png", "resnet56.png"}
        assert b"82.3" not in files["README.md"] and files["model.safetensors"] != main["model.safetensors"]


def figures(hub, repo: str, **where) -> dict[str, set[float]]:
    """Which of the made-up figures every file of a repository has."""
    files = hub.files(repo, **where)
    known = (82.3, 70.1, 55.5, 11.7)
    names = [name for name in ("results.jsonl", "results.md", "results.csv", "README.md") if name in files]
    return {name: {figure for figure in known if str(figure).encode() in files[name]} for name in names}


def test_records_of_a_folder_go_beside_those_of_the_same_weights(client, hub, tmp_path):
    repo = "someone/own-records"
    client(push_with_records, tmp_path / "model", repo, 0, ("gray-box", 82.3))
    client(push_more_records, tmp_path / "evaluation", repo, 0, ("white-box", 11.7))
    for figure in (82.3, 82.3, 70.1):  # measured again, the figure is another
        client(push_with_records, tmp_path / "model", repo, 0, ("gray-box", figure))
        assert all(found == {figure, 11.7} for found in figures(hub, repo).values()), figures(hub, repo)
        assert len(figures(hub, repo)) == 4
    client(push_with_records, tmp_path / "model", repo, 0, ("gray-box", 82.3), ("white-box", 55.5))
    assert all(found == {82.3, 55.5} for found in figures(hub, repo).values()) and len(figures(hub, repo)) == 4
    before = hub.repositories["model", repo].sha("main")
    client(push_with_records, tmp_path / "model", repo, 0, ("gray-box", 82.3), ("white-box", 55.5))
    assert hub.repositories["model", repo].sha("main") == before


def test_records_of_a_folder_leave_none_of_other_weights(client, hub, tmp_path):
    repo = "someone/own-records-of-others"
    client(push_purifier, tmp_path / "model", repo, 0, (("gray-box", 82.3),))
    client(push_more_records, tmp_path / "evaluation", repo, 0, ("white-box", 11.7))
    client(push_with_records, tmp_path / "new", repo, 1, ("gray-box", 55.5))
    assert figures(hub, repo) == {"results.jsonl": {55.5}, "README.md": {55.5}}
    assert not {"attacks.png", "resnet56.png"} & set(hub.files(repo))


OLD = [("old", 82.3, "PGD-20"), ("old", 70.1, "BIM")]
NEW = [("new", 55.5, "PGD-20"), ("new", 11.7, "BIM")]


@pytest.mark.parametrize(
    ("case", "reported", "measured", "shown", "chart"),
    [
        ("whole", NEW, NEW, {55.5, 11.7}, "own"),
        ("interrupted", NEW[:1], NEW, {55.5, 11.7}, "made"),
        ("taken out", NEW, NEW[:1], {55.5}, None),
        ("trained anew", [*OLD, *NEW], [*OLD, *NEW], {55.5, 11.7}, "made"),
        ("trained anew and interrupted", OLD, [*OLD, NEW[0]], {55.5}, None),
    ],
)
def test_tables_and_charts_are_of_the_records_that_the_page_is_of(
    client, hub, tmp_path, case, reported, measured, shown, chart
):
    repo = f"someone/report-{case.replace(' ', '-')}"
    warned = client(push_with_report_of, tmp_path / "model", repo, reported, measured)
    assert figures(hub, repo) == dict.fromkeys(("results.jsonl", "results.md", "results.csv", "README.md"), shown)
    files = hub.files(repo)
    assert (b"(attacks.png)" in files["README.md"]) == ("attacks.png" in files) == (chart is not None)
    if chart:
        there = tmp_path / "model" / "attacks.png"
        assert (there.is_file() and files["attacks.png"] == there.read_bytes()) == (chart == "own")
    assert any("records in the folder are of other weights" in line for line in warned) == ("anew" in case)


def test_records_of_other_weights_are_left_out_of_an_evaluation_too(client, hub, tmp_path):
    client(push_with_report_of, tmp_path / "model", "someone/evaluation-of-both", OLD, [*OLD, *NEW], tmp_path / "mine")
    found = figures(hub, "someone/evaluation-of-both")
    assert found == dict.fromkeys(("results.jsonl", "results.md", "results.csv", "README.md"), {55.5, 11.7})


def test_a_figure_without_checks_does_not_take_a_failed_check_off_the_page(client, hub, tmp_path):
    client(push_unchecked, tmp_path / "model", "someone/unchecked")
    files = hub.files("someone/unchecked")
    assert "⚠ unreliable" in files["README.md"].decode() and b"gradient" in files["results.jsonl"]


def test_records_of_an_adapters_folder_go_beside_those_of_the_same_fingerprint(client, hub, tmp_path):
    repo = "someone/own-records-of-adapter"
    client(push_adapter, tmp_path / "adapter", repo, 0)
    client(push_evaluation, tmp_path / "records", repo, "a" * 16, ("gray-box", 82.3))
    client(push_adapter_with_records, tmp_path / "adapter", repo, "a" * 16, ("white-box", 11.7))
    assert all(found == {82.3, 11.7} for found in figures(hub, repo).values()) and len(figures(hub, repo)) == 4
    client(push_adapter_with_records, tmp_path / "adapter", repo, "b" * 16, ("gray-box", 55.5))
    assert figures(hub, repo) == {"results.jsonl": {55.5}, "README.md": {55.5}}


def test_records_of_their_own_are_merged_too(client, hub, tmp_path):
    repo = "someone/own-dataset"
    client(push_dataset, tmp_path / "one", repo, ("gray-box", 82.3), ("white-box", 11.7))
    assert len(figures(hub, repo, type="dataset")) == 4
    client(push_dataset, tmp_path / "two", repo, ("black-box", 55.5))
    assert all(found == {82.3, 11.7, 55.5} for found in figures(hub, repo, type="dataset").values())
    client(push_dataset, tmp_path / "three", repo, ("gray-box", 70.1))  # measured again
    assert all(found == {70.1, 11.7, 55.5} for found in figures(hub, repo, type="dataset").values())


def test_a_model_and_an_adapter_do_not_share_a_repository(client, hub, tmp_path):
    repo = "someone/one-or-the-other"
    errors = client(push_one_over_the_other, tmp_path, repo)
    adapters = "adapter_config.json, adapter_model.safetensors, base_model.json"
    expected = [("", adapters), ("", adapters), ("-base", "config.json, model.safetensors")]
    for error, (name, theirs) in zip(errors, [*expected, *expected[1:]], strict=True):
        assert error.startswith(f"ValueError: repo_id: {repo}{name} holds a"), error
        assert f"push to another repo_id, or delete {theirs} there first" in error
    assert "model.safetensors" not in hub.files(repo) and "adapter_config.json" not in hub.files(f"{repo}-base")
    assert set(hub.repositories["model", repo].refs) == {"refs/heads/main"}


def test_models_of_two_types_do_not_share_a_repository(client, hub, tmp_path):
    repo = "someone/one-type"
    errors = client(push_types_over_each_other, tmp_path, repo)
    types = [("maep", "cifar_resnet"), ("maep", "cifar_resnet"), ("maep", "regnet"), ("cifar_resnet", "maep")]
    for error, (there, new) in zip(errors, [*types, types[0], types[3]], strict=True):
        assert error.startswith("ValueError: repo_id") and f"type '{there}'" in error and f"'{new}': push to" in error
    assert json.loads(hub.files(repo)["config.json"])["model_type"] == "maep"
    assert set(hub.repositories["model", repo].refs) == {"refs/heads/main"}


@pytest.mark.parametrize("content", ["theirs", "{}"])
def test_a_configuration_that_names_no_type_is_no_model_of_another(client, hub, content):
    repo = f"someone/no-type-{len(content)}"
    client(push_over_own_configuration, repo, content)
    assert json.loads(hub.files(repo)["config.json"])["model_type"] == "cifar_resnet"


@pytest.mark.parametrize("own_result", [True, False])
def test_an_edited_page_loses_the_results_of_older_weights_and_nothing_else(client, hub, tmp_path, own_result):
    repo = f"someone/edited-{own_result}"
    client(push_purifier, tmp_path / "old", repo, 0, (("gray-box", 82.3), ("white-box", 1.5)))
    metadata = hub.files(repo)["README.md"].decode().split("\n---\n", 1)[0]
    assert metadata.count("record:") == 3
    if own_result:
        metadata = metadata.replace("  results:\n", f"  results:\n{OWN_RESULT}", 1)
    text = "\r\n# My page\n\n![Attacks](attacks.png) of 82.3 %, and my <img src='banner.png'>\n"
    client(overwrite_readme, repo, f"{metadata}\n---\n{text}")
    add_files(hub, repo, OWN)
    before = set(hub.files(repo))
    assert client(push_purifier, tmp_path / "new", repo, 1)["card"] == "merged"
    files = hub.files(repo)
    assert before - set(files) == {"results.jsonl", "resnet56.png"}  # the page shows the other picture
    new_metadata, new_text = files["README.md"].decode().split("\n---\n", 1)
    assert new_text == text and "record:" not in new_metadata and "82.3" not in new_metadata
    assert ("value: 12.5" in new_metadata, "model-index" in new_metadata) == (own_result, own_result)
    assert "pipeline_tag: image-to-image" in new_metadata and "model_name" not in new_metadata
    for commit in hub.repositories["model", repo].commits.values():  # in one commit: half of it cannot be left over
        if "results.jsonl" not in commit.files and "README.md" in commit.files:
            assert b"record:" not in commit.files["README.md"].data
    assert client(push_purifier, tmp_path / "new", repo, 1)["card"] == "kept"
    assert hub.files(repo)["README.md"] == files["README.md"]


def test_a_page_that_cannot_be_read_stops_the_push_before_anything_is_sent(client, hub, tmp_path):
    repo = "someone/unreadable"
    client(push_purifier, tmp_path / "old", repo, 0, (("gray-box", 82.3),))
    repository = hub.repositories["model", repo]
    files = repository.commits[repository.sha("main")].files | {"README.md": Blob(b"---\nlicense: [\n---\n# x", False)}
    sha = repository.add("refs/heads/main", Commit(files, "by hand", repository.sha("main")))
    assert "README.md: its metadata cannot be read" in client(failure, push_purifier, tmp_path / "new", repo, 1)
    assert repository.sha("main") == sha


def test_an_adapter_pushed_again_keeps_its_results_until_it_is_trained_further(client, hub, tmp_path):
    repo = "someone/again-adapter"
    client(push_adapter, tmp_path / "adapter", repo, 0)
    assert client(push_evaluation, tmp_path / "records", repo, "a" * 16, ("gray-box", 82.3)) == []
    add_files(hub, repo, OWN)
    with_results = hub.files(repo)
    client(push_adapter, tmp_path / "adapter", repo, 0)
    again = hub.files(repo)
    assert b"82.3 (" in again["README.md"] and b"Nothing was measured" not in again["README.md"]
    assert set(again) == set(with_results) and again["results.jsonl"] == with_results["results.jsonl"]
    client(push_adapter, tmp_path / "further", repo, 1)
    further = hub.files(repo)
    assert b"82.3" not in further["README.md"] and b"Nothing was measured" in further["README.md"]
    assert set(again) - set(further) == {"results.jsonl", "results.csv", "results.md", "resnet56.png"}
    client(push_evaluation, tmp_path / "records-further", repo, "b" * 16, ("gray-box", 77.7))
    assert b"77.7 (" in hub.files(repo)["README.md"]


def test_records_of_an_adapter_from_another_machine_replace_those_there(client, hub, tmp_path):
    repo = "someone/two-machines"
    client(push_adapter, tmp_path / "adapter", repo, 0)
    client(push_evaluation, tmp_path / "one", repo, "a" * 16, ("gray-box", 82.3), ("bpda", 60.5))
    assert "resnet56.png" in hub.files(repo)
    warned = client(push_evaluation, tmp_path / "two", repo, "b" * 16, ("gray-box", 81.1))
    assert len(warned) == 1 and warned[0].startswith(f"{repo}: 2 records with another fingerprint")
    files = hub.files(repo)
    assert "resnet56.png" not in files and [json.loads(line)["protocol"]["purifier"]["fingerprint"]
                                            for line in files["results.jsonl"].splitlines()] == ["b" * 16]  # fmt: skip
    for name in ("README.md", "results.csv", "results.md"):
        assert b"81.1" in files[name] and b"82.3" not in files[name] and b"60.5" not in files[name], name
    more = client(push_evaluation, tmp_path / "more", repo, "b" * 16, ("bpda", 50.2))  # of the same: merged
    assert more == [] and b"81.1 (" in hub.files(repo)["README.md"] and b"50.2 (" in hub.files(repo)["README.md"]


RECORDS = ("run.json", "metrics.jsonl", "stage1_run.json", "stage1_metrics.jsonl")


@pytest.mark.parametrize("kind", ["purifier", "classifier", "adapter"])
def test_records_of_a_training_go_with_its_weights(client, hub, tmp_path, kind):
    repo = f"someone/trained-{kind}"
    client(push_trained, tmp_path / "old", repo, kind, 0, RECORDS)
    add_files(hub, repo, ("my_run.json", "my_metrics.jsonl", "old/run.json"))
    before = set(hub.files(repo))
    assert client(push_trained, tmp_path / "same", repo, kind, 0) == [] and set(hub.files(repo)) == before
    (warned,) = client(push_trained, tmp_path / "new", repo, kind, 1, ("run.json",))
    assert warned.endswith("of the training of other weights: metrics.jsonl, stage1_run.json, stage1_metrics.jsonl")
    assert before - set(hub.files(repo)) == set(RECORDS) - {"run.json"}
    client(push_trained, tmp_path / "newer", repo, kind, 2)
    assert before - set(hub.files(repo)) == set(RECORDS)


def test_a_page_tells_no_training_of_older_weights(client, hub, tmp_path):
    repo = "someone/trained-before"
    client(push_trained, tmp_path / "old", repo, "purifier", 0, ("run.json",))
    assert b"OLDREVISION" in hub.files(repo)["README.md"]
    client(push_trained, tmp_path / "new", repo, "purifier", 1)
    client(push_more_records, tmp_path / "evaluation", repo, 1, ("gray-box", 82.3))
    page = hub.files(repo)["README.md"]
    assert b"82.3" in page and b"OLDREVISION" not in page and b"No record of the training" in page


def test_files_go_by_their_exact_names():
    names = ["README.md", "results.jsonl", "x/results.jsonl", "my_attacks.png", "attacks.png", "resnet56.png", "x.png"]
    gone = {each.path_in_repo for each in outdated_operations(names, None, [record()])}
    assert gone == {"results.jsonl", "attacks.png", "resnet56.png"}
    shown = outdated_operations(names, "# By hand\n\n![x](https://hub/x/resolve/main/resnet56.png)", [record()])
    assert {each.path_in_repo for each in shown} == {"results.jsonl", "attacks.png"}


def of(fingerprint: str, **options) -> dict:
    made = record(**options)
    made["protocol"]["purifier"] |= {"fingerprint": fingerprint * 16}
    return made


def test_records_outdate_those_of_other_weights_alone():
    bare, scaled = record(purifier=None), of("c", purifier_options={"scale": 0.5})
    randomised = of("d")
    randomised["protocol"]["purifier"]["randomised"] = True
    assert outdated_records([of("a"), bare, scaled, randomised], [of("b")]) == [of("a"), scaled, randomised]
    assert outdated_records([of("a"), of("a", purifier_options={"overlap": 0})], [of("a", figure=1)]) == []
    for newer in ([bare], [scaled], [randomised], []):  # these do not tell the weights
        assert outdated_records([of("a"), bare], newer) == [], newer
    assert outdated_records([bare, scaled, randomised], [of("a")]) == []


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({}, True),
        ({"adapter_model.safetensors": b"other weights"}, False),
        ({"adapter_model.safetensors": None}, False),
        ({"adapter_config.json": None}, False),
        ({"adapter_config.json": ADAPTER | {"lora_alpha": 8}}, False),
        ({"adapter_config.json": ADAPTER | {"base_model_name_or_path": "a/b", "peft_version": "0.22"}}, True),
        ({"base_model.json": None}, True),  # pushed by PEFT alone
        ({"base_model.json": {"fingerprint": "2", "dtype": "float32"}}, False),
        ({"base_model.json": {"fingerprint": "2", "dtype": "bfloat16"}}, True),  # cannot be compared
    ],
)
def test_an_adapter_is_known_by_weights_scale_and_base(tmp_path, changed, same):
    files = {
        "adapter_model.safetensors": b"weights",
        "adapter_config.json": ADAPTER,
        "base_model.json": {"fingerprint": "1", "dtype": "float32"},
    }
    for folder, contents in (("here", files), ("there", files | changed)):
        (tmp_path / folder).mkdir()
        for name, content in contents.items():
            if content is not None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                (tmp_path / folder / name).write_bytes(data)
    there = {name: path if (path := tmp_path / "there" / name).is_file() else None for name in files}
    assert same_adapter(tmp_path / "here", there) is same
