"""The weights that come with the repository: what they do on real images, and that their records are all there."""

import json
import re
import statistics
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from maep_hf import MAEPModel, load_classifier
from maep_hf.adaptation import load_adapter, trainable_share
from maep_hf.checkpoints import CLASSIFIER, PURIFIER, load_purifier, released_checkpoint
from maep_hf.demo import embedded_images
from maep_hf.evaluation import benchmark
from maep_hf.evaluation.fingerprint import fingerprint
from maep_hf.evaluation.results import results
from maep_hf.evaluation.tables import markdown_table, read_results
from maep_hf.hub import render_card
from maep_hf.records import read_jsonl
from train import ablation_table, peers_table, transfer_table

ROOT = Path(__file__).resolve().parent.parent
MACHINE_PATH = re.compile(r'"/(work|root|home|tmp)/')
pytestmark = pytest.mark.checkpoint


def read_recipe(name):
    return yaml.safe_load((ROOT / "train" / "configs" / f"{name}.yaml").read_text())


def follows(run, recipe):
    """Whether the arguments of a run are its recipe's, but for those that say where its data and its start are."""
    groups = json.loads(run.read_text())["arguments"].values()
    arguments = {name: value for group in groups for name, value in group.items()}
    places = {"dataset", "streaming", "validation_split", "model"}
    return all(arguments[given] == recipe[given] for given in recipe.keys() - places)


def test_released_purifier_defends_the_released_classifier():
    classifier = load_classifier(str(released_checkpoint(CLASSIFIER)))
    result = benchmark(classifier, load_purifier(), embedded_images("cifar10"), attack="pgd-20", eps=8, progress=False)
    correct = {name: share["correct"] for name, share in result.record["accuracy"].items()}
    assert correct["clean"] >= 16 and correct["attacked"] <= 1
    assert correct["purified_clean"] >= correct["clean"] - 1
    assert correct["purified_attacked"] >= 15
    assert result.record["cosine"]["true_direction"] > 0.2  # the correction points back to the clean image


def test_released_purifier_takes_larger_images_and_passes_gradients():
    purifier = MAEPModel.from_pretrained(released_checkpoint(PURIFIER))
    image = torch.rand(1, 3, 45, 70, generator=torch.Generator().manual_seed(0), requires_grad=True)
    purified = purifier.purify(image)
    assert purified.shape == image.shape and 0 <= purified.min() and purified.max() <= 1
    purified.sum().backward()
    assert torch.isfinite(image.grad).all() and (image.grad != 0).float().mean() > 0.99


def test_records_lie_beside_the_weights_and_name_no_machine():
    folder = released_checkpoint(PURIFIER)
    for name in ("run.json", "metrics.jsonl", "pretrain_run.json", "pretrain_metrics.jsonl", "results.jsonl"):
        text = (folder / name).read_text()
        assert text and not MACHINE_PATH.search(text)
    runs = [json.loads(path.read_text()) for path in folder.glob("*run.json")]
    assert len(runs) == 10  # stage 1 and nine of stage 2
    for run in runs:
        surrogates = {Path(name).name for name in run["arguments"]["purification"]["surrogates"]}
        assert not surrogates & {"resnet56", "resnet44", "densenet-bc-100.pth.tar"}  # held out
    weights = sum(path.stat().st_size for path in (ROOT / "checkpoints").rglob("*.safetensors"))
    assert weights <= 25 * 2**20


def named_purifiers(record: dict) -> list[str]:
    """What the command of a record gives as purifiers."""
    return [value for option, value in pairwise(record["environment"]["command"]) if option == "--purifier"]


def test_card_and_readme_state_the_recorded_results():
    folder = released_checkpoint(PURIFIER)
    card, readme = (folder / "README.md").read_text(), (ROOT / "README.md").read_text()
    assert card == str(render_card(folder, f"checkpoints/{PURIFIER}"))  # its code then runs from a clone
    records = read_results(folder / "results.jsonl")
    weights = {record["protocol"]["purifier"]["fingerprint"] for record in records}
    assert weights == {fingerprint(load_purifier(folder))}, "the records are of other weights"
    assert all(f"checkpoints/{PURIFIER}" in named_purifiers(record) for record in records)
    measured = {record["protocol"]["threat_model"] for record in records}
    assert {"gray-box", "white-box"} <= measured
    missing = [line for line in table_of(records) if line not in readme.splitlines()]
    assert not missing, f"README.md: paste the tables of `maep report checkpoints/{PURIFIER}`"


