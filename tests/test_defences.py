"""Classical defences against the libraries called directly, and BPDA: the purifier's value, the identity's gradient."""

import copy
import io
import json
import pickle
import re
import sys

import numpy as np
import pytest
import scipy.ndimage
import skimage.restoration
import torch
from conftest import ROOT, tiny_purifier
from PIL import Image
from torch import nn

from maep_hf import PurifiedClassifier, defences
from maep_hf.adaptation import add_lora, default_lora_config
from maep_hf.defences import BPDA, DEFENCES, call_purifier, make_defence

DETERMINISTIC = sorted(set(DEFENCES) - {"resize-and-pad"})
DETACHED = ["bit-depth", "jpeg", "median", "total-variation"]


def images(batch: int = 3, channels: int = 3, height: int = 20, width: int = 28, seed: int = 0) -> torch.Tensor:
    """Smooth waves and some noise, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    phase = torch.rand(batch, channels, 1, 1, generator=generator) * 6
    waves = 0.5 + 0.35 * torch.sin(phase + 0.3 * x + 0.5 * y)
    return (waves + 0.1 * torch.randn(waves.shape, generator=generator)).clamp(0, 1)


def decoded_jpeg(array: np.ndarray, **options) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG", **options)
    return np.array(Image.open(file))


def test_jpeg_is_pillows():
    pixels = images()
    for quality in (75, 20):
        defended = make_defence("jpeg", quality=quality)(pixels)
        for image, expected in zip(defended, pixels, strict=True):
            array = np.rint(expected.permute(1, 2, 0).numpy() * 255).astype("u1")
            direct = decoded_jpeg(array, quality=quality)  # Pillow's own subsampling
            assert np.array_equal(image.permute(1, 2, 0).numpy(), direct.astype("f4") / 255)
    array = np.rint(pixels[0].permute(1, 2, 0).numpy() * 255).astype("u1")
    fine = make_defence("jpeg", subsampling="4:4:4")(pixels)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(fine, decoded_jpeg(array, quality=75, subsampling=0).astype("f4") / 255)


def test_jpeg_of_grey_images():
    pixels = images(channels=1)
    array = np.rint(pixels[1, 0].numpy() * 255).astype("u1")
    direct = decoded_jpeg(array, quality=75).astype("f4") / 255
    assert np.array_equal(make_defence("jpeg")(pixels)[1, 0].numpy(), direct)


def test_bit_depth_keeps_the_levels_and_the_nearest_one():
    ramp = torch.linspace(0, 1, 1001, dtype=torch.float64).view(1, 1, 1, -1)
    squeezed = make_defence("bit-depth", bits=3)(ramp)
    assert torch.allclose(squeezed.unique(), torch.arange(8, dtype=torch.float64) / 7)
    assert (squeezed - ramp).abs().max() <= 0.5 / 7 + 1e-12
    eight_bits = torch.arange(256).view(1, 1, 16, 16) / 255
    assert torch.equal(make_defence("bit-depth", bits=8)(eight_bits), eight_bits)
    assert make_defence("bit-depth", bits=1)(ramp).unique().tolist() == [0, 1]


def test_median_is_scipys_channel_by_channel():
    pixels = images()
    for size in (2, 3):
        defended = make_defence("median", size=size)(pixels)
        for image, expected in zip(defended.flatten(0, 1), pixels.flatten(0, 1), strict=True):
            assert np.array_equal(image.numpy(), scipy.ndimage.median_filter(expected.numpy(), size=size))


def test_total_variation_is_scikit_images_image_by_image():
    pixels = images()
    defended = make_defence("total-variation", weight=0.2, max_iterations=30, tolerance=1e-3)(pixels)
    for image, expected in zip(defended, pixels, strict=True):
        direct = skimage.restoration.denoise_tv_chambolle(
            expected.permute(1, 2, 0).numpy(), weight=0.2, eps=1e-3, max_num_iter=30, channel_axis=-1
        )
        assert np.allclose(image.permute(1, 2, 0).numpy(), direct.clip(0, 1), atol=1e-6)


def test_gaussian_blur_is_scipys():
    pixels = images().double()
    for sigma in (0.4, 0.7, 2.0):
        direct = scipy.ndimage.gaussian_filter(pixels.numpy(), sigma=(0, 0, sigma, sigma), mode="mirror")
        assert np.allclose(make_defence("gaussian-blur", sigma=sigma)(pixels).numpy(), direct, atol=1e-12)


def test_resize_and_pad_draws_a_size_and_a_place_for_every_image():
    torch.manual_seed(0)
    defended = make_defence("resize-and-pad")(torch.ones(600, 1, 32, 32))[:, 0]
    # A white image shows what was drawn: its area, and where its centre is, in pixels of the 36-pixel canvas.
    area = defended.sum((1, 2)) * (36 / 32) ** 2
    side = area.sqrt()
    assert {round(value) for value in side.tolist()} == {33, 34, 35}
    assert (side - side.round()).abs().max() < 0.1
    index = torch.arange(32) + 0.5
    rows = (defended.sum(2) * index).sum(1) / defended.sum((1, 2)) * 36 / 32
    columns = (defended.sum(1) * index).sum(1) / defended.sum((1, 2)) * 36 / 32
    first = torch.stack([rows, columns], 1) - side.round()[:, None] / 2  # the first row and column of the image
    assert (first - first.round()).abs().max() < 0.1
    drawn = set(zip(side.round().int().tolist(), *first.round().int().T.tolist(), strict=True))
    every = {(s, top, left) for s in (33, 34, 35) for top in range(37 - s) for left in range(37 - s)}
    assert drawn == every  # all 29 patterns, and none outside the canvas


def test_a_canvas_is_not_larger_for_an_error_of_rounding(monkeypatch):
    sizes, resize = [], defences._resize
    monkeypatch.setattr(
        defences, "_resize", lambda images, size: sizes.append(tuple(images.shape[2:])) or resize(images, size)
    )
    make_defence("resize-and-pad", smallest=1, largest=1.1)(torch.rand(1, 3, 50, 50))
    assert 50 * 1.1 > 55 and sizes[-1] == (55, 55)


def test_a_record_is_the_same_with_cuda_and_without(monkeypatch):
    monkeypatch.setattr(defences, "version", lambda library: "2.9.1+cu128")
    assert make_defence("bit-depth").record()["version"] == "2.9.1"


def test_resize_and_pad_of_other_sizes():
    for height, width in ((1, 1), (5, 3), (20, 28), (299, 40)):
        torch.manual_seed(0)
        defended = make_defence("resize-and-pad", largest=1.5)(torch.ones(4, 3, height, width))
        assert defended.shape == (4, 3, height, width) and 0 < defended.mean() < 1
    # the aspect ratio stays: 66 x 33 to 70 x 35 on 71 x 36, brought back to 64 x 32
    defended = make_defence("resize-and-pad")(torch.ones(20, 1, 64, 32))[:, 0]
    ratio = defended.sum(1).amax(1) / defended.sum(2).amax(1)
    assert (ratio - 2 * 36 / 35.5).abs().max() < 0.04


@pytest.mark.parametrize("name", DEFENCES)
def test_shape_dtype_range_and_the_input(name):
    defence = make_defence(name)
    pixels = images()
    kept = pixels.clone()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        torch.manual_seed(0)
        given = pixels.to(dtype)
        defended = defence(given)
        assert defended.shape == given.shape and defended.dtype == dtype and defended.device == given.device
        assert 0 <= defended.min() and defended.max() <= 1
        # It acts, and in every precision in the same way (a pixel near a step of a quantiser may go the other way).
        assert not torch.equal(defended, given)
        torch.manual_seed(0)
        assert (defended.float() - defence(given.float())).abs().mean() < 2e-3
    assert torch.equal(pixels, kept)
    assert defence(pixels[:0]).shape == (0, *pixels.shape[1:])
    strided = pixels.to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    expected = defence(pixels)
    torch.manual_seed(1)
    assert torch.allclose(defence(strided), expected, atol=1e-6)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_images_do_not_depend_on_the_batch_nor_on_the_random_state(name):
    defence, pixels = make_defence(name), images()
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    together = defence(pixels)
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.allclose(torch.cat([defence(image[None]) for image in pixels]), together, atol=1e-6)
    assert defence.randomised is False


def test_resize_and_pad_is_random_and_a_seed_repeats_it():
    defence, pixels = make_defence("resize-and-pad"), images()
    torch.manual_seed(5)
    first, second = defence(pixels), defence(pixels)
    torch.manual_seed(5)
    assert torch.equal(defence(pixels), first) and not torch.equal(first, second)
    assert defence.randomised is True


@pytest.mark.parametrize("name", DEFENCES)
def test_gradients_pass_or_the_result_is_detached(name):
    defence, pixels = make_defence(name), images().requires_grad_()
    defended = defence(pixels)
    assert defended.requires_grad == defence.differentiable == (name not in DETACHED)
    if defence.differentiable:
        (gradient,) = torch.autograd.grad(defended.square().sum(), pixels)
        assert torch.isfinite(gradient).all() and (gradient != 0).float().mean() > 0.99


@pytest.mark.parametrize("name", ["gaussian-blur", "resize-and-pad"])
def test_gradients_are_those_of_the_values(name):
    defence = make_defence(name)
    pixels = images(1, 1, 7, 6).double().mul(0.8).add(0.1).requires_grad_()

    def repeated(x):
        torch.manual_seed(2)
        return defence(x)

    assert torch.autograd.gradcheck(repeated, (pixels,))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("jpeg", {"quality": 30, "subsampling": "4:2:2"}),
        ("bit-depth", {"bits": 2}),
        ("median", {"size": 5}),
        ("total-variation", {"weight": 0.3, "max_iterations": 7}),
        ("gaussian-blur", {"sigma": 1.5}),
        ("resize-and-pad", {"smallest": 1.0, "largest": 2}),
    ],
)
def test_the_record_says_how_to_make_it_again(name, options):
    defence, pixels = make_defence(name, **options), images()
    record = json.loads(json.dumps(defence.record()))
    assert record["name"] == name and options.items() <= record["options"].items() and record["version"]
    assert record["randomised"] == defence.randomised and record["differentiable"] == defence.differentiable
    torch.manual_seed(0)
    expected = defence(pixels)
    for again in (
        make_defence(record["name"], **record["options"]),
        pickle.loads(pickle.dumps(defence)),
        copy.deepcopy(defence),
    ):
        torch.manual_seed(0)
        assert torch.equal(again(pixels), expected)
    torch.manual_seed(0)
    assert not torch.equal(make_defence(name)(pixels), expected)  # the options do something
    for option, value in options.items():
        assert f"{option}={value!r}" in repr(defence)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("jpg", {}, ValueError, r"name='jpg' must be one of jpeg, bit-depth"),
        ("jpeg", {"qualty": 50}, TypeError, r"jpeg has no option qualty; it has quality, subsampling"),
        ("jpeg", {"quality": 0}, ValueError, r"quality=0 must be from 1 to 100"),
        ("jpeg", {"quality": 75.0}, TypeError, r"quality=75.0 must be an integer"),
        ("jpeg", {"subsampling": "4:1:1"}, ValueError, r"subsampling='4:1:1' must be one of 4:4:4"),
        ("bit-depth", {"bits": 9}, ValueError, r"bits=9 must be from 1 to 8"),
        ("bit-depth", {"bits": True}, TypeError, r"bits=True must be an integer"),
        ("median", {"size": 1}, ValueError, r"size=1 must be at least 2"),
        ("total-variation", {"weight": 0}, ValueError, r"weight=0 must be positive"),
        ("total-variation", {"weight": "0.1"}, TypeError, r"weight='0.1' must be a number"),
        ("total-variation", {"max_iterations": 0}, ValueError, r"max_iterations=0 must be at least 1"),
        ("gaussian-blur", {"sigma": float("nan")}, ValueError, r"sigma=nan must be positive and finite"),
        ("resize-and-pad", {"smallest": 0.9}, ValueError, r"smallest=0.9 must be at least 1"),
        ("resize-and-pad", {"largest": 1.0}, ValueError, r"largest=1 must be greater than smallest"),
    ],
)
def test_bad_options_are_named(name, options, error, message):
    with pytest.raises(error, match=message):
        make_defence(name, **options)


@pytest.mark.parametrize("name", DEFENCES)
def test_bad_images_are_named(name):
    defence, pixels = make_defence(name), images()
    with pytest.raises(ValueError, match=r"pixel_values.*add the batch dimension"):
        defence(pixels[0])
    with pytest.raises(TypeError, match=r"pixel_values.*float\(\) / 255"):
        defence((pixels * 255).byte())
    with pytest.raises(ValueError, match=r"pixel_values.*\[0, 1\].*divide 8-bit images by 255"):
        defence(pixels * 255)
    with pytest.raises(ValueError, match=r"pixel_values.*NaN"):
        defence(torch.where(pixels == pixels.max(), torch.nan, pixels))


def test_images_that_a_defence_cannot_take_are_named():
    with pytest.raises(ValueError, match=r"pixel_values.*2 channels, but JPEG stores grey \(1\) or RGB \(3\)"):
        make_defence("jpeg")(images(channels=2))
    with pytest.raises(ValueError, match=r"sigma=3 reaches 12 pixels.*8 x 28: use a sigma below 1.875"):
        make_defence("gaussian-blur", sigma=3)(images(height=8))
    make_defence("gaussian-blur", sigma=1.87)(images(height=8))


@pytest.mark.parametrize(
    ("name", "module", "distribution"),
    [("median", "scipy.ndimage", "scipy"), ("total-variation", "skimage.restoration", "scikit-image")],
)
def test_a_missing_library_is_named_when_the_defence_is_made(name, module, distribution, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {distribution}.*pip install 'maep-hf\[attacks\]'"):
        make_defence(name)


class Doubled(nn.Module):
    """A purifier module of its own, with weights."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, pixel_values, power: float = 2.0):
        return (self.scale * pixel_values) ** power


