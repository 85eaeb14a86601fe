"""Recipes and the command line: what wins, and errors that name the argument and the file."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, load_script

from maep_hf.data import DataError
from maep_hf.training import (
    DataArguments,
    LoopArguments,
    NonFiniteLossError,
    RunFolderError,
    as_groups,
    parse_arguments,
    run_script,
)
from maep_hf.training.purification import PurificationArguments
from maep_hf.training.stages import AttackArguments, ModelArguments

TYPES = (DataArguments, PurificationArguments, LoopArguments)
OTHERS = ("ablation", "disco_cifar10", "disco_ablation", "disco_guided_cifar10")  # read by tests of their own


@pytest.fixture
def recipe(tmp_path):
    """A function that writes a recipe and returns the words that name it."""

    def write(text: str) -> list[str]:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def loop_of(argv: list[str], **options) -> LoopArguments:
    return parse_arguments(*TYPES, argv=argv, **options)[2]


def refused(capsys, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(*TYPES, argv=argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_defaults_then_recipe_then_command_line(recipe):
    words = recipe("max_steps: 7\nlearning_rate: 0.5\nflip: false\n")
    data, _, loop = parse_arguments(*TYPES, argv=words)
    assert (loop.max_steps, loop.learning_rate, data.flip) == (7, 0.5, False)
    assert loop.warmup_steps == LoopArguments().warmup_steps and data.crop == DataArguments().crop
    data, _, loop = parse_arguments(*TYPES, argv=[*words, "--max_steps", "9", "--flip", "true"])
    assert (loop.max_steps, loop.learning_rate, data.flip) == (9, 0.5, True)
    assert parse_arguments(*TYPES, argv=["--no_flip"])[0].flip is False
    assert parse_arguments(*TYPES, argv=[*recipe("flip: true"), "--no_flip"])[0].flip is False


def test_both_ways_to_name_a_recipe(recipe):
    _, path = recipe("max_steps: 7")
    assert loop_of([f"--config={path}"]).max_steps == loop_of(["--config", path]).max_steps == 7
    assert loop_of([], default_recipe=Path(path)).max_steps == 7
    assert loop_of(["--config", path], default_recipe=ROOT / "nowhere.yaml").max_steps == 7


@pytest.mark.parametrize("written", ["1e-3", "1.0e-3", "0.001", "'0.001'"])
def test_floats_as_people_write_them(recipe, written):
    rate = loop_of(recipe(f"learning_rate: {written}")).learning_rate  # YAML reads 1e-3 as a string
    assert isinstance(rate, float) and rate == 1e-3


def test_an_integer_will_do_for_a_float(recipe):
    decay = loop_of(recipe("weight_decay: 1")).weight_decay
    assert isinstance(decay, float) and decay == 1


@pytest.mark.parametrize("written", ["no", "'no'", "No"])
def test_a_word_is_not_taken_for_a_switch(recipe, written, capsys):
    if written == "No":
        assert "mixed_precision='No': must be one of no, bf16" in refused(capsys, recipe("mixed_precision: No"))
    else:
        assert loop_of(recipe(f"mixed_precision: {written}")).mixed_precision == "no"
    for word, value in (("no", False), ("off", False), ("False", False), ("on", True), ("yes", True), ("'true'", True)):
        assert parse_arguments(*TYPES, argv=recipe(f"flip: {word}"))[0].flip is value
        assert parse_arguments(*TYPES, argv=[*recipe(f"flip: {word}"), "--no_flip"])[0].flip is False


def test_lists(recipe):
    def surrogates(argv):
        return parse_arguments(*TYPES, argv=argv)[1].surrogates

    assert surrogates(["--surrogates", "a", "b"]) == ["a", "b"]
    assert surrogates(recipe("surrogates: [a, b]")) == ["a", "b"]
    assert surrogates(recipe("surrogates: a")) == ["a"]
    assert surrogates([*recipe("surrogates: [a, b]"), "--surrogates", "c"]) == ["c"]
    assert len(surrogates([])) == 1


def test_null_is_for_optional_arguments(recipe, capsys):
    assert parse_arguments(*TYPES, argv=recipe("image_column: null"))[0].image_column is None
    assert "max_steps" in refused(capsys, recipe("max_steps: null"))


def test_an_empty_recipe_changes_nothing(recipe):
    assert loop_of(recipe("# only a comment\n")) == LoopArguments()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("max_step: 5", "max_step"),
        ("max_steps: many", "max_steps"),
        ("max_steps: 1.5", "max_steps"),
        ("max_steps: true", "max_steps"),
        ("max_steps: [1, 2]", "max_steps"),
        ("max_steps: {a: 1}", "max_steps"),
        ("surrogates: []", "surrogates"),
        ("flip: perhaps", "flip"),
        ("- max_steps", "name: value"),
        ("max_steps: [1", "recipe.yaml"),
    ],
)
def test_a_bad_recipe_is_refused_by_name(recipe, capsys, text, named):
    message = refused(capsys, recipe(text))
    assert named in message and "recipe.yaml" in message


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--max_steps", "0"], "max_steps=0"),
        (["--max_steps", "many"], "--max_steps"),
        (["--max_step", "5"], "--max_step"),
        (["--learning_rate", "-1"], "learning_rate=-1"),
        (["--ema_decay", "1"], "ema_decay=1"),
        (["--optimizer", "lion"], "optimizer='lion'"),
        (["--mixed_precision", "fp8"], "mixed_precision='fp8'"),
        (["--report_to", "paper"], "report_to='paper'"),
        (["--mask_ratio", "1"], "mask_ratio=1"),
        (["--guidance_weight", "-1"], "guidance_weight=-1"),
        (["--attack_labels", "none"], "attack_labels='none'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config"], "--config"),
    ],
)
def test_a_bad_word_is_refused_by_name(capsys, words, named):
    assert named in refused(capsys, words)


def test_a_tracker_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("maep_hf.training.arguments.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="report_to='trackio'.*pip install trackio"):
        LoopArguments(report_to="trackio")
    assert LoopArguments().report_to == "none"


def test_another_dataset_to_validate_on_is_streamed_too(image_folder):
    folder = str(image_folder)
    for streaming in (True, False):
        data = DataArguments(dataset=folder, validation_dataset=folder, streaming=streaming)
        assert [loaded.streaming for loaded in data.load()] == [streaming, streaming]


RECIPES = [path for path in sorted((ROOT / "train" / "configs").glob("*.yaml")) if path.stem not in OTHERS]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(path):
    purifier = (DataArguments, AttackArguments, PurificationArguments, LoopArguments)
    adapt = load_script("adapt_lora")
    kinds = {
        "pretrain": (ModelArguments, *purifier),
        "finetune": (load_script("finetune").FinetuneArguments, *purifier),
        "classifier": (load_script("train_classifier").ClassifierArguments, DataArguments, LoopArguments),
        "adapt": (adapt.AdaptArguments, adapt.LoraArguments, DataArguments, AttackArguments, adapt.UnlabelledArguments,
                  LoopArguments),
    }  # fmt: skip
    kind = next((name for name in kinds if name in path.stem), "classifier" if "resnet" in path.stem else None)
    assert kind, f"{path.name}: the name must say which script it is for"
    groups = parse_arguments(*kinds[kind], argv=["--config", str(path)])
    assert "max_steps" in yaml.safe_load(path.read_text())
    if kind == "pretrain":
        assert groups[0].config(mask_ratio=groups[3].mask_ratio).mask_ratio == groups[3].mask_ratio


@pytest.mark.parametrize("name", ["pretrain", "finetune", "train_classifier", "adapt_lora"])
def test_scripts_explain_themselves(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        load_script(name).main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "--output_dir" in shown and "--dataset" in shown and ".yaml" in shown


def test_sizes_and_fields_of_a_new_model():
    arguments = ModelArguments(size="small", patch_size=8, local_branch_layers=0, residual=False)
    config = arguments.config(mask_ratio=0.25)
    assert (config.hidden_size, config.patch_size, config.local_branch_layers) == (384, 8, 0)
    assert not config.residual and config.mask_ratio == 0.25
    with pytest.raises(ValueError, match="size='huge'"):
        ModelArguments(size="huge").config()


def test_groups_are_plain_values():
    @dataclass
    class Some:
        names: list[str] = field(default_factory=lambda: ["a"])

    assert as_groups(loop=LoopArguments(seed=3))["loop"]["seed"] == 3
    assert as_groups(some=Some()) == {"some": {"names": ["a"]}}


@pytest.mark.parametrize("kind", [DataError, RunFolderError, NonFiniteLossError])
def test_scripts_end_with_one_line(kind):
    def main():
        raise kind("what to do")

    with pytest.raises(SystemExit, match="error: what to do"):
        run_script(main)


def test_scripts_do_not_hide_bugs():
    def main():
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        run_script(main)
