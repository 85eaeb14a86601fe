"""The command `maep purify`, and one-line errors of every command."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from conftest import save_classifier
from PIL import Image
from typer.testing import CliRunner

from maep_hf import MAEPConfig, MAEPModel, checkpoints, cli, figures, hub, imageio
from maep_hf.checkpoints import CheckpointError, check_model, expanded_path, load_purifier, released_checkpoint
from maep_hf.classifier import load_classifier
from maep_hf.configuration_cifar_resnet import CifarResNetConfig
from maep_hf.hub.push import Pushed
from maep_hf.modeling_cifar_resnet import CifarResNetForImageClassification
from maep_hf.training.stages import load_trainable


def run(*arguments) -> tuple[int, str, str]:
    """Exit code, standard output and the errors in one line of text."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def purifier(tmp_path_factory):
    """The folder of a small untrained purifier, which is the identity."""
    folder = tmp_path_factory.mktemp("model") / "purifier"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {f"decoder_{name}": value for name, value in sizes.items()}
    torch.manual_seed(0)
    config = MAEPConfig(image_size=16, local_branch_layers=1, local_branch_channels=4, **sizes)
    MAEPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    """A folder with a colour, a grey and an alpha picture, the last in a folder of its own."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "colour.png")
    Image.fromarray(pixels).convert("L").save(folder / "grey.png")
    Image.fromarray(pixels).convert("RGBA").resize((9, 40)).save(folder / "more" / "alpha.png")
    return folder


def test_purify_writes_every_image_under_its_name(purifier, photos, tmp_path):
    out = tmp_path / "out"
    code, output, _ = run("purify", photos, "--out", out, "--model", purifier)
    assert code == 0 and "3 of 3 images" in output
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert written == ["colour.png", "grey.png", "more/alpha.png"]
    for name in written:  # an untrained purifier is the identity
        before, after = Image.open(photos / name), Image.open(out / name)
        assert (before.mode, before.size) == (after.mode, after.size)
        assert np.abs(np.asarray(before, int) - np.asarray(after, int)).max() <= 1


def test_purify_writes_what_the_purifier_returns(purifier, photos, tmp_path, monkeypatch):
    calls = []

    def darken(self, pixel_values, **options):
        calls.append(options)
        return pixel_values / 2

    monkeypatch.setattr(MAEPModel, "purify", darken)
    options = ["--mode", "windows", "--overlap", "0.5", "--window-batch-size", "3", "--strength", "1.5"]
    code, _, _ = run("purify", photos / "colour.png", "-o", tmp_path / "o", "--model", purifier, "--compare", *options)
    assert code == 0
    assert calls == [{"mode": "windows", "overlap": 0.5, "window_batch_size": 3, "strength": 1.5}]
    before, after = (np.asarray(Image.open(path), float) for path in (photos / "colour.png", tmp_path / "o/colour.png"))
    assert np.abs(before / 2 - after).max() <= 0.5
    assert Image.open(tmp_path / "o" / "colour.png.compare.png").width > 3 * 34


def test_a_comparison_shows_image_purified_and_difference_in_the_order_of_their_captions(
    purifier, photos, tmp_path, monkeypatch
):
    grids = []
    monkeypatch.setattr(MAEPModel, "purify", lambda self, pixel_values, **options: pixel_values / 2)
    monkeypatch.setattr(figures, "image_grid", lambda *args, **options: grids.append((*args, options["captions"])))
    code, _, _ = run("purify", photos / "colour.png", "--out", tmp_path / "o", "--model", purifier, "--compare")
    ((rows, path, captions),) = grids
    image, half, difference = rows[""]
    assert code == 0 and path == tmp_path / "o" / "colour.png.compare.png"
    stored = torch.from_numpy(np.array(Image.open(photos / "colour.png")))
    torch.testing.assert_close(image, stored.permute(2, 0, 1) / 255)
    torch.testing.assert_close(half, image / 2)
    torch.testing.assert_close(difference, (0.5 - 8 * image / 2).clamp(0, 1))
    assert captions == {"": ["image", "purified", "difference × 8"]}


def test_a_purifier_of_one_channel_takes_grey_files(photos, tmp_path):
    MAEPModel(MAEPConfig.tiny(num_channels=1, image_mean=[0.5], image_std=[0.5])).save_pretrained(tmp_path / "model")
    code, output, errors = run("purify", photos, "--out", tmp_path / "o", "--model", tmp_path / "model", "--compare")
    assert code == 1 and "1 of 3 images" in output
    assert "colour.png: it has colours, and this purifier takes grey pictures" in " ".join(errors.split())
    before, after = (np.asarray(Image.open(path), int) for path in (photos / "grey.png", tmp_path / "o" / "grey.png"))
    assert after.shape == before.shape and np.abs(before - after).max() <= 1
    assert (tmp_path / "o" / "grey.png.compare.png").exists()


@pytest.mark.parametrize("options", [["--mode", "interpolate"], ["--dtype", "bfloat16"], ["--overlap", "0"]])
def test_purify_options_run(purifier, photos, tmp_path, options):
    assert run("purify", photos / "colour.png", "--out", tmp_path / "o", "--model", purifier, *options)[0] == 0
    before, after = (np.asarray(Image.open(path), int) for path in (photos / "colour.png", tmp_path / "o/colour.png"))
    assert np.abs(before - after).max() <= 2


def test_broken_file_is_skipped_counted_and_fails_the_command(purifier, photos, tmp_path):
    (photos / "broken.png").write_bytes(b"no image")
    code, output, errors = run("purify", photos, "--out", tmp_path / "out", "--model", purifier)
    assert code == 1
    assert "3 of 4 images" in output and "1 of 4 files skipped" in errors and "broken.png" in errors
    assert (tmp_path / "out/more/alpha.png").is_file() and not (tmp_path / "out/broken.png").exists()


def test_a_long_name_stops_no_other_file(purifier, tmp_path):
    """Its comparison's is longer still: the image is purified nevertheless, and the rest of the folder."""
    (tmp_path / "in").mkdir()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    names = ["a.png", f"{'m' * 250}.gif", "z.png"]
    for name in names:
        frames[0].save(tmp_path / "in" / name, save_all="m" in name, append_images=frames[1:])
    code, output, errors = run("purify", tmp_path / "in", "--out", tmp_path / "o", "--model", purifier, "--compare")
    assert code == 1 and "3 of 3 images" in output
    assert "1 of 3 comparisons not written" in errors and "skipped" not in errors
    assert "first of 2 frames is purified; purified without a comparison" in errors and "too long" in errors
    written = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert written == ["a.png", "a.png.compare.png", names[1], "z.png", "z.png.compare.png"]


