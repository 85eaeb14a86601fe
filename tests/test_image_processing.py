"""MAEPImageProcessor: every kind of image to [0, 1] pixels in three channels, and back."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import ChannelDimension

from maep_hf import MAEPImageProcessor

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def processor():
    return MAEPImageProcessor()


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(RGB),
        RGB,
        RGB.transpose(2, 0, 1),
        torch.from_numpy(RGB),
        RGB.astype(np.float32) / 255,
        torch.from_numpy(RGB).permute(2, 0, 1).float() / 255,
        (torch.from_numpy(RGB).permute(2, 0, 1).float() / 255).requires_grad_(),
        [Image.fromarray(RGB)],
        RGB[None],
        Image.fromarray(RGB).convert("RGBA"),
        np.concatenate([RGB, RGB[..., :1]], axis=2),
    ],
)
def test_every_kind_gives_the_same_unit_pixels(processor, image):
    pixels = processor(image, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 20, 30) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[0], torch.from_numpy(RGB).permute(2, 0, 1).float() / 255, rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_pil_mode_gives_three_channels(processor, mode):
    image = Image.fromarray(RGB)
    if mode in ("I;16", "I"):
        image = Image.fromarray((RGB[..., 0].astype(np.uint16) * 257).astype(np.uint16 if mode == "I;16" else np.int32))
    elif mode == "F":
        image = Image.fromarray(RGB[..., 0].astype(np.float32) / 255)
    else:
        image = image.convert(mode)
    pixels = processor(image, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 20, 30)
    assert pixels.min() >= 0 and 0.9 < pixels.max() <= 1
    if mode in ("L", "LA", "1", "I;16", "I", "F"):
        assert torch.equal(pixels[:, 0], pixels[:, 1]) and torch.equal(pixels[:, 0], pixels[:, 2])
    if mode in ("I;16", "I", "F"):
        np.testing.assert_allclose(pixels[0, 0].numpy(), RGB[..., 0] / 255, atol=1e-6)


def test_paths_are_read(processor, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(RGB).save(path)
    pixels = processor([str(path)], return_tensors="pt").pixel_values
    np.testing.assert_array_equal((pixels[0].permute(1, 2, 0) * 255).round().byte().numpy(), RGB)


def test_files_keep_sixteen_bits_and_are_turned_upright(processor, tmp_path):
    grey = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    grey.save(tmp_path / "grey.png")
    pixels = processor(tmp_path / "grey.png", return_tensors="pt").pixel_values
    np.testing.assert_allclose(pixels[0, 0].numpy(), np.asarray(grey) / 65535, atol=1e-6)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    assert processor(str(tmp_path / "turned.png"), return_tensors="pt").pixel_values.shape == (1, 3, 30, 20)


def test_files_that_cannot_be_read_are_named(processor, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    for name in ("notes.png", "gone.png"):
        with pytest.raises(ValueError, match=f"{name}: not an image file"):
            processor(tmp_path / name)


def test_round_trip_of_all_256_values_is_exact(processor):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = processor(values, return_tensors="pt").pixel_values
    back = processor.post_process(pixels)[0]
    np.testing.assert_array_equal(np.asarray(back)[..., 0], values)


def test_bfloat16_tensor_is_accepted(processor):
    pixels = processor(torch.rand(3, 8, 8).bfloat16(), return_tensors="pt").pixel_values
    assert pixels.dtype == torch.float32


def test_resize_is_opt_in_and_keeps_the_range(processor):
    pixels = processor(RGB, do_resize=True, size={"height": 8, "width": 12}, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 8, 12) and pixels.min() >= 0 and pixels.max() <= 1
    pixels = processor(RGB, do_resize=True, size={"shortest_edge": 10}, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 10, 15)
    wider = processor(RGB[:, :29], do_resize=True, size={"shortest_edge": 13})["pixel_values"][0]
    assert wider.shape == (3, 13, 19)  # of 18.85
    edge = processor(np.repeat([0, 255], 8).astype(np.uint8)[None].repeat(16, 0), do_resize=True, size=33)
    assert edge["pixel_values"][0].min() == 0 and edge["pixel_values"][0].max() == 1  # bicubic overshoots there
    with pytest.raises(ValueError, match="needs size"):
        processor(RGB, do_resize=True)
    flat = processor(np.full((9, 9, 3), 77, np.uint8), do_resize=True, size=5, return_tensors="pt").pixel_values
    torch.testing.assert_close(flat, torch.full((1, 3, 5, 5), 77 / 255))


def test_images_of_different_sizes(processor):
    images = [RGB, RGB[:10]]
    assert [pixels.shape for pixels in processor(images)["pixel_values"]] == [(3, 20, 30), (3, 10, 30)]
    with pytest.raises(ValueError, match="different shapes"):
        processor(images, return_tensors="pt")


def test_switches(processor):
    assert processor(RGB, do_rescale=False, return_tensors="pt").pixel_values.max() > 1
    grey = processor(Image.fromarray(RGB).convert("L"), do_convert_rgb=False, return_tensors="pt").pixel_values
    assert grey.shape == (1, 1, 20, 30)
    for name in ("do_normalize", "do_center_crop", "do_pad"):
        with pytest.raises(ValueError, match=f"{name}=True is not for a purifier"):
            processor(RGB, **{name: True})
        processor(RGB, **{name: False})
    for last in ("channels_last", ChannelDimension.LAST):
        with pytest.raises(ValueError, match=r"data_format='channels_last' is not for a purifier"):
            processor(RGB, data_format=last)
    assert processor(RGB, data_format="channels_first", return_tensors="pt").pixel_values.shape == (1, 3, 20, 30)


@pytest.mark.parametrize(
    "image", [RGB.astype(np.float32), RGB / 255 - 0.5, np.full((4, 4, 3), np.nan), RGB.astype(np.int32) * 9]
)
def test_values_outside_the_unit_range_are_refused(processor, image):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        processor(image)


@pytest.mark.parametrize("rescale", [True, False])
def test_grey_of_no_known_white_is_refused(processor, rescale):
    for value in (-1, 65536, 2**31 - 1):
        with pytest.raises(ValueError, match=r"mode I with values outside \[0, 65535\]"):
            processor(Image.new("I", (2, 2), value), do_rescale=rescale)
    pixels = processor(Image.new("I", (2, 2), 65535), return_tensors="pt").pixel_values
    assert torch.equal(pixels, torch.ones(1, 3, 2, 2))


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_sixteen_bits_in_either_order_of_bytes(processor, dtype):
    pixels = processor(np.full((4, 4), 4000, dtype), return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels, torch.full((1, 3, 4, 4), 4000 / 65535))


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
def test_signed_integers_are_eight_bits(processor, dtype):
    pixels = processor(RGB.astype(dtype), return_tensors="pt").pixel_values
    assert torch.equal(pixels, processor(RGB, return_tensors="pt").pixel_values)


def test_true_is_white(processor):
    pixels = processor(RGB[..., 0] > 127, return_tensors="pt").pixel_values
    assert torch.equal(pixels[0, 2], torch.from_numpy(RGB[..., 0] > 127).float())


def test_grey_with_alpha_becomes_three_equal_channels(processor):
    pixels = processor(RGB[..., :2], return_tensors="pt").pixel_values
    assert torch.equal(pixels[0], torch.from_numpy(RGB[..., 0]).expand(3, -1, -1) / 255)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_channels_are_the_first_where_both_ends_could_be(processor, width):
    narrow = RGB.transpose(2, 0, 1)[:, :, :width]
    assert np.array_equal(processor(narrow)["pixel_values"][0], narrow / np.float32(255))


def test_the_filter_of_a_resize_is_the_one_asked_for(processor):
    edge = np.repeat([0, 255], 8).astype(np.uint8)[None].repeat(16, 0)
    options = {"do_resize": True, "size": {"height": 16, "width": 33}}
    values = [np.unique(processor(edge, **options, resample=resample)["pixel_values"][0]).size for resample in (0, 3)]
    assert values[0] == 2 < values[1]  # nearest, and bicubic


def test_wrong_shapes_are_refused(processor):
    with pytest.raises(ValueError, match="channels"):
        processor(np.zeros((7, 8, 9), np.uint8))
    with pytest.raises(ValueError, match="shape"):
        processor.post_process(torch.rand(1, 2, 4, 4))
    with pytest.raises(ValueError, match="modes has 1"):
        processor.post_process(torch.rand(2, 3, 4, 4), modes=["L"])
    with pytest.raises(ValueError, match="target_sizes has 3"):
        processor.post_process(torch.rand(2, 3, 4, 4), target_sizes=[None] * 3)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "I;16", "I", "F", "1"])
def test_post_process_modes_and_sizes(processor, mode):
    images = processor.post_process(torch.rand(2, 3, 6, 9), target_sizes=[None, (12, 10)], modes=mode)
    assert [image.mode for image in images] == [mode, mode]
    assert [image.size for image in images] == [(9, 6), (10, 12)]


def test_post_process_does_not_wrap_where_a_resize_overshoots(processor):
    edge = torch.tensor([0.0] * 8 + [1.0] * 8).expand(3, 16, 16)
    (image,) = processor.post_process(edge, target_sizes=[(16, 40)])
    row = np.asarray(image)[8, :, 0]
    assert (row[:18] < 60).all() and (row[22:] > 195).all() and row.min() == 0 and row.max() == 255


def test_colours_become_grey_of_16_bits_and_of_floats_by_luma(processor):
    pixels = torch.tensor([1.0, 0.5, 0.75]).view(3, 1, 1).expand(3, 2, 2)
    images = [processor.post_process(pixels, modes=mode)[0] for mode in ("F", "I;16")]
    luma = 0.299 + 0.587 * 0.5 + 0.114 * 0.75
    assert np.asarray(images[0]) == pytest.approx(luma) and (np.asarray(images[1]) == round(65535 * luma)).all()
    assert 65535 * luma % 1 > 0.5  # so that it would be another one where it is cut off


def test_post_process_clips_and_takes_one_grey_bfloat16_image(processor):
    (image,) = processor.post_process(torch.tensor([[[-1.0, 0.5, 2.0]]], dtype=torch.bfloat16))
    assert image.mode == "L" and np.asarray(image).tolist() == [[0, 128, 255]]


def test_save_and_load(tmp_path):
    MAEPImageProcessor(do_resize=True, size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    assert (tmp_path / "image_processing_maep.py").is_file()
    loaded = MAEPImageProcessor.from_pretrained(tmp_path)
    assert loaded(RGB, return_tensors="pt").pixel_values.shape == (1, 3, 8, 8)