def test_readme_states_the_measured_throughput():
    record = json.loads((released_checkpoint(PURIFIER) / "throughput.json").read_text())
    readme = " ".join((ROOT / "README.md").read_text().split())
    eager, compiled = (statistics.median(row["share_of_matrix_product"]) for row in record["purify"][1:3])
    assert record["arguments"]["purify_batch_size"] == 256 and not MACHINE_PATH.search(json.dumps(record))
    assert f"batch 256 reaches {eager:.2f} of the machine's matrix-product throughput, {compiled:.2f} under" in readme
    pure, whole = (statistics.median(row["ratio"]) for row in record["training_step"][1:])
    assert f"takes {pure:.2f} times as many images a second" in readme and f"{whole:.2f} times with the local" in readme


RELEASED = [PURIFIER, f"{PURIFIER}-lora-imagenet", f"{PURIFIER}-lora-tiny-imagenet"]


WITH_WEIGHTS = ("finetune8", "divergence", "diverse", "again", "again-diverse")


@pytest.mark.parametrize("name", [*RELEASED, *(f"ablation/{name}" for name in WITH_WEIGHTS)])
def test_white_box_is_published_for_all_weights(name):
    found = [result for result in results(read_results(ROOT / "checkpoints" / name / "results.jsonl"))
             if result.column == "white-box" and result.attack.startswith("AutoAttack (standard), Linf")]  # fmt: skip
    assert found and not any(result.mark for result in found)


@pytest.mark.parametrize("domain", ["imagenet", "tiny-imagenet"])
def test_released_adapters_fit_their_base_and_say_what_was_measured(domain):
    folder = ROOT / "checkpoints" / f"{PURIFIER}-lora-{domain}"
    assert isinstance(load_purifier(folder), MAEPModel)
    assert trainable_share(load_adapter(load_purifier(), folder, trainable=True)) < 0.05
    records = read_results(folder / "results.jsonl")
    # of merged weights, whose last bits are the processor's, so that only their sameness can be asked for
    assert len({record["protocol"]["purifier"]["fingerprint"] for record in records}) == 1
    assert all(f"checkpoints/{folder.name}" in named_purifiers(record) for record in records)
    everything = read_results(ROOT / "checkpoints" / "transfer" / "results.jsonl")
    assert all(record in everything for record in records) and len(records) >= 3
    card = str(render_card(folder, f"checkpoints/{folder.name}", base_model=f"checkpoints/{PURIFIER}"))
    assert (folder / "README.md").read_text() == card
    elsewhere = {"output_dir": f"runs/rel-lora-{domain.removesuffix('-imagenet')}"}
    assert follows(folder / "run.json", read_recipe(f"adapt_lora_{domain.replace('-', '_')}") | elsewhere)
    assert {value.dtype for value in load_file(folder / "adapter_model.safetensors").values()} == {torch.float16}
    for path in folder.glob("*run.json"):
        run = json.loads(path.read_text())
        assert not any("lite0" in name for name in run["arguments"]["purification"]["surrogates"])  # held out
        assert not MACHINE_PATH.search(path.read_text())


def test_transfer_is_tabled_from_its_records():
    folder = ROOT / "checkpoints" / "transfer"
    records, readme = read_results(folder / "results.jsonl"), (ROOT / "README.md").read_text().splitlines()
    text = transfer_table.markdown(records)
    assert (folder / "transfer.md").read_text() == text, "python train/transfer_table.py checkpoints/transfer"
    across = transfer_table.across(transfer_table.compared(transfer_table.domains(records)))[0]
    assert all(line in readme for line in across), "README.md: paste the table across domains"
    purifiers = {record["protocol"]["purifier"]["fingerprint"] for record in records
                 if record["protocol"]["purifier"]["name"] == PURIFIER
                 and "scale" not in record["protocol"]["purifier"]["options"]}  # fmt: skip
    assert purifiers == {fingerprint(load_purifier())}


