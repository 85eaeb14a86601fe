"""The attack registry: the libraries' own images, inside the ball whatever the attack, and nothing left behind."""

import json
import logging
import math
import random
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from maep_hf.attacks import ATTACKS, check_attacked, make_attack
from maep_hf.attacks.base import perturbation_size
from maep_hf.attacks.guard import Watched

foolbox = pytest.importorskip("foolbox")
pyautoattack = pytest.importorskip("pyautoattack")

SMALL_EPS = {"Linf": 2, "L2": 0.2, "L1": 2, "L0": 4}
EVERY = [pytest.param(name, norm, id=f"{name}-{norm}") for name, spec in ATTACKS.items() for norm in spec.norms]
GRADIENT = [name for name, spec in ATTACKS.items() if spec.needs_gradient]
DRAWS = {
    "autoattack", "apgd-ce", "apgd-dlr", "apgd-t", "square", "fgsm-rs", "pgd", "eot-pgd", "boundary", "hopskipjump",
    "additive-noise", "salt-and-pepper", "gaussian-noise",
}  # fmt: skip


def network(classes: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 64, classes)
    return nn.Sequential(*layers).eval()


class Wrapped(nn.Module):
    """A network behind a function of its pixels, or one of its logits."""

    def __init__(self, before=lambda x: x, after=lambda x: x, classes: int = 5):
        super().__init__()
        self.network, self.before, self.after = network(classes), before, after
        self.passes = 0

    def forward(self, pixels):
        self.passes += 1
        return self.after(self.network(self.before(pixels)))


@pytest.fixture
def model():
    return network()


@pytest.fixture
def images():
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels(model, images):
    """What the model says, but for the first image, which it has wrong."""
    found = model(images).argmax(-1)
    found[0] = (found[0] + 1) % 5
    return found


def quick(name: str, **options):
    """Options that make an attack take milliseconds."""
    known = ATTACKS[name].options
    few = {
        "n_iter": 4,
        "n_queries": 30,
        "init_directions": 20,
        "initial_gradient_eval_steps": 5,
        "repeats": 5,
        "binary_search_steps": 5,
    }
    options |= {option: value for option, value in few.items() if option in known}
    if "steps" in known:
        options["steps"] = 2 if name == "hopskipjump" else 8
    if name == "eot-pgd":
        options["eot_samples"] = 2
    return options


def fooled(model, attacked, labels):
    with torch.no_grad():
        return model(attacked).argmax(-1) != labels


# --- equal to the libraries called directly


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 9.2), ("L2", 0.75), ("L1", 7.5)])
def test_autoattack_equals_the_library(norm, eps):
    model = network(classes=10)
    images, labels = four_images(model)
    direct = library(model, norm=norm, eps=eps / 255 if norm == "Linf" else eps)
    direct.fab.n_iter, direct.square.n_queries = 8, 60
    direct.apgd = shorter(direct.apgd)
    direct.apgd_targeted = shorter(direct.apgd_targeted, n_target_classes=direct.apgd_targeted.n_target_classes)
    expected, _ = direct.run_standard_evaluation(images, labels, batch_size=4)
    attacked = make_attack("AutoAttack", norm=norm, eps=eps, n_queries=60, n_iter=8)(model, images, labels, seed=5)
    assert torch.equal(attacked, expected)
    changed = (attacked != images).flatten(1).any(1)
    assert changed.any() and (~changed).sum() > 1  # Square has had its turn


def test_autoattack_unabridged_equals_the_library():
    model = network(classes=4)
    images, labels = four_images(model)
    direct = library(model, norm="Linf", eps=1.2 / 255)
    direct.apgd_targeted.n_target_classes = direct.fab.n_target_classes = 3
    direct.square.n_queries = 100
    expected, _ = direct.run_standard_evaluation(images, labels, batch_size=4)
    attack = make_attack("autoattack", eps=1.2, n_queries=100)
    assert torch.equal(attack(model, images, labels, seed=5), expected)
    changed = (expected != images).flatten(1).any(1)
    assert changed.any() and (~changed).sum() > 1


def four_images(model):
    """Images, the third of which the model has wrong."""
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    labels = model(images).argmax(-1)
    labels[2] = (labels[2] + 1) % 3
    return images, labels


def library(model, **options):
    return pyautoattack.AutoAttack(model, version="standard", seed=5, **options)


def shorter(part, **options):
    """A part of AutoAttack made anew with 8 iterations."""
    settings = {"norm": part.norm, "eps": part.eps, "device": part.device, "logger": part.logger}
    settings |= {"n_restarts": part.n_restarts, "use_largereps": part.use_largereps, "n_iter": 8}
    return type(part)(part.model, **settings, **options)


