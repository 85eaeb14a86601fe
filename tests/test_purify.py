"""MAEPModel.purify: any size, no seams, bounded memory, gradients to every pixel."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from maep_hf import MAEPConfig, MAEPModel, MAEPOutput
from maep_hf.modeling_maep import MAEPWindows, _windows

SMALL = {
    "image_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
    "local_branch_layers": 1,
    "local_branch_channels": 4,
}
SIZES = [(16, 16), (16, 40), (7, 5), (1, 1), (9, 50), (33, 16), (17, 47), (64, 3)]


def build(perturb=0.1, **overrides):
    torch.manual_seed(0)
    model = MAEPModel(MAEPConfig(**(SMALL | overrides))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(perturb * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("mode", ["windows", "interpolate"])
@pytest.mark.parametrize("size", SIZES)
def test_any_size_and_identity_before_training(size, mode):
    pixels = torch.rand(2, 3, *size)
    assert torch.equal(build(0.0).purify(pixels, mode=mode), pixels)
    out = build().purify(pixels, mode=mode)
    assert out.shape == pixels.shape and out.dtype == pixels.dtype
    assert out.min() >= 0 and out.max() <= 1 and (out - pixels).abs().mean() > 1e-3


def test_native_size_is_the_plain_forward_in_either_mode():
    model, pixels = build(), torch.rand(3, 3, 16, 16)
    expected = model(pixels).purified_pixel_values
    for mode in ("windows", "interpolate"):
        assert torch.equal(model.purify(pixels, mode=mode), expected)
    torch.testing.assert_close(model.purify(pixels, window_batch_size=2), expected)


def test_without_the_decorator_that_takes_return_dict(monkeypatch):
    """accelerate's unwrap_model(keep_fp32_wrapper=False) strips it with its own; a configuration may ask for tuples."""
    model, pixels = build(), torch.rand(1, 3, 20, 16)
    expected = model.purify(pixels)
    model.config.return_dict = False
    assert torch.equal(model.purify(pixels), expected)
    monkeypatch.setattr(model, "forward", MAEPModel.forward.__wrapped__.__get__(model))
    assert torch.equal(model.purify(pixels), expected)


def test_training_mode_changes_nothing():
    model, pixels = build(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5), torch.rand(1, 3, 20, 30)
    expected = model.purify(pixels)
    assert torch.equal(model.train().purify(pixels), expected)
    assert model.training


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("length", [16, 17, 31, 32, 100])
def test_windows_cover_and_weights_add_up(length, overlap):
    starts, weights = _windows(length, 16, overlap, torch.device("cpu"), torch.float64)
    assert starts[0] == 0 and starts[-1] == length - 16 and (weights > 0).all()
    steps = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    assert all(0 < step <= 16 - int(16 * overlap) for step in steps)
    total = torch.zeros(length, dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + 16] += weight
    torch.testing.assert_close(total, torch.ones(length, dtype=torch.float64))


def test_windows_are_blended_by_a_raised_cosine():
    starts, weights = _windows(24, 16, 0.5, torch.device("cpu"), torch.float64)
    rising = (1 - torch.cos(2 * torch.pi * (torch.arange(8, dtype=torch.float64) + 0.5) / 16)) / 2
    assert starts == [0, 8]
    torch.testing.assert_close(weights[1], torch.cat([rising, torch.ones(8, dtype=torch.float64)]))


def test_an_image_smaller_than_a_window_is_reflected():
    pixels = torch.rand(1, 3, 10, 12)
    expected = np.pad(pixels.numpy(), ((0, 0), (0, 0), (0, 6), (0, 4)), mode="reflect")
    assert torch.equal(MAEPWindows(10, 12, 16, 0.0).extend(pixels), torch.from_numpy(expected))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 1000])
def test_window_batch_size_does_not_change_the_result(batch_size):
    model, pixels = build(), torch.rand(2, 3, 41, 50)
    largest = []
    handle = model.encoder.register_forward_pre_hook(lambda _, args: largest.append(len(args[0])))
    out = model.purify(pixels, window_batch_size=batch_size)
    handle.remove()
    assert max(largest) <= batch_size
    torch.testing.assert_close(out, build().purify(pixels), rtol=0, atol=1e-6)


