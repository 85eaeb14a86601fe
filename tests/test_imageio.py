"""Image files: every mode comes in as [0, 1] RGB and goes back as it was."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin, features

from maep_hf.imageio import (
    ImagePath,
    ImagePathError,
    ImageReadError,
    ImageWriteError,
    check_outputs,
    find_images,
    load_image,
    restore_image,
    save_image,
)

WIDTH, HEIGHT = 23, 14


def picture(mode: str) -> Image.Image:
    """A colourful picture with soft edges in the given PIL mode."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    rgb = Image.fromarray(np.stack([x * 11, y * 18, 255 - x * 7], axis=-1).astype(np.uint8))
    alpha = Image.fromarray((x * 11).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((x * 2847 + y).astype(np.uint16))
    if mode == "F":
        return Image.fromarray((x / WIDTH).astype(np.float32))
    if mode == "P":
        return rgb.quantize(64)
    if mode in ("LA", "RGBA"):
        image = rgb.convert(mode[:-1])
        image.putalpha(alpha)
        return image
    return rgb.convert(mode)


def round_trip(source: Path, target: Path, pixels: torch.Tensor | None = None) -> Image.Image:
    loaded = load_image(source)
    save_image(
        restore_image(loaded.pixels if pixels is None else pixels, loaded), target, loaded.format, loaded.metadata
    )
    return Image.open(target)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [(m, ".png") for m in ("1", "L", "LA", "P", "I;16", "RGB", "RGBA")]
    + [("P", ".gif"), ("L", ".webp"), ("RGB", ".webp"), ("RGB", ".bmp"), ("F", ".tiff"), ("CMYK", ".tiff")],
)
def test_round_trip_without_change_is_exact(tmp_path, mode, suffix):
    source = tmp_path / f"in{suffix}"
    picture(mode).save(source, **({"lossless": True} if suffix == ".webp" else {}))
    before = Image.open(source)
    loaded = load_image(source)
    assert loaded.pixels.shape == (3, HEIGHT, WIDTH) and loaded.pixels.dtype == torch.float32
    assert 0 <= loaded.pixels.min() and loaded.pixels.max() <= 1 and loaded.pixels.max() > 0.5

    after = round_trip(source, tmp_path / f"out{suffix}")
    assert (after.mode, after.size, after.format) == (before.mode, before.size, before.format)
    if mode == "P":  # the palette may be ordered otherwise
        before, after = before.convert("RGB"), after.convert("RGB")
    if mode == "CMYK":  # its black is not unique: compare what is seen
        assert np.abs(np.asarray(before.convert("RGB"), int) - np.asarray(after.convert("RGB"), int)).max() <= 1
    else:
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))


def test_sixteen_bits_are_kept(tmp_path):
    picture("I;16").save(tmp_path / "in.png")
    pixels = load_image(tmp_path / "in.png").pixels
    assert len(pixels.unique()) > 256
    assert torch.equal(pixels[0], pixels[2])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_corrected_pixels_go_to_the_nearest_level(tmp_path, mode):
    picture(mode).save(tmp_path / "in.png")
    for level, stored in ((127.4, 127), (127.6, 128), (254.6, 255)):
        after = round_trip(tmp_path / "in.png", tmp_path / "out.png", torch.full((3, HEIGHT, WIDTH), level / 255))
        assert set(np.asarray(after)[..., : 3 if mode == "RGBA" else None].flat) == {stored}


def test_one_bit_is_white_from_a_half(tmp_path):
    picture("1").save(tmp_path / "in.png")
    for value, white in ((0.5, True), (0.499, False)):
        after = round_trip(tmp_path / "in.png", tmp_path / "out.png", torch.full((3, HEIGHT, WIDTH), value))
        assert after.mode == "1" and set(np.asarray(after).flat) == {white}


