"""`maep evaluate`, `maep report` and `maep attacks`: what is combined, what is written, what is refused."""

import os
import subprocess
import sys
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import SIZE, image_rows
from typer.main import get_command
from typer.testing import CliRunner

from maep_hf import cli, records
from maep_hf.checkpoints import CheckpointError
from maep_hf.evaluation import run
from maep_hf.evaluation.report import report
from maep_hf.evaluation.run import EvaluationArguments, make_attacks, parse_options
from maep_hf.records import append_jsonl, describe_environment, read_jsonl


def invoke(*words) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_help_names_every_kind_of_model():
    options = {option.name: option.help for option in get_command(cli.app).commands["evaluate"].params}
    assert all(kind in options["classifier"] for kind in ("timm:NAME", "python:MODULE:FUNCTION"))
    assert all(kind in options["purifier"] for kind in ("defence:NAME", "python:MODULE:FUNCTION", "none"))


@pytest.fixture
def measured(classifier_folder, purifier_folder, image_folder, tmp_path):
    words = ["evaluate", "--classifier", classifier_folder, "--dataset", image_folder, "--image-size", SIZE]
    words += ["--purifier", purifier_folder, "--purifier", "defence:bit-depth", "--purifier", "none", "--device", "cpu"]
    words += ["--attack", "fgsm", "--attack", "pgd:L2:1", "--attack-option", "pgd.steps=2", "--eps", 4, "--eps", 8]
    return words, tmp_path / "out"


def test_every_combination_is_one_record(measured):
    words, out = measured
    code, output = invoke(*words, "--out", out)
    assert code == 0, output
    records = read_jsonl(out / "results.jsonl")
    assert len(records) == 3 * 3  # purifiers x (two radii of fgsm, one of pgd)
    attacks = {tuple(record["protocol"]["attack"][key] for key in ("attack", "norm", "eps")) for record in records}
    assert attacks == {("fgsm", "Linf", 4), ("fgsm", "Linf", 8), ("pgd", "L2", 1)}
    assert {record["protocol"]["attack"]["steps"] for record in records if "pgd" in str(record)} >= {2}
    names = {entry.name for entry in out.iterdir()}
    assert names >= {"results.md", "results.csv", "accuracy_against_eps.png", "attacks.png", "pictures"}
    assert len(list((out / "pictures").glob("*.png"))) == 9
    assert "gray-box" in (out / "results.md").read_text() and "bit-depth" in output
    code, output = invoke(*words, "--out", out)
    assert code == 0 and output.count("in results.jsonl already") == 9
    assert len(read_jsonl(out / "results.jsonl")) == 9


def test_report_rebuilds_tables_from_records(measured, tmp_path):
    words, out = measured
    invoke(*words, "--out", out)
    code, output = invoke("report", out, "--out", tmp_path / "again")
    assert code == 0, output
    for name in ("results.md", "results.csv"):
        assert (tmp_path / "again" / name).read_text() == (out / name).read_text()
    code, output = invoke("report", tmp_path / "nothing")
    assert code == 1 and "error:" in output


def test_every_threat_model_in_one_call(classifier_folder, purifier_folder, image_folder, tmp_path):
    words = ["evaluate", "--classifier", classifier_folder, "--dataset", image_folder, "--image-size", SIZE]
    for name in ("gray-box", "bpda", "white-box", "black-box", "transfer"):
        words += ["--threat-model", name]
    words += ["--purifier", purifier_folder, "--attack", "fgsm", "--attack", "square", "--attack-option", "n_queries=3"]
    words += ["--source-classifier", classifier_folder, "--eps", 8, "--attack", "jpeg", "--check-images", 10]
    code, output = invoke(*words, "--device", "cpu", "--out", tmp_path)
    assert code == 0 and "left out FGSM" in output and "FAILED images" in output, output
    records = read_jsonl(tmp_path / "results.jsonl")
    assert len(records) == 5 * 3 - 1
    assert all((record["protocol"]["source"] is None) == (record["protocol"]["threat_model"] != "transfer")
               for record in records)  # fmt: skip


