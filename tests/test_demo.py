"""The demo: attack, measurement, table, pictures and record."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import ViTImageProcessor
from typer.testing import CliRunner

from maep_hf import MAEPConfig, MAEPModel, cli
from maep_hf.attacks import make_attack
from maep_hf.classifier import PixelClassifier
from maep_hf.configuration_cifar_resnet import CifarResNetConfig
from maep_hf.demo import DemoError, embedded_images, fully_convolutional, run_demo
from maep_hf.evaluation import psnr, wilson_interval
from maep_hf.evaluation.results import is_accuracy
from maep_hf.modeling_cifar_resnet import CifarResNetForImageClassification
from maep_hf.records import read_jsonl

PROCESSOR = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return CifarResNetForImageClassification(CifarResNetConfig(depth=8, width=4, num_labels=10)).eval()


@pytest.fixture(scope="module")
def classifier(network):
    return PixelClassifier(network, ViTImageProcessor(**PROCESSOR)).eval()


@pytest.fixture(scope="module")
def purifier():
    """Small and untrained, hence the identity."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {f"decoder_{name}": value for name, value in sizes.items()}
    torch.manual_seed(0)
    config = MAEPConfig(image_size=32, patch_size=8, local_branch_layers=1, local_branch_channels=4, **sizes)
    return MAEPModel(config).eval()


def test_embedded_images_are_the_first_of_the_test_set():
    pixels, labels = embedded_images("cifar10")
    assert pixels.shape == (20, 3, 32, 32) and 0 <= pixels.min() and 0.9 < pixels.max() <= 1
    assert labels.tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1, 0, 9, 5, 7, 9, 8, 5, 7, 8, 6]
    pixels, labels = embedded_images("imagenet", 224, count=2)
    assert pixels.shape == (2, 3, 224, 224) and labels.tolist() == [243, 559]
    with pytest.raises(DemoError, match="no such embedded dataset"):
        embedded_images("fashion")


def test_psnr_is_the_mean_over_images():
    reference = torch.full((2, 3, 4, 4), 0.5)
    images = torch.stack([reference[0] + 0.1, reference[1] + 0.01])
    assert psnr(images, reference) == pytest.approx((20 + 40) / 2, abs=1e-3)
    assert psnr(reference, reference) == pytest.approx(100)


@pytest.mark.parametrize(
    ("correct", "n", "expected"),
    [(20, 20, (0.8389, 1.0)), (0, 20, (0.0, 0.1611)), (10, 20, (0.2993, 0.7007)), (830, 1000, (0.8055, 0.8520))],
)
def test_wilson_interval(correct, n, expected):
    assert wilson_interval(correct, n) == pytest.approx(expected, abs=1e-4)


def test_wilson_interval_refuses_what_is_no_share():
    for correct, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="no share"):
            wilson_interval(correct, n)


def test_fully_convolutional_keeps_the_normalisation_and_drops_the_resize(classifier, network):
    large = embedded_images("imagenet", 64, count=1)[0]
    expected = network(pixel_values=(large - 0.5) / 0.25).logits
    torch.testing.assert_close(fully_convolutional(classifier)(large), expected)
    assert not torch.allclose(classifier(large), expected)


