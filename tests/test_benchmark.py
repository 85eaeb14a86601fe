"""`benchmark`: threat models, records, resumption, processes and error paths, on tiny models."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MethodType, SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, SIZE, FragileClassifier, image_rows, picture, pixels_of, save_classifier, tiny_purifier
from torch import fx, nn

from maep_hf.adaptation import add_lora, default_lora_config
from maep_hf.attacks import make_attack
from maep_hf.classifier import PixelClassifier, PurifiedClassifier
from maep_hf.classifier_sources import load_frozen_classifier
from maep_hf.configuration_cifar_resnet import CifarResNetConfig
from maep_hf.data import DataError, load_image_dataset
from maep_hf.evaluation import EvaluationImages, benchmark, judge, read_images
from maep_hf.evaluation.fingerprint import Opaque, fingerprint
from maep_hf.evaluation.gradient_probe import gradient_probe
from maep_hf.evaluation.judge import judge_batch
from maep_hf.evaluation.progress import counted_calls
from maep_hf.evaluation.tables import markdown_table
from maep_hf.evaluation.threat_models import attacked_model
from maep_hf.modeling_cifar_resnet import CifarResNetForImageClassification
from maep_hf.records import read_jsonl

PGD = {"attack": "pgd", "attack_options": {"steps": 3}, "batch_size": 4, "progress": False, "checks": False}
MACHINE = ("ms_per_image", "memory_mb_per_image", "environment")


@pytest.fixture
def classifier():
    return PixelClassifier(FragileClassifier(pixels_of(9).float() / 255))


@pytest.fixture
def images(classifier) -> EvaluationImages:
    """Nine images whose labels are the classifier's own predictions, so that there is something to lose."""
    pixels = pixels_of(9)
    return EvaluationImages(pixels, classifier(pixels.float() / 255).argmax(-1), "made", "test")


def stable(record: dict) -> dict:
    """A record without what a clock or the machine decides."""
    return json.loads(json.dumps({key: value for key, value in record.items() if key not in MACHINE}))


class Spy(nn.Module):
    """Counts what passes through and adds a constant correction."""

    def __init__(self, shift: float = 0.0):
        super().__init__()
        self.shift, self.calls, self.with_gradient = shift, 0, 0

    def forward(self, pixels):
        self.calls += 1
        self.with_gradient += bool(pixels.requires_grad and torch.is_grad_enabled())
        return (pixels + self.shift).clamp(0, 1)

    def record(self):
        return {"shift": self.shift}


def test_a_record_says_everything(classifier, images):
    result = benchmark(classifier, tiny_purifier(), images, classifier_name="c", purifier_name="p", **PGD)
    record, protocol = result.record, result.record["protocol"]
    assert json.loads(json.dumps(record)) == record
    assert protocol["threat_model"] == "gray-box" and protocol["seed"] == 0 and protocol["batch_size"] == 4
    assert protocol["attack"]["eps"] == 8 and protocol["attack"]["steps"] == 3 and "foolbox" in str(protocol["attack"])
    assert protocol["dataset"] | {"fingerprint": ""} == {
        "name": "made", "split": "test", "images": "the first 9", "n": 9, "size": [SIZE, SIZE], "fingerprint": ""
    }  # fmt: skip
    assert protocol["purifier"]["name"] == "p" and protocol["purifier"]["randomised"] is False
    assert record["accuracy"]["clean"]["percent"] == 100 > record["accuracy"]["attacked"]["percent"]
    assert record["accuracy"]["purified_attacked"]["n"] == 9
    assert 0 < record["perturbation"]["linf_255"]["max"] <= 8.001
    assert record["ms_per_image"]["attack"] > 0 and record["ms_per_image"]["purify"] > 0
    assert set(result.images) == {"clean", "attacked", "purified"} and len(result.images["clean"]) == 4
    assert record["environment"]["versions"]["torch"]


def test_figures_are_those_of_the_images(classifier, images):
    purifier = tiny_purifier().eval()
    record = benchmark(classifier, purifier, images, **PGD).record
    x, y = images.batch(0, 9, "cpu")
    attack = make_attack("pgd", eps=8, steps=3)
    attacked = torch.cat([attack(classifier, a, b, seed=0) for a, b in zip(x.split(4), y.split(4), strict=True)])
    with torch.no_grad():
        purified = purifier.purify(attacked)
        right = (classifier(purified).argmax(-1) == y).sum().item()
    assert record["accuracy"]["purified_attacked"]["correct"] == right
    error = (attacked - x).square().flatten(1).mean(1)
    assert record["psnr_db"]["attacked"] == pytest.approx((-10 * error.log10()).mean().item(), rel=1e-4)
    cosine = torch.cosine_similarity((purified - attacked).flatten(1), (x - attacked).flatten(1)).mean().item()
    assert record["cosine"]["true_direction"] == pytest.approx(cosine, rel=1e-3)


def test_distances_are_of_the_images_that_the_attack_changed(classifier, images):
    """AutoAttack leaves alone what the classifier has wrong; such an image is no small perturbation."""
    wrong = replace(images, labels=torch.cat([images.labels[:5], (images.labels[5:] + 1) % classifier.num_labels]))
    options = PGD | {"attack": "apgd-ce", "attack_options": {"n_iter": 3}}
    record = benchmark(classifier, tiny_purifier(), wrong, **options).record
    x, y = wrong.batch(0, 9, "cpu")
    attack = make_attack("apgd-ce", eps=8, n_iter=3)
    attacked = torch.cat([attack(classifier, a, b, seed=0) for a, b in zip(x.split(4), y.split(4), strict=True)])
    moved = (attacked != x).flatten(1).any(1)
    assert 0 < moved.sum() <= 5
    error = (attacked - x)[moved].square().flatten(1).mean(1)
    assert record["psnr_db"]["attacked"] == pytest.approx((-10 * error.log10()).mean().item(), rel=1e-4)
    assert record["ssim"]["attacked"] < 1
    assert record["perturbation"]["images"] == record["cosine"]["images"] == moved.sum()
    length = (attacked - x)[moved].flatten(1).norm(dim=1).mean().item()
    assert record["perturbation"]["l2"]["mean"] == pytest.approx(length, rel=1e-4)
    with torch.no_grad():
        correction = (tiny_purifier().eval().purify(attacked) - attacked)[moved].flatten(1)
    cosine = torch.cosine_similarity(correction, (x - attacked)[moved].flatten(1)).mean().item()
    assert record["cosine"]["true_direction"] == pytest.approx(cosine, rel=1e-3)


def test_right_images_that_were_never_attacked_are_told(classifier, images):
    """A purifier that puts a wrong image right has its figure under attack raised by it, as in papers."""
    x, predicted = images.batch(0, 9, "cpu")
    labels = predicted.roll(1)  # each is the class of another image

    class Healer(nn.Module):
        def forward(self, pixels):  # an image of the class that it should be
            index = (pixels[:, None] - x[None]).abs().flatten(2).amax(2).argmin(1)
            return torch.stack([x[(predicted == labels[each]).nonzero()[0, 0]] for each in index])

    found = replace(images, labels=labels)
    options = PGD | {"attack": "apgd-ce", "attack_options": {"n_iter": 3}, "batch_size": 9}
    record = benchmark(classifier, Healer(), found, **options).record
    wrong = int((predicted != labels).sum())
    assert 0 < wrong < 9 and record["accuracy"]["purified_attacked"]["correct"] == 9
    assert record["perturbation"]["images"] == 9 - wrong
    assert record["perturbation"]["right_of_the_others"] == wrong