def test_jpeg_is_written_at_quality_95_with_all_of_its_colours(tmp_path):
    picture("RGB").save(tmp_path / "in.jpg", quality=50)
    picture("RGB").save(tmp_path / "best.jpg", quality=95)
    after, best = round_trip(tmp_path / "in.jpg", tmp_path / "out.jpg"), Image.open(tmp_path / "best.jpg")
    assert after.quantization == best.quantization and JpegImagePlugin.get_sampling(after) == 0


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_avif_is_written_at_quality_95(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    noise.save(tmp_path / "in.avif", quality=100)
    noise.save(tmp_path / "best.avif", quality=95)
    round_trip(tmp_path / "in.avif", tmp_path / "out.avif")
    assert (tmp_path / "out.avif").stat().st_size > 0.9 * (tmp_path / "best.avif").stat().st_size


def test_webp_keeps_the_colours_under_transparent_pixels(tmp_path):
    picture("RGBA").save(tmp_path / "in.webp", lossless=True, exact=True)
    after = round_trip(tmp_path / "in.webp", tmp_path / "out.webp")
    assert (np.asarray(after)[..., 3] == 0).any()
    np.testing.assert_array_equal(np.asarray(after), np.asarray(picture("RGBA")))


def test_a_phones_picture_of_two_is_a_jpeg(tmp_path):
    picture("RGB").save(tmp_path / "in.jpg", "MPO", save_all=True, append_images=[picture("RGB")])
    loaded = load_image(tmp_path / "in.jpg")
    assert Image.open(tmp_path / "in.jpg").format == "MPO" and (loaded.format, loaded.frames) == ("JPEG", 2)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_carried_over_and_colour_is_replaced(tmp_path, mode):
    picture(mode).save(tmp_path / "in.png")
    changed = round_trip(tmp_path / "in.png", tmp_path / "out.png", torch.full((3, HEIGHT, WIDTH), 0.2))
    assert changed.mode == mode
    np.testing.assert_array_equal(np.asarray(changed.getchannel("A")), np.asarray(picture(mode).getchannel("A")))
    assert np.asarray(changed)[..., :-1].min() == np.asarray(changed)[..., :-1].max() == 51


@pytest.mark.parametrize("colours", [2, 64])
@pytest.mark.parametrize("kind", ["gif", "png"])
def test_transparent_palette_keeps_its_holes(tmp_path, kind, colours):
    image = picture("P").convert("RGB").quantize(colours)
    image.paste(colours - 1, (0, 0, 5, 5))
    image.save(tmp_path / f"in.{kind}", transparency=colours - 1)
    holes = np.asarray(Image.open(tmp_path / f"in.{kind}").convert("RGBA"))[..., 3] == 0
    assert holes.any() and not holes.all()
    after = round_trip(tmp_path / f"in.{kind}", tmp_path / f"out.{kind}")
    assert after.mode == "P"
    np.testing.assert_array_equal(np.asarray(after.convert("RGBA"))[..., 3] == 0, holes)


@pytest.mark.parametrize("mode", ["1", "L"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_transparent_grey_becomes_an_alpha_channel(tmp_path, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(mode).save(tmp_path / "in.png", transparency=0, exif=exif)
    after = round_trip(tmp_path / "in.png", tmp_path / "out.png")
    assert after.mode == "LA"
    np.testing.assert_array_equal(np.asarray(after), np.asarray(Image.open(tmp_path / "in.png").convert("LA")))
    grey = round_trip(
        tmp_path / "in.png", tmp_path / "grey.png", torch.full_like(load_image(tmp_path / "in.png").pixels, 0.6)
    )
    assert set(np.asarray(grey.getchannel("L")).flat) == {255 if mode == "1" else 153}


@pytest.mark.parametrize("orientation", [1, 6])
def test_transparent_grey_of_sixteen_bits_keeps_its_holes(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = np.asarray(picture("I;16")).copy()
    array[3:6, 2:9] = 40_000
    Image.fromarray(array).save(tmp_path / "in.png", transparency=40_000, exif=exif)
    after = round_trip(tmp_path / "in.png", tmp_path / "out.png")
    assert after.mode == Image.open(tmp_path / "in.png").mode and after.info["transparency"] == 40_000
    np.testing.assert_array_equal(np.asarray(after), array)
    pixels = torch.full_like(load_image(tmp_path / "in.png").pixels, 40_000 / 65535)  # elsewhere it is no hole
    np.testing.assert_array_equal(
        np.asarray(round_trip(tmp_path / "in.png", tmp_path / "flat.png", pixels)),
        np.where(array == 40_000, 40_000, 40_001),
    )
    white = np.where(array == 40_000, 65_535, array)  # nothing is above it: what would fill the hole goes below
    Image.fromarray(white).save(tmp_path / "white.png", transparency=65_535, exif=exif)
    np.testing.assert_array_equal(
        np.asarray(round_trip(tmp_path / "white.png", tmp_path / "top.png", torch.ones_like(pixels))),
        np.where(white == 65_535, 65_535, 65_534),
    )
    opaque = array - (array == 40_000)
    Image.fromarray(opaque).save(tmp_path / "opaque.png", transparency=40_000)
    np.testing.assert_array_equal(np.asarray(round_trip(tmp_path / "opaque.png", tmp_path / "same.png")), opaque)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_model_sees_it_upright_and_the_file_stays_as_stored(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture("RGB").save(tmp_path / "in.png", exif=exif)
    loaded = load_image(tmp_path / "in.png")
    assert loaded.pixels.shape[1:] == ((HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT))
    after = round_trip(tmp_path / "in.png", tmp_path / "out.png")
    assert after.getexif()[0x0112] == orientation
    np.testing.assert_array_equal(np.asarray(after), np.asarray(picture("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_written_as_it_is_seen(tmp_path, orientation):
    """How the old file stored it (its width, its orientation) does not go into the new one."""
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = orientation, "somebody"
    picture("RGB").save(tmp_path / "in.tiff", exif=exif)
    after = round_trip(tmp_path / "in.tiff", tmp_path / "out.tiff")
    before = Image.open(tmp_path / "in.tiff")
    np.testing.assert_array_equal(np.asarray(after), np.asarray(before))
    assert after.size == ((WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH))
    assert after.getexif()[0x013B] == "somebody"


def test_a_tiff_of_planes_becomes_one_that_can_be_read(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    colours = np.asarray(picture("RGB"))
    tifffile.imwrite(
        tmp_path / "in.tiff", np.moveaxis(colours, 2, 0).copy(), photometric="rgb", planarconfig="separate"
    )
    after = round_trip(tmp_path / "in.tiff", tmp_path / "out.tiff")
    np.testing.assert_array_equal(np.asarray(after), colours)


def test_a_tiff_keeps_when_it_was_taken(tmp_path):
    exif = Image.Exif()
    exif[0x8769] = {0x9003: "2020:01:01 00:00:00"}
    picture("RGB").save(tmp_path / "in.tiff", exif=exif.tobytes())
    after = round_trip(tmp_path / "in.tiff", tmp_path / "out.tiff")
    assert after.getexif().get_ifd(0x8769)[0x9003] == "2020:01:01 00:00:00"
    np.testing.assert_array_equal(np.asarray(after), np.asarray(picture("RGB")))


def test_a_tiff_keeps_where_it_was_taken(tmp_path):
    exif = Image.Exif()
    exif[0x8825] = {1: "N", 2: (52.0, 31.0, 12.0)}
    picture("RGB").save(tmp_path / "in.tiff", exif=exif.tobytes())
    after = round_trip(tmp_path / "in.tiff", tmp_path / "out.tiff")
    assert after.getexif().get_ifd(0x8825) == {1: "N", 2: (52.0, 31.0, 12.0)}
    np.testing.assert_array_equal(np.asarray(after), np.asarray(picture("RGB")))


def test_jpeg_keeps_profile_and_resolution(tmp_path):
    picture("L").save(tmp_path / "in.jpg", icc_profile=b"profile", dpi=(72, 72))
    after = round_trip(tmp_path / "in.jpg", tmp_path / "out.jpg")
    assert after.mode == "L" and after.info["icc_profile"] == b"profile" and after.info["dpi"] == (72, 72)


@pytest.mark.parametrize("suffix", ["jpg", "gif"])
def test_a_comment_is_carried_over(tmp_path, suffix):
    picture("L").save(tmp_path / f"in.{suffix}", comment=b"taken by me")
    assert round_trip(tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}").info["comment"] == b"taken by me"


def test_an_icon_keeps_its_size(tmp_path):
    for side in (27, 100, 256):
        icon = Image.new("RGBA", (side, side), "red")
        save_image(icon, tmp_path / "icon.ico", "ICO")
        with Image.open(tmp_path / "icon.ico") as written:
            assert written.size == (side, side)
    with pytest.raises(ImageWriteError, match="ICO takes no picture of more than 256 pixels a side"):
        save_image(Image.new("RGB", (300, 20)), tmp_path / "wide.ico", "ICO")
    assert not (tmp_path / "wide.ico").exists()


def test_what_is_no_image_is_named(tmp_path):
    buffer = io.BytesIO()
    picture("RGB").save(buffer, "PNG")
    for name, content in (("text.png", b"no image"), ("cut.png", buffer.getvalue()[:-60]), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageReadError, match=name):
            load_image(tmp_path / name)
    Image.fromarray(np.full((4, 4), 7.0, np.float32)).save(tmp_path / "range.tiff")
    with pytest.raises(ImageReadError, match="white is unknown"):
        load_image(tmp_path / "range.tiff")
    Image.fromarray(np.array([[0.5, np.nan]], np.float32)).save(tmp_path / "nan.tiff")
    with pytest.raises(ImageReadError, match="nan.tiff: mode F with values outside .* or NaN"):
        load_image(tmp_path / "nan.tiff")


def test_other_size_is_refused(tmp_path):
    picture("RGB").save(tmp_path / "in.png")
    with pytest.raises(ValueError, match="pixels: shape"):
        restore_image(torch.zeros(3, 4, 4), load_image(tmp_path / "in.png"))


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "old.jpg"
    picture("RGB").save(target)
    content = target.read_bytes()
    with pytest.raises(ImageWriteError, match="old.jpg"):
        save_image(picture("RGBA"), target, "JPEG")
    assert target.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["old.jpg"]


def test_full_disk_is_an_oserror_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_image(Image.new("RGB", (2, 2)), tmp_path / "new.png", "PNG")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_a_disk_that_is_full_is_no_fault_of_the_picture(tmp_path, format):
    """A limit on the size of files stands for the disk, in a process of its own."""
    code = ("import resource, signal, sys; from PIL import Image; from maep_hf.imageio import save_image\n"
            "picture = Image.effect_noise((300, 300), 90)\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (999, 999))\n"
            "try: save_image(picture, sys.argv[1], sys.argv[2])\n"
            "except OSError as error: print(error)")  # fmt: skip
    path = tmp_path / "new"
    done = subprocess.run([sys.executable, "-c", code, path, format], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout and str(path) in done.stdout and list(tmp_path.iterdir()) == []


def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path):
    """The temporary file's own is no longer; one that is too long is that file's error, not the disk's."""
    save_image(picture("L"), tmp_path / f"{'a' * 251}.png", "PNG")
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]
    for longer in (f"{'b' * 252}.png", f"{'b' * 256}/a.png"):
        with pytest.raises(ImageWriteError, match=r"b/?a?\.png: the name is too long"):
            save_image(picture("L"), tmp_path / longer, "PNG")
    assert [path.name[0] for path in tmp_path.iterdir()] == ["a"]


def test_a_file_is_hidden_until_it_is_whole(tmp_path, monkeypatch):
    """Files of one folder may be written at once: each has a temporary one of its own there."""
    seen, save = [], Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda self, file, **rest: seen.append(file) or save(self, file, **rest))
    for name in ("a.png", "b.png"):
        save_image(picture("L"), tmp_path / name, "PNG")
    assert len({*seen}) == 2 and all(path.parent == tmp_path and path.name.startswith(".") for path in seen)


def tree(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def relatives(found) -> list[str]:
    return [image.relative.as_posix() for image in found]


def test_folders_are_searched_and_keep_their_structure(tmp_path):
    tree(tmp_path, "a/one.png", "a/b/ONE.PNG", "a/b/two.jpeg", "a/notes.txt", "a/page.pdf", "a/out/old.png")
    found = find_images([tmp_path / "a"], exclude=tmp_path / "a/out")
    assert sorted(relatives(found)) == ["b/ONE.PNG", "b/two.jpeg", "one.png"]
    found = find_images([f"{tmp_path}/a/**/*.png"], exclude=tmp_path / "a/out")
    assert relatives(found) == ["one.png"]


def test_a_folder_around_the_images_is_a_place_for_results(tmp_path):
    tree(tmp_path, "a/one.png", "a/b/two.png")
    for inputs in ([tmp_path / "a"], [f"{tmp_path}/a/**/*.png"]):
        found = find_images(inputs, exclude=tmp_path)
        assert sorted(relatives(found)) == ["b/two.png", "one.png"]
        check_outputs(found, tmp_path)
        with pytest.raises(ImagePathError, match="overwrite the input"):
            check_outputs(find_images(inputs, exclude=tmp_path / "a"), tmp_path / "a")


def test_patterns_keep_the_path_below_their_fixed_part(tmp_path):
    tree(tmp_path, "a/x/p.png", "a/y/p.png", "a/y/p.txt")
    assert relatives(find_images([f"{tmp_path}/a/*/p.*"])) == ["x/p.png", "y/p.png"]
    assert relatives(find_images([f"{tmp_path}/a/**/*.png"])) == ["x/p.png", "y/p.png"]


def test_equal_names_do_not_collide_and_repeats_count_once(tmp_path):
    tree(tmp_path, "a/p.png", "b/p.png", "c/q.png")
    files = [tmp_path / "a/p.png", tmp_path / "b/p.png", tmp_path / "c/q.png", tmp_path / "c/../c/q.png"]
    assert relatives(find_images(files)) == ["a/p.png", "b/p.png", "q.png"]


def test_names_that_differ_in_case_alone_do_not_collide_either(tmp_path):
    tree(tmp_path, "a/p.png", "b/P.PNG")
    assert relatives(find_images([tmp_path / "a/p.png", tmp_path / "b/P.PNG"])) == ["a/p.png", "b/P.PNG"]


def test_an_input_named_from_the_working_directory_is_not_overwritten(tmp_path, monkeypatch):
    tree(tmp_path, "p.png")
    monkeypatch.chdir(tmp_path)
    for out in (".", tmp_path):
        with pytest.raises(ImagePathError, match="overwrite the input"):
            check_outputs(find_images(["p.png"]), out)


def test_names_of_comparisons_are_taken_too(tmp_path):
    tree(tmp_path, "a/p.png", "a/P.PNG.compare.png", "b/p.png", "c/p.png.compare.png", "d/q.png")
    assert len(find_images([tmp_path / "a"])) == 2
    for inputs in ([tmp_path / "a"], [f"{tmp_path}/a/*.png"]):
        message = r"the comparison of .*p\.png .*written to p\.png\.compare\.png: purify them .* without --compare"
        with pytest.raises(ImagePathError, match=message) as caught:
            find_images(inputs, compare=True)
        assert "P.PNG.compare.png and" in str(caught.value)
    files = [tmp_path / name for name in ("b/p.png", "c/p.png.compare.png", "d/q.png")]
    assert relatives(find_images(files)) == ["p.png", "p.png.compare.png", "q.png"]
    apart = ["b/p.png", "c/p.png.compare.png", "q.png"]
    assert relatives(find_images(files, compare=True)) == apart
    assert relatives(find_images(files[::-1], compare=True)) == apart[::-1]
    images = [ImagePath(files[0], Path("p.png")), ImagePath(files[1], Path("elsewhere.png"))]
    check_outputs(images, tmp_path / "c")
    with pytest.raises(ImagePathError, match=r"overwrite the input .*c/p\.png\.compare\.png"):
        check_outputs(images, tmp_path / "c", compare=True)


def test_paths_that_cannot_be_used_are_named(tmp_path):
    tree(tmp_path, "a/p.png", "notes/n.txt")
    with pytest.raises(ImagePathError, match="gone.png: no such file"):
        find_images([tmp_path / "gone.png"])
    with pytest.raises(ImagePathError, match="matches no image"):
        find_images([f"{tmp_path}/notes/*"])
    with pytest.raises(ImagePathError, match="no image files in"):
        find_images([tmp_path / "notes"])
    found = find_images([tmp_path / "a"])
    with pytest.raises(ImagePathError, match="overwrite the input"):
        check_outputs(found, tmp_path / "a")
    with pytest.raises(ImagePathError, match="not a folder"):
        check_outputs(found, tmp_path / "a/p.png")
    check_outputs(found, tmp_path / "new")


def test_output_behind_a_link_to_an_input_is_refused(tmp_path):
    tree(tmp_path, "a/p.png")
    (tmp_path / "link").symlink_to(tmp_path / "a", target_is_directory=True)
    with pytest.raises(ImagePathError, match="overwrite the input"):
        check_outputs(find_images([tmp_path / "a/p.png"]), tmp_path / "link")
