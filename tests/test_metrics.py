"""The `evaluate` modules: their figures by hand and against torchmetrics, loading without a network, their errors."""

import doctest
import importlib.resources
import json
import socket
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from maep_hf import metrics
from maep_hf.evaluation.statistics import psnr


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """Where `evaluate` copies the scripts to and keeps what is added, instead of the user's home."""
    folder = tmp_path_factory.mktemp("evaluate")
    patch = pytest.MonkeyPatch()
    patch.setattr(evaluate.config, "HF_MODULES_CACHE", folder / "modules")
    patch.setattr(evaluate.config, "HF_METRICS_CACHE", folder / "metrics")
    patch.setattr(sys, "path", list(sys.path))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def connect(self, address, *_):
        raise AssertionError(f"a connection to {address} was tried")

    monkeypatch.setattr(socket.socket, "connect", connect)


def load(name, configuration=None, **options):
    return evaluate.load(metrics.path(name), configuration, **options)


def images(count=5, size=(16, 20), channels=3, seed=0):
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- robust accuracy


def test_counts_by_hand():
    result = load("robust_accuracy").compute(predictions=[0, 1, 2, 0], references=[0, 1, 2, 3])
    low, high = result.pop("interval_95")
    assert result == {"accuracy": 0.75, "correct": 3, "n": 4}
    # Wilson: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n) with p = 3/4, n = 4, z = 1.96
    assert (low, high) == pytest.approx((0.300642, 0.954413), abs=1e-5)


def test_right_before_and_after_by_hand():
    result = load("robust_accuracy").compute(
        predictions=[0, 1, 9, 9, 4, 5], references=[0, 1, 2, 3, 4, 5], clean_predictions=[0, 1, 2, 3, 9, 9]
    )
    # the attack breaks 2 and 3, and turns 4 and 5 right by chance: those are not robust
    assert (result["correct"], result["clean_correct"], result["robust_correct"]) == (4, 4, 2)
    assert (result["accuracy"], result["clean_accuracy"], result["robust_accuracy"]) == (4 / 6, 4 / 6, 2 / 6)
    assert result["attack_success_rate"] == 0.5
    assert result["robust_interval_95"][0] < 2 / 6 < result["robust_interval_95"][1]
    json.dumps(result)


def test_nothing_right_before_has_no_success_rate():
    result = load("robust_accuracy").compute(predictions=[1, 1], references=[0, 0], clean_predictions=[1, 1])
    assert result["attack_success_rate"] is None and result["robust_accuracy"] == 0


def test_accuracy_is_that_of_torchmetrics():
    generator = torch.Generator().manual_seed(1)
    predictions, references = torch.randint(0, 5, (2, 300), generator=generator)
    result = load("robust_accuracy").compute(predictions=predictions, references=references.numpy())
    assert result["accuracy"] == pytest.approx(multiclass_accuracy(predictions, references, 5, average="micro").item())


@pytest.mark.parametrize("options", [{}, {"keep_in_memory": True}])
def test_batches_give_the_same_as_one_call(options):
    predictions, references, clean = np.random.default_rng(0).integers(0, 4, (3, 20))
    whole = load("robust_accuracy").compute(predictions=predictions, references=references, clean_predictions=clean)
    module = load("robust_accuracy", "with_clean", **options)
    for part in (slice(0, 7), slice(7, 19)):
        module.add_batch(
            predictions=predictions[part], references=references[part], clean_predictions=clean[part]
        )  # fmt: skip
    module.add(prediction=predictions[19], reference=references[19], clean_predictions=clean[19])
    assert module.compute() == whole
    assert len(module) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictions": [0, 1], "references": [0]}, r"predictions \(2\) and references \(1\)"),
        ({"predictions": [], "references": []}, "references: empty"),
        ({"predictions": [0.7], "references": [1]}, r"predictions: 0\.7 at position 0 is no class index"),
        ({"predictions": [0, 1], "references": [0, -1]}, "references: -1 at position 1 is no class index"),
        ({"predictions": [float("nan")], "references": [1]}, "predictions: nan"),
        ({"predictions": [[0.1, 0.9]], "references": [1]}, "format"),
        (
            {"predictions": [0, 1], "references": [0, 1], "clean_predictions": [0]},
            "clean_predictions: 1 .* 2",
        ),
        (
            {"predictions": [0], "references": [0], "clean_predictions": [[0.2, 0.8]]},
            "clean_predictions: .* argmax",
        ),
        ({"predictions": [0], "references": [0], "clean_prediction": [0]}, "clean_prediction: no argument"),
    ],
)
def test_robust_accuracy_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        load("robust_accuracy", keep_in_memory=True).compute(**arguments)  # a failed call's file stays locked


