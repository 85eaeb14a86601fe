"""Purification at another scale."""

import numpy as np
import pytest
import torch
from PIL import Image

from maep_hf import MAEPConfig, MAEPModel
from maep_hf.defences import make_defence
from maep_hf.rescaled import RescaledPurifier

SIZES = []


def darken(pixels):
    """Half of every pixel: its correction is as smooth as the image, so that it survives the resizes."""
    SIZES.append(tuple(pixels.shape[2:]))
    return pixels / 2


def smooth_images() -> torch.Tensor:
    ramp = torch.linspace(0.2, 0.8, 40)
    return (ramp[:, None] + ramp).div(2).expand(2, 3, 40, 40).clone()


@pytest.mark.parametrize(("scale", "size"), [(0.5, (20, 20)), (2, (80, 80)), (0.001, (1, 1))])
def test_the_purifier_sees_the_other_scale(scale, size):
    images = smooth_images()
    purified = RescaledPurifier(darken, scale)(images)
    assert SIZES[-1] == size and purified.shape == images.shape
    if scale > 0.1:
        torch.testing.assert_close(purified, images / 2, atol=0.01, rtol=0)


def test_details_are_kept_where_nothing_is_corrected():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 40, 30)
    untrained = MAEPModel(MAEPConfig.tiny())  # exactly the identity
    assert torch.equal(RescaledPurifier(untrained, 0.5).purify(images, overlap=0.5), images)


def test_scale_one_is_the_purifier_and_gradients_pass():
    images = smooth_images().requires_grad_()
    assert torch.equal(RescaledPurifier(darken, 1)(images), images / 2)
    RescaledPurifier(darken, 0.5)(images).sum().backward()
    assert images.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [
        (torch.rand(2, 3, 8, 8) * 255, ValueError, r"must be in \[0, 1\], got values from .* divide 8-bit images"),
        (torch.randn(2, 3, 8, 8), ValueError, r"must be in \[0, 1\]"),
        (torch.rand(3, 8, 8), ValueError, "shape"),
        (torch.ones(2, 3, 8, 8, dtype=torch.uint8), TypeError, "floating point"),
    ],
)
def test_what_are_no_pixels_is_refused(pixels, error, message):
    with pytest.raises(error, match=message):
        RescaledPurifier(darken, 0.5)(pixels)
    assert RescaledPurifier(darken, 0.5)(torch.rand(0, 3, 8, 8)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("scale", [0.25, 1.5])
def test_the_purifier_sees_unit_pixels_resized_with_antialiasing(scale):
    seen = []
    edges = (torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    RescaledPurifier(lambda pixels: seen.append(pixels) or pixels, scale)(edges)
    side = round(32 * scale)
    filtered = [
        np.asarray(Image.fromarray(plane.numpy()).resize((side, side), Image.Resampling.BICUBIC)) for plane in edges[0]
    ]
    assert scale < 1 or np.max(filtered) > 1.05  # bicubic overshoots
    np.testing.assert_allclose(seen[0][0].numpy(), np.clip(filtered, 0, 1), atol=1e-5)


def test_the_record_is_the_purifiers_own_with_the_scale():
    inner = make_defence("bit-depth", bits=3)
    assert RescaledPurifier(inner, 0.5).record() == inner.record() | {"scale": 0.5}
    assert RescaledPurifier(darken, 2).record() == {"scale": 2.0}


@pytest.mark.parametrize("scale", [0, -1, float("inf"), float("nan")])
def test_a_wrong_scale_is_named(scale):
    with pytest.raises(ValueError, match="scale="):
        RescaledPurifier(darken, scale)
