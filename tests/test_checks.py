"""Gradient-masking checks: an honest purifier passes, the usual ways to fool an attack are caught."""

import importlib
import re
from functools import partial

import pytest
import torch
from conftest import FragileClassifier, pixels_of, tiny_purifier
from rich.console import Console
from torch import nn

from maep_hf.attacks import make_attack
from maep_hf.classifier import PixelClassifier, PurifiedClassifier
from maep_hf.defences import BPDA
from maep_hf.evaluation import EvaluationImages, benchmark, checks, gradient_masking_checks, progress
from maep_hf.evaluation.run import _print_checks

right = checks._right
CHECKS = {"gradient", "eps sweep", "step sweep", "black-box", "transfer"}


@pytest.fixture(scope="module")
def pixels():
    return pixels_of(24).float() / 255


@pytest.fixture(scope="module")
def classifier(pixels):
    return PixelClassifier(FragileClassifier(pixels))


@pytest.fixture(scope="module")
def images(classifier, pixels):
    with torch.no_grad():
        return EvaluationImages(pixels, classifier(pixels).argmax(-1))


class Quantise(nn.Module):
    def forward(self, pixels):
        return (pixels * 16).round() / 16


class Detach(nn.Module):
    def forward(self, pixels):
        return pixels.detach() * 1.0


class Noise(nn.Module):
    def forward(self, pixels):
        return (pixels + 0.1 * torch.randn_like(pixels)).clamp(0, 1)


class Shattered(nn.Module):
    """Differentiable, but the gradient points anywhere: fine ripples on top of the image (Athalye et al. 2018)."""

    def forward(self, pixels):
        return pixels + 2e-3 * torch.sin(6e3 * pixels)


class Gate(nn.Module):
    """Lets each image through or not, at random, and with it the gradient."""

    def forward(self, pixels):
        return pixels * torch.randint(2, (len(pixels), 1, 1, 1))


def test_the_gradient_of_a_random_purifier_does_not_depend_on_the_callers_state(classifier, images):
    x, y = images.batch(0, 24, "cpu")
    defended, kept, found = PurifiedClassifier(Gate(), classifier), {}, []
    for state in (1, 2, 3):
        torch.manual_seed(state)
        report = gradient_masking_checks(defended, x, y, eps=8, randomised=True, kept=kept)
        found.append(next(result.data for result in report.results if result.name == "gradient"))
    assert 0 < found[0]["images_without_gradient"] < found[0]["n"] and found[1] == found[2] == found[0]


def checked(purifier, classifier, pixels, **options):
    defended = PurifiedClassifier(purifier, classifier)
    with torch.no_grad():
        labels = defended(pixels).argmax(-1)
    return gradient_masking_checks(defended, pixels, labels, eps=8, **options)


def test_an_honest_purifier_passes(classifier, pixels):
    purifier, state = tiny_purifier(), torch.get_rng_state()
    report = checked(purifier, classifier, pixels, source=classifier)
    assert torch.equal(torch.get_rng_state(), state)
    assert report.reliable, report.record()
    assert sum(result.name == "transfer" for result in report.results) == 3  # bare, BPDA, and the source
    assert {result.name for result in report.results} == CHECKS
    sweep = next(result for result in report.results if result.name == "eps sweep")
    assert sweep.data["eps"] == [4, 8, 16, 32, 128] and sweep.data["percent"][-1] <= 5
    bare = checked(None, classifier, pixels)
    assert bare.reliable, bare.record()


@pytest.mark.parametrize("purifier", [Quantise(), Detach()])
def test_a_purifier_without_a_gradient_is_caught(purifier, classifier, pixels):
    report = checked(purifier, classifier, pixels)
    assert not report.reliable and {"gradient", "transfer"} <= set(report.failed), report.record()


def test_bpda_is_checked_by_its_own_gradient(classifier, pixels):
    quantised = checked(Quantise(), classifier, pixels, threat_model="bpda")
    assert quantised.reliable, quantised.record()

    class Mirror(nn.Module):  # the identity is no stand-in for its gradient, and the full one shows it
        def forward(self, pixels):
            return pixels.flip(-1)

    assert "transfer" in checked(Mirror(), classifier, pixels, threat_model="bpda").failed
    assert checked(Mirror(), classifier, pixels).reliable