def test_batch_equals_one_by_one():
    model, pixels = build(), torch.rand(3, 3, 20, 37)
    singles = torch.cat([model.purify(image[None]) for image in pixels])
    torch.testing.assert_close(model.purify(pixels), singles, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["windows", "interpolate"])
@pytest.mark.parametrize("size", [(16, 16), (40, 17)])
def test_an_empty_batch_is_one(size, mode):
    purified = build().purify(torch.zeros(0, 3, *size), mode=mode)
    assert purified.shape == (0, 3, *size)


def test_no_seams():
    """Where windows begin and end, the correction of a smooth image jumps no more than elsewhere."""
    model = build(0.3)
    rows, columns = torch.meshgrid(torch.linspace(0.3, 0.7, 88), torch.linspace(0.3, 0.7, 88), indexing="ij")
    pixels = torch.stack([rows, columns, (rows + columns) / 2])[None]
    change = model.purify(pixels) - pixels
    assert change.abs().mean() > 0.01
    starts, _ = _windows(88, 16, 0.25, torch.device("cpu"), torch.float32)
    borders = sorted({edge for start in starts for edge in (start, start + 16) if 0 < edge < 88})
    for jump in (change.diff(dim=2).abs().mean(dim=(0, 1, 3)), change.diff(dim=3).abs().mean(dim=(0, 1, 2))):
        at = torch.tensor([edge - 1 for edge in borders])
        elsewhere = torch.ones(87, dtype=torch.bool).index_fill(0, at, False)
        assert jump[at].mean() < 1.2 * jump[elsewhere].mean()


def test_blending_spreads_the_worst_seam(monkeypatch):
    """Every window darkens its left and brightens its right side: put side by side, that is a step at each border."""
    model, pixels = build(), torch.full((1, 3, 16, 80), 0.5)
    ramp = torch.linspace(-0.1, 0.1, 16)
    monkeypatch.setattr(model, "forward", lambda windows, **_: MAEPOutput(purified_pixel_values=windows + ramp))
    jumps = [model.purify(pixels, overlap=overlap).diff(dim=3).abs().max() for overlap in (0.0, 0.25, 0.5)]
    assert jumps[0] > 0.19
    assert jumps[1] < 0.4 * jumps[0] and jumps[2] < 0.2 * jumps[0]


@pytest.mark.parametrize("mode", ["windows", "interpolate"])
@pytest.mark.parametrize("size", [(16, 16), (21, 35), (9, 16)])
def test_gradient_reaches_every_pixel(size, mode):
    pixels = (torch.rand(1, 3, *size) * 0.4 + 0.3).requires_grad_()
    (gradient,) = torch.autograd.grad(build(0.05).purify(pixels, mode=mode).square().sum(), pixels)
    assert gradient.isfinite().all() and (gradient != 0).all()


@pytest.mark.parametrize("mode", ["windows", "interpolate"])
def test_gradient_equals_finite_differences(mode):
    model = build(0.05, image_size=8, patch_size=4).double()
    pixels = (torch.rand(1, 3, 9, 11, dtype=torch.float64) * 0.4 + 0.3).requires_grad_()

    def value(x):
        return model.purify(x, mode=mode, window_batch_size=3).square().sum()

    (gradient,) = torch.autograd.grad(value(pixels), pixels)
    for seed in range(3):
        direction = torch.randn(pixels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            difference = (value(pixels + 1e-6 * direction) - value(pixels - 1e-6 * direction)) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-5, atol=1e-7)


def test_gradients_are_not_switched_off_nor_on():
    model, pixels = build(), torch.rand(1, 3, 20, 20)
    assert model.purify(pixels).requires_grad
    with torch.no_grad():
        assert not model.purify(pixels).requires_grad


def test_bfloat16():
    pixels = torch.rand(1, 3, 20, 30)
    expected = build().purify(pixels)
    model = build().to(torch.bfloat16)
    torch.testing.assert_close(model.purify(pixels), expected, rtol=0, atol=0.05)
    assert model.purify(pixels.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["windows", "interpolate"])
