"""Rows of images as a picture: exact pixels, clear errors."""

import numpy as np
import pytest
import torch
from PIL import Image

from maep_hf.figures import RIGHT, WRONG, difference_image, image_grid, new_figure, save_figure


def contains(picture: np.ndarray, patch: np.ndarray) -> bool:
    """Whether a patch of pixels occurs anywhere, exactly."""
    height, width = patch.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(picture, (height, width, 3))[:, :, 0]
    rows, columns = np.nonzero((windows[:, :, 0, 0] == patch[0, 0]).all(-1))
    return any((windows[r, c] == patch).all() for r, c in zip(rows, columns, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_images_are_drawn_pixel_by_pixel(tmp_path, count):
    images = torch.rand(count, 3, 5, 8, generator=torch.Generator().manual_seed(count))
    path = image_grid({"a": images, "b\nlonger name": 1 - images}, tmp_path / "new" / "grid.png", title="T", magnify=3)
    picture = np.asarray(Image.open(path))
    for batch in (images, 1 - images):
        for image in batch:
            patch = (image.permute(1, 2, 0) * 255).round().byte().numpy().repeat(3, 0).repeat(3, 1)
            assert contains(picture, patch)
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]


def test_small_images_are_enlarged_by_a_whole_number_and_large_ones_reduced(tmp_path):
    small = np.asarray(Image.open(image_grid({"": torch.zeros(1, 1, 30, 20)}, tmp_path / "s.png", cell=128)))
    assert (small == 0).all(-1).sum() == (4 * 30) * (4 * 20)
    large = np.asarray(Image.open(image_grid({"": torch.zeros(1, 3, 400, 200)}, tmp_path / "l.png", largest=100)))
    assert (large == 0).all(-1).sum() == 100 * 50


def test_captions_have_their_colour(tmp_path):
    rows = {"r": torch.ones(2, 3, 32, 32)}
    path = image_grid(rows, tmp_path / "c.png", captions={"r": [("cat", RIGHT), ("dog", WRONG)]})
    picture = np.asarray(Image.open(path)).reshape(-1, 3).astype(int)
    for color in (RIGHT, WRONG):
        rgb = [int(color[index : index + 2], 16) for index in (1, 3, 5)]
        assert np.abs(picture - rgb).max(1).min() < 40  # strokes are thinner than a pixel


FORMULA = r"d $x_{$.png"  # none that can be read


def test_dollars_in_names_are_no_formula(tmp_path):
    rows = {FORMULA: torch.ones(1, 3, 8, 8)}
    image_grid(rows, tmp_path / "c.png", title=FORMULA, captions={FORMULA: [FORMULA]})
    figure = new_figure(4, 3, layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], label=FORMULA)
    axis.set(title=FORMULA, xlabel=FORMULA)
    axis.set_yticks([0, 1], [FORMULA, "b"])
    figure.suptitle(FORMULA)
    figure.legend()
    save_figure(figure, tmp_path / "f.png")
    assert axis.get_yticklabels()[0].get_text() == FORMULA


def test_powers_of_a_logarithmic_axis_are_formulas(tmp_path):
    figure = new_figure(4, 3)
    axis = figure.subplots()
    axis.set(xscale="log", xlim=(1, 1000))
    save_figure(figure, tmp_path / "l.png")
    assert all(label.get_parse_math() for label in axis.get_xticklabels() if label.get_text())
    assert not axis.xaxis.label.get_parse_math()


def test_difference_is_grey_where_equal_and_magnified(tmp_path):
    image = torch.full((1, 3, 2, 2), 0.25)
    assert torch.equal(difference_image(image, image), torch.full_like(image, 0.5))
    torch.testing.assert_close(difference_image(image + 0.01, image, 10), torch.full_like(image, 0.6))
    assert difference_image(image + 0.5, image, 10).max() == 1
    with pytest.raises(ValueError, match="shape"):
        difference_image(image, image[0])


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ({}, {}, "none to draw"),
        ({"a": torch.zeros(3, 4, 4)}, {}, "same N"),
        ({"a": torch.zeros(0, 3, 4, 4)}, {}, "same N"),
        ({"a": torch.zeros(1, 3, 4, 4), "b": torch.zeros(2, 3, 4, 4)}, {}, "same N"),
        ({"a": torch.zeros(1, 3, 4, 4)}, {"captions": {"b": ["x"]}}, "'b' is not a row"),
        ({"a": torch.zeros(1, 3, 4, 4)}, {"captions": {"a": ["x", "y"]}}, "2 texts for the 1 images"),
        ({"a": torch.zeros(1, 3, 4, 4)}, {"magnify": 0}, "magnify"),
    ],
)
def test_what_cannot_be_drawn_is_named(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        image_grid(rows, tmp_path / "x.png", **options)
    assert not (tmp_path / "x.png").exists()


def test_a_long_title_is_not_cut_off(tmp_path):
    """Wide letters take more than the eight pixels of most."""
    title = "WWMM PGD-100, Linf 8/255, white-box, maep-tiny-cifar10-lora-imagenet, resnet56 " * 2
    (tmp_path / "short").mkdir()
    for name, text in (("long", title), ("short/one", "T")):
        path = image_grid({"a": torch.zeros(1, 3, 8, 8)}, tmp_path / f"{name}.png", title=text)
        picture = np.asarray(Image.open(path)).min(-1)
        assert (picture[:, -10:] > 250).all() and (picture[:30] < 100).any()