def test_a_shattered_gradient_is_caught(classifier, pixels):
    report = checked(Shattered(), classifier, pixels)
    assert not report.reliable and set(report.failed) & {"transfer", "black-box", "eps sweep"}, report.record()


def test_noise_needs_an_expectation_over_it(classifier, pixels, monkeypatch):
    monkeypatch.setattr(checks, "STEPS", (1, 5))
    monkeypatch.setattr(checks, "SWEEP_STEPS", 5)
    few = pixels[:8]
    assert "randomness" in checked(Noise(), classifier, few, randomised=True).failed
    averaged = checked(Noise(), classifier, few, randomised=True, eot_samples=10)
    assert "randomness" not in averaged.failed


def test_a_failed_check_goes_into_the_record(classifier, pixels, tmp_path):
    with torch.no_grad():
        labels = classifier(Quantise()(pixels)).argmax(-1)
    options = {"threat_model": "white-box", "attack": "pgd", "attack_options": {"steps": 2}, "progress": False}
    images = EvaluationImages(pixels, labels)
    record = benchmark(classifier, Quantise(), images, out=tmp_path, **options).record
    assert record["checks"]["reliable"] is False and "gradient" in record["checks"]["failed"]
    noisy = benchmark(classifier, Noise(), EvaluationImages(pixels[:6], labels[:6]), **options).record
    assert "randomness" in noisy["checks"]["failed"]
    unchecked = benchmark(classifier, Quantise(), images, checks=False, **options).record
    assert unchecked["checks"] is None
    more = benchmark(classifier, Quantise(), images, out=tmp_path, **options | {"attack_options": {"steps": 3}}).record
    assert more["checks"]["results"][:-1] == record["checks"]["results"][:-1]  # once for a pipeline and radius


def test_a_weak_attack_says_nothing_of_robustness(classifier, images):
    labels = images.labels.clone()
    labels[:3] = (labels[:3] + 1) % 3  # wrong before any attack: the checks leave them out
    images = EvaluationImages(images.pixels, labels)
    options = {"threat_model": "white-box", "attack": "pgd", "eps": 1, "progress": False, "purifier": tiny_purifier()}
    failed = {}
    for name, settings in (("weak", {"steps": 1, "step_size": 0.001}), ("strong", {"steps": 40})):
        record = benchmark(classifier, dataset=images, attack_options=settings, **options).record
        assert record["accuracy"]["purified_attacked"]["correct"] > 0
        failed[name], results = record["checks"]["failed"], record["checks"]["results"]
        assert {result["name"] for result in results} == {*CHECKS, "attack"}
        assert results[-1]["name"] == "attack" and results[-1]["data"]["n"] == 21
    assert failed == {"weak": ["attack"], "strong": []}


def test_checks_attack_as_the_evaluation_does(classifier, images, monkeypatch):
    told = []
    module = importlib.import_module("maep_hf.evaluation.benchmark")
    report = checks.MaskingReport([])
    monkeypatch.setattr(module, "gradient_masking_checks", lambda *args, **options: told.append(options) or report)
    options = {"attack": "eot-pgd", "norm": "L2", "eps": 0.3, "attack_options": {"steps": 1, "eot_samples": 3}}
    options |= {"threat_model": "bpda", "seed": 5, "batch_size": 7, "source": classifier, "progress": False}
    benchmark(classifier, Noise(), images, passes=1, **options)
    expected = {"norm": "L2", "eps": 0.3, "eot_samples": 3, "threat_model": "bpda", "seed": 5, "batch_size": 7}
    assert told[0].items() >= (expected | {"randomised": True, "source": classifier}).items()