@pytest.mark.parametrize("size", [(16, 16), (20, 30)])
def test_strength_multiplies_the_correction(size, mode):
    model, pixels = build(), torch.rand(2, 3, *size)
    correction = model.purify(pixels, mode=mode) - pixels
    assert correction.abs().max() > 0.01
    for strength in (0, 0.5, 1.3):
        expected = (pixels + strength * correction).clamp(0, 1)
        torch.testing.assert_close(model.purify(pixels, mode=mode, strength=strength), expected)
    assert torch.equal(model.purify(pixels, mode=mode, strength=0), pixels)
    assert model.purify(pixels, mode=mode, strength=100).aminmax() == (0, 1)
    stronger = build(purify_strength=1.3)
    assert torch.equal(stronger.purify(pixels, mode=mode), model.purify(pixels, mode=mode, strength=1.3))
    assert torch.equal(stronger.purify(pixels, mode=mode, strength=1), model.purify(pixels, mode=mode))


def test_strength_multiplies_the_gradient_and_keeps_the_dtype():
    model, pixels = build(perturb=0.02), 0.4 + 0.2 * torch.rand(1, 3, 20, 20)
    gradients = []
    for strength in (0.0, 1.0, 2.0):
        leaf = pixels.clone().requires_grad_()
        gradients.append(torch.autograd.grad(model.purify(leaf, strength=strength).square().sum(), leaf)[0])
    assert torch.equal(gradients[0], 2 * pixels)  # the image itself
    assert not torch.equal(gradients[1], gradients[2])
    half = build().bfloat16()
    assert half.purify(pixels.bfloat16(), strength=1.3).dtype == torch.bfloat16


def test_masked_purification_follows_the_generator():
    model, pixels = build(), torch.rand(1, 3, 20, 30)
    draws = [model.purify(pixels, mask_ratio=0.5, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("pixels", "arguments", "message"),
    [
        (torch.rand(3, 20, 20), {}, "shape"),
        (torch.rand(1, 4, 20, 20), {}, "shape"),
        (torch.rand(1, 3, 0, 20), {}, "no pixels"),
        (torch.zeros(1, 3, 20, 20, dtype=torch.uint8), {}, "floating"),
        (torch.rand(1, 3, 20, 20) * 255, {}, "255"),
        (torch.rand(1, 3, 20, 20) - 0.5, {}, r"\[0, 1\]"),
        (torch.rand(1, 3, 20, 20), {"mode": "tiles"}, "mode"),
        (torch.rand(1, 3, 20, 20), {"overlap": 1.0}, "overlap"),
        (torch.rand(1, 3, 20, 20), {"window_batch_size": 0}, "window_batch_size"),
        (torch.rand(1, 3, 20, 20), {"mask_ratio": 1}, "mask_ratio"),
        (torch.rand(1, 3, 16, 16), {"strength": -0.1}, "strength"),
        (torch.rand(1, 3, 20, 20), {"strength": float("inf")}, "strength"),
        (torch.rand(1, 3, 20, 20), {"strength": float("nan")}, "strength"),
    ],
)
def test_arguments_are_checked(pixels, arguments, message):
    with pytest.raises(ValueError, match=message):
        build().purify(pixels, **arguments)


@pytest.mark.parametrize("factor", [255, -1, float("nan")])
def test_values_that_are_no_pixels_are_refused(factor):
    spoiled = torch.zeros(1, 3, 32, 32)
    spoiled[0, 0, 0, 0] = factor
    with pytest.raises(ValueError, match=r"pixel_values must be in \[0, 1\]"):
        build().purify(spoiled)


def test_memory_of_a_large_image_is_bounded():
    """A tenth of the pixels of a 4096 x 4096 image must stay under a quarter of its 2 GiB."""
    pytest.importorskip("resource")
    script = f"""
import resource, sys, torch
from maep_hf import MAEPConfig, MAEPModel
torch.set_num_threads(1)
model = MAEPModel(MAEPConfig(**{SMALL | {"image_size": 32}!r})).eval()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
with torch.no_grad():
    model.purify(torch.rand(1, 3, 32, 32))
    before = peak()
    model.purify(torch.rand(1, 3, 1296, 1296))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 0.5