def purifiers() -> dict:
    model = tiny_purifier()
    return {
        **{name: make_defence(name) for name in DETERMINISTIC},
        "maep": model,
        "lora": add_lora(tiny_purifier(), default_lora_config(model)),
        "module": Doubled(),
        "callable": torch.sqrt,
        "behind a classifier": PurifiedClassifier(Doubled(), nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))),
    }


@pytest.mark.parametrize("name", purifiers())
def test_bpda_has_the_purifiers_value_and_the_identitys_gradient(name):
    purifier = purifiers()[name]
    pixels = images(2, 3, 16, 16).requires_grad_()
    output = BPDA(purifier)(pixels)
    expected = call_purifier(purifier, pixels.detach())
    assert torch.equal(output, expected) and not torch.equal(output, pixels)  # bit for bit
    weights = torch.randn(pixels.shape)
    (gradient,) = torch.autograd.grad((output * weights).sum(), pixels)
    assert torch.equal(gradient, weights)
    if isinstance(purifier, nn.Module):  # nothing of the purifier lies in the graph
        output = BPDA(purifier)(pixels)
        output.sum().backward()
        assert all(parameter.grad is None for parameter in purifier.parameters())


def test_bpda_in_front_of_a_classifier_is_the_classifiers_gradient_at_the_purified_image():
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.Tanh(), nn.Linear(8, 5))
    pixels = images(2, 3, 16, 16).requires_grad_()
    defended = PurifiedClassifier(BPDA(Doubled()), classifier, purify_kwargs={"power": 3.0})
    logits = defended(pixels)
    assert torch.equal(logits, classifier((0.5 * pixels) ** 3))
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), pixels)
    purified = (0.5 * pixels.detach()).pow(3).requires_grad_()
    (expected,) = torch.autograd.grad(classifier(purified)[:, 1].sum(), purified)
    assert torch.equal(gradient, expected)
    # which is not the gradient of the pipeline itself
    (full,) = torch.autograd.grad(PurifiedClassifier(Doubled(), classifier)(pixels)[:, 1].sum(), pixels)
    assert not torch.allclose(full, expected)