def test_parts_and_iterations_equal_the_library(model, images, labels):
    from pyautoattack.autopgd_base import APGDAttack

    direct = APGDAttack(model, n_iter=7, norm="Linf", n_restarts=2, eps=4 / 255, seed=3, eot_iter=3, loss="dlr")
    attack = make_attack("apgd-dlr", eps=4, n_iter=7, n_restarts=2, eot_samples=3)
    attacked = attack(model, images, labels, seed=3)
    broken = fooled(model, attacked, labels)
    assert broken[1:].any()
    assert torch.equal(attacked[broken], direct.perturb(images, labels)[broken])


@pytest.mark.parametrize("steps", [1, 40, 100, 300])
def test_the_schedule_of_apgd_is_the_librarys(steps):
    from pyautoattack.autopgd_base import APGDAttack

    direct = APGDAttack(nn.Identity(), n_iter=steps, eps=8 / 255)
    ours = make_attack("autoattack", n_iter=steps)._adversary(nn.Identity())
    for name in ("n_iter", "n_iter_orig", "n_iter_2", "n_iter_min", "size_decr"):
        assert getattr(ours.apgd, name) == getattr(ours.apgd_targeted, name) == getattr(direct, name)
    assert ours.fab.n_iter == steps


def test_versions_are_the_librarys():
    for version in ("standard", "plus", "rand"):
        direct = pyautoattack.AutoAttack(nn.Identity(), norm="Linf", eps=8 / 255, version=version)
        record = make_attack(f"autoattack-{version}").record()
        assert list(record["parts"]) == direct.attacks_to_run and record["version"] == version
        assert record["parts"]["apgd-ce"]["n_restarts"] == direct.apgd.n_restarts
        assert record["eot_samples"] == direct.apgd.eot_iter
    custom = make_attack("autoattack", version="custom", attacks=["square", "apgd-ce"], n_queries=7)
    assert custom.name == "AutoAttack (square, apgd-ce)" and custom.parts == ("square", "apgd-ce")
    assert custom.record()["parts"]["square"]["n_queries"] == 7 and custom.needs_gradient
    weaker = make_attack("autoattack", n_iter=3, n_queries=5000)  # is not called what the reference is called
    assert weaker.name == "AutoAttack (standard, n_iter=3)" and make_attack("autoattack").name.endswith("(standard)")
    assert not make_attack("autoattack", version="custom", attacks=["square"]).needs_gradient


def test_parts_on_the_released_classifier_equal_the_library(released):
    model, images, labels = released
    images, labels = images[:3], labels[:3]
    direct = pyautoattack.AutoAttack(model, norm="Linf", eps=1 / 255, version="custom", attacks=["apgd-ce"], seed=0)
    direct.apgd.n_restarts = 1
    direct.apgd = shorter(direct.apgd)
    expected, _ = direct.run_standard_evaluation(images, labels, batch_size=3)
    attacked = make_attack("apgd-ce", eps=1, n_iter=8)(model, images, labels, seed=0)
    assert torch.equal(attacked, expected) and not torch.equal(attacked, images)
    custom = make_attack("autoattack", version="custom", attacks=["apgd-ce"])
    assert custom.record()["parts"]["apgd-ce"]["n_restarts"] == 5  # the library's, of a custom version


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_pgd_equals_foolbox(norm, model, images, labels):
    kind = {"Linf": foolbox.attacks.LinfPGD, "L2": foolbox.attacks.L2PGD}[norm]
    unit = 255 if norm == "Linf" else 1
    torch.manual_seed(4)
    direct = kind(abs_stepsize=1.5 / unit, steps=6)(
        foolbox.PyTorchModel(model, bounds=(0, 1)), images, labels, epsilons=3 / unit
    )[1]
    attack = make_attack("pgd-6", norm=norm, eps=3, step_size=1.5)
    assert torch.equal(attack(model, images, labels, seed=4), direct)


def test_fgsm_is_a_signed_step_and_grows_with_eps_on_the_released_classifier(released):
    model, images, labels = released
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), labels, reduction="sum"), leaf)
    right = []
    for eps in (0.25, 1, 4):
        attacked = make_attack("fgsm", eps=eps)(model, images, labels, seed=0)
        expected = (images + eps / 255 * gradient.sign()).clamp(0, 1)
        torch.testing.assert_close(attacked, expected, atol=1e-6, rtol=0)
        right.append(int((~fooled(model, attacked, labels)).sum()))
    assert right[0] > right[1] > right[2]


@pytest.fixture(scope="module")
def released():
    from pathlib import Path

    from maep_hf.classifier import load_classifier
    from maep_hf.demo import embedded_images

    model = load_classifier(Path(__file__).resolve().parent.parent / "checkpoints" / "resnet20-cifar10")
    return model, *embedded_images("cifar10", count=10)


# --- every attack


