"""The ablation runner: rows become recipes, are trained and measured once each, resume, and end in one table."""

import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, load_script
from PIL import Image
from running import Interrupted, _raise, reset_accelerate, stop_at, words
from safetensors.torch import load_file, save_file

from maep_hf import MAEPConfig
from maep_hf.records import read_jsonl
from maep_hf.training.stages import ModelArguments

ablation = load_script("ablation")
rows_module, table_module = sys.modules["ablation_rows"], sys.modules["ablation_table"]
chart_module = sys.modules["ablation_chart"]
CONSOLE = ablation.Console(quiet=True)
MODEL = {"size": "tiny", "patch_size": 8, "local_branch_layers": 1}
CLASSIFIER = "checkpoints/resnet20-cifar10"


@pytest.fixture
def start(tmp_path):
    """A function that runs the ablation on the embedded images: the table's rows; `rows` of the YAML can be given."""
    table = {
        "stage_1_share": 0.5,
        "both": {"surrogates": [CLASSIFIER], "attack_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1,
                 "validation_images": 2},
        "pretrain": MODEL | {"mask_ratio": 0.5},
        "finetune": {"mask_ratio": 0.0, "guidance_weight": 0.05, "purification_loss_weight": 1.0},
        "rows": {
            "reference": {"group": "reference", "change": "as it is"},
            "guidance-0": {"group": "guidance", "change": "none", "finetune": {"guidance_weight": 0.0}},
            "broken": {"group": "surrogates", "change": "one that is not there", "both": {"surrogates": ["/nowhere"]}},
        },
    }  # fmt: skip

    def run(out="out", **changed):
        (tmp_path / "table.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
        usual = {"table": tmp_path / "table.yaml", "output_dir": tmp_path / out, "rows": "reference,guidance-0",
                 "dataset": "embedded:cifar10", "max_steps": 2, "images": 6, "attacks": "pgd-2,fgsm", "cpu_threads": 1,
                 "classifier": CLASSIFIER, "device": "cpu"}  # fmt: skip
        reset_accelerate()
        return ablation.main(words(**usual | changed))

    run.folder, run.table = tmp_path / "out", table
    return run


def test_two_rows_are_trained_measured_and_tabulated(start, capsys):
    first, second = start()
    assert [first["row"], second["row"]] == ["reference", "guidance-0"] and first["seeds"] == [0]
    records = read_jsonl(start.folder / "rows.jsonl")
    assert [record["key"] for record in records] == ["reference-seed0", "guidance-0-seed0"]
    for record, line in zip(records, (first, second), strict=True):
        attacks = record["percent"]["attacks"]
        assert list(attacks) == ["pgd-2", "fgsm"] and record["percent"]["worst"] == min(attacks.values())
        assert line["worst"]["mean"] == record["percent"]["worst"] and record["images"] == 4
        assert record["training_seconds"] > 0 and 0 < record["attack_time_share"] < 1
        assert [stage["script"] for stage in record["training"]] == ["pretrain", "finetune"]
        assert [stage["max_steps"] for stage in record["training"]] == [1, 1]
    # one set of attacked images for both rows, and one stage 1, whose arguments are the same
    assert len(list((start.folder / "evaluation" / "attacked").iterdir())) == 2
    assert len([path for path in (start.folder / "stage1").iterdir() if path.is_dir()]) == 1
    weights = [load_file(start.folder / f"{name}-seed0" / "model.safetensors") for name in ("reference", "guidance-0")]
    assert any(not weights[0][key].equal(weights[1][key]) for key in weights[0])
    stored = [json.loads(line) for line in (start.folder / "table.jsonl").read_text().splitlines()]
    assert stored == [first, second]
    text = (start.folder / "table.md").read_text()
    assert "| guidance | guidance-0 | none |" in text and "gray-box" in text and "first 6 images" in text
    recipe = start.folder / "guidance-0-seed0.yaml"  # one command repeats a stage
    assert yaml.safe_load(recipe.read_text())["guidance_weight"] == 0.0 and "finetune.py --config" in recipe.read_text()

    picture = Image.open(start.folder / "table.png")
    assert min(picture.size) > 200 and len(picture.convert("L").getcolors()) > 20
    chart_module.write_chart(start.folder / "other.png", [first | {"clean": table_module.spread([3.0])}, second])
    assert Image.open(start.folder / "other.png").tobytes() != picture.tobytes()
    chart_module.write_chart(start.folder / "other.png", [])
    assert not (start.folder / "other.png").exists()
    for name in ("table.md", "table.jsonl", "table.png"):
        (start.folder / name).unlink()
    assert start(tabulate=True, rows="all") == [first, second]
    assert (start.folder / "table.md").read_text() == text
    assert Image.open(start.folder / "table.png").tobytes() == picture.tobytes()

    capsys.readouterr()
    changed = {path: path.stat().st_mtime_ns for path in start.folder.rglob("*.safetensors")}
    assert start() == [first, second]
    assert capsys.readouterr().out.count("finished before") == 2
    assert {path: path.stat().st_mtime_ns for path in start.folder.rglob("*.safetensors")} == changed


def test_an_interrupted_row_goes_on_and_ends_as_if_it_had_not_been(start):
    del start.table["rows"]["guidance-0"]
    start.table["both"]["ema_decay"] = 0.5
    (whole,) = start("whole", rows="reference", max_steps=4)
    restore = stop_at("log", 2, how=_raise)
    try:
        with pytest.raises(Interrupted):
            start(rows="reference", max_steps=4)
    finally:
        restore()
    assert not (start.folder / "rows.jsonl").exists()
    (resumed,) = start(rows="reference", max_steps=4)
    for name in ("clean", "worst", "attacks"):
        assert resumed[name] == whole[name]
    one, other = (load_file(start.folder.parent / name / "reference-seed0" / "model.safetensors")
                  for name in ("whole", "out"))  # fmt: skip
    assert all(one[key].equal(other[key]) for key in one)


def test_a_row_of_one_stage_is_trained_in_its_own_folder(start):
    start.table["rows"]["whole"] = {"group": "stages", "change": "no stage 2", "stage_1_share": 1}
    (line,) = start(rows="whole")
    (record,) = read_jsonl(start.folder / "rows.jsonl")
    assert [stage["script"] for stage in record["training"]] == ["pretrain"] and record["images"] == 4
    assert line["row"] == "whole" and (start.folder / "whole-seed0" / "model.safetensors").is_file()
    assert not (start.folder / "stage1").exists()


def test_a_row_that_fails_is_told_and_tried_again(start):
    with pytest.raises(ValueError, match="1 of 2 failed: broken-seed0"):
        start(rows="broken,reference")
    failed, measured = read_jsonl(start.folder / "rows.jsonl")
    assert "/nowhere" in failed["failed"] and measured["row"] == "reference"
    assert "- broken, seed 0: " in (start.folder / "table.md").read_text()
    start.table["rows"]["broken"]["both"] = {}  # the same folder, put right
    table = start(rows="broken,reference")
    assert [row["row"] for row in table] == ["reference", "broken"]
    assert "Not measured" not in (start.folder / "table.md").read_text()


def test_a_table_has_one_protocol(start):
    start()
    (again,) = start(rows="reference", attacks="fgsm")
    assert list(again["attacks"]) == ["fgsm"]
    (line,) = start(tabulate=True, rows="all")
    assert line == again and "guidance-0" not in (start.folder / "table.md").read_text()


def test_no_table_without_records(start):
    with pytest.raises(ValueError, match="output_dir: there are no records"):
        start(tabulate=True)


def test_one_table_has_one_budget(start):
    start(rows="reference")
    with pytest.raises(ValueError, match="max_steps: 2 there, 3 now.*another output_dir"):
        start(rows="guidance-0", max_steps=3)
    start.table["finetune"]["guidance_weight"] = 0.3
    with pytest.raises(ValueError, match="finetune.guidance_weight: 0.05 there, 0.3 now"):
        start(rows="reference")


def test_what_finished_before_its_row_was_changed_is_not_taken_for_it(start, monkeypatch):
    def broken(*_):
        raise OSError("no purifier")

    with monkeypatch.context() as patch:  # a row that failed, or was killed, after its training
        patch.setattr(ablation.Judge, "__call__", broken)
        with pytest.raises(ValueError, match="reference-seed0"):
            start(rows="reference")
    start.table["finetune"]["guidance_weight"] = 0.3
    refusal = "reference-seed0 holds a finished stage of other arguments .finetune.guidance_weight: 0.05 there, 0.3 now"
    with pytest.raises(ValueError, match=refusal):
        start(rows="reference")
    start.table["finetune"]["guidance_weight"] = 0.05
    start.table["pretrain"]["mask_ratio"] = 0.25
    with pytest.raises(ValueError, match="finetune.model: '.*-seed0' there"):
        start(rows="reference")
    start.table["pretrain"]["mask_ratio"] = 0.5
    (start.folder / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match="pretrain.max_steps: 1 there, 2 now|finetune.max_steps: 1 there, 2 now"):
        start(rows="reference", max_steps=4)
    moved = start.folder.rename(start.folder.with_name("moved"))
    before = (moved / "reference-seed0" / "model.safetensors").stat().st_mtime_ns
    (line,) = start("moved", rows="reference")
    assert line["row"] == "reference"
    assert (moved / "reference-seed0" / "model.safetensors").stat().st_mtime_ns == before


def test_other_attacks_measure_finished_rows_again_without_training(start):
    start(rows="reference")
    before = (start.folder / "reference-seed0" / "model.safetensors").stat().st_mtime_ns
    (line,) = start(rows="reference", attacks="fgsm")
    assert list(line["attacks"]) == ["fgsm"]
    assert (start.folder / "reference-seed0" / "model.safetensors").stat().st_mtime_ns == before


def test_another_classifier_of_the_same_name_is_another_protocol(start):
    start(rows="reference")
    (record,) = read_jsonl(start.folder / "rows.jsonl")
    folder = start.folder.parent / Path(CLASSIFIER).name
    shutil.copytree(CLASSIFIER, folder)
    path = folder / "model.safetensors"
    save_file({name: 1.1 * value for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    start(rows="reference", classifier=folder)
    (again,) = read_jsonl(start.folder / "rows.jsonl")
    marks = [each["evaluation"].pop("classifier_fingerprint") for each in (record, again)]
    assert record["evaluation"] == again["evaluation"] and marks[0] != marks[1]
    assert not ablation.same_protocol(*({"classifier_fingerprint": mark} for mark in marks))
    assert ablation.same_protocol(record["evaluation"], again["evaluation"] | {"classifier_fingerprint": marks[1]})


def test_a_row_in_other_hands_is_passed_over(start, capsys):
    with ablation.held(start.folder / "reference-seed0"):
        assert start(rows="reference") == []
    assert "another ablation is at it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": "referense"}, "there is no referense; there are: reference, guidance-0"),
        ({"rows": ","}, "none was named"),
        ({"max_steps": 1}, "needs at least 2"),
        ({"attacks": "pgdd"}, "pgdd"),
        ({"classifier": "/nowhere"}, "/nowhere"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(start, changed, message):
    with pytest.raises((ValueError, OSError), match=message):
        start(**changed)
    assert not list(start.folder.rglob("run.json"))


@pytest.mark.parametrize("words", [["--seeds", "0,a"], ["--seeds", "-1"], ["--images", "0"], ["--attacks", ","]])
def test_arguments_out_of_range(words, capsys):
    with pytest.raises(SystemExit):
        ablation.main(words)
    assert words[0].strip("-") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"finetune": {"seed": 3}}, "seed is given by the ablation's command line"),
        ({"finetune": {"guidance_wait": 3}}, "no argument finetune.guidance_wait"),
        ({"both": {"eps_min": 20.0}}, "eps_min <= eps_max"),
        ({"pretrain": {"patch_size": 5}}, "patch_size=5 must divide"),
        ({"finetune": {"guidance_weight": -1}}, "finetune does not take its arguments"),
        ({"stage_1_share": 0}, "stage_1_share=0 must be more than 0"),
        ({"pre-train": {}}, "pre-train is not known"),
        ({"finetune": 3}, "finetune must be a mapping"),
    ],
)
def test_a_wrong_row_is_named(start, row, message):
    start.table["rows"] = {"wrong": row}
    with pytest.raises(ValueError, match=f"(?s)row wrong.*{message}"):
        start(rows="wrong")
    assert not list(start.folder.rglob("run.json"))