def test_bpda_takes_purifiers_of_another_precision_and_leaves_no_graph_where_none_is_wanted():
    pixels = images().requires_grad_()
    output = BPDA(lambda x: x.half())(pixels)
    output.sum().backward()
    assert output.dtype == torch.float16 and torch.equal(pixels.grad, torch.ones_like(pixels))
    assert not BPDA(torch.sqrt)(images()).requires_grad


def test_bpda_declares_what_its_purifier_declares():
    assert BPDA(make_defence("resize-and-pad")).randomised is True
    assert BPDA(make_defence("jpeg")).randomised is False and BPDA(torch.sqrt).randomised is False
    model = tiny_purifier()
    assert BPDA(model).config is model.config and BPDA(torch.sqrt).config is None


def test_what_is_no_purifier_is_named():
    with pytest.raises(TypeError, match=r"purifier.*got a name; use MAEPModel.from_pretrained\('jpeg'\)"):
        BPDA("jpeg")
    with pytest.raises(TypeError, match=r"purifier.*got NoneType"):
        BPDA(None)
    with pytest.raises(ValueError, match=r"purifier.*keep the shape.*\(3, 3, 20, 28\).*\(3, 3, 20, 14\)"):
        BPDA(lambda x: x[..., ::2])(images())
    with pytest.raises(TypeError, match=r"purifier.*must return a tensor of images, got tuple"):
        BPDA(lambda x: (x,))(images())
    with pytest.raises(ValueError, match=r"pixel_values.*shape \(B, C, H, W\)"):
        BPDA(torch.sqrt)(images()[0])


def test_the_guide_names_what_there_is():
    import typer

    from maep_hf.attacks import make_attack
    from maep_hf.cli import app
    from maep_hf.evaluation.threat_models import THREAT_MODELS

    guide = (ROOT / "maep_hf" / "evaluation" / "THREAT_MODELS.md").read_text(encoding="utf-8")
    assert all(name in guide for name in [*DEFENCES, *(f"| `{name}` |" for name in THREAT_MODELS)])
    parameters = typer.main.get_command(app).commands["evaluate"].params
    options = {option for parameter in parameters for option in [*parameter.opts, *parameter.secondary_opts]}
    mentioned = set(re.findall(r"--[a-z][a-z-]+", guide))
    assert len(mentioned) > 15 and mentioned <= options
    for name in re.findall(r"--attack (\S+?)[`\s]", guide):
        make_attack(name)
    for name in re.findall(r"--threat-model (\S+)", guide):
        assert name in THREAT_MODELS