@pytest.mark.parametrize(("name", "norm"), [("apgd-ce", "L2"), ("apgd-dlr", "Linf"), ("square", "L2"), ("pgd", "Linf")])
def test_the_order_of_pixels_in_memory_does_not_matter(name, norm, model, images, labels):
    attack = make_attack(name, norm=norm, eps=SMALL_EPS.get(norm), **quick(name))
    turned = images.contiguous(memory_format=torch.channels_last)
    assert not turned.is_contiguous()
    assert torch.equal(attack(model, turned, labels, seed=0), attack(model, images, labels, seed=0))


@pytest.mark.parametrize(("name", "norm"), EVERY)
def test_every_attack_stays_in_its_ball_and_repeats(name, norm, model, images, labels):
    eps = SMALL_EPS.get(norm)
    attack = make_attack(name, norm=norm, eps=eps, **quick(name))
    before = images.clone()
    attacked = attack(model, images, labels, seed=0)
    assert attacked.shape == images.shape and attacked.dtype == images.dtype and not attacked.requires_grad
    assert attacked.min() >= 0 and attacked.max() <= 1
    assert torch.equal(images, before)
    if norm is not None and not attack.control:
        assert perturbation_size(images, attacked, norm).max() <= eps / (255 if norm == "Linf" else 1) * (1 + 1e-5)
    assert torch.equal(attack(model, images, labels, seed=0), attacked)
    record = json.loads(json.dumps(attack.record()))
    assert record["norm"] == norm and record["eps"] == eps and record["name"] == attack.name
    assert (
        set(ATTACKS[name].options) - {"attacks"}
        <= record.keys() | record.get("parts", {}).get(name, {"n_iter": 0, "n_queries": 0}).keys()
    )