def test_survivors_stay_right_under_every_attack_of_the_checks(classifier, images, monkeypatch):
    """Each of Square and the sources of transfer breaks an image that nothing else does, of the defended classifier:
    the bare one has most images wrong without an attack."""

    class Negative(nn.Module):
        def forward(self, pixels):
            return 1 - pixels

    x, _ = images.batch(0, 24, "cpu")
    defended = PurifiedClassifier(Negative(), classifier)
    y = defended(x).argmax(-1)
    assert (classifier(x).argmax(-1) != y)[4:].any()
    others = [x[y != y[index]][0] for index in range(4)]

    class Breaking:
        def __init__(self, name, **about):
            self.about = {"name": name} | about
            # however few the steps, they reach the end of the ball
            assert name == "square" or about["steps"] * about["step_size"] >= about["eps"]
            assert name == "square" or about["eot_samples"] == 3

        def record(self):
            return self.about

        def __call__(self, model, pixels, labels, seed):
            index = 0 if self.about["name"] == "square" else {id(classifier): 1, id(surrogate): 2}.get(id(model))
            index = 3 if isinstance(getattr(model, "purifier", None), BPDA) else index
            attacked = pixels.clone()
            if index is not None:
                attacked[index] = others[index]
            return attacked

    surrogate = nn.Sequential(classifier)
    monkeypatch.setattr(checks, "make_attack", Breaking)
    report = gradient_masking_checks(defended, x, y, source=surrogate, eot_samples=3)
    assert report.used == list(range(24)) and report.survivors == [False] * 4 + [True] * 20


def test_a_figure_of_zero_needs_no_checks(classifier, images):
    options = {"threat_model": "white-box", "attack": "pgd", "progress": False, "check_images": 4}
    zero = benchmark(classifier, tiny_purifier(), images, eps=255, **options).record
    assert zero["accuracy"]["purified_attacked"]["correct"] == 0 and zero["checks"]["reliable"]
    assert [result["name"] for result in zero["checks"]["results"]] == ["attack"]
    some = benchmark(classifier, tiny_purifier(), images, eps=0.2, **options).record
    assert some["accuracy"]["purified_attacked"]["correct"] > 0 and some["checks"]["failed"] == ["images"]
    broken = EvaluationImages(images.pixels, (images.labels + 1) % 3)  # no figure, and nothing right to be taken away
    assert benchmark(classifier, tiny_purifier(), broken, eps=255, **options).record["checks"]["failed"] == ["images"]


def test_interrupted_checks_go_on_at_the_attack_where_they_were(classifier, images, monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "STEPS", (1, 5))
    monkeypatch.setattr(checks, "SWEEP_STEPS", 5)
    options = {"threat_model": "white-box", "attack": "pgd", "eps": 1, "progress": False}
    made, judged = [], []

    def run(folder, purifier=None, last=None, steps=1):
        def make(name, **about):
            if len(made) == last:
                raise KeyboardInterrupt
            made.append(name)
            return make_attack(name, **about)

        made.clear()
        judged.clear()
        monkeypatch.setattr(checks, "make_attack", make)
        monkeypatch.setattr(checks, "_right", lambda *args: judged.append(1) or right(*args))
        options["attack_options"] = {"steps": steps}
        return benchmark(classifier, purifier or tiny_purifier(), images, out=folder, **options).record["checks"]

    whole = run(tmp_path / "whole")
    count = len(made)
    assert len(judged) == count + 1  # one to find the images that are right
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", last=4)
    assert run(tmp_path / "cut") == whole and len(judged) == count - 4
    assert run(tmp_path / "cut", steps=2)["results"][:-1] == whole["results"][:-1] and not judged
    other = run(tmp_path / "cut", Quantise())  # of another pipeline nothing is there
    assert len(judged) == count + 1 and other == run(tmp_path / "other", Quantise())


def test_kept_attacks_are_of_the_images_that_were_right_then(classifier, pixels):
    class Moody(nn.Module):  # with random numbers of its own, which no seed reaches
        draws = torch.Generator().manual_seed(0)

        def forward(self, pixels):
            return (pixels + 0.1 * torch.randn(pixels.shape, generator=self.draws)).clamp(0, 1)

    kept: dict[str, list[bool]] = {}
    first, second = (checked(Moody(), classifier, pixels, kept=kept) for _ in range(2))
    assert first.used == second.used and first.survivors == second.survivors and len(first.used) < len(pixels)


class LargestBatch(nn.Module):
    largest = 0

    def forward(self, pixels):
        LargestBatch.largest = max(LargestBatch.largest, len(pixels))
        return pixels * 1.0