# -------------------------------------------------------------------------------------------- purification quality


def test_quality_is_that_of_torchmetrics():
    purified, clean = images(), images(seed=1)
    result = load("purification_quality").compute(predictions=purified, references=clean.numpy())
    ratio = peak_signal_noise_ratio(purified, clean, data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")
    similarity = structural_similarity_index_measure(purified, clean, data_range=1.0)
    assert result["psnr_db"] == pytest.approx(ratio.item(), rel=1e-6)
    assert result["ssim"] == pytest.approx(similarity.item(), rel=1e-5)
    assert result["n"] == 5
    assert result["psnr_db"] == pytest.approx(psnr(purified, clean), rel=1e-6)  # what the records state


def test_quality_by_hand():
    clean = np.full((2, 1, 8, 8), 0.5)
    result = load("purification_quality").compute(predictions=clean + 0.1, references=clean)
    assert result["psnr_db"] == pytest.approx(20, abs=1e-4)  # a squared error of 0.01
    # without structure only the luminance term is left: (2 * 0.5 * 0.6 + c) / (0.5² + 0.6² + c), c = 0.01²
    assert result["ssim"] == pytest.approx((0.6 + 1e-4) / (0.61 + 1e-4), abs=1e-4)


def test_identical_images_count_100_db():
    clean, other = images(1), images(1, seed=1)
    module = load("purification_quality")
    assert module.compute(predictions=clean, references=clean) == {"psnr_db": 100, "ssim": pytest.approx(1), "n": 1}
    single = module.compute(predictions=other, references=clean)["psnr_db"]
    both = module.compute(predictions=torch.cat((clean, other)), references=torch.cat((clean, clean)))["psnr_db"]
    assert both == pytest.approx((100 + single) / 2)  # of the images' figures, not of their errors


def test_every_image_counts_once_whatever_its_size():
    clean = [*images(3, (8, 8)), *images(1, (6, 9))]
    purified = [image * share for image, share in zip(clean, (0.5, 0.6, 0.7, 0.99), strict=True)]
    module = load("purification_quality")
    single = [module.compute(predictions=[p], references=[c]) for p, c in zip(purified, clean, strict=True)]
    result = module.compute(predictions=purified, references=clean)
    for name in ("psnr_db", "ssim"):
        assert result[name] == pytest.approx(np.mean([figures[name] for figures in single]), rel=1e-5)


def test_sizes_may_differ_and_batches_add_up():
    pairs = [(images(3, size, c, 2 * c), images(3, size, c, 5 * c)) for c in (1, 3) for size in ((6, 30), (17, 9))]
    single = [load("purification_quality").compute(predictions=p, references=r) for p, r in pairs]
    module = load("purification_quality")
    mixed = [pair for part in pairs[:2] for pair in zip(*part, strict=True)]
    module.add_batch(predictions=[pair[0] for pair in mixed], references=[pair[1] for pair in mixed])
    module.add_batch(predictions=pairs[2][0], references=pairs[2][1])
    for image, reference in zip(*pairs[3], strict=True):
        module.add(prediction=image, reference=reference)
    result = module.compute()
    assert result["n"] == 12
    for name in ("psnr_db", "ssim"):
        assert result[name] == pytest.approx(np.mean([figures[name] for figures in single]), rel=1e-5)


@pytest.mark.parametrize(
    ("purified", "clean", "message"),
    [
        (images(2), images(1), r"predictions \(2\) and references \(1\)"),
        ([], [], "predictions: empty"),
        (images(0), images(0), "predictions: empty"),
        (images(2) * 1.1, images(2), r"predictions: image 0 has values from .* to 1\.0\d+, but \[0, 1\]"),
        (images(2), images(2) - 0.5, r"references: image 0 has values from -0\.\d+ to .*, but \[0, 1\]"),
        ((images(1) * 255).round().byte(), images(1), "divide by 255"),
        (torch.full((1, 3, 8, 8), float("nan")), images(1, (8, 8)), "predictions: image 0 has values from nan"),
        (images(1, (8, 9)), images(1, (9, 8)), r"image 0 has shape \(3, 8, 9\), its reference \(3, 9, 8\)"),
        (images(1).permute(0, 2, 3, 1), images(1).permute(0, 2, 3, 1), r"\(16, 20, 3\), but \(C, H, W\) with C 1 or 3"),
        (images(1, (5, 8)), images(1, (5, 8)), "SSIM needs 6 pixels on each side"),
        (images(1)[0], images(1)[0], "format"),
        ([[[[0.0] * 6, [0.0] * 7] * 4]], [[[[0.0] * 6, [0.0] * 7] * 4]], "predictions: image 0 is no rectangle"),
    ],
)
def test_purification_quality_errors(purified, clean, message):
    with pytest.raises(ValueError, match=message):
        load("purification_quality", keep_in_memory=True).compute(predictions=purified, references=clean)


def test_an_error_does_not_spoil_the_next_call():
    module = load("purification_quality")
    with pytest.raises(ValueError, match="divide by 255"):
        module.compute(predictions=images(2) * 255, references=images(2))
    assert module.compute(predictions=images(1), references=images(1))["n"] == 1


# --------------------------------------------------------------------------------------------- loading, combining


def test_both_combine():
    purified, clean = images(4), images(4, seed=1)
    names = [metrics.path("robust_accuracy"), load("purification_quality", "images")]
    expected = load("purification_quality").compute(predictions=purified, references=clean)
    both = evaluate.combine(names)
    for part in (slice(0, 1), slice(1, 4)):
        both.add_batch(
            predictions=[0, 1, 2, 3][part], references=[0, 1, 2, 0][part], purified_images=purified[part],
            clean_images=clean[part],
        )  # fmt: skip
    result = both.compute()
    assert result["accuracy"] == 0.75 and result["robust_accuracy_n"] == result["purification_quality_n"] == 4
    assert result["psnr_db"] == pytest.approx(expected["psnr_db"]) and result["ssim"] == pytest.approx(expected["ssim"])
    arguments = {"predictions": [0, 1, 2, 3], "references": [0, 1, 2, 0], "clean_predictions": [0, 1, 2, 3]}
    at_once = both.compute(**arguments, purified_images=purified, clean_images=clean)
    assert at_once["psnr_db"] == result["psnr_db"] and at_once["clean_accuracy"] == 0.75


def test_one_module_twice_keeps_its_names_apart():
    modules = {"gray-box": load("robust_accuracy"), "white-box": load("robust_accuracy")}
    result = evaluate.combine(modules).compute(predictions=[0, 1], references=[0, 0])
    assert result["gray-box_accuracy"] == result["white-box_accuracy"] == 0.5


@pytest.mark.parametrize("name", metrics.NAMES)
def test_read_only_copy_loads_and_stays_as_it_was(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    for path in Path(metrics.path(name)).iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
            (folder / path.name).chmod(0o444)
    before = sorted(path.name for path in folder.iterdir())
    folder.chmod(0o555)
    try:
        module = evaluate.load(str(folder), cache_dir=str(tmp_path / "cache"))
        assert module.name == name
        assert sorted(path.name for path in folder.iterdir()) == before
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize("name", metrics.NAMES)
def test_card_is_packaged_and_its_examples_hold(name):
    folder = importlib.resources.files(f"maep_hf.metrics.{name}")
    assert Path(metrics.path(name)) == Path(str(folder)) and (folder / "__init__.py").is_file()
    tested = doctest.testfile(str(folder / "README.md"), module_relative=False)
    assert tested.attempted > 5 and tested.failed == 0
    inputs = load(name).inputs_description
    example = doctest.DocTestParser().get_doctest(inputs, {}, name, None, 0)
    assert example.examples and doctest.DocTestRunner().run(example).failed == 0


def test_unknown_names():
    with pytest.raises(ValueError, match="no module 'accuracy'; choose one of robust_accuracy, purification_quality"):
        metrics.path("accuracy")
    for name in metrics.NAMES:
        with pytest.raises(ValueError, match="config_name: 'other' is none of default"):
            load(name, "other")
    with pytest.raises(ValueError, match="psnr: no argument of purification_quality"):
        load("purification_quality", keep_in_memory=True).compute(
            predictions=images(1), references=images(1), psnr=True
        )