def test_bases_of_other_domains_are_tabled_from_their_records():
    folder = ROOT / "checkpoints" / "transfer" / "bases"
    records, readme = read_results(folder / "results.jsonl"), (folder / "README.md").read_text().splitlines()
    text = transfer_table.markdown(records)
    assert (folder / "transfer.md").read_text() == text, "python train/transfer_table.py checkpoints/transfer/bases"
    across = transfer_table.across(transfer_table.compared(transfer_table.domains(records)))[0]
    assert all(line in readme for line in across), "README.md beside it: paste the table across domains"
    held_out = ("resnet56", "lite0")
    for path in [*folder.glob("*_run.json"), folder / "results.jsonl"]:
        assert not MACHINE_PATH.search(path.read_text())
    runs = {path.name: json.loads(path.read_text()) for path in folder.glob("*_run.json")}
    named = {record["protocol"]["purifier"]["name"] for record in records}
    assert named == {name.removesuffix("_run.json") for name in runs} and len(named) == 3
    for run in runs.values():
        assert run["arguments"]["model"]["size"] == "tiny"  # from random weights
        assert not any(name in surrogate for surrogate in run["arguments"]["purification"]["surrogates"]
                       for name in held_out)  # fmt: skip


@pytest.mark.parametrize(
    "name, trained",
    [("peers", 5), ("peers/guidance-both", 3), ("peers/guidance-both-seed-1", 3), ("peers/guidance-0.2", 3)],
)
def test_peers_are_tabled_from_their_records(name, trained):
    folder = ROOT / "checkpoints" / name
    told_in = folder if (folder / "README.md").is_file() else ROOT
    records, readme = read_results(folder / "results.jsonl"), (told_in / "README.md").read_text().splitlines()
    text = peers_table.markdown(records)
    assert (folder / "peers.md").read_text() == text, f"python train/peers_table.py checkpoints/{name}"
    assert all(line in readme for line in text.splitlines() if line.startswith("|")), "README.md: paste peers.md"
    weights = {record["protocol"]["purifier"]["name"]: record["protocol"]["purifier"]["fingerprint"]
               for record in records if record["protocol"]["purifier"]}  # fmt: skip
    assert name != "peers" or weights[PURIFIER] == fingerprint(load_purifier())
    images = {}
    for path in folder.glob("*_run.json"):
        run = json.loads(path.read_text())
        assert not any("resnet56" in name for name in run["arguments"]["purification"]["surrogates"])
        assert not MACHINE_PATH.search(path.read_text())
        loop = run["arguments"]["loop"]
        images[path.name] = loop["max_steps"] * loop["per_device_train_batch_size"]
    assert len(images) == trained and len(set(images.values())) == 1  # the same budget for all that were trained for it


def test_ablation_is_tabled_from_its_records():
    folder = ROOT / "checkpoints" / "ablation"
    records = read_jsonl(folder / "rows.jsonl")
    order = list(yaml.safe_load((ROOT / "train" / "configs" / "ablation.yaml").read_text())["rows"])
    text = ablation_table.markdown(ablation_table.summarise(records, order), records)
    assert (folder / "table.md").read_text() == text, "python train/ablation.py --tabulate true --output_dir FOLDER"
    assert {record["row"] for record in records} == set(order), "ablation/README.md says that all rows were measured"
    for record in records:
        assert "resnet56" in record["evaluation"]["classifier"]  # never a surrogate
        assert not any("resnet56" in name for stage in record["training"] for name in stage["surrogates"])
        assert not MACHINE_PATH.search(json.dumps(record))


UNSEEN = {"resnet56", "resnet44"}  # never surrogates
LONG_RUNS = [
    ("scratch", "pretrain_scratch", UNSEEN | {"densenet-bc-100"}),
    ("single", "pretrain_single", UNSEEN),
    ("single-guided", "finetune_single", UNSEEN),
    ("wide", "pretrain_wide", UNSEEN),
    ("lean", "pretrain_lean", UNSEEN | {"densenet-bc-100"}),
    ("lean-finetuned", "finetune_lean", UNSEEN),
    ("lean-distance", "finetune_lean3", UNSEEN),
    ("lean-grown", "finetune_lean2", UNSEEN | {"densenet-bc-100"}),
    ("finetune8", "finetune8", UNSEEN | {"densenet-bc-100", "efficientnet_lite0"}),
    ("divergence", "finetune9", UNSEEN | {"densenet-bc-100", "efficientnet_lite0"}),
]
AGAIN = ("again", "finetune9", UNSEEN | {"densenet-bc-100", "efficientnet_lite0"})
CHAIN = ("pretrain", "finetune", *(f"finetune{number}" for number in (2, 3, 4, 6, 7, 8, 9)))