def test_a_perfect_purifier_undoes_everything(classifier, images):
    x, _ = images.batch(0, 9, "cpu")

    class Oracle(nn.Module):
        def forward(self, pixels):
            distance = (pixels[:, None] - x[None]).abs().flatten(2).amax(2)
            return x[distance.argmin(1)]

    record = benchmark(classifier, Oracle(), images, **PGD).record
    assert record["accuracy"]["purified_attacked"]["percent"] == 100
    assert record["cosine"]["true_direction"] == pytest.approx(1, abs=1e-4)
    assert record["cosine"]["undone_share"] == pytest.approx(1, abs=1e-4)
    assert record["psnr_db"]["purified_attacked"] == 100 and record["ssim"]["purified_attacked"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("threat_model", "sees", "gradient"),
    [("gray-box", False, False), ("bpda", True, False), ("white-box", True, True), ("black-box", True, False)],
)
def test_what_each_threat_model_sees(classifier, images, threat_model, sees, gradient):
    spy = Spy()
    attack = make_attack("square", n_queries=5) if threat_model == "black-box" else make_attack("pgd", steps=2)
    model = attacked_model(threat_model, classifier, spy)
    x, y = images.batch(0, 4, "cpu")
    attack(model, x, y, seed=0)
    assert (spy.calls > 0) == sees and (spy.with_gradient > 0) == gradient


def test_white_box_differentiates_through_the_purifier(classifier, images):
    """Against a purifier that mirrors the image, only the attacker who knows it pushes the pixels the right way."""

    class Mirror(nn.Module):
        def forward(self, pixels):
            return pixels.flip(-1)

    flipped = EvaluationImages(images.pixels.flip(-1), images.labels)
    percent = {
        name: benchmark(classifier, Mirror(), flipped, threat_model=name, eps=4, **PGD).record["accuracy"]
        for name in ("gray-box", "white-box")
    }
    assert percent["white-box"]["purified_clean"]["percent"] == 100
    assert percent["white-box"]["purified_attacked"]["correct"] < percent["gray-box"]["purified_attacked"]["correct"]


@pytest.mark.parametrize("threat_model", ["bpda", "white-box"])
def test_an_adaptive_attack_meets_the_purifier_as_it_is_measured(classifier, images, threat_model):
    shifts = set()

    class Shifting(nn.Module):
        def purify(self, pixels, shift=0.0):
            shifts.add(shift)
            return (pixels + shift).clamp(0, 1)

    benchmark(classifier, Shifting(), images, threat_model=threat_model, purify_kwargs={"shift": 0.01}, **PGD)
    assert shifts == {0.01}


def test_another_seed_makes_other_attacked_images(classifier, images):
    first, again, other = (benchmark(classifier, None, images, **PGD | {"seed": seed}).images for seed in (0, 0, 1))
    assert torch.equal(first["attacked"], again["attacked"]) and not torch.equal(first["attacked"], other["attacked"])


def test_transfer_attacks_the_source(classifier, images, tmp_path):
    source = load_frozen_classifier(save_classifier(tmp_path / "other", seed=5))
    options = {"threat_model": "transfer", "source": source, **PGD}
    record = benchmark(classifier, tiny_purifier(), images, **options).record
    x, y = images.batch(0, 4, "cpu")
    expected = make_attack("pgd", steps=3)(source, x, y, seed=0)
    kept = benchmark(classifier, tiny_purifier(), images, out=tmp_path / "out", **options)
    torch.testing.assert_close(kept.images["attacked"][:4], expected)
    assert record["protocol"]["source"]["fingerprint"] == fingerprint(source)
    with pytest.raises(ValueError, match="source"):
        benchmark(classifier, None, images, threat_model="transfer", **PGD)


def test_a_fingerprint_is_that_of_another_torch(monkeypatch):
    model = tiny_purifier()
    known = fingerprint(model)
    said = nn.LayerNorm.extra_repr
    monkeypatch.setattr(nn.LayerNorm, "extra_repr", lambda self: said(self).partition(", bias=")[0])  # torch 2.6
    assert fingerprint(model) == known


def test_a_source_with_its_classes_in_another_order_is_given_the_right_labels(classifier_folder, images, tmp_path):
    """Else its attack leaves wrong classes alone, and the robust figure is too high."""

    def source(order):
        model = load_frozen_classifier(classifier_folder)
        names = list(model.id2label.values())
        head = model.classifier.classifier
        with torch.no_grad():
            head.weight.copy_(head.weight[order].clone())
            head.bias.copy_(head.bias[order].clone())
        model.classifier.config.id2label = {index: names[own] for index, own in enumerate(order)}
        return PurifiedClassifier(None, model)

    classifier = load_frozen_classifier(classifier_folder)
    labels = classifier(images.pixels.float() / 255).argmax(-1)
    named = EvaluationImages(images.pixels, labels, class_names=tuple(classifier.id2label.values()))
    options = {"threat_model": "transfer", "eps": 16, **PGD}
    expected = benchmark(classifier, None, named, source=source([0, 1, 2]), out=tmp_path / "same", **options)
    with pytest.warns(UserWarning, match="source: its classes stand in another order"):
        turned = benchmark(classifier, None, named, source=source([2, 0, 1]), out=tmp_path / "turned", **options)
    torch.testing.assert_close(turned.images["attacked"], expected.images["attacked"])


def named_classifier(names: list[str] | None, order: tuple[int, ...] = (0, 1, 2)) -> PixelClassifier:
    """The fixture's classifier with its classes in another order, and names for them where there are some."""
    model = FragileClassifier(pixels_of(9).float() / 255)
    model.projection.weight.data = model.projection.weight.data[list(order)]
    model.config = SimpleNamespace(id2label=dict(enumerate(names)) if names else None)
    return PixelClassifier(model)


def test_a_source_is_matched_to_the_dataset_where_the_classifier_has_no_names(images, tmp_path):
    named = replace(images, class_names=("red", "green", "blue"))
    options = {"threat_model": "transfer", "eps": 16, **PGD}
    same = named_classifier(["red", "green", "blue"])
    expected = benchmark(named_classifier(None), None, named, source=same, out=tmp_path / "same", **options)
    turned = named_classifier(["Blue", "red", "green"], (2, 0, 1))
    for names in (None, ["LABEL_0", "LABEL_1", "LABEL_2"], ["n01", "n02", "n03"]):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        found = benchmark(named_classifier(names), None, named, source=turned, out=out, **options)
        torch.testing.assert_close(found.images["attacked"], expected.images["attacked"])
        assert turned.class_order is None and list(turned.id2label.values()) == ["Blue", "red", "green"]


def test_a_source_has_its_own_order_again_for_the_next_classifier(images, tmp_path):
    """Else a classifier without names would be attacked in the order of the one before it."""
    source, nameless = named_classifier(["red", "green", "blue"]), named_classifier(None)
    other = named_classifier(["green", "blue", "red"], (1, 2, 0))
    named = replace(images, class_names=("red", "green", "blue"))
    options = {"threat_model": "transfer", "source": source, "eps": 16, **PGD}
    records = [benchmark(model, None, named, **options).record for model in (nameless, other, nameless)]
    assert stable(records[0]) == stable(records[2])
    assert records[1]["accuracy"] == records[0]["accuracy"]
    source.match_classes(["blue", "green", "red"])  # the user's own: what others are matched from, and what is kept
    kept = source.class_order.clone()
    again = benchmark(other, None, named, **options).record
    assert again["accuracy"] == records[1]["accuracy"] and torch.equal(source.class_order, kept)
    with pytest.raises(ValueError, match="labels go from"):
        benchmark(nameless, None, replace(named, labels=named.labels + 9), **options)
    assert torch.equal(source.class_order, kept)