def test_two_evaluations_may_write_into_one_folder(tmp_path):
    def write(first):
        for index in range(first, first + 20):
            append_jsonl(tmp_path / "results.jsonl", {"key": index})

    threads = [Thread(target=write, args=(100 * number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_jsonl(tmp_path / "results.jsonl")) == 60


def test_so_may_two_processes_of_other_temporary_folders(tmp_path):
    code = ("import sys; from pathlib import Path; from maep_hf.records import append_jsonl\n"
            "for index in range(60): append_jsonl(Path(sys.argv[1]), {'key': sys.argv[2] + str(index)})")  # fmt: skip
    processes = []
    for name in "ab":
        (tmp_path / name).mkdir()
        words = [sys.executable, "-c", code, str(tmp_path / "out/results.jsonl"), name]
        processes.append(subprocess.Popen(words, env=os.environ | {"TMPDIR": str(tmp_path / name)}))
    assert [process.wait() for process in processes] == [0, 0]
    assert len(read_jsonl(tmp_path / "out/results.jsonl")) == 120
    assert os.listdir(tmp_path / "out") == ["results.jsonl"] and not os.listdir(tmp_path / "a")  # no lock stays behind


def test_so_may_another_user(tmp_path):
    if os.getuid() != 0:
        pytest.skip("only root becomes another user")
    os.chmod(tmp_path, 0o777)
    append_jsonl(tmp_path / "results.jsonl", {"key": "first"})
    os.chmod(tmp_path / "results.jsonl", 0o644)
    code = ("import os; from pathlib import Path; from maep_hf.records import append_jsonl\n"
            "os.setuid(65534); append_jsonl(Path('results.jsonl'), {'key': 'second'})")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert [record["key"] for record in read_jsonl(tmp_path / "results.jsonl")] == ["first", "second"]


def test_a_disk_without_locks_or_a_full_one(tmp_path, monkeypatch, caplog):
    def fails(*_):
        raise OSError(error)

    path, error = tmp_path / "results.jsonl", "no space left"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=error):
        patch.setattr(records, "_replace", fails)
        append_jsonl(path, {"key": 0})
    assert not path.exists()  # nor an empty one, which would be an evaluation without records
    error = "no locks available"
    monkeypatch.setattr("fcntl.flock", fails)
    append_jsonl(path, {"key": 1})
    append_jsonl(path, {"key": 2})
    assert read_jsonl(path) == [{"key": 1}, {"key": 2}]
    assert caplog.text.count(f"{path} cannot be locked (OSError: {error})") == 1


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module in the working directory with functions that make purifiers, and some that do not."""
    (tmp_path / "own_defence.py").write_text(
        "import torch\n"
        "class Peer:\n"
        "    def purify(self, pixels): return pixels\n"
        "def peer(): return Peer()\n"
        "class Scale(torch.nn.Module):\n"
        "    def __init__(self, factor): super().__init__(); self.factor = factor\n"
        "    def forward(self, pixels): return pixels * self.factor\n"
        "def scale(factor='1'): return Scale(float(factor))\n"
        "def nothing(): return 3\n"
        "value = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "python:own_defence"
    sys.modules.pop("own_defence", None)


def test_a_purifier_from_a_function(own_module, classifier_folder, image_folder, tmp_path):
    words = ["evaluate", "--classifier", classifier_folder, "--dataset", image_folder, "--image-size", SIZE]
    words += ["--purifier", f"{own_module}:scale", "--purifier", f"{own_module}:scale:0", "--device", "cpu"]
    before = list(sys.path)
    code, output = invoke(*words, "--attack", "fgsm", "--out", tmp_path / "out")
    assert code == 0 and sys.path == before, output
    same, black = read_jsonl(tmp_path / "out" / "results.jsonl")
    assert (same["protocol"]["purifier"]["name"], black["protocol"]["purifier"]["name"]) == ("scale", "0")
    assert same["protocol"]["purifier"]["fingerprint"] != black["protocol"]["purifier"]["fingerprint"]
    assert same["accuracy"]["purified_attacked"]["correct"] == same["accuracy"]["attacked"]["correct"]
    assert black["psnr_db"]["purified_clean"] < 20 < same["psnr_db"]["purified_clean"]


def test_an_argument_may_have_colons_and_a_folder_is_named_by_its_last_part(own_module):
    with pytest.raises(CheckpointError, match="could not convert string to float: '1:2'"):
        run.python_purifier(f"{own_module}:scale:1:2")
    assert run._short("python:some.module:load:/some/where/disco") == "disco"
    assert run._short("python:some.module:load:/some/where/dense-1.5.pth.tar") == "dense-1.5"


@pytest.mark.parametrize(
    ("name", "short"),
    [("/some/where/gone", "gone"), ("~/mine", "mine"), ("./mine", "mine"), ("checkpoints/gone", "gone"),
     ("google/vit", "google/vit"), ("timm:resnet18", "resnet18"), ("defence:jpeg", "defence:jpeg")],
)  # fmt: skip
def test_a_name_in_a_record_says_nothing_of_the_machine(name, short):
    assert run._short(name) == short


@pytest.mark.parametrize("purified", [True, False])
def test_a_picture_shows_the_difference_of_the_last_row_to_the_clean_images(tmp_path, monkeypatch, purified):
    grids = []
    monkeypatch.setattr(run, "image_grid", lambda rows, path, title: grids.append((rows, path)))
    shades = {"clean": 0.5, "attacked": 0.52} | ({"purified": 0.49} if purified else {})
    images = {name: torch.full((3, 3, 4, 4), shade) for name, shade in shades.items()}
    record = {"key": "k", "protocol": {"purifier": None, "classifier": {"name": "c"}, "threat_model": "gray-box",
              "attack": {"name": "PGD", "norm": "Linf", "eps": 8.0}}}  # fmt: skip
    run._picture(SimpleNamespace(images=images, record=record), tmp_path, count=2)
    ((rows, path),) = grids
    label, difference = list(rows.items())[-1]
    assert list(rows)[:-1] == list(shades) and all(len(row) == 2 for row in rows.values())
    assert label.startswith("purified − clean" if purified else "attacked − clean") and path.name == "k.png"
    torch.testing.assert_close(difference, torch.full((2, 3, 4, 4), 0.5 + 8 * (-0.01 if purified else 0.02)))


def test_random_masks_are_measured_as_random(classifier_folder, purifier_folder, image_folder, tmp_path):
    words = ["evaluate", "--classifier", classifier_folder, "--dataset", image_folder, "--image-size", SIZE]
    words += ["--purifier", purifier_folder, "--random-mask-ratio", 0.5, "--draws", 2, "--threat-model", "white-box"]
    words += ["--attack", "pgd", "--attack-option", "steps=1", "--eot-samples", 2, "--no-checks", "--passes", 3]
    code, output = invoke(*words, "--device", "cpu", "--out", tmp_path)
    assert code == 0, output
    (record,) = read_jsonl(tmp_path / "results.jsonl")
    purifier = record["protocol"]["purifier"]
    assert purifier["randomised"] and purifier["options"]["mask_ratio"] == 0.5 and record["protocol"]["passes"] == 3
    assert record["protocol"]["attack"]["eot_samples"] == 2
    assert "not checked" in (tmp_path / "results.md").read_text()


def test_another_scale_is_another_purifier_in_the_record(own_module, classifier_folder, image_folder, tmp_path):
    words = ["evaluate", "--classifier", classifier_folder, "--dataset", image_folder, "--image-size", SIZE]
    words += ["--purifier", f"{own_module}:scale:0.5", "--attack", "fgsm", "--device", "cpu", "--out", tmp_path / "out"]
    for more in ([], ["--scale", 0.5]):
        code, output = invoke(*words, *more)
        assert code == 0, output
    plain, rescaled = (record["protocol"]["purifier"] for record in read_jsonl(tmp_path / "out" / "results.jsonl"))
    assert rescaled["options"]["scale"] == 0.5 and "scale" not in plain["options"]
    assert rescaled["name"] == plain["name"] and rescaled["fingerprint"] != plain["fingerprint"]


def test_windows_are_for_the_purifiers_that_have_them(
    own_module, classifier_folder, purifier_folder, image_folder, tmp_path
):
    words = ["evaluate", "--classifier", classifier_folder, "--dataset", image_folder, "--image-size", SIZE + 4]
    words += ["--purifier", purifier_folder, "--purifier", f"{own_module}:peer", "--purifier", "defence:bit-depth"]
    words += ["--purifier", "none", "--overlap", 0.5, "--attack", "fgsm", "--device", "cpu"]
    for scale in (1, 0.9):
        code, output = invoke(*words, "--scale", scale, "--out", tmp_path / str(scale))
        assert code == 0, output
        purifiers = [record["protocol"]["purifier"] for record in read_jsonl(tmp_path / str(scale) / "results.jsonl")]
        assert [purifier and purifier["options"].get("overlap") for purifier in purifiers] == [0.5, None, None, None]


def test_strength_is_of_the_protocol(classifier_folder, purifier_folder, image_folder, tmp_path):
    words = ["evaluate", "--classifier", classifier_folder, "--purifier", purifier_folder, "--dataset", image_folder]
    words += ["--attack", "fgsm", "--device", "cpu", "--out", tmp_path]
    for strength in ([], ["--strength", 0], ["--strength", 2]):
        code, output = invoke(*words, *strength)
        assert code == 0, output
    plain, none, double = read_jsonl(tmp_path / "results.jsonl")
    options = [record["protocol"]["purifier"]["options"] for record in (plain, none, double)]
    assert options == [{}, {"strength": 0.0}, {"strength": 2.0}]
    assert none["accuracy"]["purified_clean"]["correct"] == none["accuracy"]["clean"]["correct"]
    psnr = [record["psnr_db"]["purified_clean"] for record in (plain, none, double)]
    assert psnr[2] < psnr[0] < psnr[1] == 100  # dB, the most that is told


def test_the_purifier_of_a_source_has_the_same_windows(classifier_folder, purifier_folder, image_folder, tmp_path):
    words = ["evaluate", "--classifier", classifier_folder, "--dataset", image_folder, "--image-size", SIZE + 4]
    words += ["--source-classifier", classifier_folder, "--source-purifier", purifier_folder, "--attack", "pgd"]
    words += ["--attack-option", "steps=2", "--device", "cpu", "--no-checks", "--out", tmp_path, "--purifier"]
    for threat_models, windows in ((["white-box", "transfer"], ["--overlap", 0.75]), (["transfer"], [])):
        given = [word for name in threat_models for word in ("--threat-model", name)]
        code, output = invoke(*words, purifier_folder, *given, *windows)
        assert code == 0, output
    white_box, transfer, plain = read_jsonl(tmp_path / "results.jsonl")
    for figures in ("accuracy", "psnr_db"):  # made on the pipeline itself
        assert transfer[figures] == white_box[figures]
    sources = [record["protocol"]["source"] for record in (transfer, plain)]
    assert sources[0]["options"] == {"overlap": 0.75} and "options" not in sources[1]
    assert sources[0]["fingerprint"] != sources[1]["fingerprint"]
    code, output = invoke(*words, "none", "--threat-model", "transfer", "--overlap", 0.75)  # its source alone has it
    assert code == 0, output


def test_every_option_arrives_in_the_evaluation(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(run, "run_evaluation", given.append)
    expected = {
        "purifiers": ["none", "defence:jpeg"], "classifiers": ["a/b", "timm:c"], "dataset": "d", "split": "train[:5]",
        "dataset_config": "f", "image_column": "g", "label_column": "h", "max_images": 11, "image_size": 12,
        "threat_models": ["bpda", "transfer"], "attacks": ["pgd", "square:L2"], "norm": "L2", "eps": [0.5, 1.0],
        "attack_options": {"steps": 13, "pgd.step_size": 0.25}, "seed": 14, "batch_size": 15, "passes": 16,
        "random_mask_ratio": 0.25, "draws": 17, "eot_samples": 18, "mode": "interpolate", "overlap": 0.75,
        "strength": 1.25, "scale": 0.5, "source_classifier": "i/j", "source_purifier": "k/l", "checks": False,
        "check_images": 19, "device": "cpu", "out": tmp_path,
    }  # fmt: skip
    words = ["--no-checks", "--attack-option", "steps=13", "--attack-option", "pgd.step_size=0.25"]
    for name, value in expected.items():
        if name not in ("checks", "attack_options"):
            singular = name.removesuffix("s") if isinstance(value, list) and name != "eps" else name
            for each in value if isinstance(value, list) else [value]:
                words += [f"--{singular.replace('_', '-')}", each]
    code, output = invoke("evaluate", *words)
    assert code == 0 and given == [EvaluationArguments(**expected)], output
    assert set(expected) == set(vars(given[0]))
    code, output = invoke("evaluate")
    assert code == 0 and given[1] == EvaluationArguments(out=given[1].out) and str(given[1].out) == "evaluation"


def test_what_an_evaluation_is_asked_for_reaches_the_benchmark(
    classifier_folder, purifier_folder, image_folder, tmp_path, monkeypatch
):
    calls, benchmark = [], run.benchmark
    monkeypatch.setattr(run, "benchmark", lambda *args, **options: calls.append(options) or benchmark(*args, **options))
    args = {"seed": 3, "batch_size": 4, "passes": 2, "check_images": 10, "checks": False, "random_mask_ratio": 0.5}
    (record,) = run.run_evaluation(
        EvaluationArguments(
            [str(purifier_folder)], [str(classifier_folder)], str(image_folder), split="train", max_images=5,
            image_size=SIZE, attacks=["fgsm"], draws=3, device="cpu", out=tmp_path, **args,
        )
    )  # fmt: skip
    given = {name: calls[0][name] for name in ("seed", "batch_size", "passes", "check_images", "checks")}
    assert given == {name: args[name] for name in given} and len(calls) == 1
    protocol = record["protocol"]
    assert (protocol["seed"], protocol["batch_size"], protocol["passes"]) == (3, 4, 2)
    assert (protocol["dataset"]["split"], protocol["dataset"]["n"]) == ("train", 5)
    assert protocol["purifier"]["options"]["draws"] == 3


def test_columns_and_configuration_of_a_dataset(classifier_folder, tmp_path):
    rows = image_rows(4).rename_column("label", "y")
    other = image_rows(4).select_columns("image").rename_column("image", "other")
    datasets.concatenate_datasets([rows, other], axis=1).save_to_disk(tmp_path / "data")
    words = ["evaluate", "--classifier", classifier_folder, "--dataset", tmp_path / "data", "--image-size", SIZE]
    words += ["--purifier", "none", "--attack", "fgsm", "--device", "cpu", "--out", tmp_path / "out"]
    code, output = invoke(*words, "--image-column", "image", "--label-column", "y")
    assert code == 0, output
    assert read_jsonl(tmp_path / "out" / "results.jsonl")[0]["accuracy"]["clean"]["n"] == 4
    code, output = invoke(*words, "--label-column", "y")
    assert code == 1 and "image_column" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scale", 0, "--attack", "fgsm"], "scale=0.0 must be a positive number"),
        (["--attack", "pgdd"], "pgdd"),
        (["--attack", "pgd", "--attack-option", "stepz=3"], "stepz"),
        (["--attack", "pgd", "--attack-option", "steps"], "name=value"),
        (["--attack", "fgsm", "--attack-option", "attacks=[fab, square"], "'attacks=[fab, square': its value"),
        (["--attack", "pgd:L2:much"], "'much' is no number"),
        (["--attack", "pgd:L2:1:2"], "NAME:NORM:EPS"),
        (["--attack", "cw-l2", "--norm", "Linf"], "Linf"),
        (["--attack", "pgd:L2", "--attack", "fgsm:Linf:4", "--eps", 2], "eps: none of pgd:L2, fgsm:Linf:4 takes it"),
        (["--attack", "fgsm", "--draws", 4], "draws=4"),
        (["--attack", "fgsm", "--purifier", "defence:jpeg", "--overlap", 0.5], "overlap: none of defence:jpeg has it"),
        (["--attack", "fgsm", "--label-column", "lable"], "label_column='lable' is not in"),
        (["--threat-model", "grey-box", "--attack", "fgsm"], "gray-box"),
        (["--purifier", "defence:jpg", "--attack", "fgsm"], "jpg"),
        (["--purifier", "defence:jpeg", "--attack", "fgsm", "--random-mask-ratio", 0.5], "takes no random masks"),
        (["--threat-model", "gray-box", "--threat-model", "transfer", "--attack", "fgsm"], "source_classifier"),
        (["--attack", "fgsm", "--source-purifier", "none"], "source_purifier is put in front of source_classifier"),
        (["--threat-model", "black-box", "--attack", "fgsm"], "uses gradients"),
        (["--device", "abacus", "--attack", "fgsm"], "--device abacus cannot be used here"),
        (["--purifier", "/nowhere", "--attack", "fgsm"], "/nowhere"),
        (["--purifier", "python:own_defence", "--attack", "fgsm"], "python:MODULE:FUNCTION"),
        (["--purifier", "python:no_such_module:make", "--attack", "fgsm"], "no_such_module cannot be imported"),
        (["--purifier", "python:own_defence:fail", "--attack", "fgsm"], "has no function fail"),
        (["--purifier", "python:own_defence:value", "--attack", "fgsm"], "has no function value"),
        (["--purifier", "python:own_defence:nothing", "--attack", "fgsm"], "returned int, which purifies nothing"),
        (["--purifier", "python:own_defence:scale:much", "--attack", "fgsm"], "scale failed: could not convert"),
        (["--purifier", "python:own_defence:nothing:3", "--attack", "fgsm"], "nothing failed: nothing() takes 0"),
    ],
)
def test_mistakes_are_one_line(words, message, classifier_folder, purifier_folder, image_folder, tmp_path, own_module):
    given = ["--classifier", classifier_folder, "--dataset", image_folder, "--image-size", SIZE]
    given += [] if "--device" in words else ["--device", "cpu"]
    purifier = [] if "--purifier" in words else ["--purifier", purifier_folder]
    code, output = invoke("evaluate", *given, *purifier, *words, "--out", tmp_path)
    assert code == 1 and message in output and "Traceback" not in output


def test_attacks_are_listed():
    code, output = invoke("attacks")
    assert code == 0 and "autoattack" in output and "hopskipjump" in output and len(output.splitlines()) >= 20


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("5e-2", 0.05), ("-1E5", -1e5), (".5e1", 5.0), ("2.e+0", 2.0), ("1.5e3", 1500.0),
     ("[1e-3, 2]", [0.001, 2]), ("'1e-3'", "1e-3"), ("1e", "1e"), ("e-3", "e-3"), ("1e3x", "1e3x"),
     ("0.5", 0.5), ("12", 12), ("no", False)],
)  # fmt: skip
def test_numbers_with_an_exponent_are_numbers(text, value):
    found = parse_options([f"option={text}"])["option"]
    assert found == value and type(found) is type(value)


def test_a_number_with_an_exponent_reaches_the_attack():
    args = EvaluationArguments(attacks=["cw-l2"], attack_options=parse_options(["cw-l2.initial_const=1e-3"]))
    assert make_attacks(args)[0].options["initial_const"] == 0.001


@pytest.mark.parametrize(
    ("attacks", "options", "steps"),
    [
        (["CW-L2"], {"cw-l2.steps": 5}, [5]),
        (["cw_l2"], {"Cw L2.steps": 5}, [5]),
        (["pgd-10", "PGD"], {"pgd.steps": 5}, [10, 5]),
        (["pgd+eot"], {"eot-pgd.steps": 5}, [5]),
    ],
)
def test_the_attack_of_an_option_is_named_as_freely_as_attacks_are(attacks, options, steps):
    made = make_attacks(EvaluationArguments(attacks=attacks, attack_options=options))
    assert [attack.options["steps"] for attack in made] == steps


def test_options_of_an_attack_are_those_of_its_kinds_too():
    options = {"pgd-10.step_size": 3, "pgd.step_size": 1, "PGD-20.step_size": 2}
    made = make_attacks(EvaluationArguments(attacks=["pgd", "pgd-10", "pgd_20", "pgd-30"], attack_options=options))
    assert [attack.options["step_size"] for attack in made] == [1, 3, 2, 1]
    for wrong in ("cw-l2.steps", "nothing.steps", "pgd-40.step_size"):
        with pytest.raises(ValueError, match=f"none of pgd-10 has {wrong}"):
            make_attacks(EvaluationArguments(attacks=["pgd-10"], attack_options={wrong: 1}))


def test_options_and_attacks_are_parsed():
    assert parse_options(["steps=3", "random_start=false", "parts=[a, b]"]) == {
        "steps": 3, "random_start": False, "parts": ["a", "b"]
    }  # fmt: skip
    args = EvaluationArguments(attacks=["pgd", "pgd", "square:L2"], attack_options={"pgd.steps": 5, "n_queries": 9})
    first, second = make_attacks(args)
    assert first.record()["steps"] == 5 and second.norm == "L2" and "'n_queries': 9" in str(second.record())


@pytest.mark.parametrize(("norm", "eps"), [("linf", 2), ("L2", 2), ("l2", 2), (None, 2)])
def test_a_norm_in_any_case_has_its_radius(norm, eps):
    (attack,) = make_attacks(EvaluationArguments(attacks=["pgd"], norm=norm, eps=[eps]))
    assert (attack.norm.lower(), attack.eps) == ((norm or "Linf").lower(), eps)


def test_a_recorded_command_says_nothing_of_the_machine(monkeypatch):
    words = ["--out=/home/me/out", "python:own:make:/home/me/weights.pth", "/home/me/x", "uoft-cs/cifar10", "a=b/c"]
    monkeypatch.setattr(sys, "argv", ["/home/me/bin/maep", *words, "http://host/x"])
    said = ["--out=out", "python:own:make:weights.pth", "x", "uoft-cs/cifar10", "a=b/c", "http://host/x"]
    assert describe_environment()["command"] == ["maep", *said]


def test_a_revision_is_that_of_the_packages_own_repository(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    inside = tmp_path / ".venv" / "site-packages" / "maep_hf"
    inside.mkdir(parents=True)
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(records, "__file__", str(inside / "records.py"))
    assert describe_environment()["git_revision"] is None
    monkeypatch.setattr(records, "__file__", str(tmp_path / "maep_hf" / "records.py"))
    (tmp_path / "maep_hf").mkdir()
    assert len(describe_environment()["git_revision"]) == 40


def test_a_norm_and_a_radius_pass_over_a_corruption():
    made = make_attacks(EvaluationArguments(attacks=["fgsm", "jpeg"], norm="L2", eps=[2.0]))
    assert [(attack.norm, attack.eps) for attack in made] == [("L2", 2.0), (None, None)]
    for attacks, message in ((["jpeg"], "norm: none of jpeg takes it"), (["fgsm", "jpeg:L2"], "bounded by no norm")):
        with pytest.raises(ValueError, match=message):
            make_attacks(EvaluationArguments(attacks=attacks, norm="L2"))


def test_tables_are_written_whole_or_not_at_all(measured, tmp_path, monkeypatch):
    words, out = measured
    assert invoke(*words, "--no-checks", "--out", out)[0] == 0
    (tmp_path / "results.md").write_text("old")

    def full(path, text, **options):
        with path.open("w") as file:
            file.write(text[:10])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="disk full"):
        report(out / "results.jsonl", tmp_path)
    assert (tmp_path / "results.md").read_text() == "old"