DIVERSE = {"resnet20-cifar10", "resnet20", "resnet32", "regnet-cifar10", "mobilenet-v2-cifar10"}


def test_released_purifier_was_made_by_its_recipe():
    recipe, folder = read_recipe("finetune_release_tiny_cifar10"), released_checkpoint(PURIFIER)
    # the chain lay in folders of its own
    places = {"output_dir": "runs/again-released", "start_share_of": "runs/again-finetune7"}
    assert follows(folder / "run.json", recipe | places)
    assert {Path(surrogate).name for surrogate in recipe["surrogates"]} == DIVERSE
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float16}
    seconds = sum(seconds_of(path) for path in folder.glob("*metrics.jsonl"))
    assert seconds < 5 * 3600
    hours = f"[{seconds / 3600:.1f} hours](checkpoints/ablation/README.md)"
    assert hours in " ".join((ROOT / "README.md").read_text().split())


def test_released_weights_lie_between_those_of_their_chain():
    # again-diverse is half of `again` and half of the trained end, 65 % of which is released, with 35 % of finetune7;
    # what is left of the released weights is then finetune7's share, which is no part of the other two
    released, half, before = (
        MAEPModel.from_pretrained(folder).state_dict()
        for folder in (
            released_checkpoint(PURIFIER),
            *(ROOT / "checkpoints" / "ablation" / name for name in ("again-diverse", "again")),
        )
    )
    ends = {name: 2 * half[name] - before[name] for name in released}
    rest = {name: (released[name] - 0.65 * ends[name]) / 0.35 for name in released}
    flat = [torch.cat([weights[name].flatten() for name in released]) for weights in (rest, before, ends)]
    assert torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0) > 0.9
    assert (flat[0] - flat[1]).norm() < (flat[0] - flat[2]).norm()  # finetune7 comes before both


@pytest.mark.parametrize(("name", "recipe", "unseen"), [*LONG_RUNS, AGAIN])
def test_long_runs_are_tabled_from_their_records(name, recipe, unseen):
    folder = ROOT / "checkpoints" / "ablation" / name
    elsewhere = {"output_dir": f"runs/again-{recipe}"} if name == "again" else {}
    recipe = read_recipe(f"{recipe}_tiny_cifar10") | elsewhere
    assert_tabled(folder, unseen)
    assert follows(folder / "run.json", recipe)
    assert {Path(surrogate).name for surrogate in recipe["surrogates"]} == {"resnet20-cifar10", "resnet20", "resnet32"}


def assert_tabled(folder: Path, unseen: set[str]) -> None:
    """A run of the ablation's README stands there as its records say, and these are of the weights beside them."""
    records, readme = read_results(folder / "results.jsonl"), (folder.parent / "README.md").read_text().splitlines()
    table = table_of(records)
    assert all(line in (folder / "results.md").read_text().splitlines() for line in table), "maep report FOLDER"
    assert all(line in readme for line in table), "ablation/README.md: paste the table of `maep report FOLDER`"
    assert not MACHINE_PATH.search((folder / "run.json").read_text() + (folder / "results.jsonl").read_text())
    assert {record["protocol"]["classifier"]["name"] for record in records} == unseen
    if (folder / "model.safetensors").is_file():
        weights = {record["protocol"]["purifier"]["fingerprint"] for record in records}
        assert weights == {fingerprint(load_purifier(folder))}, "the records are of other weights"
        name = f"checkpoints/ablation/{folder.name}"
        assert all(name in named_purifiers(record) for record in records)
        assert (folder / "README.md").read_text() == str(render_card(folder, name))


def table_of(records: list[dict]) -> list[str]:
    """The lines of the table that `maep report` makes of them."""
    return [line for line in markdown_table(records).splitlines() if line.startswith("|")]


def seconds_of(log: Path) -> float:
    """What attacks and training steps of a run took, by its log."""
    lines = [line for line in read_jsonl(log) if "attack_seconds" in line]
    return sum(line["attack_seconds"] + line["model_seconds"] for line in lines)