@pytest.mark.parametrize(
    ("own", "classifier_names", "dataset", "said"),
    [
        (["a", "b", "c"], ["x", "y", "z"], None, "not the classifier's (a, b, c / x, y, z); taken by index"),
        (["a", "b", "c"], None, ("x", "y", "z"), "not the dataset's (a, b, c / x, y, z); taken by index"),
        (["a", "b", "c"], ["x", "y", "z"], ("p", "q", "r"), "not the classifier's (a, b, c / x, y, z)"),
        (["a", "b", "c"], ["x", "y", "z"], ("a", "b", "c"), None),
        (["a", "b", "c"], ["a", "b", "c"], ("x", "y", "z"), None),
        (None, ["x", "y", "z"], None, None),
        (None, ["0", "10", "2"], ("0", "10", "2"), "of the dataset, its classes are numbers in the order of the alpha"),
        (None, None, ("0", "10", "2"), None),
        (["b", "c", "a"], ["a", "b", "c"], None, "another order than the classifier's"),
    ],
)
def test_a_source_whose_names_are_others_is_warned_of_once(images, own, classifier_names, dataset, said):
    source, named = named_classifier(own), replace(images, class_names=dataset)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for eps in (8, 16):
            options = {"threat_model": "transfer", "source": source, "eps": eps, **PGD}
            benchmark(named_classifier(classifier_names), None, named, **options)
    told = [str(warning.message) for warning in caught if str(warning.message).startswith("source: ")]
    assert len(told) == (said is not None) and (said or "") in "".join(told)


def test_without_a_purifier_the_classifier_itself_is_measured(classifier, images):
    record = benchmark(classifier, None, images, **PGD).record
    assert record["protocol"]["threat_model"] == "white-box" and record["protocol"]["purifier"] is None
    assert record["accuracy"]["purified_attacked"] is None and record["checks"] is None
    assert record["accuracy"]["attacked"]["correct"] < 9


def test_any_callable_can_be_measured(classifier, images):
    record = benchmark(classifier, lambda pixels: pixels.round(), images, purifier_name="rounding", **PGD).record
    assert record["protocol"]["purifier"]["name"] == "rounding"


class Blend(nn.Module):
    """What it does is in a plain attribute alone."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, pixels):
        return pixels * (1 - self.share) + 0.5 * self.share


class Callable:
    def __init__(self, share):
        self.share = share

    def __call__(self, pixels):
        return pixels * self.share


def test_nothing_stored_is_taken_for_another_purifier(classifier, images, tmp_path):
    def scaled(share):
        return lambda pixels: pixels * share

    def half(pixels, share):
        return pixels * share

    pairs = [(Blend(0.0), Blend(1.0)), (scaled(1.0), scaled(0.5)), (lambda x: x * 1, lambda x: x * 0.5),
             (nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(5, 1, 2)), (partial(half, share=1.0), partial(half, share=0.5)),
             (Callable(1.0), Callable(0.5)),
             *((Holder(kind, 1.0), Holder(kind, 0.5)) for kind in Holder.kinds)]  # fmt: skip
    for index, (first, second) in enumerate(pairs):
        out = tmp_path / str(index)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept = benchmark(classifier, first, images, out=out, **PGD)
            other = benchmark(classifier, second, images, out=out, **PGD)
        assert other.resumed >= 0 and other.record["psnr_db"] != kept.record["psnr_db"], (first, second)
    assert fingerprint(scaled(1.0)) == fingerprint(scaled(1.0))
    with pytest.raises(Opaque, match="record"):
        fingerprint(Callable(1.0))
    assert fingerprint(PixelClassifier(pairs[1][0])) != fingerprint(PixelClassifier(pairs[1][1]))


class Private(nn.Module):
    """What it does is in a private attribute, or in hooks on a layer of a library's."""

    def __init__(self, kept, **hooks):
        super().__init__()
        self._kept, self._itself = kept, [self]
        self.layer = nn.Identity()
        for kind, hook in hooks.items():
            getattr(self.layer, f"register_{kind}")(hook)

    def forward(self, pixels):
        return self.layer(pixels)


@pytest.mark.parametrize(
    "make",
    [
        lambda share: Private(share),
        lambda share: Private(torch.full((3, 1, 1), share)),
        lambda share: Private(lambda pixels: pixels * share),
        lambda share: Private([Blend(share)]),
        lambda share: Private(0, forward_hook=lambda layer, inputs, output: output * share),
        lambda share: Private(0, forward_pre_hook=partial(lambda layer, inputs, by: inputs[0] * by, by=share)),
        lambda share: PixelClassifier(Private(share)),
    ],
    ids=["number", "tensor", "function", "layers", "hook", "pre-hook", "inside"],
)
def test_private_state_and_hooks_of_ones_own_are_told_apart(make):
    assert fingerprint(make(1.0)) == fingerprint(make(1.0)) != fingerprint(make(0.5))


def test_what_libraries_put_on_a_module_leaves_its_fingerprint():
    own, layer = Private(1.0), nn.Conv2d(3, 3, 1)
    known, of_layer = fingerprint(own), fingerprint(layer)
    own._hf_hook, own._is_hf_initialized, layer._kept = object(), True, object()
    with counted_calls(own, SimpleNamespace(), {}):
        assert (fingerprint(own), fingerprint(layer)) == (known, of_layer)


class Scaled(CifarResNetForImageClassification):
    """Somebody's own subclass of a transformers model."""

    def __init__(self, share):
        super().__init__(CifarResNetConfig(depth=8))
        self.share = share

    def forward(self, pixel_values, **kwargs):
        output = super().forward(pixel_values, **kwargs)
        output.logits = output.logits * self.share
        return output


def patched(share: float, name: str) -> nn.Module:
    """A model of this package with a method put over its own."""
    model = tiny_purifier()
    setattr(model, name, MethodType(lambda self, pixels, **kwargs: pixels * share, model))
    return model


def scripted(share: float, freeze: bool = False) -> nn.Module:
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.share, self.tensor = share, torch.ones(4) * share

        def forward(self, pixels):
            return pixels * self.share + self.tensor

    program = torch.jit.script(Kept().eval())
    return torch.jit.freeze(program) if freeze else program


def traced_by_fx(share: float, tensor: bool = False) -> nn.Module:
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = torch.full((1,), share) if tensor else share

        def forward(self, pixels):
            return pixels * self.kept

    return fx.symbolic_trace(Layer())


@pytest.mark.parametrize(
    "make",
    [
        lambda share: Scaled(share),
        lambda share: PixelClassifier(Scaled(share), do_resize=False, image_mean=0, image_std=1),
        lambda share: patched(share, "forward"),
        lambda share: patched(share, "purify"),
        lambda share: torch.jit.trace(Blend(share), torch.rand(1, 3, 4, 4)),
        scripted,
        partial(scripted, freeze=True),
        traced_by_fx,
        partial(traced_by_fx, tensor=True),
        lambda share: Private(0, full_backward_hook=lambda layer, inputs, outputs: (outputs[0] * share,)),
        lambda share: Private(0, full_backward_pre_hook=lambda layer, outputs: (outputs[0] * share,)),
    ],
    ids=["subclass", "inside", "forward", "purify", "traced", "scripted", "frozen", "fx", "fx tensor", "backward hook",
         "backward pre-hook"],
)  # fmt: skip
def test_models_that_differ_beside_their_weights_are_told_apart(make):
    def mark(share):
        torch.manual_seed(0)
        return fingerprint(make(share))

    assert mark(1.0) == mark(1.0) != mark(0.5)