def test_a_name_that_is_too_long_is_skipped(purifier, photos, tmp_path, monkeypatch):
    """As where results go to a file system that takes shorter ones than the inputs'."""
    replace = os.replace

    def shorter(source, target):
        if Path(target).name == "colour.png":
            raise OSError(errno.ENAMETOOLONG, "File name too long")
        replace(source, target)

    monkeypatch.setattr(imageio.os, "replace", shorter)
    code, output, errors = run("purify", photos, "--out", tmp_path / "o", "--model", purifier, "--compare")
    assert code == 1 and "2 of 3 images" in output and "1 of 3 files skipped" in errors
    assert "comparisons not written" not in errors
    written = sorted(path.name for path in (tmp_path / "o").rglob("*.*"))
    assert written == ["alpha.png", "alpha.png.compare.png", "grey.png", "grey.png.compare.png"]


def test_comparisons_and_results_of_one_name_are_refused(purifier, photos, tmp_path):
    """As where the inputs are the results of an earlier run."""
    arguments = ("--model", purifier, "--compare")
    assert run("purify", photos, "--out", tmp_path / "one", *arguments)[0] == 0
    code, _, errors = run("purify", tmp_path / "one", "--out", tmp_path / "two", *arguments)
    assert code == 1 and "would both be written to" in errors and "without --compare" in errors
    assert not (tmp_path / "two").exists()
    assert run("purify", tmp_path / "one", "--out", tmp_path / "two", "--model", purifier)[0] == 0


