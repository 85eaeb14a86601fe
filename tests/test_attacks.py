"""The training attacks: inside the ball, the same as the field's reference, and one sample independent of another."""

import numpy as np
import pytest
import torch
from torch import nn

from maep_hf.attacks import KINDS, AttackMixture, AttackParameters, perturb, pgd
from maep_hf.attacks.gradient import _look, _smooth, input_gradient
from maep_hf.training.samples import collate


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 64, 5))
    return model.eval().requires_grad_(False)


@pytest.fixture
def images():
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def mixed_batch(count: int, mixture: AttackMixture | None = None) -> dict[str, torch.Tensor]:
    mixture = mixture or AttackMixture(num_surrogates=2)
    return collate([mixture.draw(np.random.default_rng((3, i)), (3, 8, 8)) for i in range(count)])


def test_mixture_stays_in_ball_and_leaves_clean_samples_alone(classifier):
    shares = {"square": 0.15, "pgd_l2": 0.2, "pgd_random_start": 0.5, "input_diversity": 0.3, "smoothed_gradient": 0.3}
    batch = mixed_batch(64, AttackMixture(num_surrogates=2, **shares))
    parameters = AttackParameters.from_batch(batch)
    x = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    attacked = perturb([classifier, classifier], x, torch.zeros(64, dtype=torch.long), parameters)
    change = (attacked - x).flatten(1)
    l2 = batch["attack_kind"] == KINDS.index("pgd_l2")
    distance = torch.where(l2, change.norm(dim=1), change.abs().amax(dim=1))
    assert (distance <= parameters.eps + 1e-6).all()
    assert attacked.min() >= 0 and attacked.max() <= 1
    clean = batch["attack_kind"] == KINDS.index("clean")
    assert clean.any() and torch.equal(attacked[clean], x[clean])
    assert (distance[~clean] > 0.3 * parameters.eps[~clean]).all()
    assert set(batch["attack_kind"].tolist()) == set(range(len(KINDS)))


def test_draws_spread_over_their_ranges():
    batch = mixed_batch(600, AttackMixture(pgd_l2=0.3))
    eps, l2 = batch["attack_eps"], batch["attack_kind"] == KINDS.index("pgd_l2")
    for found, low, high in ((255 * eps[~l2], 2, 12), (eps[l2], 0.1, 0.75)):
        share = (found - low) / (high - low)
        assert -1e-6 <= share.min() < 0.05 and 0.95 < share.max() <= 1 + 1e-6 and abs(share.mean() - 0.5) < 0.05
    length = batch["attack_start"][l2].flatten(1).norm(dim=1)  # in the ball, not only on it
    assert length.min() < 0.1 and 0.9 < length.max() <= 1 + 1e-6


def test_steps_are_those_of_each_kind():
    batch = mixed_batch(300, AttackMixture(pgd_l2=0.3))
    for name in ("fgsm_rs", "mi_fgsm", "pgd", "pgd_l2"):
        rows = batch["attack_kind"] == KINDS.index(name)
        eps, step_size, steps = (batch[f"attack_{key}"][rows] for key in ("eps", "step_size", "steps"))
        assert rows.sum() > 20 and (batch["attack_momentum"][rows] == (name == "mi_fgsm")).all()
        if name == "fgsm_rs":
            torch.testing.assert_close(step_size, 1.25 * eps)
            assert (steps == 1).all() and batch["attack_start"][rows].abs().mean() > 0.4
        else:
            assert set(steps.tolist()) == set(range(2 if name == "mi_fgsm" else 1, 11))
            reached = steps * step_size / eps
            assert (reached - 1).abs().max() < 1e-5 if name == "mi_fgsm" else reached.min() > 1 - 1e-5
            assert (step_size <= eps * (1 + 1e-6)).all()