def test_the_whole_test_set_is_tabled_from_its_records():
    folder, readme = ROOT / "checkpoints" / "whole-test-set", (ROOT / "README.md").read_text().splitlines()
    records = read_results(folder / "results.jsonl")
    for text in ((folder / "results.md").read_text().splitlines(), readme):
        assert all(line in text for line in table_of(records)), (
            "maep report checkpoints/whole-test-set; paste its table"
        )
    places = {PURIFIER: released_checkpoint(PURIFIER)}
    for record in records:
        protocol = record["protocol"]
        assert protocol["dataset"]["n"] == 10000 and protocol["classifier"]["name"] in ("resnet56", "resnet44")
        name = protocol["purifier"]["name"]
        place = places.get(name, ROOT / "checkpoints" / "ablation" / name)
        assert protocol["purifier"]["fingerprint"] == fingerprint(load_purifier(place))
        assert str(place.relative_to(ROOT)) in named_purifiers(record)
    assert PURIFIER == records[0]["protocol"]["purifier"]["name"]
    assert not MACHINE_PATH.search((folder / "results.jsonl").read_text())


def test_all_images_of_imagenet_are_tabled_from_their_records():
    folder, readme = ROOT / "checkpoints" / "transfer" / "whole-set", (ROOT / "README.md").read_text().splitlines()
    records = read_results(folder / "results.jsonl")
    for text in ((folder / "results.md").read_text().splitlines(), readme):
        assert all(line in text for line in table_of(records)), (
            "maep report checkpoints/transfer/whole-set; paste its table"
        )
    long = ROOT / "checkpoints" / "ablation" / "lora-imagenet-900"
    names = {record["protocol"]["purifier"]["name"] for record in records}
    assert names == {PURIFIER, f"{PURIFIER}-lora-imagenet", long.name, "defence:jpeg"}
    for record in records:
        assert record["protocol"]["dataset"]["n"] == 1000 and record["perturbation"]["images"] == 916
        name = record["protocol"]["purifier"]["name"]
        assert name == "defence:jpeg" or Path(name).name in {Path(each).name for each in named_purifiers(record)}
    assert not MACHINE_PATH.search((folder / "results.jsonl").read_text())
    base = load_purifier(released_checkpoint(PURIFIER))
    load_adapter(base, long)  # refuses another base
    assert json.loads((long / "run.json").read_text())["arguments"]["loop"]["max_steps"] == 900


def test_the_longer_adapter_is_tabled_beside_the_released_one():
    checkpoints = ROOT / "checkpoints"
    places = {"the released one": checkpoints / f"{PURIFIER}-lora-imagenet",
              "lora-imagenet-900": checkpoints / "ablation" / "lora-imagenet-900"}  # fmt: skip
    columns = [("nips2017-dev", 4.0, 500), ("nips2017-dev", 4.0, 200), ("nips2017-dev", 8.0, 250),
               ("tiny-imagenet", 4.0, 500), ("cifar10", 8.0, 500)]  # fmt: skip
    readme = (checkpoints / "ablation" / "README.md").read_text().splitlines()
    images = []
    for name, folder in places.items():
        found, weights = {}, fingerprint(load_purifier(folder))
        for record in read_results(folder / "results.jsonl"):
            protocol = record["protocol"]
            assert protocol["purifier"]["fingerprint"] == weights
            if protocol["threat_model"] == "gray-box":
                found[protocol["dataset"]["name"], protocol["attack"]["eps"], protocol["dataset"]["n"]] = record
        rows = [found[column] for column in columns]
        cells = [f"{accuracy['purified_clean']['percent']:.1f} / {accuracy['purified_attacked']['percent']:.1f}"
                 for accuracy in (record["accuracy"] for record in rows)]  # fmt: skip
        assert f"| {name} | {' | '.join(cells)} |" in readme
        images.append([record["protocol"]["dataset"]["fingerprint"] for record in rows])
    assert images[0] == images[1]


def test_the_release_before_is_tabled_from_its_records():
    folder, recipe = ROOT / "checkpoints" / "ablation" / "diverse", read_recipe("finetune_diverse_tiny_cifar10")
    assert_tabled(folder, AGAIN[2] | {"resnet20-cifar10"})
    assert follows(folder / "run.json", recipe)
    assert {Path(surrogate).name for surrogate in recipe["surrogates"]} == DIVERSE
    runs = [json.loads(path.read_text()) for path in folder.glob("*run.json")]
    assert len(runs) == 10  # stage 1 and nine of stage 2