def test_arguments_are_those_that_the_scripts_take():
    types = rows_module.argument_types("pretrain")
    assert ModelArguments in types and len(types) >= 5
    assert "FinetuneArguments" in {kind.__name__ for kind in rows_module.argument_types("finetune")}
    assert rows_module.SCRIPTS["pretrain"].parse_arguments is ablation.parse_arguments  # put back


def test_of_all_rows_those_without_an_argument_are_passed_over(start, capsys):
    start.table["rows"] = {"wider": {"pretrain": {"no_such_width": 1}}, "reference": {}}
    assert [row["row"] for row in start(rows="all")] == ["reference"]
    assert "passed over: row wider" in capsys.readouterr().out


def test_every_row_of_the_file_can_be_run(tmp_path):
    file = rows_module.Ablation.read(ROOT / "train" / "configs" / "ablation.yaml")
    assert next(iter(file.rows)) == table_module.REFERENCE
    model_fields = {entry.name for entry in fields(MAEPConfig)}
    for row in file.rows.values():
        missing = file.missing(row)  # widths and depths, until the scripts take them
        assert all(name.startswith("pretrain.") and name.split(".")[1] in model_fields for name in missing)
        recipes = file.recipes(row, 800, 0, "data/cifar10")
        assert sum(recipe.values["max_steps"] for recipe in recipes) == 800
        assert len({recipe.values["seed"] for recipe in recipes}) == len(recipes)
        for recipe in recipes if not missing else ():
            ablation.check_recipe(row, recipe, tmp_path)
    reference = file.recipes(file.rows["reference"], 800, 0, "")
    assert [recipe.values["max_steps"] for recipe in reference] == [160, 640]
    assert [recipe.values["warmup_steps"] for recipe in reference] == [8, 32]
    for row in file.rows.values():  # a row that changes nothing would be a second reference
        changed = file.recipes(row, 800, 0, "")
        assert row.name == "reference" or [(r.script, r.values) for r in changed] != [
            (r.script, r.values) for r in reference
        ]