def test_the_random_start_is_the_seeds(classifier, images):
    first, again, other = (pgd(classifier, images, LABELS, steps=1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_labels_of_any_integers_and_no_images(classifier, images):
    expected = pgd(classifier, images, LABELS, steps=3)
    assert torch.equal(pgd(classifier, images, LABELS.to(torch.int32), steps=3), expected)
    assert pgd(classifier, images[:0], LABELS[:0]).shape == (0, 3, 8, 8)
    for dtype in (torch.float16, torch.bfloat16):  # 8/255 rounded in them is more
        with pytest.raises(ValueError, match="float32 is needed"):
            pgd(classifier, images.to(dtype), LABELS)


def test_a_sample_does_not_depend_on_its_batch(classifier):
    batch = mixed_batch(12, AttackMixture(num_surrogates=2, input_diversity=0.5, smoothed_gradient=0.5))
    parameters = AttackParameters.from_batch(batch)
    x = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(12) % 5
    together = perturb([classifier, lambda v: -classifier(v)], x, labels, parameters)
    for i in range(12):
        alone = AttackParameters(**{k: v[i : i + 1] for k, v in vars(parameters).items()})
        single = perturb([classifier, lambda v: -classifier(v)], x[i : i + 1], labels[i : i + 1], alone)
        torch.testing.assert_close(single, together[i : i + 1], atol=1e-6, rtol=0)


def test_pgd_equals_foolbox(classifier, images):
    foolbox = pytest.importorskip("foolbox")
    attack = foolbox.attacks.LinfPGD(steps=5, abs_stepsize=2 / 255, random_start=False)
    reference = attack(foolbox.PyTorchModel(classifier, bounds=(0, 1)), images, LABELS, epsilons=[8 / 255])[1][0]
    own = pgd(classifier, images, LABELS, eps=8, steps=5, step_size=2, random_start=False)
    torch.testing.assert_close(own, reference, atol=1e-6, rtol=0)


def test_pgd_in_the_l2_norm_equals_foolbox(classifier, images):
    foolbox = pytest.importorskip("foolbox")
    attack = foolbox.attacks.L2PGD(steps=5, abs_stepsize=0.2, random_start=False)
    reference = attack(foolbox.PyTorchModel(classifier, bounds=(0, 1)), images, LABELS, epsilons=[0.5])[1][0]
    count = (len(images),)
    parameters = AttackParameters(
        eps=torch.full(count, 0.5),
        step_size=torch.full(count, 0.2),
        steps=torch.full(count, 5),
        momentum=torch.zeros(count),
        start=torch.zeros_like(images),
        surrogate=torch.zeros(count, dtype=torch.long),
        l2=torch.ones(count, dtype=torch.bool),
        smoothing=torch.zeros(count),
        views=torch.ones(*count, 0, 3),
    )
    torch.testing.assert_close(perturb([classifier], images, LABELS, parameters), reference, atol=1e-6, rtol=0)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_attacks_inside_a_guard_of_gradients(classifier, images, guard, outside):
    expected = pgd(classifier, images, LABELS, steps=3)
    views = AttackMixture(clean=0, input_diversity=1.0)
    batch = mixed_batch(6, views)
    mixed = perturb([classifier], images, None, AttackParameters.from_batch(batch))
    with guard():
        made = images.clone(), LABELS.clone(), {key: value.clone() for key, value in batch.items()}
        x, y, copied = (images, LABELS, batch) if outside else made
        assert torch.equal(pgd(classifier, x, y, steps=3), expected)
        assert torch.equal(perturb([classifier], x, None, AttackParameters.from_batch(copied)), mixed)
    x, y, copied = made  # tensors of inference mode outside of it
    assert torch.equal(pgd(classifier, x, y, steps=3), expected)
    assert torch.equal(perturb([classifier], x, None, AttackParameters.from_batch(copied)), mixed)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_cannot_be_attacked_is_not_passed_for_attacked(classifier, images, bad):
    def broken(pixels):
        logits = classifier(pixels)
        return logits + torch.where(pixels[:, :1, 0, 0] < 0.3, bad, 0.0)  # of single images alone

    images[:, 0, 0, 0] = torch.tensor([0.5, 0.1, 0.6, 0.7, 0.2, 0.9])
    parameters = AttackParameters.from_batch(mixed_batch(6, AttackMixture(clean=0, fgsm=1, num_surrogates=1)))
    parameters.surrogate = torch.tensor([0, 1, 1, 0, 0, 1])
    both = "logits or gradients of {} are not finite .* on {} of 6 images"
    with pytest.raises(ValueError, match=both.format("classifier 2", 1)):
        perturb([classifier, broken], images, LABELS, parameters)
    with pytest.raises(ValueError, match=both.format("one, other", 2)):
        perturb([broken, broken], images, LABELS, parameters, ["one", "other"])
    with pytest.raises(ValueError, match=both.format("mine", 2)):
        pgd(broken, images, LABELS, steps=2, random_start=False, name="mine")
    parameters.steps[[1, 4]] = 0  # nothing asks the classifiers about them
    assert perturb([broken, broken], images, LABELS, parameters).isfinite().all()
    assert torch.equal(pgd(lambda pixels: pixels.flatten(1)[:, :5] * 0, images, LABELS, random_start=False), images)


def test_fgsm_is_one_signed_step(classifier, images):
    fgsm = AttackMixture(clean=0, fgsm=1, fgsm_rs=0, mi_fgsm=0, pgd=0, eps_min=8, eps_max=8)
    parameters = AttackParameters.from_batch(mixed_batch(6, fgsm))
    leaf = images.clone().requires_grad_()
    loss = nn.functional.cross_entropy(classifier(leaf), LABELS, reduction="sum")
    expected = (images + 8 / 255 * torch.autograd.grad(loss, leaf)[0].sign()).clamp(0, 1)
    torch.testing.assert_close(perturb([classifier], images, LABELS, parameters), expected, atol=1e-6, rtol=0)


def test_attack_raises_the_loss(classifier, images):
    def loss(x):
        return nn.functional.cross_entropy(classifier(x), LABELS)

    assert loss(pgd(classifier, images, LABELS, eps=8, steps=5)) > loss(images) + 0.01


def test_momentum_is_that_of_mi_fgsm(classifier, images):
    eps, steps = 8 / 255, 3
    expected, momentum = images.clone(), torch.zeros_like(images)
    for _ in range(steps):
        leaf = expected.clone().requires_grad_()
        loss = nn.functional.cross_entropy(classifier(leaf), LABELS, reduction="sum")
        gradient = torch.autograd.grad(loss, leaf)[0]
        momentum = momentum + gradient / gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
        expected = (expected + eps / steps * momentum.sign()).clamp(images - eps, images + eps).clamp(0, 1)
    count = (len(images),)
    parameters = AttackParameters(
        eps=torch.full(count, eps),
        step_size=torch.full(count, eps / steps),
        steps=torch.full(count, steps),
        momentum=torch.ones(count),
        start=torch.zeros_like(images),
        surrogate=torch.zeros(count, dtype=torch.long),
        l2=torch.zeros(count, dtype=torch.bool),
        smoothing=torch.zeros(count),
        views=torch.ones(*count, 0, 3),
    )
    torch.testing.assert_close(perturb([classifier], images, LABELS, parameters), expected, atol=1e-6, rtol=0)


def test_squares_are_stripes_and_squares_of_the_whole_radius(classifier):
    batch = mixed_batch(32, AttackMixture(clean=0, fgsm=0, fgsm_rs=0, mi_fgsm=0, pgd=0, square=1, eps_min=8, eps_max=8))
    images = torch.full((32, 3, 8, 8), 0.5)
    attacked = perturb([classifier], images, torch.zeros(32, dtype=torch.long), AttackParameters.from_batch(batch))
    change = (attacked - images) * 255 / 8
    torch.testing.assert_close(change.abs(), torch.ones_like(change), atol=1e-5, rtol=0)
    same_as_below = (change[:, :, 1:] - change[:, :, :-1]).abs() < 1
    assert 0.6 < same_as_below.float().mean() < 0.999  # noise would give a half, stripes alone 1
    stripes = same_as_below.flatten(1).all(dim=1)
    assert stripes.any() and not stripes.all()


def test_a_share_of_pgd_starts_at_the_clean_image():
    only_pgd = {"clean": 0, "fgsm": 0, "fgsm_rs": 0, "mi_fgsm": 0, "pgd": 1}
    at_random, mixed = (mixed_batch(64, AttackMixture(**only_pgd, pgd_random_start=share)) for share in (1.0, 0.5))
    started = (mixed["attack_start"] != 0).flatten(1).any(dim=1)
    assert 16 < started.sum() < 48 and (at_random["attack_start"] != 0).flatten(1).any(dim=1).all()
    assert torch.equal(mixed["attack_start"][started], at_random["attack_start"][started])
    assert torch.equal(mixed["attack_eps"], at_random["attack_eps"])


def test_every_sample_is_attacked_on_its_own_surrogate(classifier, images):
    others = [classifier, lambda x: -classifier(x)]
    parameters = AttackParameters.from_batch(mixed_batch(6, AttackMixture(clean=0, num_surrogates=2)))
    parameters.surrogate = torch.tensor([0, 1, 0, 1, 0, 1])
    mixed = perturb(others, images, LABELS, parameters)
    parameters.surrogate = torch.zeros(6, dtype=torch.long)
    for index, surrogate in enumerate(others):
        alone = perturb([surrogate], images, LABELS, parameters)
        torch.testing.assert_close(mixed[index::2], alone[index::2], atol=1e-6, rtol=0)
        assert not torch.allclose(mixed[1 - index :: 2], alone[1 - index :: 2])


def test_missing_labels_are_the_classifiers_own(classifier, images):
    predicted = classifier(images).argmax(-1)
    expected = pgd(classifier, images, predicted)
    assert torch.equal(pgd(classifier, images, None), expected)
    assert torch.equal(pgd(classifier, images, torch.full((6,), -1)), expected)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"clean": -0.1}, "shares"),
        (dict.fromkeys(KINDS, 0.0), "shares"),
        ({"eps_min": 9, "eps_max": 8}, "eps_min"),
        ({"eps_min": 0.01, "eps_max": 8 / 255}, "1/255"),
        ({"l2_eps_min": 0.5, "l2_eps_max": 0.4}, "l2_eps_min"),
        ({"max_steps": 1}, "max_steps"),
        ({"pgd_random_start": 1.5}, "pgd_random_start"),
        ({"input_diversity": -0.1}, "input_diversity"),
        ({"smoothed_gradient": 2}, "smoothed_gradient"),
        ({"num_surrogates": 0}, "num_surrogates"),
    ],
)
def test_mixture_names_the_bad_argument(arguments, named):
    with pytest.raises(ValueError, match=named):
        AttackMixture(**arguments)


