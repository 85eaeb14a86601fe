"""Cards: from the records, complete, honest about what is not there, and never over the work of a person."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_purifier
from hub_helpers import transformers_classifier
from huggingface_hub import DatasetCard, ModelCard, ModelCardData
from local_hub import wrong_metadata
from made_up_records import PASSED, failed, record
from PIL import Image

from maep_hf import MAEPModel
from maep_hf.adaptation import add_lora, default_lora_config, save_adapter
from maep_hf.checkpoints import load_purifier
from maep_hf.evaluation.fingerprint import fingerprint
from maep_hf.hub import render_card, render_model_card, write_card
from maep_hf.hub.contents import LeakError, check_for_leaks, operations_of
from maep_hf.hub.folders import kind_of
from maep_hf.hub.names import dataset_id, hub_id
from maep_hf.hub.recipe import Recipe
from maep_hf.hub.records import merge_records, write_report
from maep_hf.hub.results import records_of
from maep_hf.hub.seal import edited, renewed, sealed, without_names
from maep_hf.paths import text_without_paths, without_paths
from maep_hf.randomised import RandomisedPurifier
from maep_hf.records import as_jsonl, read_jsonl
from maep_hf.rescaled import RescaledPurifier

THREATS = ("gray-box", "bpda", "white-box", "black-box", "transfer", "no attack")
UNRENDERED = (
    r"None|\{\{|\}\}|\{%|%\}|\bundefined\b(?! \()|More Information Needed|TODO|<(?!details|summary|sup)[a-z_]+>"
)
RUN = {
    "arguments": {
        "finetune": {"model": "/home/someone/runs/stage1"},
        "data": {"dataset": "/home/someone/cifar10", "validation_images": 100},
        "purification": {"surrogates": ["/home/someone/resnet20", "google/vit"]},
        "loop": {"output_dir": "/tmp/x", "max_steps": 30, "per_device_train_batch_size": 10},
    },
    "data": {"train": {"fingerprint": "f1", "images": 50000}, "validation": {"fingerprint": "f2", "images": 10000}},
    "command": ["finetune.py"],
    "versions": {"torch": "2.13.0", "peft": None},
    "git_revision": "abc123",
    "git_dirty": True,
}


@pytest.fixture
def folder(tmp_path):
    tiny_purifier().save_pretrained(tmp_path / "my-purifier")
    return tmp_path / "my-purifier"


@pytest.fixture
def of_these_weights():
    """A function that makes records of the purifier in `folder`."""
    mark = fingerprint(tiny_purifier().eval())

    def make(*args, **options):
        made = record(*args, **options)
        if made["protocol"]["purifier"] is not None:
            made["protocol"]["purifier"] = made["protocol"]["purifier"] | {"fingerprint": mark}
        return made

    return make


def write_results(folder, *records) -> None:
    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))


def check(card) -> None:
    """What holds of every card."""
    text = str(card)
    found = re.search(UNRENDERED, text)
    assert not found, text[max(0, found.start() - 100) : found.end() + 100]
    assert wrong_metadata(card.data.to_dict()) == []
    assert not re.search(r"/home/|/tmp/|/root/|/work/", text)
    assert not re.search(r"\n\n\n|[ \t]\n", card.text), "untidy"
    figures = [line for line in card.text.splitlines() if re.search(r"\d\.\d \(\d", line)]
    for line in figures:  # in a row, or under a heading, that names a threat model
        table = card.text[: card.text.index(line)].rpartition("\n\n")[2] + line
        assert any(name in table for name in THREATS), line
    for result in getattr(card.data, "eval_results", None) or []:
        assert any(name in result.metric_name for name in THREATS), result.metric_name
        assert "n = " in result.metric_name and "95 % interval" in result.metric_name


def test_card_of_a_run(folder, of_these_weights):
    (folder / "run.json").write_text(json.dumps(RUN))
    first = RUN | {
        "arguments": {"loop": RUN["arguments"]["loop"] | {"output_dir": "stage1"}},
        "command": ["pretrain.py"],
    }
    first["arguments"]["loop"]["output_dir"] = "/home/someone/runs/stage1"
    (folder / "pretrain_run.json").write_text(json.dumps(first))
    Image.new("RGB", (4, 4)).save(folder / "attacks.png")
    Image.new("RGB", (4, 4)).save(folder / "resnet56.png")
    Image.new("RGB", (4, 4)).save(folder / "unrelated.png")
    write_results(
        folder,
        of_these_weights(82.3, "gray-box"),
        of_these_weights(70.1, "gray-box", "MI-FGSM"),
        of_these_weights(12.5, "white-box", checks=PASSED),
        of_these_weights(90.0, "gray-box", "JPEG", control=True, norm=None, eps=None),
        record(1.0, "white-box", purifier=None),
    )
    card = render_model_card(folder, repo_id="someone/my-purifier")
    check(card)
    data, text = card.data, card.text
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "image-to-image")
    assert data.datasets == ["uoft-cs/cifar10"] and data.metrics == ["accuracy"] and data.base_model is None
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert len(values) == 5 and 12.5 in values.values() and 1.0 not in values.values()
    assert any(
        name.startswith("robust accuracy (%), white-box, PGD-20, Linf 8/255, resnet56, n = 1000") for name in values
    )
    assert any("under corruption" in name for name in values)
    assert "| **70.1 (67.2–72.9) %** | MI-FGSM" in text and "| **12.5 (10.6–14.7) %** |" in text
    assert re.search(r"\| bpda \|.*\*\*not measured\*\*", text) and re.search(r"\| black-box \|.*not measured", text)
    assert "![" in text and "(attacks.png)" in text and "(resnet56.png)" in text and "unrelated" not in text
    assert 'from_pretrained("someone/my-purifier")' in text and "pipeline(" in text
    assert "`pretrain_run.json` (pretrain.py): 30 steps, 300 images; `run.json` (finetune.py)" in text
    assert "600 images in all" in text and "abc123 with uncommitted changes" in text and "torch 2.13.0" in text
    assert "uoft-cs/cifar10: train 50,000 images (fingerprint f1)" in text and "peft" not in text
    assert "resnet20, vit" in text and "## Limits and misuse" in text and "## Licence" in text


def test_card_of_a_run_that_was_started_again(folder):
    first = {"versions": {"torch": "2.12.0"}, "git_revision": "def456", "git_dirty": False}
    for began, told in ((first, ", first started with def456. "), (RUN, ". ")):
        kept = {name: began[name] for name in first}
        (folder / "run.json").write_text(json.dumps(RUN | {"first_start": kept}))
        card = render_model_card(folder)
        check(card)
        assert f"abc123 with uncommitted changes{told}" in card.text
        assert ("torch 2.13.0; first started with torch 2.12.0" in card.text) == (began is first)


def test_weights_that_a_run_started_from_are_no_images(folder):
    cards = []
    for start in ({}, {"start": {"model": "f9"}}):
        (folder / "run.json").write_text(json.dumps(RUN | start))
        cards.append(str(render_model_card(folder)))
    assert cards[0] == cards[1] and "(fingerprint f1)" in cards[0]


def test_card_without_records_names_what_is_missing(folder):
    card = render_model_card(folder)
    check(card)
    assert card.text.count("**not measured**") == 4 and "Nothing was measured" in card.text
    assert "No record of the training run" in card.text and card.data.eval_results is None


def test_adapter_and_its_base(tmp_path):
    adapter = {"base_model_name_or_path": "/home/someone/base", "r": 8, "lora_alpha": 16, "modules_to_save": ["x.head"]}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    with pytest.raises(ValueError, match="base_model: the adapter was trained on 'base'"):
        render_card(tmp_path / "adapter")
    card = render_card(tmp_path / "adapter", "someone/lora", base_model="someone/base")
    check(card)
    assert (card.data.base_model, card.data.base_model_relation) == ("someone/base", "adapter")
    assert card.data.library_name == "peft" and "lora" in card.data.tags and "abc123" in card.text
    assert 'from_pretrained("someone/base")' in card.text and "rank 8, alpha 16, and the whole of `x.head`" in card.text
    assert re.search(r"\| white-box \|.*not measured", card.text)


def test_figures_of_other_adapter_weights_are_not_shown_where_its_base_is_here(folder, tmp_path):
    model = add_lora(MAEPModel.from_pretrained(folder), default_lora_config(tiny_purifier(), rank=2))
    save_adapter(model, tmp_path / "adapter")
    made = record(82.3)
    made["protocol"]["purifier"] = made["protocol"]["purifier"] | {"fingerprint": fingerprint(load_purifier(folder))}
    write_results(tmp_path / "adapter", made)
    assert "82.3" in render_card(tmp_path / "adapter", base_model="someone/base").text  # its update is still zero
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="other weights .fingerprint"):
        render_card(tmp_path / "adapter", base_model="someone/base")
    random = record(71.7)
    random["protocol"]["purifier"] = random["protocol"]["purifier"] | {"randomised": True}  # of no known weights
    assert "71.7" in render_card(tmp_path / "adapter", base_model="someone/base", results=[random]).text
    shutil.rmtree(folder)
    assert "82.3" in render_card(tmp_path / "adapter", base_model="someone/base").text


def test_the_runs_of_an_adapter_that_was_trained_further(tmp_path):
    def adapted(number, runs, **group):
        loop = RUN["arguments"]["loop"] | {"output_dir": f"{runs}/adapt{number}"}
        return RUN | {"arguments": {"adapt": {"model": "someone/base", **group}, "loop": loop}, "command": ["adapt.py"]}

    for runs in ("runs", "/home/someone/runs"):
        (tmp_path / "run.json").write_text(json.dumps(adapted(2, runs, adapter=f"{runs}/adapt1/adapter")))
        (tmp_path / "adapt1_run.json").write_text(json.dumps(adapted(1, runs, adapter=None)))
        recipe = Recipe(tmp_path)
        assert [stage.split()[0] for stage in recipe.stages] == ["`adapt1_run.json`", "`run.json`"]
        assert recipe.base_model == "someone/base" and recipe.images == 600


@pytest.mark.parametrize("pushed", [False, True])
def test_runs_of_one_name_in_folders_of_their_own_are_all_counted(tmp_path, pushed):
    for number, name in ((0, "stage0_run.json"), (1, "stage1_run.json"), (2, "run.json")):
        loop = RUN["arguments"]["loop"] | {"output_dir": f"/mnt/exp{number}/run", "max_steps": 10 + number}
        made = RUN | {"arguments": {"finetune": {"model": f"/mnt/exp{number - 1}/run"}, "loop": loop}}
        (tmp_path / name).write_text(json.dumps(without_paths(made) if pushed else made))
    other = RUN | {"arguments": {"loop": RUN["arguments"]["loop"] | {"output_dir": "/mnt/elsewhere/other"}}}
    (tmp_path / "other_run.json").write_text(json.dumps(other))
    recipe = Recipe(tmp_path)
    assert [stage.split()[0] for stage in recipe.stages] == ["`stage0_run.json`", "`stage1_run.json`", "`run.json`"]
    assert recipe.images == (10 + 11 + 12) * 10 and "/mnt" not in str(vars(recipe))


@pytest.mark.parametrize(
    ("made", "model", "counted"),
    [
        ("runs/pre", "runs/pre/", True), ("runs/pre/", "./runs/pre", True), ("/home/me/p/runs/pre", "runs/pre", True),
        ("runs/pre", "/home/me/p/runs/pre", True), ("runs/pre", "other/pre", False), ("runs/pre", "someone/pre", False),
        ("runs/pre", "/home/me/runs/pre2", False), ("/a/runs/pre", "/b/runs/old/pre2", False),
    ],
)  # fmt: skip
def test_a_stage_is_found_however_its_folder_was_typed(tmp_path, made, model, counted):
    first = RUN | {"arguments": {"loop": RUN["arguments"]["loop"] | {"output_dir": made}}}
    then = RUN["arguments"]["loop"] | {"output_dir": "runs/then"}
    (tmp_path / "first_run.json").write_text(json.dumps(first))
    (tmp_path / "run.json").write_text(json.dumps(RUN | {"arguments": {"finetune": {"model": model}, "loop": then}}))
    assert Recipe(tmp_path).images == (600 if counted else 300)


def test_images_of_every_process_and_micro_batch_are_counted(tmp_path):
    loop = RUN["arguments"]["loop"] | {"gradient_accumulation_steps": 4}
    run = RUN | {"arguments": RUN["arguments"] | {"loop": loop}, "num_processes": 2}
    (tmp_path / "run.json").write_text(json.dumps(run))
    recipe = Recipe(tmp_path)
    assert recipe.images == 30 * 10 * 4 * 2 and recipe.stages == ["`run.json` (finetune.py): 30 steps, 2,400 images"]
    assert "max_steps" in recipe.arguments and "output_dir" not in recipe.arguments
    assert recipe.validation_images == 100
    few = run | {"data": {"validation": {"fingerprint": "f2", "images": 60}}}
    (tmp_path / "run.json").write_text(json.dumps(few))
    assert Recipe(tmp_path).validation_images == 60


def test_classifier(classifier_folder, tmp_path):
    folder = tmp_path / "resnet"
    folder.mkdir()
    for path in classifier_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    check(card := render_card(folder, "someone/resnet"))
    assert "Nothing was recorded" in card.text and card.data.pipeline_tag == "image-classification"
    # perhaps converted from somebody else's weights
    assert card.data.license is None and "Apache" not in str(card) and "It was trained" not in card.text
    assert "## Licence\n\nNot recorded" in card.text
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "metrics.jsonl").write_text('{"step": 1, "validation": {"accuracy_clean": 50, "accuracy_pgd10_8": 3}}\n')
    check(card := render_card(folder, "someone/resnet"))
    assert "| no attack | none | 100 | 50.0 (40.4–59.6) % |" in card.text and "| white-box | PGD-10" in card.text
    assert [result.metric_value for result in card.data.eval_results] == [50.0, 3.0]
    more = RUN | {"arguments": RUN["arguments"] | {"data": RUN["arguments"]["data"] | {"validation_images": 500}}}
    (folder / "run.json").write_text(json.dumps(more))
    measured = [result.metric_args["n"] for result in render_card(folder, "someone/resnet").data.eval_results]
    assert measured == [500, 128]  # the attack is made on the first of them
    (folder / "run.json").write_text(json.dumps(RUN))
    assert card.data.license == "apache-2.0" and "It was trained as a plain classifier" in card.text


def test_classifier_of_transformers(tmp_path):
    transformers_classifier().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 48, "width": 48}}')
    check(card := render_card(tmp_path, "someone/regnet"))
    assert "`regnet`, for 2 classes: cat, dog" in card.text and "torch.rand(1, 3, 48, 48)" in card.text
    assert "Nothing was recorded" in card.text and "ResNet" not in card.text and "Apache" not in str(card)
    assert card.data.license is None and "regnet" in card.data.tags
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    check(card := render_card(tmp_path, "someone/regnet"))
    assert card.data.license == "apache-2.0" and "An undefended classifier" in card.text and "abc123" in card.text


@pytest.mark.checkpoint
@pytest.mark.parametrize("name", ["maep-tiny-cifar10", "resnet20-cifar10"])
def test_cards_of_the_released_checkpoints(name):
    card = render_card(ROOT / "checkpoints" / name)
    check(card)
    if name.startswith("maep"):
        assert len(card.data.eval_results) > 20 and card.text.count("![") == 4
        assert re.search(r"\| white-box \|.*\| \*\*0\.0 \(0\.0–0\.8\) %\*\*", card.text)


def test_figures_of_other_weights_are_not_shown(folder, of_these_weights):
    with pytest.raises(ValueError, match="other weights .fingerprint b{16}; these are"):
        render_model_card(folder, results=[record(82.3)])
    card = render_model_card(folder, results=[record(11.1), of_these_weights(82.3)])
    assert "82.3" in card.text and "11.1" not in str(card)


def test_charts_of_other_records_are_not_shown(folder, of_these_weights):
    """Trained anew, or an evaluation that was interrupted: the charts are those of the report before."""
    fresh = [of_these_weights(82.3), of_these_weights(70.1, attack="BIM")]

    def shown(*records) -> bool:
        (folder / "results.jsonl").write_text(as_jsonl(records))
        return "(attacks.png)" in render_model_card(folder).text

    write_results(folder, *fresh)
    write_report(folder)
    assert shown(*fresh) and shown(*fresh, fresh[0])
    assert not shown(fresh[0]) and not shown(*fresh, of_these_weights(55.5, attack="FGSM"))
    with_others = [*fresh, record(11.1, attack="FGSM")]  # of other weights, under the same name
    write_results(folder, *with_others)
    write_report(folder)
    assert not shown(*with_others)
    with_others[-1] = record(11.1, attack="FGSM", purifier="defence:jpeg")  # which its name tells apart
    write_results(folder, *with_others)
    write_report(folder)
    assert shown(*with_others)
    (folder / "results.csv").write_text("a person's, own\n")
    assert shown(*with_others)


@pytest.mark.parametrize("options", [{"scale": 0.5}, {"mask_ratio": 0.5, "draws": 2}, {"mask_ratio": 0.5, "scale": 2}])
def test_figures_of_a_purifier_used_otherwise_are_known_by_its_weights(folder, options):
    """A rescaled or randomised purifier has a fingerprint of its own."""

    def used(seed: int, figure: float) -> dict:
        torch.manual_seed(seed)
        varied = tiny_purifier().eval() if not seed else MAEPModel(tiny_purifier().config).eval()
        if "mask_ratio" in options:
            varied = RandomisedPurifier(varied, options["mask_ratio"], options.get("draws", 1))
        if "scale" in options:
            varied = RescaledPurifier(varied, options["scale"])
        made = record(figure, "white-box", purifier_options={"overlap": 0} | varied.record())
        randomised = {"randomised": "mask_ratio" in options, "fingerprint": fingerprint(varied)}
        made["protocol"]["purifier"] = made["protocol"]["purifier"] | randomised
        return made | {"key": f"{seed} {made['key']}"}

    own, other = used(0, 71.7), used(1, 22.2)
    assert own["protocol"]["purifier"]["fingerprint"] != other["protocol"]["purifier"]["fingerprint"]
    check(card := render_model_card(folder, results=[own]))
    assert "71.7" in card.text
    plain = record(82.3)
    plain["protocol"]["purifier"] = plain["protocol"]["purifier"] | {"fingerprint": fingerprint(tiny_purifier().eval())}
    text = str(render_model_card(folder, results=[plain, own, other]))
    assert "82.3" in text and "71.7" in text and "22.2" not in text
    with pytest.raises(ValueError, match=f"other weights .fingerprint {other['protocol']['purifier']['fingerprint']};"):
        render_model_card(folder, results=[other])


def test_an_adapter_measured_in_two_ways_is_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base", "r": 2}')
    scaled = record(71.7, purifier_options={"scale": 0.5})
    scaled["protocol"]["purifier"] = scaled["protocol"]["purifier"] | {"fingerprint": "e" * 16}
    text = render_card(tmp_path, results=[record(82.3), scaled]).text
    assert "82.3" in text and "71.7" in text


def test_predictions_that_are_kept_are_no_accuracy_of_a_purifier(folder, of_these_weights):
    kept = of_these_weights(33.3, attack="BIM") | {"counted": "kept: the prediction is its own"}
    card = str(render_model_card(folder, results=[of_these_weights(82.3), kept]))
    assert "82.3" in card and "33.3" not in card
    assert "Nothing was measured" in render_model_card(folder, results=[kept]).text


def test_the_worst_figure_says_how_the_purifier_was_used(folder, of_these_weights):
    made = [of_these_weights(80.0), of_these_weights(3.0, purifier_options={"strength": 0.1, "seed": None})]
    text = render_model_card(folder, results=made).text
    (row,) = (line for line in text.splitlines() if line.startswith("| gray-box"))
    assert "| **3.0 (2.1–4.3) %** | PGD-20, Linf 8/255, resnet56, purifier strength 0.1, n = 1000" in row
    assert "PGD-20, Linf 8/255, resnet56, n = 1000; purified" in render_model_card(folder, results=made[:1]).text


def test_embedded_images_are_a_data_set_of_their_own(folder, of_these_weights):
    """The Hub puts results of one type and split under the name of the first."""
    made = [of_these_weights(95.0, n=20), of_these_weights(80.0)]
    made[0]["protocol"]["dataset"]["name"] = "embedded:cifar10"
    data = render_model_card(folder, results=made).data.to_dict()
    found = {
        (each["dataset"]["name"], each["dataset"]["type"], metric["args"]["n"])
        for each in data["model-index"][0]["results"] for metric in each["metrics"]
    }  # fmt: skip
    assert found == {("embedded:cifar10", "embedded:cifar10", 20), ("cifar10", "uoft-cs/cifar10", 1000)}


@pytest.mark.parametrize("place", ["runs/{}/final", "/scratch/runs/{}/final"])
@pytest.mark.parametrize("pushed", [False, True])
def test_stages_whose_folders_have_one_name_are_all_there(tmp_path, place, pushed):
    before = None
    names = {"pretrain_run.json": 100, "finetune_run.json": 20, "run.json": 3}
    for name, steps in names.items():
        output = place.format(Path(name).stem)
        loop = {"output_dir": output, "max_steps": steps, "per_device_train_batch_size": 10}
        run = {"arguments": {"model": {"model": before}, "loop": loop}, "command": ["finetune.py"]}
        (tmp_path / name).write_text(json.dumps(without_paths(run) if pushed else run))
        before = output
    recipe = Recipe(tmp_path)
    assert [stage.split("`")[1] for stage in recipe.stages] == list(names) and recipe.images == 1230
    assert "/scratch" not in recipe.arguments


def test_a_name_breaks_no_row_of_the_summary(folder, of_these_weights):
    text = render_model_card(folder, results=[of_these_weights(82.3, classifier="res|net")]).text
    (row,) = (line for line in text.splitlines() if line.startswith("| gray-box"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 5 and r"res\|net, n = 1000" in row


def test_the_worst_figure_stands_beside_the_same_images_without_an_attack(folder, of_these_weights):
    """It may be that of another, weaker classifier, whose clean accuracy is not much higher."""
    made = [of_these_weights(27.6, classifier="weak", purified_clean=39.6), of_these_weights(84.6)]
    text = render_model_card(folder, results=made).text
    (row,) = (line for line in text.splitlines() if line.startswith("| gray-box"))
    assert re.search(r"\*\*27\.6 .*weak, n = 1000; purified clean 39\.6 \(36\.6–42\.7\) %; worst of 2 measured", row)


def test_the_summary_is_of_attacks_and_the_metadata_of_each_figure(folder, of_these_weights):
    made = [of_these_weights(70.0), of_these_weights(1.0, "gray-box", "JPEG", control=True, norm=None, eps=None)]
    card = render_model_card(folder, results=made)
    (row,) = (line for line in card.text.splitlines() if line.startswith("| gray-box"))
    assert "**70.0 (" in row and "worst of 1 measured" in row
    values = {result.metric_name.partition(",")[0]: result.metric_value for result in card.data.eval_results}
    assert len(card.data.eval_results) == 3  # clean images once
    assert values == {
        "accuracy (%) of purified clean images": 92.5, "robust accuracy (%)": 70.0,
        "accuracy (%) under corruption": 1.0,
    }  # fmt: skip
    (robust,) = (each for each in card.data.eval_results if each.metric_name.startswith("robust"))
    wanted = {
        "threat_model": "gray-box",
        "attack": "PGD-20",
        "norm": "Linf",
        "eps": 8.0,
        "eps_unit": "1/255",
        "n": 1000,
    }
    assert {name: robust.metric_args[name] for name in wanted} == wanted
    assert (robust.dataset_type, robust.dataset_split) == ("uoft-cs/cifar10", "test")


def test_records_of_two_purifiers_are_of_no_adapter(folder, tmp_path):
    records = [record(82.3), record(11.1, purifier="other")]
    records[1]["protocol"]["purifier"]["fingerprint"] = "e" * 16
    with pytest.raises(ValueError, match="they are of 2 purifiers .maep-tiny, other."):
        records_of(records, None)
    assert records_of([records[0], record(purifier=None)], None) == [records[0]]


def test_unreliable_results_say_so(folder, of_these_weights):
    made = of_these_weights(40, "white-box", checks=failed("gradient", "transfer"))
    check(card := render_model_card(folder, results=[made]))
    assert "⚠ unreliable" in card.text and "failed gradient, transfer" in card.text
    assert "unreliable: failed gradient, transfer" in card.data.eval_results[-1].metric_name
    assert "not checked" in render_model_card(folder, results=[made | {"checks": None}]).text


def test_metadata_says_what_the_table_says(folder, of_these_weights):
    made = [
        of_these_weights(40.0, "white-box"),
        of_these_weights(41.0, "white-box", "BIM", checks=failed()),
        of_these_weights(42.0, purifier_options={"overlap": 0.5}),
        of_these_weights(43.0),
        of_these_weights(44.0, "transfer", source={"name": "resnet20+maep", "fingerprint": "1"}),
        of_these_weights(45.0, "transfer", source={"name": "resnet20", "fingerprint": "2"}),
    ]
    check(render_model_card(folder, results=made[:4]))
    card = render_model_card(folder, results=made)
    assert wrong_metadata(card.data.to_dict()) == []
    found = {result.metric_value: result for result in card.data.eval_results}
    names = {figure: result.metric_name for figure, result in found.items()}
    assert names[40.0].endswith(", not checked") and names[41.0].endswith(", unreliable")
    assert ", resnet56, purifier overlap 0.5, n = " in names[42.0] and ", resnet56, n = " in names[43.0]
    assert found[42.0].metric_args["purifier_options"] == {"overlap": 0.5}
    assert "purifier_options" not in found[43.0].metric_args
    assert ", transfer from resnet20+maep, " in names[44.0] and ", transfer from resnet20, " in names[45.0]
    assert found[44.0].metric_args["source"]["name"] == "resnet20+maep" and "source" not in found[43.0].metric_args
    assert len({result.metric_name for result in card.data.eval_results}) == len(card.data.eval_results)


def test_result_without_its_protocol_is_refused(folder, of_these_weights):
    for name in ("threat_model", "attack", "dataset", "classifier"):
        made = of_these_weights(82.3)
        del made["protocol"][name]
        with pytest.raises(ValueError, match=f"record 1: there is no protocol.{name}"):
            render_model_card(folder, results=[made])


def test_template_that_asks_for_more_is_refused(folder, tmp_path):
    (tmp_path / "card.md").write_text("---\n{{ card_data }}\n---\n{{ unheard_of }}\n")
    with pytest.raises(ValueError, match="card.md: UndefinedError.*unheard_of"):
        render_model_card(folder, template=tmp_path / "card.md")
    (tmp_path / "card.md").write_text("{% if %}")
    with pytest.raises(ValueError, match="card.md: TemplateSyntaxError"):
        render_model_card(folder, template=tmp_path / "card.md")


def test_evaluation_names_what_was_not_measured(tmp_path):
    write_results(tmp_path, record(82.3), record(1.0, "white-box", purifier=None))
    check(card := render_card(tmp_path, "someone/records"))
    assert "Not measured with a purifier: bpda, white-box, black-box." in card.text
    write_results(tmp_path, {"a": 1})
    with pytest.raises(ValueError, match="record 1: there is no key, protocol.threat_model"):
        render_card(tmp_path)


def test_a_record_without_checks_takes_no_failed_one_away(tmp_path):
    doubtful, unchecked = record(60, "white-box", checks=failed("gradient")), record(61, "white-box")
    passed = record(62, "white-box", checks=PASSED)
    for known, new, stays in (
        (doubtful, unchecked, doubtful),
        (doubtful, passed, passed),
        (unchecked, record(60, "white-box"), record(60, "white-box")),
    ):
        (tmp_path / "results.jsonl").write_text(as_jsonl([known]))
        merge_records(tmp_path / "results.jsonl", [new])
        assert read_jsonl(tmp_path / "results.jsonl") == [stays]


def test_what_has_no_card_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        render_card(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no config.json"):
        render_card(tmp_path / "empty")
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no card of its own"):
        render_card(tmp_path)


def test_a_written_card_is_renewed_and_an_edited_one_gets_results_only(folder, of_these_weights):
    path = folder / "README.md"
    assert write_card(folder) == "written" and "not measured" in path.read_text()
    write_results(folder, of_these_weights(82.3), of_these_weights(5.5, "white-box", checks=PASSED))
    assert write_card(folder) == "written" and "82.3" in path.read_text()  # untouched, so written anew
    mine = path.read_text().replace("## Use", "## How I use it")
    path.write_text(mine)
    assert write_card(folder) == "merged" and path.read_text() == mine  # nothing new
    write_results(folder, of_these_weights(33.3))
    assert write_card(folder) == "merged"
    body = mine.split("\n---\n", 1)[1]
    text = path.read_text()
    assert text.split("\n---\n", 1)[1] == body and "value: 33.3" in text and "value: 82.3" not in text
    (folder / "results.jsonl").unlink()
    with pytest.raises(FileExistsError, match="edited by hand.*--overwrite"):
        write_card(folder)
    assert path.read_text() == text
    assert write_card(folder, overwrite=True) == "written" and "How I use it" not in path.read_text()
    assert not (folder / "README.md.tmp").exists()


CARD = "---\nlicense: mit\ntags:\n- a\n- b\n---\n\n# Card\n\nText\n"


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("Text", "Other text", True),
        ("mit", "apache-2.0", True),
        ("- b\n", "- b\n- c\n", True),
        ("\n# Card", "\nA first line\n\n# Card", True),
        ("tags:\n- a\n- b\n", "tags: [a, b]\n", False),  # the same in another style
        ("license: mit\ntags:\n- a\n- b\n", "tags:\n  - a\n  - b\nlicense: 'mit'\n", False),
        ("\n", "\r\n", False),
    ],
)
def test_an_edit_is_what_changes_the_content(old, new, changed):
    card = str(sealed(ModelCard(CARD)))
    assert not edited(ModelCard(card))
    assert edited(ModelCard(card.replace(old, new))) is changed


def test_a_sealed_card_without_names_that_mean_nothing():
    text = "---\nsource_datasets:\n- extended|a/b\n- extended|c/d\nlicense: mit\n---\n\n# Card\n"
    card = without_names(sealed(DatasetCard(text)), {"extended|a/b"})
    assert card.data.source_datasets == ["extended|c/d"] and not edited(card)
    assert "source_datasets" not in str(without_names(card, {"extended|c/d"}))


def test_readmes_without_a_seal():
    fresh = sealed(ModelCard(CARD))
    assert renewed(None, fresh) == (fresh, "written") and renewed("", fresh)[1] == "written"
    for text in ("# By hand", "---\nlicense: gpl\n---\n# By hand\n"):
        card, how = renewed(text, fresh)
        assert how == "kept" and card.text in text
    card, how = renewed("---\nlicense: gpl-3.0\n---\n", fresh)  # made on the website, empty
    assert how == "written" and card.data.license == "gpl-3.0" and "# Card" in card.text and not edited(card)
    for metadata in ("- a list", "license: mit\n1: a name that is no text"):
        with pytest.raises(ValueError, match="README.md: its metadata cannot be read"):
            renewed(f"---\n{metadata}\n---\n# By hand", fresh)
    placeholders = ModelCard.from_template(ModelCardData(), model_description="_")  # as transformers leaves it
    placeholders.data.license, placeholders.data.base_model = "gpl-3.0", "/home/someone/base"
    card, how = renewed(str(placeholders), sealed(ModelCard(CARD)))
    assert how == "written" and "# Card" in card.text and not edited(card)
    assert card.data.license == "gpl-3.0" and card.data.base_model is None


METADATA = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage: de\ntags:\n- mine\n---\n"


@pytest.mark.parametrize(
    ("existing", "licence", "kept"),
    [
        ("---\nlicense: mit\n---\n", "Code: Apache-2.0. Weights: mit. The", {"license": "mit"}),
        (METADATA, "Code: Apache-2.0. Weights: [mine](LICENSE). The", {"language": "de", "tags": ["mine"]}),
        ("---\nlanguage: de\n---\n", "Code and weights: Apache-2.0. The", {"license": "apache-2.0", "language": "de"}),
    ],
)
def test_metadata_of_a_person_outlives_every_card(folder, of_these_weights, existing, licence, kept):
    (folder / "README.md").write_text(existing)
    for figure in (82.3, 55.5, 44.4):
        write_results(folder, of_these_weights(figure))
        assert write_card(folder) == "written"
        check(card := ModelCard((folder / "README.md").read_text()))
        assert {name: card.data.get(name) for name in kept} == kept and str(figure) in card.text
        assert card.text.split("## Licence\n\n")[1].startswith(licence) and not edited(card)
        assert card.data.pipeline_tag == "image-to-image" and card.text.count("kept: ") == 1
    (folder / "README.md").write_text(card.content.replace("## Use", "## My use"))
    write_results(folder, of_these_weights(33.3))
    assert write_card(folder) == "merged"  # the seal still tells


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("/home/a b/model", "model"),
        ("--output_dir=/home/me/run", "--output_dir=run"),
        (["~/x/y", {"a": "C:\\Users\\me\\x"}], ["y", {"a": "x"}]),
        ("see /home/me/x/data.csv, please", "see data.csv, please"),
        ("python:/home/me/x.py:net", "python:x.py:net"),
        ("dataset:/home/me/x", "dataset:x"),
        ("see C:\\Users\\me\\x", "see x"),
        ("https://huggingface.co/a/b/c", "https://huggingface.co/a/b/c"),
        ("at https://huggingface.co:443/a/b", "at https://huggingface.co:443/a/b"),
        ("Linf 8/255 and/or L2", "Linf 8/255 and/or L2"),
        ("runs/pretrain", "runs/pretrain"),
        ({"surrogates[/home/me/x]": "1f", "start_share": 0.5}, {"surrogates[x]": "1f", "start_share": 0.5}),
        ({"[/a/b/x]": 1, "[/a/c/x]": 2, "[x] (2)": 3}, {"[x]": 1, "[x] (2)": 2, "[x] (2) (2)": 3}),
        (["--output_dir=/Users/John Smith/r1", "-o/home/me/r2"], ["--output_dir=r1", "-or2"]),
        ({"surrogates[/Users/John Smith/my net]": "1f"}, {"surrogates[my net]": "1f"}),
        (["surrogates[python:nets:make:/home/a b/w.pth]"], ["surrogates[python:nets:make:w.pth]"]),
        ("python:nets:make:C:\\Users\\John Smith\\w.pth", "python:nets:make:w.pth"),
        (["python:nets:make:/home/o'brien/x", "dataset:/home/a b/x"], ["python:nets:make:x", "dataset:x"]),
        (["../../alice/faces", "./../alice/sky", "runs/../../alice/sea"], ["faces", "sky", "sea"]),
        (["~alice/x", "--config=~alice/x.yaml", "see ~alice/y, ../z"], ["x", "--config=x.yaml", "see y, z"]),
        (["file:///home/John Smith/x/y", "at file://localhost/home/me/z"], ["y", "at z"]),
        (["\\\\server\\a b\\x", "--dataset=\\\\server\\a b\\y", "on \\\\server\\a\\z"], ["x", "--dataset=y", "on z"]),
        ('{"weights": "/Users/John Smith/x/y", "/": "../a b/z"}', '{"weights": "y", "/": "z"}'),
        (["/a/net", "/b/net", "/a/net", "--base=/b/net"], ["net", "net (2)", "net", "--base=net"]),
        (["/runs/8", "8", 8], ["8 (2)", "8", 8]),
        (8.5, 8.5),
    ],
)
def test_paths_of_this_machine_are_cut(value, kept):
    assert without_paths(value) == kept


@pytest.mark.parametrize("place", ["home", "working directory", "folder", "beside it"])
def test_no_text_with_a_path_of_this_machine_leaves_it(tmp_path, monkeypatch, place):
    places = {name: tmp_path / name for name in ("home", "working directory", "runs")}
    for path in places.values():
        path.mkdir()
    monkeypatch.setenv("HOME", str(places["home"]))
    monkeypatch.chdir(places["working directory"])
    folder = places["runs"] / "mine"
    named = places.get(place, folder if place == "folder" else places["runs"])
    check_for_leaks("notes.md", b"x /elsewhere/x", folder)
    with pytest.raises(LeakError, match=f"notes.md in .*mine names a path of this machine, {re.escape(str(named))};"):
        check_for_leaks("notes.md", f"x {named}/x".encode(), folder)


def test_no_text_with_a_token_leaves_this_machine(tmp_path):
    for content in (b"token: hf_" + b"aB3" * 11, b"key=secret"):
        with pytest.raises(LeakError, match="notes.md in .* holds a Hub token"):
            check_for_leaks("notes.md", content, tmp_path, "secret")
    check_for_leaks("notes.md", b"hf_hub_download, key=secret", tmp_path)


def test_what_is_no_path_of_a_machine_stays():
    names = ["--endpoint=https://a.b/c/../d/~e", "timm:hf-hub:a/b", "host:443/a/b", "n/a", ".../x", "..", "/"]
    names += ["~5/10", "eps [/255]", "PGD-20, Linf 8/255", r".*\.(q_proj|fc1)", "hf://datasets/a/b"]
    assert [without_paths(name) for name in names] == without_paths(names) == names


def test_texts_lose_paths_and_keep_their_links(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/Users/John Smith")
    kept = "/* [all](../ablation/README.md#x), 8/255 and/or https://a.b/Users/John/c */\n"
    assert text_without_paths(kept) == kept
    assert text_without_paths("in /Users/John Smith/runs/x and `/mnt/a b/y`,../../me/z") == "in x and `y`,z"
    (tmp_path / "results.jsonl").write_text("{}\n")
    (tmp_path / "results.md").write_text(f"{kept}| ../../me/net |\n")
    content = {each.path_in_repo: each.path_or_fileobj for each in operations_of(tmp_path, kind_of(tmp_path))}
    assert content["results.md"].decode() == f"{kept}| net |\n"


def test_hub_ids_and_local_names(tmp_path, monkeypatch):
    assert hub_id("uoft-cs/cifar10") == dataset_id("uoft-cs/cifar10") == "uoft-cs/cifar10"
    for local in (None, "", "data/cifar10", "/abs/cifar10", "cifar10", "a/b/c", "runs/x", "./x", "../x"):
        assert hub_id(local) is None
    assert dataset_id("data/cifar10") == dataset_id("embedded:cifar10") == "uoft-cs/cifar10"
    assert dataset_id("data/mine") is None
    (tmp_path / "uoft-cs/cifar10").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("uoft-cs/cifar10") is None  # a folder of that name comes first, as it does in training


def test_the_local_hub_refuses_what_the_hub_would():
    assert (
        wrong_metadata({"license": "mit", "tags": ["a"], "base_model": "a/b", "base_model_relation": "adapter"}) == []
    )
    for wrong in ({"tags": [1]}, {"base_model": "/home/x/base"}, {"datasets": ["a/b/c"]}, {"base_model_relation": "x"},
                  {"model-index": [{"name": "x", "results": [{"task": {"type": "t"}}]}]}):  # fmt: skip
        assert wrong_metadata(wrong), wrong