def test_animation_says_that_one_frame_is_written(purifier, tmp_path):
    frames = [Image.new("L", (8, 8), value) for value in (0, 100, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    code, _, errors = run("purify", tmp_path / "a.gif", "--out", tmp_path / "out", "--model", purifier)
    assert code == 0 and "first of 3 frames" in errors


def test_inputs_are_never_overwritten(purifier, photos):
    before = (photos / "colour.png").read_bytes()
    code, _, errors = run("purify", photos / "colour.png", "--out", photos, "--model", purifier)
    assert code == 1 and "would overwrite the input" in errors
    assert (photos / "colour.png").read_bytes() == before


def test_second_run_does_not_purify_its_own_results(purifier, photos):
    for _ in range(2):
        code, output, _ = run("purify", photos, "--out", photos / "out", "--model", purifier)
        assert code == 0 and "3 of 3" in output


def test_full_disk_is_one_line(purifier, photos, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(imageio, "save_image", full)
    code, _, errors = run("purify", photos, "--out", tmp_path / "out", "--model", purifier)
    assert code == 1 and "error: [Errno 28] No space left on device" in errors


def test_out_of_memory_names_the_image_and_the_way_out(purifier, photos, tmp_path, monkeypatch):
    def exhausted(self, pixel_values, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(MAEPModel, "purify", exhausted)
    code, _, errors = run("purify", photos, "--out", tmp_path / "out", "--model", purifier)
    assert code == 1 and "colour.png: out of memory at (21, 34) pixels" in errors and "--window-batch-size" in errors


def test_errors_of_ours_keep_their_traceback(purifier, photos, tmp_path, monkeypatch):
    def wrong(self, pixel_values, **options):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(MAEPModel, "purify", wrong)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run("purify", photos, "--out", tmp_path / "out", "--model", purifier)


@pytest.mark.parametrize("command", [["purify", "IMAGE", "--out", "OUT"], ["demo", "--out", "OUT"]])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./gone", "./gone: no such folder"),
        ("gone", "not a Hub id of the form OWNER/NAME"),
        ("EMPTY", "holds no config.json"),
        ("CLASSIFIER", "is not a purifier: its config.json has model_type 'cifar_resnet'"),
        ("IMAGE", "is a file"),
    ],
)
def test_wrong_model_is_one_line(photos, tmp_path, command, model, message):
    (tmp_path / "empty").mkdir()
    CifarResNetForImageClassification(CifarResNetConfig(depth=8, width=4)).save_pretrained(tmp_path / "classifier")
    places = {
        "IMAGE": photos / "colour.png",
        "OUT": tmp_path / "out",
        "EMPTY": tmp_path / "empty",
        "CLASSIFIER": tmp_path / "classifier",
    }
    arguments = [places.get(word, word) for word in [*command, "--model", model]]
    code, output, errors = run(*arguments)
    assert code == 1 and errors.startswith("error: ") and message in errors
    assert not output and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.png"], "gone.png: no such file"),
        (["EMPTY"], "no image files"),
        (["IMAGE", "--device", "nonsense"], "--device nonsense cannot be used"),
        (["IMAGE", "--revision", "no-such-tag"], "revision='no-such-tag': "),
    ],
)
def test_wrong_arguments_are_one_line(purifier, photos, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": tmp_path / "empty", "IMAGE": photos / "colour.png"}
    words = [places.get(word, word) for word in arguments]
    code, _, errors = run("purify", *words, "--out", tmp_path / "out", "--model", purifier)
    assert code == 1 and message in errors


def test_eps_must_be_positive_and_names_its_unit(purifier, tmp_path):
    code, _, errors = run("demo", "--eps", "0", "--out", tmp_path, "--model", purifier)
    assert code == 1 and "units of 1/255" in errors


def test_an_installed_package_finds_the_release_of_the_clone_it_is_run_from(purifier, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "__file__", str(tmp_path / "site-packages" / "maep_hf" / "checkpoints.py"))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "maep-tiny-cifar10").symlink_to(purifier)
    monkeypatch.chdir(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="not part of this installation"):
        released_checkpoint("maep-tiny-cifar10")
    monkeypatch.chdir(tmp_path)
    assert released_checkpoint("maep-tiny-cifar10").samefile(purifier) and load_purifier().num_parameters() > 0


def test_a_home_folder_that_no_shell_expanded(purifier, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(purifier.parent))
    name = f"~/{purifier.name}"
    check_model(name, model_type="maep")
    assert load_purifier(name).num_parameters() == load_trainable(name).num_parameters()