def test_a_view_is_the_image_shrunk_and_laid_on_black():
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    small = nn.functional.interpolate(images, scale_factor=0.5, mode="bilinear")  # means of 2 x 2 pixels
    corners = {(-1.0, -1.0): (0, 0), (1.0, -1.0): (0, 16), (-1.0, 1.0): (16, 0), (1.0, 1.0): (16, 16)}
    for (across, down), (top, left) in corners.items():
        expected = torch.zeros_like(images)
        expected[:, :, top : top + 16, left : left + 16] = small
        seen = _look(images, torch.tensor([0.5, across, down]).expand(4, 3))
        torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)
    mixed = _look(images, torch.tensor([[1.0, 0.3, 0.3], [0.8, 0.0, 0.0], [1.0, 0.0, 0.0], [0.9, 1.0, 1.0]]))
    assert torch.equal(mixed[::2], images[::2]) and not torch.allclose(mixed[1::2], images[1::2])


def test_a_diverse_attack_takes_the_gradient_of_the_view(classifier, images):
    mixture = AttackMixture(clean=0, fgsm=1, fgsm_rs=0, mi_fgsm=0, pgd=0, eps_min=8, eps_max=8, input_diversity=1)
    batch = collate([mixture.draw(np.random.default_rng((5, i)), (3, 8, 8)) for i in range(6)])
    view = batch["attack_views"][:, 0]
    assert (view[:, 0] < 1).any() and (view[:, 0] == 1).any() and view[:, 0].min() >= 0.75
    leaf = images.clone().requires_grad_()
    loss = nn.functional.cross_entropy(classifier(_look(leaf, view)), LABELS, reduction="sum")
    expected = (images + 8 / 255 * torch.autograd.grad(loss, leaf)[0].sign()).clamp(0, 1)
    attacked = perturb([classifier], images, LABELS, AttackParameters.from_batch(batch))
    torch.testing.assert_close(attacked, expected, atol=1e-6, rtol=0)