BODY = """
import torch
SHARE = {share}
def scaled(pixels):
    return pixels * SHARE
class Purifier(torch.nn.Module):
    gain = {gain}
    def forward(self, pixels):
        if pixels.ndim in {{4, 5}}:
            return (lambda values: values * {inner})(scaled(pixels)) * self.gain
    @staticmethod
    def help(pixels):
        return pixels + {inner}
"""


def written(folder: Path, monkeypatch, share=1.0, gain=1.0, inner=1.0):
    """The module of somebody's own purifier, in a file of its own."""
    folder.mkdir()
    (folder / "own_purifier.py").write_text(BODY.format(share=share, gain=gain, inner=inner))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "own_purifier", raising=False)
    return importlib.import_module("own_purifier")


def test_code_of_ones_own_is_told_apart(classifier, images, tmp_path, monkeypatch):
    """Two versions of one file: same names, same weights, other methods or global values."""
    settings = [{}, {"share": 0.5}, {"gain": 0.5}, {"inner": 0.5}]
    found = [written(tmp_path / str(index), monkeypatch, **kwargs) for index, kwargs in enumerate(settings)]
    marks = [fingerprint(module.Purifier()) for module in found]
    assert len(set(marks)) == 4
    assert marks[0] == fingerprint(written(tmp_path / "again", monkeypatch).Purifier())
    assert fingerprint(found[0].scaled) != fingerprint(found[1].scaled)
    assert fingerprint(found[0].Purifier.help) != fingerprint(found[3].Purifier.help)
    first, second = [
        benchmark(classifier, found[index].Purifier(), images, out=tmp_path / "out", **PGD) for index in (0, 2)
    ]
    assert second.resumed >= 0 and second.record["psnr_db"] != first.record["psnr_db"]


OWN_HELPERS = """
FACTOR = {share}
def soften(pixels):
    return pixels * FACTOR
def elsewhere(pixels):
    return pixels + {other}
"""
WITH_HELPERS = """
import torch
import own_helpers
class Purifier(torch.nn.Module):
    def forward(self, pixels):
        return own_helpers.soften(pixels)
def closing():
    import own_helpers as inner
    return lambda pixels: inner.soften(pixels)
"""


