"""Randomised purification, and which models are recognised as random."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import SIZE, tiny_purifier
from torch import nn

from maep_hf import PurifiedClassifier
from maep_hf.adaptation import add_lora, default_lora_config
from maep_hf.defences import BPDA, DEFENCES, make_defence
from maep_hf.randomised import RandomisedPurifier, is_randomised


@pytest.fixture(scope="module")
def model():
    return tiny_purifier().eval()


def images(batch: int = 2, height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def linear(classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, classes))


def test_it_is_the_mean_over_masks_of_the_models_own_purify(model):
    pixels, generator = images(), torch.Generator().manual_seed(7)
    draws = [model.purify(pixels, mask_ratio=0.5, generator=generator) for _ in range(4)]
    assert not torch.equal(draws[0], draws[1])
    purifier = RandomisedPurifier(model, 0.5, draws=4, seed=7)
    assert torch.allclose(purifier.purify(pixels), torch.stack(draws).mean(0), atol=1e-6)
    given = RandomisedPurifier(model, 0.5, draws=4).purify(pixels, generator=torch.Generator().manual_seed(7))
    assert torch.equal(given, purifier(pixels))
    assert torch.equal(RandomisedPurifier(model, 0.5, seed=7)(pixels), draws[0])
    # every image has a mask of its own
    twins = pixels[:1].expand(2, -1, -1, -1)
    first, second = RandomisedPurifier(model, 0.5, seed=7)(twins)
    assert not torch.equal(first, second)


def test_the_global_seed_repeats_it_and_without_one_calls_differ(model):
    purifier, pixels = RandomisedPurifier(model, mask_ratio=0.25, draws=2), images()
    torch.manual_seed(3)
    first, second = purifier(pixels), purifier(pixels)
    torch.manual_seed(3)
    assert torch.equal(purifier(pixels), first) and not torch.equal(first, second)
    # One number a call, whatever is drawn with it: what comes after does not depend on draws or size.
    following = []
    for draws, batch in ((1, 1), (3, 2)):
        torch.manual_seed(3)
        RandomisedPurifier(model, 0.5, draws=draws)(images(batch))
        following.append(torch.rand(()).item())
    assert following[0] == following[1]


def test_more_draws_come_closer_to_the_mean_over_all_masks(model):
    pixels = images(1)
    mean = RandomisedPurifier(model, 0.5, draws=150, seed=0)(pixels)
    distance = {k: (RandomisedPurifier(model, 0.5, k, seed=1)(pixels) - mean).norm().item() for k in (1, 32)}
    assert distance[32] < distance[1] / 2.5  # about 1 / 5 is expected


def test_no_mask_is_one_deterministic_pass(model):
    purifier, pixels, state = RandomisedPurifier(model, mask_ratio=0, draws=5), images(), torch.get_rng_state()
    assert torch.equal(purifier(pixels), model.purify(pixels))
    assert torch.equal(torch.get_rng_state(), state)
    assert purifier.randomised is False and purifier.draws == 1
    assert purifier.record() == {
        "mask_ratio": 0.0, "draws": 1, "seed": None, "purify_kwargs": {}, "randomised": False,
    }  # fmt: skip


def test_a_seed_of_its_own_fixes_the_masks_and_leaves_the_global_state(model):
    purifier, state = RandomisedPurifier(model, seed=4), torch.get_rng_state()
    assert torch.equal(purifier(images()), purifier(images()))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(purifier(images()), RandomisedPurifier(model, seed=5)(images()))


def test_the_gradient_is_the_mean_of_the_draws_gradients(model):
    pixels, weights = images().requires_grad_(), torch.randn(2, 3, SIZE, SIZE)
    (gradient,) = torch.autograd.grad((RandomisedPurifier(model, draws=3, seed=2)(pixels) * weights).sum(), pixels)
    generator = torch.Generator().manual_seed(2)
    expected = torch.zeros_like(pixels)
    for _ in range(3):
        purified = model.purify(pixels, mask_ratio=0.5, generator=generator)
        expected += torch.autograd.grad((purified * weights).sum(), pixels)[0] / 3
    assert torch.allclose(gradient, expected, atol=1e-5) and gradient.abs().sum() > 0


def test_other_sizes_precisions_and_options(model):
    for pixels in (images(1, 21, 37), images().half(), images().double()):
        purified = RandomisedPurifier(model, draws=3)(pixels)
        assert purified.shape == pixels.shape and purified.dtype == pixels.dtype
        assert ((purified >= 0) & (purified <= 1)).all()
    pixels = images(1, 21, 37)
    closer = RandomisedPurifier(model, seed=0, purify_kwargs={"overlap": 0.75})
    expected = model.purify(pixels, overlap=0.75, mask_ratio=0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(closer(pixels), expected)
    plain = RandomisedPurifier(model, seed=0, purify_kwargs={"overlap": 0.1})
    assert torch.equal(plain.purify(pixels, overlap=0.75), expected)  # as PurifiedClassifier hands options on
    assert torch.equal(RandomisedPurifier(model, 0)(pixels, overlap=0.75), model.purify(pixels, overlap=0.75))
    assert not torch.equal(RandomisedPurifier(model, seed=0)(pixels), expected)
    assert json.loads(json.dumps(closer.record()))["purify_kwargs"] == {"overlap": 0.75}


def test_white_pixels_stay_within_the_range():
    white = RandomisedPurifier(tiny_purifier(trained=False), draws=7)(torch.ones(1, 3, SIZE, SIZE))
    assert white.max() <= 1


def test_it_stands_before_a_classifier_and_around_an_adapter(model):
    defended = PurifiedClassifier(RandomisedPurifier(model, draws=2), linear())
    pixels = images().requires_grad_()
    torch.manual_seed(0)
    logits = defended(pixels)
    torch.manual_seed(0)
    assert torch.equal(defended(pixels), logits)
    logits.sum().backward()
    assert torch.isfinite(pixels.grad).all() and pixels.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="channels"):
        defended(images()[:, :1])
    adapted = add_lora(tiny_purifier(), default_lora_config(model))
    expected = RandomisedPurifier(tiny_purifier(), seed=0)(images())
    assert torch.allclose(RandomisedPurifier(adapted, seed=0)(images()), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask_ratio": 1.0}, ValueError, "mask_ratio=1.0 must be at least 0 and less than 1"),
        ({"mask_ratio": -0.1}, ValueError, "mask_ratio=-0.1"),
        ({"mask_ratio": float("nan")}, ValueError, "mask_ratio=nan"),
        ({"mask_ratio": "half"}, TypeError, "mask_ratio='half' must be a number"),
        ({"mask_ratio": 0.01}, ValueError, "mask_ratio=0.01 hides none of 16 patches: raise it, or give 0"),
        ({"draws": 0}, ValueError, "draws=0 must be at least 1"),
        ({"draws": 2.0}, TypeError, "draws=2.0 must be an integer"),
        ({"seed": -1}, ValueError, "seed=-1 must be from 0 to"),
        ({"seed": 2**63}, ValueError, "seed=9223372036854775808 must be from 0 to 9223372036854775807"),
        ({"purify_kwargs": {"generator": None}}, TypeError, "purify_kwargs.*generator: use `mask_ratio` and `seed`"),
    ],
)
def test_bad_options_are_named(model, options, error, message):
    with pytest.raises(error, match=message):
        RandomisedPurifier(model, **options)


def test_purifiers_without_a_mask_are_named():
    with pytest.raises(TypeError, match=r"purifier.*purify\(pixel_values, mask_ratio=, generator=\).*JPEG has none"):
        RandomisedPurifier(make_defence("jpeg"))
    with pytest.raises(TypeError, match="got a name; use MAEPModel.from_pretrained"):
        RandomisedPurifier("maep")


class Noisy(nn.Module):
    """Adds noise from one of the places that noise comes from."""

    def __init__(self, source: str, scale: float = 0.01):
        super().__init__()
        self.source, self.scale = source, scale
        self.generator, self.rng = torch.Generator(), np.random.default_rng(0)

    def forward(self, pixel_values):
        shape = pixel_values.shape
        if self.source == "torch":
            noise = torch.randn(shape)
        elif self.source == "numpy":
            noise = torch.from_numpy(np.random.standard_normal(shape)).float()
        elif self.source == "python":
            noise = random.random()
        elif self.source == "own generator":
            noise = torch.randn(shape, generator=self.generator)
        elif self.source == "own rng":
            noise = torch.from_numpy(self.rng.standard_normal(shape)).float()
        elif self.source == "global state left as it was":
            with torch.random.fork_rng(devices=[]):
                noise = torch.randn(shape)
        elif self.source == "seeded":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                noise = torch.randn(shape)
        return pixel_values + self.scale * noise


SOURCES = ["torch", "numpy", "python", "own generator", "own rng", "global state left as it was"]


@pytest.mark.parametrize("source", SOURCES)
def test_noise_is_recognised_wherever_it_comes_from(source):
    purifier = Noisy(source)
    assert is_randomised(purifier, images()) is True
    assert is_randomised(purifier.forward, images()) is True
    assert is_randomised(BPDA(purifier), images()) is True
    assert is_randomised(PurifiedClassifier(purifier, linear()), images()) is True
    # the classifier's own noise counts too, behind a deterministic purifier
    assert is_randomised(PurifiedClassifier(torch.sqrt, nn.Sequential(Noisy(source), linear())), images()) is True


def test_deterministic_models_are_recognised_as_such(model):
    assert is_randomised(Noisy("seeded"), images()) is False
    assert is_randomised(Noisy("torch", scale=1e-7), images()) is False  # rounding
    assert is_randomised(torch.sqrt, images()) is False
    assert is_randomised(lambda x: x * torch.nan, images()) is False
    for name, kind in DEFENCES.items():
        assert is_randomised(make_defence(name), images()) is kind.randomised
    assert is_randomised(model, images()) is False
    assert is_randomised(tiny_purifier(hidden_dropout_prob=0.5).train(), images()) is False  # purify drops nothing
    assert is_randomised(PurifiedClassifier(model, linear()), images()) is False


def test_randomised_purification_is_recognised(model):
    for purifier, expected in (
        (RandomisedPurifier(model), True),
        (RandomisedPurifier(model, draws=8), True),
        (RandomisedPurifier(model, mask_ratio=0), False),
        (RandomisedPurifier(model, seed=0), True),  # an image's mask depends on its place in the batch
    ):
        assert purifier.randomised is expected
        assert is_randomised(purifier, images()) is expected
        assert is_randomised(PurifiedClassifier(purifier, linear()), images()) is expected
    # not by its word alone: the same purifier is found out when asked through a function
    assert is_randomised(RandomisedPurifier(model).purify, images()) is True


def test_dropout_counts_in_the_mode_the_model_is_in():
    classifier = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * SIZE * SIZE, 4))
    assert is_randomised(classifier.eval(), images()) is False
    assert is_randomised(classifier.train(), images()) is True and classifier.training


def test_a_declaration_is_believed_where_draws_happen_to_agree():
    class Rare(nn.Module):
        randomised = True

        def forward(self, x):
            return x

    assert is_randomised(Rare(), images()) is True
    assert is_randomised(PurifiedClassifier(Rare(), linear()), images()) is True


def test_a_rare_act_is_seen_with_enough_passes():
    def rarely(x):
        return 1 - x if torch.rand(()) < 0.2 else x

    assert is_randomised(rarely, images(), passes=60) is True


def global_states() -> list:
    return [torch.get_rng_state(), *np.random.get_state()[1:3], random.getstate()]


def test_the_callers_random_states_stay_as_they_are():
    before = global_states()
    for source in SOURCES:
        is_randomised(Noisy(source), images())

    def fails(x):
        torch.rand(3), np.random.rand(3), random.random()
        raise RuntimeError("no such image")

    with pytest.raises(RuntimeError, match="no such image"):
        is_randomised(fails, images())
    after = global_states()
    assert torch.equal(before[0], after[0]) and np.array_equal(before[1], after[1])
    assert before[2:] == after[2:]


def test_no_graph_is_made_and_inputs_stay(model):
    pixels = images().requires_grad_()
    seen = []
    assert is_randomised(lambda x: seen.append(torch.is_grad_enabled()) or x, pixels) is False
    assert seen == [False] * 3 and pixels.grad is None


def test_what_cannot_be_judged_is_named(model):
    with pytest.raises(ValueError, match="passes=1 must be at least 2"):
        is_randomised(model, images(), passes=1)
    with pytest.raises(ValueError, match="pixels.*no images"):
        is_randomised(model, images(0))
    with pytest.raises(TypeError, match="got a name"):
        is_randomised("maep", images())
    with pytest.raises(TypeError, match="module.*must return a tensor.*got str"):
        is_randomised(lambda x: "cat", images())