def test_the_last_recipe_again_took_less_than_five_hours():
    ablation = ROOT / "checkpoints" / "ablation"
    folder, readme = ablation / "again-diverse", (ablation / "README.md").read_text()
    recipe, run = read_recipe("finetune_diverse_tiny_cifar10"), json.loads((folder / "run.json").read_text())
    changed = {"model", "output_dir", "per_device_train_batch_size", "mixed_precision", "torch_compile"}
    assert follows(folder / "run.json", {key: value for key, value in recipe.items() if key not in changed})
    assert run["num_processes"] * run["arguments"]["loop"]["per_device_train_batch_size"] == 64
    assert_tabled(folder, AGAIN[2])
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float16}
    chain = sum(seconds_of(released_checkpoint(PURIFIER) / f"{name}_metrics.jsonl") for name in CHAIN)
    seconds = chain + seconds_of(folder / "metrics.jsonl")
    assert seconds < 5 * 3600 and f"{seconds / 3600:.1f} hours from random weights" in readme
    assert f"[{seconds / 3600:.1f} hours](checkpoints/ablation/README.md)" in (ROOT / "README.md").read_text()


def test_the_recipes_again_took_less_than_five_hours():
    folder, seconds, images = released_checkpoint(PURIFIER), 0.0, 0  # these runs' end lies in ablation/again
    again = ROOT / "checkpoints" / "ablation" / "again"
    assert (folder / "finetune9_run.json").read_text() == (again / "run.json").read_text()
    assert (folder / "finetune9_metrics.jsonl").read_text() == (again / "metrics.jsonl").read_text()
    readme = (again.parent / "README.md").read_text()
    # what two processes share, what shows the run and what keeps it
    shown = {"per_device_train_batch_size", "validation_images", "eval_steps", "save_steps", "output_dir"}
    for name in CHAIN:
        recipe, path = read_recipe(f"{name}_tiny_cifar10"), folder / f"{name}_run.json"
        assert follows(path, {key: value for key, value in recipe.items() if key not in shown})
        run = json.loads(path.read_text())
        shared = run["num_processes"] * run["arguments"]["loop"]["per_device_train_batch_size"]
        assert shared == recipe["per_device_train_batch_size"] * (2 if name == CHAIN[-1] else 1)
        assert not MACHINE_PATH.search(path.read_text())
        took, made = seconds_of(folder / f"{name}_metrics.jsonl"), recipe["max_steps"] * 64
        assert f"| `{name}` | {took / 60:.1f} | {recipe['max_steps']:,} | {made:,} |" in readme
        seconds, images = seconds + took, images + made
    assert seconds < 5 * 3600 and f"{images:,} images, {seconds / 3600:.1f} hours" in readme
    assert f"[{seconds / 3600:.1f} hours](checkpoints/ablation/README.md)" in (ROOT / "README.md").read_text()


def test_long_runs_stand_beside_each_other():
    folders = {f"`{recipe}`": ROOT / "checkpoints" / "ablation" / name for name, recipe, _ in LONG_RUNS}
    folders["the same recipes again"] = ROOT / "checkpoints" / "ablation" / "again"
    folders["the last recipe again too"] = ROOT / "checkpoints" / "ablation" / "again-diverse"
    folders["the release before"] = ROOT / "checkpoints" / "ablation" / "diverse"
    folders["the released purifier"] = released_checkpoint(PURIFIER)
    readme = (ROOT / "checkpoints" / "ablation" / "README.md").read_text().splitlines()
    for name, folder in folders.items():
        [line] = [line for line in readme if re.match(rf"\| {re.escape(name)}[ ,][^|]*\| [\d,]+ \|", line)]
        records = results(read_results(folder / "results.jsonl"))
        found = {result.classifier: result.record["accuracy"] for result in records
                 if result.attack == peers_table.MAIN_ATTACK and result.column == "gray-box"
                 and result.record["protocol"]["dataset"]["n"] <= 1000}  # fmt: skip
        clean, attacked = ([found[unseen][key]["percent"] for unseen in ("resnet56", "resnet44")]
                           for key in ("purified_clean", "purified_attacked"))  # fmt: skip
        gaps = [before - after for before, after in zip(clean, attacked, strict=True)]
        cells = [" / ".join(f"{value:.1f}" for value in pair) for pair in (clean, attacked, gaps)]
        assert [cell.strip() for cell in line.split("|")[3:-1]] == cells


def test_code_beside_the_weights_is_the_packages():
    for copy in (ROOT / "checkpoints").glob("*/*.py"):
        assert copy.read_text() == (ROOT / "maep_hf" / copy.name).read_text(), f"{copy}: copy maep_hf/{copy.name} again"