def test_code_that_is_reached_through_a_module_of_ones_own_is_told_apart(tmp_path, monkeypatch):
    marks = []
    for index, (share, other) in enumerate([(1.0, 0.0), (0.5, 0.0), (1.0, 0.5)]):
        (folder := tmp_path / str(index)).mkdir()
        (folder / "own_helpers.py").write_text(OWN_HELPERS.format(share=share, other=other))
        (folder / "with_helpers.py").write_text(WITH_HELPERS)
        monkeypatch.syspath_prepend(folder)
        for name in ("own_helpers", "with_helpers"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module("with_helpers")
        marks.append((fingerprint(module.Purifier()), fingerprint(module.closing())))
    for first, edited, elsewhere in zip(*marks, strict=True):  # what is not reached says nothing
        assert first != edited and first == elsewhere


def test_fingerprints_of_code_are_those_of_another_process(tmp_path, monkeypatch):
    """A set of strings stands in another order in every process."""
    code = "def pick(pixels):\n    return pixels if str(pixels.dtype) in {'torch.half', 'torch.float', 'x'} else 0\n"
    (tmp_path / "own_function.py").write_text(code)
    script = (
        "import own_function as own; from maep_hf.evaluation.fingerprint import fingerprint as mark; "
        "print(mark(own.pick))"
    )
    marks = {
        subprocess.run(
            [sys.executable, "-c", script], check=True, capture_output=True, text=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(marks) == 1


class Holder(nn.Module):
    """Scales by a number that it keeps in one of the usual ways, and holds itself."""

    kinds = {
        "tensor": (torch.tensor, lambda kept: kept),
        "array": (np.array, lambda kept: torch.from_numpy(kept).float()),
        "namespace": (lambda share: SimpleNamespace(share=share, device=torch.device("cpu")), lambda kept: kept.share),
        "modules": (lambda share: [Blend(share)], lambda kept: kept[0].share),
        "buffer": (None, lambda kept: kept),
    }

    def __init__(self, kind, share):
        super().__init__()
        make, self.read = self.kinds[kind]
        if make is None:
            self.register_buffer("kept", torch.tensor(share), persistent=False)
        else:
            self.kept = make(share)
        self.parents = [self]

    def forward(self, pixels):
        return pixels * self.read(self.kept)


def test_what_cannot_be_read_is_opaque():
    holder = Holder("tensor", 1.0)
    assert fingerprint(holder) == fingerprint(Holder("tensor", 1.0))
    holder.draws = torch.Generator()
    with pytest.raises(Opaque, match="Generator"):
        fingerprint(holder)


def test_adapters_are_known_by_their_settings():
    def adapted(alpha):
        purifier = add_lora(tiny_purifier(), default_lora_config(tiny_purifier(), rank=2, alpha=alpha))
        with torch.no_grad():
            for name, parameter in purifier.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        return purifier

    first = adapted(2)
    assert fingerprint(first) != fingerprint(adapted(200))
    known = fingerprint(first)
    with first.disable_adapter():
        assert fingerprint(first) != known
    assert fingerprint(first) == known


def test_another_strength_is_another_purifier():
    purifier = tiny_purifier()
    known, found = fingerprint(purifier), []
    for strength in (1, 1.0, 1.3):
        purifier.config.purify_strength = strength
        found.append(fingerprint(purifier))
    del purifier.config.purify_strength  # as the field was not there when the release's records were made
    assert found[:2] == [known, known] == [fingerprint(purifier)] * 2 and found[2] != known


def test_gray_box_images_are_attacked_once_for_all_purifiers(classifier, images, tmp_path):
    first = benchmark(classifier, Spy(0.01), images, out=tmp_path, **PGD)
    second = benchmark(classifier, Spy(0.02), images, out=tmp_path, **PGD)
    white = benchmark(classifier, Spy(0.02), images, threat_model="white-box", out=tmp_path, **PGD)
    again = benchmark(classifier, Spy(0.02), images, out=tmp_path, **PGD)
    assert [first.resumed, second.resumed, white.resumed, again.resumed] == [0, 3, 0, -1]
    assert again.record == json.loads(json.dumps(second.record))
    assert len(read_jsonl(tmp_path / "results.jsonl")) == 3
    other = benchmark(classifier, Spy(0.02), images, out=tmp_path, **PGD | {"seed": 1})
    assert other.resumed == 0 and other.record["key"] != second.record["key"]


def test_attacked_images_are_taken_again_only_for_what_the_attack_met(classifier, images, tmp_path):
    def resumed(share, threat_model, source=None):
        options = PGD | {"threat_model": threat_model, "source": source, "out": tmp_path}
        return benchmark(classifier, Blend(share), images, **options).resumed

    for threat_model in ("bpda", "white-box"):
        assert [resumed(share, threat_model) for share in (0.1, 0.2)] == [0, 0]
    first, second = (PurifiedClassifier(Blend(share), classifier) for share in (0.1, 0.2))
    assert [resumed(0.1, "transfer", first), resumed(0.2, "transfer", first)] == [0, 3]
    assert resumed(0.1, "transfer", second) == 0


def test_weights_and_options_are_part_of_the_key(classifier, images):
    def key(purifier, **options):
        return benchmark(classifier, purifier, images, **PGD | options).record["key"]

    purifier = tiny_purifier()
    same, overlap = key(purifier), key(purifier, purify_kwargs={"overlap": 0.5})
    assert key(tiny_purifier(), purifier_name="another name") == same != overlap
    with torch.no_grad():
        purifier.decoder.head.weight.add_(1e-3)
    assert key(purifier) != same


def test_random_purifiers_are_seen_and_averaged(classifier, images):
    class Noise(nn.Module):
        def forward(self, pixels):
            return (pixels + 0.05 * torch.randn_like(pixels)).clamp(0, 1)

    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    bare = benchmark(PixelClassifier(Spoiled(classifier)), None, images, **PGD).record
    assert bare["protocol"]["passes"] == 10
    records = [benchmark(classifier, Noise(), images, **PGD).record for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert stable(records[0]) == stable(records[1])
    assert records[0]["protocol"]["passes"] == 10 and records[0]["protocol"]["purifier"]["randomised"] is True
    accuracy = records[0]["accuracy"]
    assert accuracy["purified_attacked_every_pass"]["percent"] <= accuracy["purified_attacked"]["percent"]


def test_the_row_of_an_image(classifier):
    """A change below half a grey level is none once the image is stored."""
    x, about = torch.full((4, 3, SIZE, SIZE), 0.5), {"attack_seconds": 1.0, "memory_bytes_per_image": 7.0}
    attacked = x.clone()
    attacked[:, :, :4] += 4 / 255
    attacked[:, :, 4:8] -= 0.4 / 255
    labels = torch.zeros(4, dtype=torch.long)
    row = judge_batch(classifier, PurifiedClassifier(None, classifier), x, attacked, labels, 1, 0, about, 8)[1]
    quarter = 3 * SIZE * SIZE / 4
    found = {name: row[name] for name in ("index", "linf_255", "l1", "l2", "changed_percent", "ms_attack")}
    expected = {"index": 9, "linf_255": 4, "l1": quarter * 4.4 / 255, "l2": (quarter * 16.16) ** 0.5 / 255}
    assert found == pytest.approx(expected | {"changed_percent": 25, "ms_attack": 250}, rel=1e-4)
    just = x + 0.6 / 255  # enough for another level
    row, *_ = judge_batch(classifier, PurifiedClassifier(None, classifier), x, just, labels, 1, 0, about, 8)
    assert row["changed_percent"] == 100


def test_the_row_of_a_purified_image(monkeypatch):
    seconds = iter((2.0, 4.0, 6.0))  # of the classifier, of the first pass, and of another one, which is not shown
    purified, met = [], []

    def timed(function, device):
        before = len(purified)
        result = function()
        met.append(len(purified) - before)  # what was timed: without the purifier, or once through it
        return result, next(seconds)

    monkeypatch.setattr(judge, "timed", timed)

    class Bright(nn.Module):
        def forward(self, pixels):
            return torch.stack([torch.full((len(pixels),), 0.55), pixels.mean((1, 2, 3))], 1)

    clean, about = torch.full((4, 3, SIZE, SIZE), 0.5), {"attack_seconds": 1.0, "memory_bytes_per_image": 7.0}
    defended = PurifiedClassifier(lambda pixels: purified.append(0.9 * pixels) or purified[-1], Bright())
    labels = torch.tensor([0, 1, 0, 0])
    first, second, *_ = judge_batch(defended.classifier, defended, clean, clean + 0.2, labels, 2, 0, about, 0)
    assert {name: first[f"ms_{name}"] for name in ("attack", "classify", "purify")} == {
        "attack": 250, "classify": 500, "purify": 1000,
    }  # fmt: skip
    errors = {"attacked": 0.2, "purified_attacked": 0.13, "purified_clean": 0.05}
    found = {name: first[f"psnr_{name}"] for name in errors}
    assert found == pytest.approx({name: -20 * np.log10(error) for name, error in errors.items()}, rel=1e-4)
    assert (first["cosine_true_direction"], first["undone"]) == pytest.approx((1, 0.07 / 0.2), rel=1e-4)
    for row, right in ((first, {"clean", "purified_clean"}), (second, {"attacked", "purified_attacked"})):
        assert {name for name in ("clean", *errors) if row[f"right_{name}"]} == right
    assert first["memory_bytes_per_image"] == 7 and met == [0, 1, 1]


def test_an_image_is_always_right_where_every_pass_is():
    class Fading(nn.Module):
        """Leaves clean and attacked images as they are in the first pass, and darkens them in the second."""

        calls = 0

        def forward(self, pixels):
            self.calls += 1
            return pixels * (self.calls <= 2)

    class Bright(nn.Module):
        def forward(self, pixels):
            return torch.stack([torch.full((len(pixels),), 0.25), pixels.mean((1, 2, 3))], 1)

    x, about = torch.full((2, 3, SIZE, SIZE), 0.5), {"attack_seconds": 1.0, "memory_bytes_per_image": 1.0}
    defended, both = PurifiedClassifier(Fading(), Bright()), x * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    rows = judge_batch(defended.classifier, defended, both, both, torch.tensor([1, 0]), 2, 0, about, 0)
    for name in ("purified_clean", "purified_attacked"):
        assert [(row[f"right_{name}"], row[f"always_right_{name}"]) for row in rows] == [(0.5, 0), (1, 1)]


def test_a_summary_is_of_the_images_that_it_says():
    names = ("attacked", "purified_clean", "purified_attacked")

    def row(index, psnr, ssim, rights, attack, **others):
        figures = {f"psnr_{name}": value for name, value in zip(names, psnr, strict=True)}
        figures |= {f"ssim_{name}": value for name, value in zip(names, ssim, strict=True)}
        figures |= dict(zip(["right_clean", *(f"right_{name}" for name in names)], rights, strict=True))
        figures |= dict(zip(("linf_255", "l2", "l1", "changed_percent", "cosine_true_direction"), attack, strict=True))
        return {"index": index} | figures | others

    changed = row(
        1, (30, 40, 34), (0.9, 0.8, 0.7), (1, 0, 1, 0.5), (8, 2, 10, 50, 0.5), undone=0.25, ms_attack=1, ms_purify=2,
        ms_classify=3, memory_bytes_per_image=3 * 2**20, always_right_purified_attacked=0,
    )  # fmt: skip
    left_alone = row(
        0, (100, 50, 50), (1.0, 0.9, 0.9), (0, 0, 1, 1), (0, 0, 0, 0, 0), undone=0, ms_attack=3, ms_purify=4,
        ms_classify=5, memory_bytes_per_image=float("nan"), always_right_purified_attacked=1,
    )  # fmt: skip
    found = judge.summarise([changed, left_alone], True, 2)
    percent = {name: share["percent"] for name, share in found["accuracy"].items()}
    assert percent == {
        "clean": 50, "attacked": 0, "purified_clean": 100, "purified_attacked": 75, "purified_attacked_every_pass": 50,
    }  # fmt: skip
    assert found["psnr_db"] == {"attacked": 30, "purified_clean": 45, "purified_attacked": 42}
    assert found["ssim"] == pytest.approx({"attacked": 0.9, "purified_clean": 0.85, "purified_attacked": 0.8})
    assert found["cosine"] == {
        "true_direction": 0.5, "minus_perturbation": 0.5, "undone_share": 0.25, "images": 1
    }  # fmt: skip
    sizes = {"linf_255": {"mean": 8, "max": 8}, "l2": {"mean": 2, "max": 2}, "l1": {"mean": 10, "max": 10}}
    assert found["perturbation"] == sizes | {"changed_percent": 50, "images": 1, "right_of_the_others": 1}
    assert found["ms_per_image"] == {"attack": 2, "purify": 3, "classify": 4} and found["memory_mb_per_image"] == 3
    assert "purified_attacked_every_pass" not in judge.summarise([changed, left_alone], True, 1)["accuracy"]


def test_memory_that_cannot_be_told_is_no_figure(monkeypatch):
    now = judge.psutil.Process().memory_info().rss
    assert now / 2 < judge._peak_rss() < 2**50  # bytes
    for peaks, known in (((2 * now, 2 * now), False), ((now, 3 * now, 3 * now), True), ((0, 0), False)):
        values = iter(peaks)
        monkeypatch.setattr(judge, "_peak_rss", lambda values=values: next(values))
        with judge.peak_memory(torch.device("cpu")) as rise:
            pass
        assert (now < rise.risen < 3 * now) if known else rise.risen != rise.risen


def test_images_are_described_by_height_and_width_and_known_by_their_labels():
    pixels = torch.zeros(2, 3, 5, 7, dtype=torch.uint8)
    first, other = (EvaluationImages(pixels, torch.tensor(labels)).describe() for labels in ([0, 1], [1, 0]))
    assert first["size"] == [5, 7] and (first["n"], first["images"]) == (2, "the first 2")
    assert first["fingerprint"] != other["fingerprint"]


def test_the_final_passes_are_not_of_the_attacks_draws(classifier, images):
    draws = []

    class Drawing(nn.Module):
        def forward(self, pixels):
            draws.append(torch.rand(()).item())
            return pixels

    (x, y), about = images.batch(0, 4, "cpu"), {"attack_seconds": 1.0, "memory_bytes_per_image": 1.0}
    for start in (0, 4):
        judge_batch(classifier, PurifiedClassifier(Drawing(), classifier), x, x, y, 2, 3, about, start)
    seen = torch.rand(8, generator=torch.Generator().manual_seed(3)).tolist()
    assert len(draws) == 8 == len(set(draws)) and not set(draws) & set(seen)


def test_a_random_classifier_alone_is_averaged_too(images):
    class Coin(nn.Module):
        """Right every other time that it sees a pair of clean and attacked images."""

        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, pixels):
            self.calls += 1
            return nn.functional.one_hot(torch.full((len(pixels),), (self.calls - 1) // 2 % 2), 3).float()

    coin, about = Coin(), {"attack_seconds": 1.0, "memory_bytes_per_image": 1.0}
    x, y = images.batch(0, 3, "cpu")
    rows = judge_batch(coin, PurifiedClassifier(None, coin), x, x, y * 0, 4, 0, about, 0, bare_passes=4)
    assert {row[name] for row in rows for name in ("right_clean", "right_attacked")} == {0.5}
    assert {row["right_purified_attacked"] for row in rows} == {0.5}
    random = PixelClassifier(Spoiled(PixelClassifier(FragileClassifier(pixels_of(9).float() / 255))))
    record = benchmark(random, None, images, **PGD).record
    counts = [9 * record["accuracy"][name]["percent"] / 100 for name in ("clean", "attacked")]
    assert record["protocol"]["passes"] == 10 and any(abs(count - round(count)) > 0.05 for count in counts)


def test_classes_are_matched_by_name(classifier_folder, images, caplog):
    classifier = load_frozen_classifier(classifier_folder)
    x, _ = images.batch(0, 9, "cpu")
    labels = classifier(x).argmax(-1)
    names = list(classifier.config.id2label.values())
    order = [2, 0, 1]  # what the dataset calls 0 is the classifier's class 2
    shuffled = torch.tensor([order.index(label) for label in labels.tolist()])
    own = tuple(names[index] for index in order)
    records = [benchmark(classifier, None, EvaluationImages(images.pixels, given, class_names=called), **PGD).record
               for given, called in ((labels, tuple(names)), (shuffled, own))]  # fmt: skip
    assert records[0]["accuracy"]["clean"]["percent"] == 100 and "matched by name" in caplog.text
    assert stable(records[0]) == stable(records[1])
    strange = EvaluationImages(images.pixels, shuffled, class_names=("x", "y", "z"))
    assert strange.in_order_of(names) is strange and strange.in_order_of(None) is strange


@pytest.mark.parametrize("text_keys", [False, True])
def test_class_names_are_read_in_the_order_of_their_indices(tmp_path, text_keys):
    """transformers stores keys of text in the order of the alphabet: 0, 1, 10, 11, 2, ..."""
    folder = save_classifier(tmp_path, classes=12)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = dict(sorted(config["id2label"].items()))
    (folder / "config.json").write_text(json.dumps(config))
    classifier = load_frozen_classifier(folder)
    assert list(classifier.config.id2label)[:3] == [0, 1, 10]
    if text_keys:
        classifier.classifier.config.id2label = {str(key): name for key, name in classifier.config.id2label.items()}
    names = [f"class{index}" for index in range(12)]
    assert list(classifier.id2label.items()) == list(enumerate(names))
    assert not classifier.match_classes(names)
    assert classifier.match_classes(names[::-1]) and list(classifier.id2label.values()) == names[::-1]


@pytest.mark.parametrize(("line", "what"), [("null", "not a JSON object: null"), ('{"key"', "not JSON")])
def test_a_damaged_line_of_the_records_is_named(classifier, images, tmp_path, line, what):
    (tmp_path / "results.jsonl").write_text(f'{{"key": "other"}}\n{line}\n')
    with pytest.raises(ValueError, match=f"results.jsonl, line 2 is {what}"):
        benchmark(classifier, None, images, out=tmp_path, **PGD)


def test_images_of_any_kind_of_array(classifier, images):
    pixels = images.pixels.float() / 255
    expected = stable(benchmark(classifier, None, (pixels, images.labels), **PGD).record)
    for own in ((pixels.numpy(), images.labels.numpy()), (pixels.clone().requires_grad_(), images.labels)):
        assert stable(benchmark(classifier, None, own, **PGD).record) == expected
    half = benchmark(classifier, None, (pixels.bfloat16(), images.labels), **PGD).record
    assert half["protocol"]["dataset"]["n"] == 9


def test_autoattack_is_the_reference_librarys(images, tmp_path):
    from pyautoattack import AutoAttack

    classifier = PixelClassifier(FragileClassifier(pixels_of(9).float() / 255, num_classes=10))
    x, _ = images.batch(0, 6, "cpu")
    y = classifier(x).argmax(-1)
    eps = 0.5  # small enough for some images to hold, so that every part has its turn
    options = {"attack": "autoattack", "eps": eps, "attack_options": {"n_queries": 30}, "batch_size": 6}
    result = benchmark(classifier, None, (x, y), seed=3, progress=False, out=tmp_path, **options)
    reference = AutoAttack(classifier, norm="Linf", eps=eps / 255, seed=3, version="standard")
    reference.square.n_queries = 30
    attacked, predicted = reference.run_standard_evaluation(x, y, batch_size=6)
    assert torch.equal(result.images["attacked"], attacked)
    assert result.record["accuracy"]["attacked"]["correct"] == int((predicted == y).sum())
    assert 0 < result.record["accuracy"]["attacked"]["correct"] < 6


def test_seeds_beyond_numpys_are_taken(classifier, images):
    x, y = images.batch(0, 2, "cpu")  # as those of the images far into a large test set
    about = {"attack_seconds": 1.0, "memory_bytes_per_image": 1.0}
    assert len(judge_batch(classifier, PurifiedClassifier(Spy(), classifier), x, x, y, 1, 0, about, start=50_000)) == 2


class Spoiled(nn.Module):
    """A classifier that draws at random, from NumPy."""

    def __init__(self, classifier):
        super().__init__()
        self.inner = classifier

    def forward(self, pixels):
        return self.inner(pixels + 0.05 * torch.from_numpy(np.random.standard_normal(pixels.shape)).float())


class Blind(nn.Module):
    """A classifier that gives the pixels no gradient, in one of the usual ways."""

    ways = {
        "no_grad": torch.no_grad()(lambda classifier, pixels: classifier(pixels)),
        "8 bits": lambda classifier, pixels: classifier((pixels * 255).to(torch.uint8).float() / 255),
        "rounding": lambda classifier, pixels: classifier((pixels * 255).round() / 255),
    }

    def __init__(self, classifier, way):
        super().__init__()
        self.inner, self.way = classifier, way

    def forward(self, pixels):
        return self.ways[self.way](self.inner, pixels)


@pytest.mark.parametrize("way", Blind.ways)
def test_a_classifier_without_a_gradient_is_no_robust_one(classifier, images, way):
    blind = PixelClassifier(Blind(classifier, way))
    for purifier in (None, tiny_purifier()):
        with pytest.raises(ValueError, match="classifier deaf gives the pixels no gradient.*square"):
            benchmark(blind, purifier, images, classifier_name="deaf", **PGD)
    source = PurifiedClassifier(None, blind)
    with pytest.raises(ValueError, match="source deaf gives the pixels no gradient"):
        benchmark(classifier, None, images, threat_model="transfer", source=source, source_name="deaf", **PGD)
    square = PGD | {"attack": "square", "attack_options": {"n_queries": 2}}
    assert "gradient" not in benchmark(blind, None, images, **square).record


@pytest.mark.parametrize("threat_model", ["white-box", "transfer"])
def test_purifiers_without_a_gradient_are_left_to_the_checks(classifier, images, threat_model):
    def rounding(pixels):
        return pixels.round()

    source = PurifiedClassifier(rounding, classifier) if threat_model == "transfer" else None
    record = benchmark(classifier, rounding, images, threat_model=threat_model, source=source, **PGD).record
    assert "gradient" not in record


def test_a_source_whose_purifier_cuts_the_gradient_is_told_and_marked(classifier, images):
    options = {"threat_model": "transfer", "classifier_name": "own", **PGD | {"eps": 1}}
    cut, through = (PurifiedClassifier(purifier, classifier) for purifier in (torch.round, tiny_purifier()))
    with pytest.warns(UserWarning, match="source .*: the gradient is zero for 4 of the first 4 images"):
        record = benchmark(classifier, None, images, source=cut, **options).record
    assert record["checks"]["failed"] == ["gradient"] and record["accuracy"]["attacked"]["correct"] > 0
    name = f"{type(torch.round).__name__}+FragileClassifier"
    assert f"⚠ unreliable: failed gradient; attack made on {name}" in markdown_table([record])
    whole = benchmark(classifier, None, images, source=through, **options).record
    assert whole["checks"] is None and whole["protocol"]["source"]["name"].endswith("+FragileClassifier")


class Listed(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.networks = {"kept": [network]}

    def forward(self, pixels):
        return self.networks["kept"][0](pixels)


class Held:
    def __init__(self, network):
        self.network = network

    def __call__(self, pixels):
        return self.network(pixels)


GLOBAL = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
HIDING = {
    "closure": lambda network: lambda pixels: network(pixels),
    "partial": lambda network: partial(lambda inner, pixels: inner(pixels), network),
    "list": Listed,
    "object": Held,
    "method": lambda network: Held(network).__call__,
    "global": lambda network: lambda pixels: GLOBAL(pixels),
}


@pytest.mark.filterwarnings("ignore:(classifier|purifier).* cannot be told")
@pytest.mark.parametrize("way", HIDING)
def test_batch_statistics_out_of_reach_of_eval_are_refused(classifier, images, way):
    model = HIDING[way](GLOBAL)
    GLOBAL.train()
    before = GLOBAL[0].running_mean.clone()
    with pytest.raises(ValueError, match="classifier: a BatchNorm2d that it uses is in training mode"):
        benchmark(model, None, images, **PGD)
    front = HIDING[way](nn.BatchNorm2d(3)) if way != "global" else lambda pixels: GLOBAL[0](pixels)
    with pytest.raises(ValueError, match="purifier: a BatchNorm2d"):
        benchmark(classifier, front, images, **PGD)
    assert torch.equal(GLOBAL[0].running_mean, before)
    GLOBAL.eval()
    assert benchmark(model, None, images, **PGD).record["accuracy"]


def test_images_without_a_gradient_are_told_and_marked(images):
    """Saturated logits, or half precision, leave the cross-entropy of some images no gradient at all."""
    fragile = FragileClassifier(pixels_of(9).float() / 255)

    class Saturated(nn.Module):
        def forward(self, pixels):
            logits = fragile(pixels)
            return (
                torch.where((pixels - fragile.mean).flatten(1).norm(dim=1, keepdim=True) > self.bound, 1e4, 1) * logits
            )

    saturated, (x, _) = Saturated(), images.batch(0, 4, "cpu")
    saturated.bound = (x - fragile.mean).flatten(1).norm(dim=1).sort().values[:2].mean()  # three of four are beyond it
    with pytest.warns(UserWarning, match="classifier hot: the gradient is zero for 3 of the first 4 images"):
        record = benchmark(PixelClassifier(saturated), None, images, classifier_name="hot", **PGD | {"eps": 1}).record
    assert record["gradient"] == {"images": 4, "zero": 3} and record["accuracy"]["attacked"]["correct"] > 0
    assert "⚠ unreliable: failed gradient (zero for 3 of 4 images)" in markdown_table([record])


def test_asking_for_the_gradient_leaves_nothing_behind(images, monkeypatch):
    """Not a figure of a random classifier, no random state, nothing in its parameters; no warning of a sound one."""
    inner = FragileClassifier(pixels_of(9).float() / 255).requires_grad_(True)
    random, options = PixelClassifier(Spoiled(inner)), PGD | {"batch_size": 9}
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    found = gradient_probe(random, *images.batch(0, 9, "cpu"), name="", seed=0)
    assert found == {"images": 9, "zero": 0} and np.random.random() == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        asked = benchmark(random, None, images, **options).record
    assert inner.projection.weight.requires_grad and inner.projection.weight.grad is None
    module = importlib.import_module("maep_hf.evaluation.benchmark")
    monkeypatch.setattr(module, "gradient_probe", lambda *_, **__: {"images": 9, "zero": 0})
    assert stable(asked) == stable(benchmark(random, None, images, **options).record)


class Interrupted(RuntimeError):
    pass


def test_resumed_equals_uninterrupted(classifier, images, tmp_path, monkeypatch):
    whole = benchmark(classifier, tiny_purifier(), images, out=tmp_path / "whole", **PGD).record
    attack = make_attack("pgd", steps=3)
    calls = []

    class Failing:
        def __getattr__(self, name):
            return getattr(attack, name)

        def __call__(self, *args, **kwargs):
            if len(calls) == 2:
                raise Interrupted
            calls.append(None)
            return attack(*args, **kwargs)

    options = PGD | {"attack": Failing(), "attack_options": None}
    with pytest.raises(Interrupted):
        benchmark(classifier, tiny_purifier(), images, out=tmp_path / "cut", **options)
    assert not (tmp_path / "cut" / "results.jsonl").exists()
    resumed = benchmark(classifier, tiny_purifier(), images, out=tmp_path / "cut", **PGD)
    assert resumed.resumed == 2 and stable(resumed.record) == stable(whole)


def test_a_source_is_attacked_as_it_would_be_used(classifier, images):
    source = nn.Sequential(nn.Dropout(0.5), FragileClassifier(pixels_of(9).float() / 255))
    options = {"threat_model": "transfer", "source": source.train(), **PGD}
    records = [benchmark(classifier, None, images, max_images=4, **options).record for _ in range(2)]
    assert stable(records[0]) == stable(records[1]) and not source.training
    assert records[0]["protocol"]["dataset"]["n"] == 4


def test_more_images_find_the_attacked_ones_of_fewer(classifier, images, tmp_path):
    whole = benchmark(classifier, tiny_purifier(), images, **PGD).record
    benchmark(classifier, tiny_purifier(), images, out=tmp_path, max_images=2 * PGD["batch_size"], **PGD)
    more = benchmark(classifier, tiny_purifier(), images, out=tmp_path, **PGD)
    assert more.resumed == 2 and stable(more.record) == stable(whole)
    other = EvaluationImages(images.pixels.flip(-1), images.labels, images.name, images.split)
    assert benchmark(classifier, tiny_purifier(), other, out=tmp_path, **PGD).resumed == 0


def test_damaged_batch_is_attacked_again(classifier, images, tmp_path):
    whole = benchmark(classifier, tiny_purifier(), images, out=tmp_path, **PGD).record
    (tmp_path / "results.jsonl").unlink()
    part = sorted(tmp_path.glob("attacked/*/*.safetensors"))[1]
    part.write_bytes(part.read_bytes()[:100])
    result = benchmark(classifier, tiny_purifier(), images, out=tmp_path, **PGD)
    assert result.resumed == 2 and stable(result.record) == stable(whole)


COMMAND = ["--attack", "pgd", "--attack-option", "steps=40", "--batch-size", "2", "--no-checks", "--device", "cpu"]


def command(folders: dict, out: Path, *more: str) -> list[str]:
    script = str(ROOT / "train" / "evaluate.py")
    named = [word for name, folder in folders.items() for word in (f"--{name}", str(folder))]
    return [*more, script, *named, "--image-size", str(SIZE), *COMMAND, "--out", str(out)]


def test_killed_command_goes_on_and_processes_share_the_images(
    classifier_folder, purifier_folder, image_folder, tmp_path
):
    folders = {"classifier": classifier_folder, "purifier": purifier_folder, "dataset": image_folder}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    run = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    killed = subprocess.Popen([sys.executable, *command(folders, tmp_path / "cut")], **run, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cut").glob("attacked/*/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "cut" / "results.jsonl").exists(), "it ended before it could be killed"
    again = subprocess.run([sys.executable, *command(folders, tmp_path / "cut")], **run)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    shared = subprocess.run([sys.executable, *launch, *command(folders, tmp_path / "shared")], **run)
    assert again.returncode == shared.returncode == 0, again.stdout + shared.stdout
    (resumed,) = read_jsonl(tmp_path / "cut" / "results.jsonl")
    (gathered,) = read_jsonl(tmp_path / "shared" / "results.jsonl")
    assert gathered["environment"]["processes"] == 2
    assert stable(resumed) == stable(gathered) and resumed["accuracy"]["clean"]["n"] == 9
    assert str(tmp_path) not in (tmp_path / "cut" / "results.jsonl").read_text()
    assert {path.name for path in (tmp_path / "cut").iterdir()} >= {"results.jsonl", "results.md", "results.csv"}


def test_two_classes(images, tmp_path):
    classifier = load_frozen_classifier(save_classifier(tmp_path / "two", classes=2))
    x, _ = images.batch(0, 9, "cpu")
    labelled = EvaluationImages(images.pixels, classifier(x).argmax(-1))
    record = benchmark(classifier, tiny_purifier(), labelled, attack="autoattack", max_images=4, checks=False,
                       attack_options={"n_queries": 10}, progress=False).record  # fmt: skip
    assert record["accuracy"]["attacked"]["percent"] < 50
    with pytest.raises(ValueError, match="labels go from 0 to 2.*0 to 1"):
        benchmark(classifier, None, EvaluationImages(images.pixels, torch.arange(9) % 3), **PGD)
    for named, told in ((10, "10 classes and the classifier only 2"), (1, "1 classes and the classifier 2")):
        with pytest.raises(DataError, match=f"{told}.*this dataset's classes"):
            benchmark(classifier, None, replace(labelled, class_names=tuple(map(str, range(named)))), **PGD)


def test_bad_input_is_named(classifier, images, tmp_path):
    class Broken(nn.Module):
        def forward(self, pixels):
            return pixels.mean((2, 3)) * float("nan")

    with pytest.raises(ValueError, match="not finite"):
        benchmark(Broken(), None, images, **PGD)
    with pytest.raises(ValueError, match="not finite"):
        benchmark(classifier, lambda pixels: pixels * float("nan"), images, **PGD)
    with pytest.raises(ValueError, match="threat_model='grey'.*gray-box"):
        benchmark(classifier, tiny_purifier(), images, threat_model="grey", **PGD)
    with pytest.raises(ValueError, match="black-box.*square"):
        benchmark(classifier, tiny_purifier(), images, threat_model="black-box", **PGD)
    with pytest.raises(ValueError, match="batch_size"):
        benchmark(classifier, None, images, **PGD | {"batch_size": 0})
    for name, count in (("max_images", -1), ("max_images", 0), ("passes", -1), ("passes", 0)):
        with pytest.raises(ValueError, match=f"{name}={count}: must be at least 1"):
            benchmark(classifier, None, images, **PGD | {name: count})
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * (SIZE + 4) ** 2, 3))
    with pytest.raises(ValueError, match=f"classifier: it fails on images of {SIZE} x {SIZE} .*mat1.*image_size"):
        benchmark(flat, None, images, **PGD)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        benchmark(classifier, None, images, out=tmp_path / "file", **PGD)
    with pytest.raises(ValueError, match="make_attack"):
        benchmark(classifier, None, images, **PGD | {"attack": make_attack("pgd")}, eps=4)
    with pytest.raises(DataError, match="class indices"):
        benchmark(classifier, None, (images.pixels, images.labels.float()), **PGD)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        benchmark(classifier, None, (images.pixels.float(), images.labels), **PGD)


def test_the_centre_of_larger_images_is_taken(tmp_path):
    ramp = np.broadcast_to(np.arange(48, dtype=np.uint8)[None, :, None], (16, 48, 3))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [ramp, ramp.transpose(1, 0, 2)], "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path)
    images = read_images(load_image_dataset(str(tmp_path), "test"), image_size=16)
    across, down = images.pixels
    assert across[0, 0].tolist() == down[0, :, 0].tolist() == list(range(16, 32))


def test_broken_images_and_other_sizes(image_folder, tmp_path):
    rows = image_rows(4).to_dict()
    rows["image"][1] = {"bytes": b"no image", "path": None}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "broken")
    read = read_images(load_image_dataset(str(tmp_path / "broken"), "test"))
    assert len(read) == 3 and read.classes == 3 and read.broken == 1 and "1 broken" in read.describe()["images"]
    mixed = {"image": [picture(0, 20, 16), picture(1, 16, 24)], "label": [0, 1]}
    datasets.Dataset.from_dict(mixed, features=features).save_to_disk(tmp_path / "mixed")
    dataset = load_image_dataset(str(tmp_path / "mixed"), "test")
    with pytest.raises(DataError, match="16 x 24.*20 x 16.*image_size"):
        read_images(dataset)
    assert read_images(dataset, image_size=SIZE).pixels.shape == (2, 3, SIZE, SIZE)
    with pytest.raises(DataError, match="no labels"):
        image_rows(3, labelled=False).save_to_disk(tmp_path / "bare")
        read_images(load_image_dataset(str(tmp_path / "bare"), "test"))