@pytest.mark.parametrize("name", ATTACKS)
def test_the_seed_matters_where_an_attack_draws(name, model, images, labels):
    norm = ATTACKS[name].norms[-1]
    eps = {"Linf": 20, "L2": 2, "L1": 20}.get(norm)
    attack = make_attack(name, norm=norm, eps=eps, **quick(name))
    first, *others = (attack(model, images, labels, seed=seed) for seed in range(4))
    assert (name in DRAWS) == any(not torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", ["autoattack", "fgsm", "pgd", "apgd-ce", "fab", "mi-fgsm", "deepfool", "fmn"])
def test_gradient_attacks_beat_noise(name, model, images, labels):
    noise = make_attack("gaussian-noise", eps=4)(model, images, labels, seed=0)
    attacked = make_attack(name, eps=4)(model, images, labels, seed=0)
    assert fooled(model, attacked, labels).all()
    assert not fooled(model, noise, labels).all()


@pytest.mark.parametrize(
    "name", ["cw-l2", "deepfool", "ddn", "ead", "fmn", "boundary", "hopskipjump", "salt-and-pepper"]
)
def test_without_eps_a_search_fools_every_image(name, model, images, labels):
    options = {"steps": 60} if name in ("cw-l2", "ead", "boundary", "salt-and-pepper") else {}
    if name == "hopskipjump":
        options = {"steps": 2, "initial_gradient_eval_steps": 10}
    attack = make_attack(name, norm="Linf" if name == "fmn" else None, **options)
    assert attack.eps is None and attack.radius is None
    attacked = attack(model, images, labels, seed=0)
    assert fooled(model, attacked, labels).all()
    assert (attacked[0] - images[0]).abs().max() < 1e-5  # wrong before


def test_a_search_that_finds_nothing_returns_the_image(images):
    constant = Wrapped(after=lambda logits: 0 * logits + torch.tensor([1.0, 0, 0, 0, 0]))
    labels = torch.zeros(5, dtype=torch.long)
    for name in ("cw-l2", "ead", "ddn", "boundary", "hopskipjump", "spatial", "blur-search", "salt-and-pepper"):
        attacked = make_attack(name, **quick(name))(constant, images, labels, seed=0)
        assert torch.equal(attacked, images), name  # CW and EAD would return black ones


def test_l0_budget_counts_values(model, images, labels):
    free = make_attack("fmn", norm="L0")(model, images, labels, seed=0)
    counts = perturbation_size(images, free, "L0")
    budget = int(counts[1:].min())
    bound = make_attack("fmn", norm="L0", eps=budget)(model, images, labels, seed=0)
    within = counts <= budget
    assert within.any() and torch.equal(bound[within], free[within]) and torch.equal(bound[~within], images[~within])


# --- models that are special


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_few_classes(classes, images):
    model = network(classes)
    labels = model(images).argmax(-1)
    for name in ("autoattack", "fab-t", "fab", "square", "deepfool", "ddn", "pgd"):
        attacked = make_attack(name, norm="L2", eps=4, **quick(name))(model, images, labels, seed=0)
        assert name in ("square", "ddn") or fooled(model, attacked, labels).all()
    record = make_attack("autoattack").record(num_classes=classes)
    assert ("apgd-t" in record["parts"]) == (classes >= 4)
    assert ("left_out" in record) == (classes < 4) and record["parts"]["fab-t"]["n_target_classes"] == classes - 1
    assert record == make_attack("autoattack").record(num_classes=classes)
    for name, least in (("apgd-dlr", 3), ("apgd-t", 4)):
        attack = make_attack(name, n_iter=2)
        if classes >= least:
            attack(model, images, labels, seed=0)
        else:
            with pytest.raises(ValueError, match=f"needs {least} classes .* has {classes}"):
                attack(model, images, labels, seed=0)
    plus = make_attack("autoattack", version="plus").record(num_classes=classes)
    assert ("apgd-dlr" in plus["parts"]) == (classes >= 3)


@pytest.mark.parametrize("name", ["autoattack", "square", "pgd", "cw-l2", "hopskipjump", "spatial"])
def test_nan_logits_name_the_model(name, images, labels):
    broken = Wrapped(after=lambda logits: logits / 0)
    with pytest.raises(ValueError, match="Wrapped returns NaN or infinite logits for"):
        make_attack(name, **quick(name))(broken, images, labels, seed=0)


@pytest.mark.parametrize("name", ["apgd-ce", "fab", "pgd", "ddn"])
def test_a_gradient_that_is_not_finite_warns_and_counts_as_zero(name, images, labels):
    def steep(pixels):  # the root has an infinite slope at 0
        zero = (pixels[1:2] - pixels[1:2]).abs().sqrt()
        return torch.cat([pixels[:1], pixels[1:2] + zero, pixels[2:]])

    attack = make_attack(name, norm="L2", eps=2, **quick(name))
    with pytest.warns(UserWarning, match="Wrapped gives 1 of 5 images a NaN or infinite gradient"):
        attacked = attack(Wrapped(before=steep), images, network()(images).argmax(-1), seed=0)
    broken = fooled(network(), attacked, network()(images).argmax(-1))
    assert broken[0] and broken[2:].all()


def test_pixels_that_are_not_finite_are_not_blamed_on_the_model(images, labels):
    with pytest.raises(ValueError, match="the attack gave Sequential NaN or infinite pixels"):
        Watched(network(), labels)(images / 0)


@pytest.mark.parametrize("name", ["autoattack", "pgd", "boundary", "hopskipjump", "cw-l2", "ddn", "spatial", "square"])
def test_all_images_wrong_already(name, model, images, labels):
    wrong = (model(images).argmax(-1) + 1) % 5
    attacked = make_attack(name, **quick(name))(model, images, wrong, seed=0)
    assert fooled(model, attacked, wrong).all()
    if name not in ("pgd", "cw-l2"):
        assert torch.equal(attacked, images)
    single = make_attack(name, **quick(name))(model, images[:1], labels[:1], seed=0)
    assert single.shape == images[:1].shape
    assert make_attack(name)(model, images[:0], labels[:0], seed=0).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("name", ["autoattack", "fgsm", "fab", "deepfool", "ddn", "ead"])
def test_a_model_that_detaches_gives_a_zero_gradient_and_a_warning(name, images, labels):
    detached = Wrapped(before=torch.Tensor.detach)
    attack = make_attack(name, norm=None, eps=1, **quick(name))
    with pytest.warns(UserWarning, match="Wrapped gives the pixels no gradient"):
        attacked = attack(detached, images, labels, seed=0)
    assert attacked.isfinite().all()


def test_decision_attacks_refuse_a_randomised_model(images, labels):
    noisy = Wrapped(before=lambda x: x + 0.3 * torch.randn_like(x))
    for name in ("boundary", "hopskipjump"):
        with pytest.raises(ValueError, match="answers the same twice; use square"):
            make_attack(name, **quick(name))(noisy, images, labels, seed=0)


def test_sizes_that_the_librarys_square_cannot_take():
    for size in ((32, 32), (28, 28), (16, 24), (18, 18), (24, 16), (4, 4)):
        model = nn.Sequential(nn.AdaptiveAvgPool2d(16), network())
        images, labels = torch.rand(2, 3, *size), torch.tensor([0, 1])
        make_attack("square", n_queries=5)(model, images, labels, seed=0)
        attack = make_attack("square", norm="L2", n_queries=5)
        if size in ((32, 32), (28, 28), (16, 24)):
            attack(model, images, labels, seed=0)
        else:
            with pytest.raises(ValueError, match=f"on images of {size[0]} x {size[1]}"):
                attack(model, images, labels, seed=0)


# --- EOT and restarts


class NoisyGradient(nn.Module):
    """Logits (0, w x) where w is drawn anew at each pass: its gradient is the draw."""

    def __init__(self):
        super().__init__()
        self.draws: list[torch.Tensor] = []

    def forward(self, pixels):
        weight = torch.randn(pixels[0].numel()) + 0.5
        if pixels.requires_grad:
            self.draws.append(weight)
        score = pixels.flatten(1) @ weight
        return torch.stack([torch.zeros_like(score), score], dim=1)


@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd", "mi-fgsm"])
def test_eot_averages_the_gradient(name):
    model, pixels, labels = NoisyGradient(), torch.full((1, 3, 4, 4), 0.5), torch.tensor([0])
    options = {} if name == "fgsm" else {"steps": 1, "step_size": 4}
    options |= {"random_start": False} if name == "pgd" else {}
    attacked = make_attack(name, eps=8, eot_samples=6, **options)(model, pixels, labels, seed=0)
    assert len(model.draws) == 6
    draws = torch.stack(model.draws)
    share = torch.sigmoid(draws @ pixels.flatten())  # d cross-entropy / d pixels = p1 * w, as the label is 0
    mean = (share[:, None] * draws).mean(0)
    assert torch.equal((attacked - pixels).flatten().sign(), mean.sign())
    assert not torch.equal(mean.sign(), (share[:, None] * draws)[0].sign())


def test_momentum_weighs_steps_by_the_l1_norm():
    """A second gradient on a quarter of the values alone, of the opposite sign, outweighs three times the first."""

    class Bent(nn.Module):
        def forward(self, pixels):
            bend, quarter = 0.5 + 2 / 255, pixels.shape[-1] // 4
            rising, turning = pixels[..., quarter:].clamp(max=bend), -(pixels[..., :quarter] - bend).abs()
            value = rising.flatten(1).sum(1) + turning.flatten(1).sum(1)
            return torch.stack([torch.zeros_like(value), value / 100], dim=1)

    grey, label = torch.full((1, 3, 8, 8), 0.5), torch.tensor([0])
    change = make_attack("mi-fgsm", eps=8, steps=2, momentum=3.0)(Bent(), grey, label, seed=0) - grey
    expected = torch.full_like(grey, 8 / 255)
    expected[..., :2] = 0  # there and back
    torch.testing.assert_close(change, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_momentum_sums_gradients_over_their_l1_norm(norm, model, images, labels):
    """Dong et al. 2018, eq. 6 to 9; foolbox sums signs, of which opposite ones cancel out."""
    eps, steps = {"Linf": (8 / 255, 10), "L2": (0.5, 10)}[norm]
    expected, momentum = images.clone(), torch.zeros_like(images)
    for _ in range(steps):
        leaf = expected.clone().requires_grad_()
        gradient = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), labels, reduction="sum"), leaf)[0]
        momentum = momentum + gradient / gradient.abs().sum((1, 2, 3), keepdim=True)
        if norm == "Linf":
            expected = (expected + eps / steps * momentum.sign()).clamp(images - eps, images + eps)
        else:
            expected = expected + eps / steps * momentum / momentum.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            change = expected - images
            expected = images + change * (eps / change.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
        expected = expected.clamp(0, 1)
    attack = make_attack("mi-fgsm", norm=norm, eps=8 if norm == "Linf" else 0.5, steps=steps)
    torch.testing.assert_close(attack(model, images, labels, seed=0), expected, atol=1e-6, rtol=0)
    assert attack.record()["gradient_norm"] == "L1"


@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd", "mi-fgsm"])
def test_the_smallest_gradients_are_followed(name, norm, model, images, labels):
    """Foolbox takes a norm for 1e-12 at least: a confident model has smaller gradients, and looked robust."""

    class Tiny(torch.autograd.Function):
        @staticmethod
        def forward(ctx, pixels):
            return pixels.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2.0**-60

    attack = make_attack(name, norm=norm, eps=SMALL_EPS[norm], **({} if name == "fgsm" else {"steps": 3}))
    expected = attack(model, images, labels, seed=0)
    found = attack(Wrapped(Tiny.apply), images, labels, seed=0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_step_in_the_wrong_unit_is_warned_of():
    with pytest.warns(UserWarning, match=r"step_size: 20 x 0.00784\d* is far .* 2, not 2/255"):
        make_attack("pgd-20", step_size=2 / 255)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_attack("pgd-20", step_size=2 / 255, norm="L2")
        make_attack("pgd-20", eps=0.5, step_size=0.05)  # as the checks, whose radii may be small
        make_attack("fgsm", eps=0.1)


def test_names_of_eot_attacks_say_how_many_passes():
    assert make_attack("eot-pgd").name == make_attack("PGD+EOT").name == "PGD-20+EOT-20"
    assert make_attack("eot-pgd").record()["eot_samples"] == 20
    assert make_attack("pgd-7+eot", restarts=3).name == "PGD-7+EOT-20 (3 restarts)"


def test_restarts_keep_the_worst_case(model):
    images = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    labels = model(images).argmax(-1)
    options = {"eps": 2.0, "steps": 1, "step_size": 0.5}
    once = make_attack("pgd", **options)(model, images, labels, seed=0)
    often = make_attack("pgd", restarts=30, **options)(model, images, labels, seed=0)
    first, worst = fooled(model, once, labels), fooled(model, often, labels)
    assert torch.equal(often[first], once[first])
    assert worst.sum() > first.sum() and (worst | ~first).all()


# --- nothing is left behind


@pytest.mark.parametrize(
    "name", ["autoattack", "fab", "pgd", "deepfool", "boundary", "spatial", "additive-noise", "jpeg"]
)
def test_process_and_model_are_as_before(name, model, images, labels):
    model[0].weight.requires_grad_(False)
    model[3].bias.grad = torch.ones(5)
    options = quick(name) | ({"grid_search": False} if name == "spatial" else {})
    attack = make_attack(name, **options)
    calls = []

    def trace(frame, event, arg):
        calls.append(event)

    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    handlers, tracing = logging.root.handlers, sys.gettrace()
    try:
        logging.root.handlers = []  # foolbox sets logging up where nobody has
        sys.settrace(trace)
        with torch.no_grad():
            attacked = attack(model, images, labels, seed=0)
            assert not torch.is_grad_enabled()
        assert sys.gettrace() is trace
        assert logging.root.handlers == []
    finally:
        sys.settrace(tracing)
        logging.root.handlers = handlers
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True, True]
    assert [parameter.grad is None for parameter in model.parameters()] == [True, True, True, False]
    assert torch.equal(model[3].bias.grad, torch.ones(5))
    with torch.enable_grad():
        assert torch.equal(attack(model, images, labels, seed=0), attacked)
    with torch.inference_mode():
        assert torch.equal(attack(model, images.clone(), labels.clone(), seed=0), attacked)


def test_a_failing_model_leaves_everything_in_place(model, images, labels):
    broken = Wrapped(after=lambda logits: logits / 0)
    state, tracing = torch.get_rng_state(), sys.gettrace()
    with pytest.raises(ValueError):
        make_attack("autoattack")(broken, images, labels, seed=0)
    assert torch.equal(torch.get_rng_state(), state) and sys.gettrace() is tracing
    assert all(parameter.requires_grad for parameter in broken.parameters())


def test_autoattack_checks_are_logged_for_whoever_listens(model, images, labels, caplog, capfd):
    noisy = Wrapped(before=lambda x: x + 0.3 * torch.randn_like(x))
    attack = make_attack("apgd-ce", n_iter=2)
    handlers, logging.root.handlers = logging.root.handlers, []
    try:
        attack(noisy, images, labels, seed=0)
    finally:
        logging.root.handlers = handlers
    assert capfd.readouterr().err == ""
    with caplog.at_level(logging.WARNING, logger="auto-attack"):
        attack(noisy, images, labels, seed=0)
        assert "randomized defense" in caplog.text
        attack(Wrapped(before=denoise), images, labels, seed=0)
        assert "dynamic defense" in caplog.text
        caplog.clear()
        attack(model, images, labels, seed=0)
        assert "dynamic" not in caplog.text  # the library would go on saying so


def denoise(pixels):
    """A step down its own gradient, as test-time optimisation does it."""
    with torch.enable_grad():
        leaf = pixels.detach().requires_grad_()
        return pixels - 0.1 * torch.autograd.grad((leaf**2).sum(), leaf)[0]


# --- the check of what comes out


def test_check_attacked_projects_float_error_and_refuses_more(images):
    for norm, eps in (("Linf", 8.0), ("L2", 0.5), ("L1", 12.0)):
        attack = make_attack("pgd", norm=norm, eps=eps)
        inner = images * 0.5 + 0.25
        direction = torch.ones_like(inner) / {"Linf": 1, "L2": math.sqrt(768), "L1": 768}[norm]
        exact = inner + attack.radius * direction
        assert torch.equal(check_attacked(attack, inner, exact), exact)
        over = inner + attack.radius * (1 + 8e-6) * direction
        projected = check_attacked(attack, inner, over)
        assert not torch.equal(projected, over)
        assert perturbation_size(inner, projected, norm).max() < attack.radius * (1 + 3e-6)
        loose = inner + attack.radius * (1 + 8e-4) * direction
        with pytest.raises(ValueError, match=f"PGD-20 left its {norm} ball"):
            check_attacked(attack, inner, loose)
        repaired = check_attacked(attack, inner, loose, tolerance=1e-3)
        assert perturbation_size(inner, repaired, norm).max() < attack.radius * (1 + 5e-5)
        torch.testing.assert_close(repaired, exact, atol=1e-6, rtol=0)


def test_check_attacked_cuts_float_error_off_at_black_and_white(images):
    attack, inner = make_attack("pgd", eps=8), images.clamp(0.01, 0.99)
    attacked = inner.clone()
    attacked[:, :, 0], attacked[:, :, 1] = -5e-6, 1 + 5e-6
    inner[:, :, 0], inner[:, :, 1] = 0.01, 0.99
    assert torch.equal(check_attacked(attack, inner, attacked), attacked.clamp(0, 1))


def test_check_attacked_refuses_what_is_no_image(images):
    attack = make_attack("pgd", norm="L2", eps=100)
    for broken, message in (
        (images[:2], "shape"),
        (images.double(), "float64"),
        (images.masked_fill(images > 0.9, math.nan), "NaN or infinite pixels for 5 of 5"),
        (images + 0.01, r"left \[0, 1\] by"),
        (images - 0.2, r"left \[0, 1\] by"),
    ):
        with pytest.raises(ValueError, match=f"PGD-20 .*{message}"):
            check_attacked(attack, images, broken)
    assert check_attacked(attack, images, images + 5e-6).max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": torch.zeros(5, 3, 16, 16, dtype=torch.uint8)}, "float32"),
        ({"pixels": torch.full((5, 3, 16, 16), 255.0)}, r"\[0, 1\]"),
        ({"pixels": torch.full((5, 3, 16, 16), math.nan)}, r"\[0, 1\]"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, "labels: 5 integers"),
        ({"labels": torch.full((5,), 7)}, "labels: 7 is none of the 5 classes"),
        ({"labels": torch.full((5,), -1)}, "labels: -1 is none"),
        ({"model": nn.Sequential(nn.BatchNorm2d(3), network())}, "training mode"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(768, 1))}, "2 classes"),
    ],
)
def test_batches_that_cannot_be_attacked(change, message, model, images, labels):
    call = {"model": model, "pixels": images, "labels": labels} | change
    for name in ("autoattack", "pgd"):
        with pytest.raises(ValueError, match=message):
            make_attack(name)(**call, seed=0)