def test_every_step_has_a_view_of_its_own(classifier, images):
    batch = mixed_batch(6, AttackMixture(clean=0, fgsm=1, fgsm_rs=0, mi_fgsm=0, pgd=0, eps_min=8, eps_max=8))
    views = torch.tensor([[1.0, 0, 0], [0.5, -1, -1]]).expand(6, 2, 3)
    parameters = AttackParameters.from_batch(batch | {"attack_steps": torch.full((6,), 3), "attack_views": views})
    parameters.step_size = parameters.eps / 4
    expected = images
    for step in range(3):  # the two in turns
        gradient = input_gradient(classifier, expected, LABELS, views[:, step % 2])
        expected = (expected + 2 / 255 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(perturb([classifier], images, LABELS, parameters), expected, atol=1e-6, rtol=0)


def test_a_smoothed_gradient_is_convolved_with_a_gaussian():
    gradient = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(1))
    places = torch.arange(-11, 12)
    kernel = torch.exp(-(places**2) / (2 * 0.8**2))
    kernel = (kernel[:, None] * kernel).expand(3, 1, -1, -1)
    expected = nn.functional.conv2d(gradient[1:], kernel, padding=11, groups=3)
    smoothed = _smooth(gradient, torch.tensor([0.0, 0.8]))
    torch.testing.assert_close(smoothed[1:], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(smoothed[0], gradient[0])


def test_shares_of_diverse_and_smoothed_attacks_are_those_asked_for():
    mixture = AttackMixture(input_diversity=0.25, smoothed_gradient=0.5, square=0.2)
    batch = collate([mixture.draw(np.random.default_rng((7, i)), (3, 8, 8)) for i in range(800)])
    gradient = (batch["attack_kind"] != KINDS.index("clean")) & (batch["attack_kind"] != KINDS.index("square"))
    viewed = (batch["attack_views"][:, :, 0] < 1).any(dim=1)
    smoothed = batch["attack_smoothing"] > 0
    assert not viewed[~gradient].any() and not smoothed[~gradient].any()
    assert abs(viewed[gradient].float().mean() - 0.25) < 0.05 and abs(smoothed[gradient].float().mean() - 0.5) < 0.06
    plain = AttackMixture(square=0.2)
    for i in range(20):  # what older recipes draw has not changed
        drawn, before = (m.draw(np.random.default_rng((7, i)), (3, 8, 8)) for m in (mixture, plain))
        assert all(torch.equal(drawn[f"attack_{k}"], before[f"attack_{k}"]) for k in ("eps", "kind", "start", "steps"))