def test_run_writes_table_pictures_and_protocol(classifier, purifier, tmp_path):
    console = Console(file=io.StringIO(), width=100)
    results = run_demo(
        tmp_path / "out",
        purifier=purifier,
        purifier_name="tiny",
        classifier=classifier,
        classifier_name="random",
        attack=make_attack("pgd", eps=4, steps=2),
        seed=3,
        imagenet_images=6,  # more than one batch
        console=console,
    )
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["cifar10.png", "imagenet.png", "results.jsonl"]
    assert read_jsonl(out / "results.jsonl") == json.loads(json.dumps(results))
    cifar, imagenet = results
    for record in results:
        protocol = record["protocol"]
        assert protocol["threat_model"] == "gray-box" and protocol["purifier"]["name"] == "tiny"
        assert protocol["seed"] == 3 and protocol["attack"] | {"eps": 4, "steps": 2} == protocol["attack"]
        assert set(record["accuracy"]) == {"clean", "attacked", "purified_clean", "purified_attacked"}
        # an untrained purifier changes nothing
        assert record["psnr_db"]["purified_attacked"] == pytest.approx(record["psnr_db"]["attacked"], abs=1e-2)
    assert cifar["protocol"]["dataset"]["n"] == 20 and imagenet["protocol"]["dataset"]["n"] == 6
    assert imagenet["protocol"]["dataset"]["size"] == [224, 224]
    assert imagenet["accuracy"]["clean"]["percent"] == 100 and "not an accuracy" in imagenet["counted"]
    assert is_accuracy(cifar) and not is_accuracy(imagenet)  # so do tables and cards know
    text = console.file.getvalue()
    assert "gray-box" in text and "attacked, purified" in text and "ms per image" in text
    assert f"{cifar['accuracy']['attacked']['correct']}/20" in text
    for name in ("cifar10.png", "imagenet.png"):
        assert np.asarray(Image.open(out / name)).std() > 10


def test_run_with_an_imagenet_classifier_counts_its_labels(classifier, purifier, tmp_path):
    torch.manual_seed(0)
    many = CifarResNetForImageClassification(CifarResNetConfig(depth=8, width=4, num_labels=1000))
    options = {"purifier": purifier, "purifier_name": "tiny", "classifier": classifier, "classifier_name": "random"}
    options |= {"attack": make_attack("pgd", steps=1), "console": Console(file=io.StringIO()), "imagenet_images": 2}
    judge = PixelClassifier(many, ViTImageProcessor(**PROCESSOR))
    results = run_demo(tmp_path, imagenet_classifier=judge, imagenet_name="many", **options)
    record = results[1]
    assert record["protocol"]["classifier"]["name"] == "many" and record["counted"].startswith("right")
    with pytest.raises(DemoError, match="has 10 classes; the embedded images need one of 1000"):
        run_demo(tmp_path, imagenet_classifier=classifier, imagenet_name="ten", **options)
    options["classifier"] = judge
    with pytest.raises(DemoError, match="random has 1000 classes"):
        run_demo(tmp_path, **options)


def test_records_of_an_evaluation_are_never_replaced(classifier, purifier, tmp_path):
    options = {"purifier": purifier, "classifier": classifier, "purifier_name": "own", "classifier_name": "own"}
    options |= {"attack": make_attack("fgsm"), "imagenet_images": 0, "console": Console(file=io.StringIO())}
    run_demo(tmp_path, **options)
    before = (tmp_path / "results.jsonl").read_text()
    run_demo(tmp_path, **options)  # its own are
    assert len(read_jsonl(tmp_path / "results.jsonl")) == 1
    evaluated = before.replace('"counted"', '"count"')  # what `maep evaluate` measures on the embedded images
    for other in (before.replace("embedded:cifar10", "cifar10"), '{"accuracy": 1}\n', evaluated):
        (tmp_path / "results.jsonl").write_text(other)
        with pytest.raises(DemoError, match="results.jsonl holds records of .*give another folder"):
            run_demo(tmp_path, **options)
        assert (tmp_path / "results.jsonl").read_text() == other


def test_command_runs_on_folders(network, purifier, tmp_path):
    network.save_pretrained(tmp_path / "classifier")
    ViTImageProcessor(**PROCESSOR).save_pretrained(tmp_path / "classifier")
    purifier.save_pretrained(tmp_path / "purifier")
    arguments = ["demo", "--out", tmp_path / "out", "--model", tmp_path / "purifier", "--classifier"]
    arguments += [tmp_path / "classifier", "--steps", 1, "--imagenet-images", 0, "--eps", 2.5]
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "PGD-1 L∞ 2.5/255" in result.output
    assert not (tmp_path / "out" / "imagenet.png").exists()
    [record] = read_jsonl(tmp_path / "out" / "results.jsonl")
    assert record["protocol"]["attack"]["eps"] == 2.5
    assert record["protocol"]["classifier"]["name"] == str(tmp_path / "classifier")