def test_model_of_the_wrong_type(images, labels):
    with pytest.raises(TypeError, match="torch.nn.Module"):
        make_attack("fgsm")(lambda x: x, images, labels, seed=0)
    with pytest.raises(TypeError, match="Wrapped returns dict, not logits"):
        make_attack("fgsm")(Wrapped(after=lambda logits: {"logits": logits}), images, labels, seed=0)


# --- names, norms, options


@pytest.mark.parametrize(
    ("given", "name", "options"),
    [
        ("PGD_100", "pgd", {"steps": 100}),
        ("Mi_FGSM", "mi-fgsm", {}),
        ("MIM-5", "mi-fgsm", {"steps": 5}),
        ("APGD-CE", "apgd-ce", {}),
        ("apgdt", "apgd-t", {}),
        ("CW-L2", "cw-l2", {}),
        ("C-W", "cw-l2", {}),
        ("HopSkipJump", "hopskipjump", {}),
        ("AutoAttack_Rand", "autoattack", {"version": "rand"}),
        ("pgd-10+eot", "eot-pgd", {"steps": 10, "eot_samples": 20}),
    ],
)
def test_names_are_tolerant(given, name, options):
    attack = make_attack(given)
    assert attack.spec.name == name
    assert options.items() <= attack.options.items()