def made_up(row: str, seed: int, clean: float, fgsm: float, pgd: float) -> dict:
    return {
        "key": f"{row}-seed{seed}", "row": row, "seed": seed, "group": "g", "change": "c", "parameters": 1_500_000,
        "percent": {"clean": clean, "attacks": {"fgsm": fgsm, "pgd": pgd}, "worst": min(fgsm, pgd)},
        "undefended": {"clean": 94.0, "attacks": {"fgsm": 20.0, "pgd": 0.0}}, "training_seconds": 90.0, "images": 640,
        "attack_time_share": 0.4,
        "evaluation": {"eps": 8.0, "classifier": "c56", "dataset": {"n": 500, "name": "cifar10", "split": "test"}},
    }  # fmt: skip


def test_spread_and_differences_over_seeds():
    records = [
        made_up("other", 0, 90, 80, 70),
        made_up("reference", 1, 93, 85, 80),
        made_up("reference", 0, 91, 84, 76),
    ]
    records += [made_up("other", 1, 91, 60, 75), {"row": "lost", "seed": 0, "failed": "OSError: gone"}]
    first, second = table_module.summarise(records, ["reference", "never run"])
    assert (first["row"], second["row"]) == ("reference", "other")
    assert first["worst"]["mean"] == 78 and first["worst"]["sd"] == pytest.approx(8**0.5)
    assert (first["worst"]["min"], first["worst"]["max"]) == (76, 80) and first["worst_against_reference"] is None
    # worst of each seed (70 and 60), not of the means; differences seed by seed
    assert second["worst"]["values"] == [70, 60] and second["worst_against_reference"]["values"] == [-6, -20]
    assert second["clean_against_reference"]["mean"] == -1.5 and second["worst_attack"] == "fgsm"
    text = table_module.markdown([first, second], records)
    assert (
        "| 78.0 (76.0 to 80.0) |" in text
        and "| -13.0 (-20.0 to -6.0) |" in text
        and "| 1.5 | 40 |" in text
        and "- lost, seed 0" in text
    )
    header, _, _, other = (
        line.removeprefix("| ").removesuffix(" |").split(" | ") for line in text.splitlines() if line.startswith("|")
    )
    cells = dict(zip(header, other, strict=True))
    figures = {name: cells[name].split(" (")[0] for name in ("clean", "fgsm", "pgd", "worst")}
    assert figures == {"clean": "90.5", "fgsm": "70.0", "pgd": "72.5", "worst": "65.0"}
    assert cells["worst - reference"].startswith("-13.0") and cells["clean - reference"].startswith("-1.5")
    assert (cells["million weights"], cells["minutes"], cells["attack, % of them"]) == ("1.50", "1.5", "40")
    assert cells["seeds"] == "0, 1"
    (single,) = table_module.summarise(records[:1], [])
    assert single["worst"]["sd"] is None and table_module.shown(single["worst"]) == "70.0"


def test_the_table_says_every_budget_that_rows_had():
    records = [made_up("reference", 0, 91, 84, 76), made_up("other", 0, 90, 80, 70) | {"images": 12_800}]
    assert "trained from scratch on 640 or 12,800 images" in table_module.markdown(
        table_module.summarise(records, []), records
    )


def test_seeds_that_one_of_two_rows_lacks_are_in_no_difference():
    records = [made_up("reference", seed, 91, 84, 76) for seed in (0, 2)]
    records += [made_up("other", 0, 90, 80, 70), made_up("other", 1, 50, 40, 30)]
    _, other = table_module.summarise(records, [])
    assert other["clean"]["values"] == [90, 50] and other["clean_against_reference"]["values"] == [-1]


def test_the_table_is_written_whole(tmp_path):
    (tmp_path / "table.md").write_text("old")
    table_module.write_table(tmp_path, [made_up("reference", 0, 91, 84, 76)], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.jsonl", "table.md"]
    assert "undefended: clean 94.0" in (tmp_path / "table.md").read_text().lower()


def test_its_folder_may_be_in_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ablation.AblationArguments(output_dir="~/rows").output_dir == str(tmp_path / "rows")