def test_checks_take_no_more_images_at_once_than_the_evaluation(classifier, images, monkeypatch):
    monkeypatch.setattr(checks, "STEPS", (1, 5))
    monkeypatch.setattr(checks, "SWEEP_STEPS", 5)
    options = {"threat_model": "white-box", "attack": "pgd", "eps": 0.2, "progress": False}
    record = benchmark(classifier, LargestBatch(), images, batch_size=7, **options).record
    assert record["checks"]["check_images"] == 24 and LargestBatch.largest == 7
    defended = PurifiedClassifier(tiny_purifier(), classifier)
    x, y = images.batch(0, 24, "cpu")
    whole, split = (gradient_masking_checks(defended, x, y, batch_size=size) for size in (24, 23))
    assert split.used == whole.used and len(split.survivors) == len(whole.survivors)


def test_a_corruption_is_not_checked(classifier, images):
    options = {"threat_model": "white-box", "norm": "Linf", "eps": 8, "progress": False}
    record = benchmark(classifier, tiny_purifier(), images, attack="gaussian-noise", **options).record
    assert record["protocol"]["attack"]["eps"] == 8 and record["checks"] is None


def test_more_check_images_are_taken(classifier, images, tmp_path):
    options = {"threat_model": "white-box", "attack": "pgd", "eps": 0.2, "progress": False, "out": tmp_path}
    few = benchmark(classifier, tiny_purifier(), images, check_images=4, **options)
    assert few.record["checks"]["failed"] == ["images"] and few.record["checks"]["check_images"] == 4
    assert benchmark(classifier, tiny_purifier(), images, check_images=4, **options).resumed == -1
    enough = benchmark(classifier, tiny_purifier(), images, check_images=24, **options)
    assert enough.resumed == 1 and enough.record["checks"]["reliable"]
    assert benchmark(classifier, tiny_purifier(), images, check_images=4, **options).resumed == -1


def test_a_source_that_is_given_later_is_checked_too(classifier, images, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "STEPS", (1, 5))
    monkeypatch.setattr(checks, "SWEEP_STEPS", 5)
    options = {"threat_model": "white-box", "attack": "pgd", "eps": 0.2, "progress": False, "out": tmp_path}
    run = partial(benchmark, classifier, tiny_purifier(), images, **options)
    source, other = (PixelClassifier(FragileClassifier(pixels_of(count).float() / 255)) for count in (5, 7))
    assert run().resumed == 0 and run().resumed == -1
    for surrogate in (source, other):
        found = run(source=surrogate)
        assert found.resumed == 1 and "surrogate pipeline" in str(found.record["checks"]["results"])
        assert run(source=surrogate).resumed == -1 and run().resumed == -1


@pytest.mark.parametrize(("eps", "resumed"), [(0.2, 1), (64, -1)])
def test_more_check_images_count_where_fewer_passed_but_not_for_a_figure_of_zero(
    classifier, images, tmp_path, monkeypatch, eps, resumed
):
    monkeypatch.setattr(checks, "STEPS", (1, 5))
    monkeypatch.setattr(checks, "SWEEP_STEPS", 5)
    options = {"threat_model": "white-box", "attack": "pgd", "eps": eps, "progress": False, "out": tmp_path}
    few = benchmark(classifier, tiny_purifier(), images, check_images=20, **options).record["checks"]
    assert few["reliable"] and (len(few["results"]) == 1) == (resumed < 0)
    more = benchmark(classifier, tiny_purifier(), images, check_images=24, **options)
    assert more.resumed == resumed and more.record["checks"]["check_images"] == (24 if resumed > 0 else 20)
    assert benchmark(classifier, tiny_purifier(), images, check_images=20, **options).resumed == -1