def test_defaults_of_the_field():
    assert [make_attack("autoattack", norm=norm).eps for norm in ("linf", "L2", "l1")] == [8, 0.5, 12]
    assert make_attack("autoattack").radius == 8 / 255
    assert make_attack("cw-l2").norm == "L2" and make_attack("cw-l2").eps is None
    assert make_attack("pgd").record()["step_size"] == 2 and make_attack("pgd").record()["eps_unit"] == "1/255"
    assert make_attack("fgsm-rs", eps=8).record()["step_size"] == 10
    assert make_attack("mi-fgsm", norm="L2").record()["step_size"] == 0.05
    black_box = {"square", "boundary", "hopskipjump", "spatial"}
    assert black_box <= set(ATTACKS) - set(GRADIENT)
    assert [name for name, spec in ATTACKS.items() if spec.control] == ["gaussian-noise", "gaussian-blur", "jpeg"]
    assert next(iter(ATTACKS)) == "autoattack" and all(spec.description for spec in ATTACKS.values())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pdg", {}, r"'pdg' \(did you mean pgd\?\); there are: autoattack, "),
        ("fgsm-10", {}, "no attack 'fgsm-10'"),
        ("pgd-100", {"steps": 20}, "steps: 'pgd-100' says 100"),
        ("pgd", {"step": 2}, "pgd has no option step; it has: steps, step_size"),
        ("pgd", {"norm": "L0"}, "pgd is there for Linf and L2 and L1, got 'L0'"),
        ("cw-l2", {"norm": "Linf"}, "cw-l2 is there for L2"),
        ("spatial", {"norm": "Linf"}, "bounded by no norm"),
        ("spatial", {"eps": 8}, "bounded by no norm"),
        ("pgd", {"eps": 8 / 255}, "8, not 8/255"),
        ("pgd", {"eps": 300}, "above 255"),
        ("pgd", {"eps": 0}, "not a positive number"),
        ("pgd", {"eps": "8"}, "not a positive number"),
        ("square", {"norm": "L2", "eps": -1}, "not a positive number"),
        ("pgd", {"steps": 0}, "steps: 0 is not a whole number of at least 1"),
        ("pgd", {"steps": 2.5}, "steps: 2.5"),
        ("pgd", {"step_size": 0}, "step_size: 0 is not a number above 0"),
        ("pgd", {"random_start": 1}, "random_start: 1 is not True or False"),
        ("ead", {"decision_rule": "L2"}, "decision_rule: 'L2' is not one of EN, L1"),
        ("sparse-l1-descent", {"quantile": 2}, "quantile"),
        ("autoattack", {"version": "custom"}, "attacks: version='custom' needs a list"),
        ("autoattack", {"attacks": ["square"]}, "attacks: only version='custom'"),
        ("autoattack", {"version": "custom", "attacks": ["pgd"]}, "attacks: .* is not a list of apgd-ce"),
        ("autoattack", {"version": "custom", "attacks": "square"}, "is not a list of"),
        ("apgd-ce", {"norm": "L1", "n_iter": 2}, "n_iter: at least 3"),
        ("gaussian-noise", {"eps": 8, "std": 0.1}, "std: give either"),
        ("jpeg", {"quality": 101}, "quality"),
    ],
)
def test_errors_say_what_there_is(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_attack(name, **options)


def test_a_library_that_is_missing_is_named(monkeypatch):
    for library, name in (("foolbox", "pgd"), ("pyautoattack", "autoattack")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ImportError, match=rf"{library}.*pip install 'maep-hf\[attacks\]'"):
            make_attack(name)
    make_attack("jpeg")
    make_attack("gaussian-noise")


# --- controls


def test_noise_has_the_size_of_eps(model):
    grey, label = torch.full((1, 3, 64, 64), 0.5), torch.tensor([0])
    constant = nn.Sequential(nn.AdaptiveAvgPool2d(16), network())
    for norm, eps in (("Linf", 8), ("L2", 3), ("L1", 100)):
        noise = make_attack("gaussian-noise", norm=norm, eps=eps)(constant, grey, label, seed=0) - grey
        size = noise.std() * 255 if norm == "Linf" else perturbation_size(grey, grey + noise, norm)[0]
        assert float(size) == pytest.approx(eps, rel=0.03)
    fixed = make_attack("gaussian-noise", std=0.1)
    assert float((fixed(constant, grey, label, seed=0) - grey).std()) == pytest.approx(0.1, rel=0.03)
    assert fixed.record()["std"] == 0.1 and make_attack("gaussian-noise").record()["std"] == 8 / 255


def test_controls_never_ask_the_model(images, labels):
    from scipy.ndimage import gaussian_filter

    watched = Wrapped()
    for name in ("gaussian-noise", "gaussian-blur", "jpeg"):
        attack = make_attack(name)
        assert not torch.equal(attack(watched, images, labels, seed=0), images)
        assert attack.control and not attack.needs_gradient
    assert watched.passes == 0
    blurred = make_attack("gaussian-blur", sigma=0.7)(watched, images, labels, seed=0)
    expected = gaussian_filter(images.double().numpy(), (0, 0, 0.7, 0.7), mode="mirror")
    np.testing.assert_allclose(blurred.numpy(), expected, atol=1e-6)
    images = nn.functional.interpolate(images[..., :4, :4], 16, mode="bicubic").clamp(0, 1)
    coarse, fine = (make_attack("jpeg", quality=q)(watched, images, labels, seed=0) for q in (10, 95))
    assert (coarse - images).abs().mean() > 2 * (fine - images).abs().mean()
    assert torch.equal((fine * 255).round() / 255, fine)


def test_attacks_are_quiet(model, images, labels, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("autoattack", "pgd", "deepfool", "boundary", "spatial", "blur-search", "fmn"):
            make_attack(name, **quick(name))(model, images, labels, seed=0)
    assert not caught and capfd.readouterr() == ("", "")