def test_every_path_of_a_command_may_be_in_the_home_folder(purifier, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(photos)
    code, _, errors = run("purify", "~/photos/colour.png", "--out=~/out", "--model", purifier)
    assert code == 0, errors
    assert (tmp_path / "out" / "colour.png").is_file() and not (photos / "~").exists()
    paths = set()
    for command in cli.app.registered_commands:
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if Path in (getattr(hint, "__origin__", None), *get_args(getattr(hint, "__origin__", None))):
                assert hint.__metadata__[0].callback is expanded_path, (command.callback, name)
                paths.add((command.callback.__name__, name))
    assert {("purify", "out"), ("demo", "out"), ("evaluate", "out"), ("report", "results"), ("push", "folder")} <= paths


def test_a_classifier_in_the_home_folder(tmp_path, monkeypatch):
    save_classifier(tmp_path / "resnet")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_classifier("~/resnet").num_labels == 3


def test_an_empty_input_is_not_the_working_directory(purifier, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    code, _, errors = run("purify", "", "--out", tmp_path / "out", "--model", purifier)
    assert code == 1 and "an input is empty" in errors and not (tmp_path / "out").exists()
    assert run("purify", ".", "--out", tmp_path / "out", "--model", purifier)[0] == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["--private", "--tag", "v1", "--revision", "dev"], {"private": True, "tag": "v1", "revision": "dev"}),
        (["--public", "--create-pr"], {"private": False, "create_pr": True}),
        (["--message", "more", "--base-model", "a/b"], {"commit_message": "more", "base_model": "a/b"}),
        (["--repo-type", "dataset"], {"repo_type": "dataset"}),
    ],
)
def test_every_option_of_push_arrives(words, expected, tmp_path, monkeypatch):
    calls = []

    def push(*args, **options):
        calls.append((args, options))
        return Pushed("a/b", "model", "https://hub/a/b", "0" * 40, "dev", "kept")

    monkeypatch.setattr(hub, "push_to_hub", push)
    code, output, errors = run("push", tmp_path, "mine", *words)
    assert code == 0, errors
    assert output == "pushed: https://hub/a/b (dev, 00000000; README edited by hand: left as it is)\n"
    left_out = dict.fromkeys(("private", "revision", "tag", "commit_message", "base_model", "repo_type"))
    assert calls == [((tmp_path, "mine"), left_out | {"create_pr": False} | expected)]


def test_missing_release_names_the_folder_and_the_fix():
    with pytest.raises(CheckpointError, match="no released checkpoint 'no-such-model'.*Hub id"):
        released_checkpoint("no-such-model")


def test_purifier_is_loaded_for_inference(purifier):
    model = load_purifier(purifier, dtype=torch.bfloat16)
    assert not model.training and model.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())
    check_model(purifier, model_type="maep")


def test_version_and_help():
    assert run("--version")[1].startswith("maep ")
    for command in ("purify", "demo"):
        code, output, _ = run(command, "--help")
        assert code == 0 and "--out" in output


def test_command_line_starts_without_loading_torch_by_itself():
    code = "import sys; sys.modules['maep_hf'] = type(sys)('maep_hf'); sys.modules['maep_hf'].__path__ = ['maep_hf'];"
    code += "import maep_hf.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_card_is_written_once_and_not_over_an_edited_one(purifier):
    card = purifier / "README.md"
    code, _, _ = run("card", purifier, "--repo-id", "someone/purifier")
    assert code == 0 and 'from_pretrained("someone/purifier")' in card.read_text()
    card.write_text("edited by hand")
    code, _, error = run("card", purifier)
    assert code == 1 and "--overwrite" in error and card.read_text() == "edited by hand"
    assert run("card", purifier, "--overwrite")[0] == 0
    assert card.read_text().startswith("---")
    (purifier / "mine.md").write_text("---\n{{ card_data }}\n---\n# My {{ name }}\n")
    assert run("card", purifier, "--template", purifier / "mine.md")[0] == 0 and "# My " in card.read_text()
    (purifier / "mine.md").write_text("{{ nothing }}")
    code, _, error = run("card", purifier, "--template", purifier / "mine.md", "--results", purifier / "gone.jsonl")
    assert code == 1 and "gone.jsonl" in error
    code, _, error = run("card", purifier, "--template", purifier / "mine.md")
    assert code == 1 and "mine.md: UndefinedError" in error
    (purifier / "mine.md").unlink()
    card.unlink()