def test_without_a_start_for_square_its_check_is_left_out(classifier, pixels, capsys):
    larger = torch.nn.functional.interpolate(pixels, size=(24, 24))
    defended = PurifiedClassifier(None, PixelClassifier(FragileClassifier(larger)))
    seen: list[tuple] = []
    report = gradient_masking_checks(
        defended, larger, defended(larger).argmax(-1), norm="L2", eps=0.5, progress=lambda *told: seen.append(told)
    )
    (left_out,) = (check for check in report.record()["results"] if check["name"] == "black-box")
    assert left_out["passed"] is None and "Square cannot start in L2 on images of 24 x 24" in left_out["detail"]
    assert report.reliable and len(report.survivors) == len(report.used)
    assert seen[-1] == ("done", len(seen) - 1, len(seen) - 1)
    _print_checks({"checks": report.record()}, Console())
    assert "not run black-box: left out" in capsys.readouterr().out


def test_what_cannot_be_checked_is_not_measured_again(classifier, images, tmp_path):
    options = {"threat_model": "white-box", "attack": "deepfool", "progress": False, "out": tmp_path}
    assert benchmark(classifier, tiny_purifier(), images, **options).record["checks"] is None
    assert benchmark(classifier, tiny_purifier(), images, **options).resumed == -1


def test_bars_move_while_a_batch_is_attacked(classifier, images, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0)
    benchmark(classifier, tiny_purifier(), images, threat_model="white-box", attack="pgd-20", eps=0.2, check_images=4)
    bars = capsys.readouterr().err
    attack, check = (re.findall(rf"{title}.*?calls=(\d+)", bars) for title in ("white-box", "gradient-masking"))
    assert {*map(int, attack)} >= {*range(1, 21)} and max(map(int, check)) > 100 and "check=transfer" in bars
    assert not any(module._forward_hooks for module in classifier.modules())


def test_progress_counts_the_attacks(classifier, pixels, monkeypatch):
    monkeypatch.setattr(checks, "STEPS", (1, 5))
    monkeypatch.setattr(checks, "SWEEP_STEPS", 5)
    seen = []
    checked(tiny_purifier(), classifier, pixels, progress=lambda *told: seen.append(told))
    assert [done for _, done, _ in seen] == list(range(len(seen))) and {total for *_, total in seen} == {len(seen) - 1}
    assert {name for name, *_ in seen} == CHECKS - {"gradient"} | {"done"}


def test_few_images_and_any_radius(classifier, pixels):
    assert "images" in checked(tiny_purifier(), classifier, pixels[:6]).failed
    for eps in (0.15, 100):
        defended = PurifiedClassifier(tiny_purifier(), classifier)
        labels = defended(pixels).argmax(-1)
        report = gradient_masking_checks(defended, pixels, labels, eps=eps)
        assert "images" not in report.failed and len(report.survivors) == len(report.used) == 24


def test_on_too_few_images_no_attack_is_said_to_be_the_stronger_one_nor_not_to_be(classifier, pixels, capsys):
    """Six broken of six may be chance at 1 %, seven of seven not."""
    right, broken = torch.ones(7, dtype=torch.bool), torch.zeros(7, dtype=torch.bool)
    for n, found in ((6, None), (7, False)):
        report = checks.MaskingReport([], list(range(n)), broken[:n].tolist())
        told = checks.attack_check(report, right, "PGD-2")
        assert told.passed is found and ("too few images to tell" in told.detail) == (n == 6)
        assert ("too weak" in told.detail) == (n == 7)
        assert checks._not_stronger("transfer", "PGD", broken[:n], right[:n]).passed is found
        assert checks._step_sweep({1: broken[:n], 60: right[:n]}).passed is found
        assert checks._eps_sweep({8.0: broken[:n], 128.0: broken[:n]}).passed is (None if n == 6 else True)
    assert checks._eps_sweep({8.0: right[:6], 128.0: right[:6]}).passed is False  # that, six images tell
    report = checked(tiny_purifier(), classifier, pixels[:6])
    assert report.failed == ["images"] and not report.reliable
    assert [check.name for check in report.results if check.passed] == ["gradient"]
    _print_checks({"checks": report.record()}, Console())
    assert "unknown step sweep: 1 steps: " in capsys.readouterr().out


def test_nothing_right_is_nothing_to_check(classifier, pixels):
    with torch.no_grad():
        wrong = (classifier(pixels).argmax(-1) + 1) % 3
    report = gradient_masking_checks(PurifiedClassifier(None, classifier), pixels, wrong)
    assert report.failed == ["images"] and not report.used
