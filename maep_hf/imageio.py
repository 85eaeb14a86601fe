"""Image files in and out for the command line: any mode to [0, 1] RGB tensors, and back to the file's own mode.

What a purifier never sees is carried over unchanged: the alpha channel, the EXIF orientation and the other metadata.
"""

from __future__ import annotations

import errno
import glob
import io
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# Showing a picture upright (EXIF orientation, key) and turning it back as it was stored.
_STORED_FROM_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_ORIENTATION = 0x0112
# What a TIFF's tags say of the picture (ImageDescription, Make, Model, Software, DateTime, Artist, Copyright) and the
# directories of EXIF and GPS; the others say how the file stores it, which is another way once it is written again.
_TIFF_DIRECTORIES = (34665, 34853)
_TIFF_DESCRIPTIVE = (270, 271, 272, 305, 306, 315, 33432, *_TIFF_DIRECTORIES)
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "F")
ICO_SIDE = 256
# GIF and palette PNG are rebuilt with a new palette; lossy formats are written at a quality that keeps the correction.
_SAVE_OPTIONS = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
    "AVIF": {"quality": 95},
    "TIFF": {"compression": "tiff_lzw"},
}


class ImageReadError(ValueError):
    """A file that is not an image, is cut off, or holds pixels of unknown range; the message names the file."""


class ImageWriteError(ValueError):
    """A picture that its format does not take, or a name that is too long for a file; the message names the file."""


class ImagePathError(ValueError):
    """Inputs or outputs that cannot be used as asked; the message says which and what to do."""


@dataclass(frozen=True)
class LoadedImage:
    """One decoded file.

    Attributes:
        pixels: (3, H, W) float32 in [0, 1], upright; a grey picture has three equal channels.
        mode: PIL mode of the file.
        format: PIL name of the file's format, e.g. `PNG`.
        alpha: upright alpha channel (PIL mode `L`), or `None`.
        orientation: EXIF orientation, 1 to 8 (1: stored upright).
        metadata: what is written back with the picture (`exif`, `icc_profile`, `dpi`, `comment`), and how, where it
            needs that (`compression`).
        frames: how many frames the file has; only the first is read.
    """

    pixels: Tensor
    mode: str
    format: str
    alpha: Image.Image | None = None
    orientation: int = 1
    metadata: dict = field(default_factory=dict)
    frames: int = 1

    @property
    def grey(self) -> bool:
        """Whether the file has no colours."""
        return self.mode in _GREY_MODES


def load_image(path: str | os.PathLike) -> LoadedImage:
    """Read an image file of any mode (1, L, LA, P, PA, I;16, F, RGB, RGBA, CMYK, ...) into [0, 1] RGB.

    Sixteen-bit grey keeps its sixteen bits; transparent pixels keep the colour that is stored under them.

    Raises:
        ImageReadError: not an image, cut off, of unknown range, or of a format that Pillow cannot write again.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            image.load()
            return _decode(image)
    except Exception as error:  # a broken file raises nearly anything, depending on the decoder
        raise ImageReadError(f"{path}: {_first_line(error)}") from error


def restore_image(pixels: Tensor, like: LoadedImage) -> Image.Image:
    """Turn purified pixels into a picture of the mode, alpha channel and stored orientation of `like`.

    Grey modes take the mean of the three channels; mode `1` the threshold 0.5. A `1` or `L` of which one value is
    transparent becomes LA; in sixteen bits, which have no such mode, the transparent pixels keep that value and others
    are kept off it. A palette picture gets a new palette of up to 256 colours without dither (the corrected
    colours are not in the old one); where its transparency is more than on or off it becomes RGBA.

    Args:
        pixels: (3, H, W) in [0, 1], the size of `like.pixels`.

    Raises:
        ValueError: `pixels` has another size.
    """
    if pixels.shape != like.pixels.shape:
        raise ValueError(f"pixels: shape {tuple(pixels.shape)}, but the image has {tuple(like.pixels.shape)}")
    array = pixels.detach().to("cpu", torch.float32).clamp(0, 1).permute(1, 2, 0).numpy()
    if like.grey:
        picture = _grey_picture(array.mean(axis=2), like)
    else:
        picture = _colour_picture(Image.fromarray(np.rint(array * 255).astype(np.uint8)), like)
    transpose = _STORED_FROM_UPRIGHT.get(like.orientation)
    if transpose is None:
        return picture
    turned = picture.transpose(transpose)
    turned.info.update(picture.info)
    return turned


def save_image(picture: Image.Image, path: str | os.PathLike, format: str, metadata: dict | None = None) -> None:
    """Write a picture so that `path` holds either the whole new file or what was there before.

    Args:
        format: PIL name, e.g. `PNG`; JPEG is written at quality 95 without chroma subsampling, WebP without loss.
        metadata: `exif`, `icc_profile`, `dpi`, `comment`, `compression` as in `LoadedImage.metadata`.

    Raises:
        OSError: the folder cannot be written or the disk is full; nothing is left behind.
        ImageWriteError: the format does not take a picture of this mode, or the name is too long.
    """
    try:
        _write_whole(picture, Path(path), format, metadata)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise ImageWriteError(f"{path}: the name is too long to be written there; shorten it") from error


def _write_whole(picture: Image.Image, path: Path, format: str, metadata: dict | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{uuid4().hex}.tmp")  # with the file's own name it might be too long
    options = {**_SAVE_OPTIONS.get(format, {}), **(metadata or {})}
    if format == "ICO":  # Pillow would write its own sizes that are smaller than the picture
        if max(picture.size) > ICO_SIDE:
            raise ImageWriteError(f"{path}: ICO takes no picture of more than {ICO_SIDE} pixels a side; write a PNG")
        options["sizes"] = [picture.size]
    if format == "TIFF" and picture.mode not in ("L", "RGB", "RGBA"):
        options["compression"] = None
    try:
        if format == "TIFF":  # libtiff does not say that a disk is full
            buffer = io.BytesIO()
            picture.save(buffer, format=format, **options)
            temporary.write_bytes(buffer.getbuffer())
        else:
            picture.save(temporary, format=format, **options)
        os.replace(temporary, path)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if (number := getattr(error, "errno", None)) is not None:  # the disk's or the folder's, and so every file's
            raise OSError(number, error.strerror, str(path)) from error
        raise ImageWriteError(f"{path}: {format} does not take it ({_first_line(error)})") from error
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class ImagePath:
    """An input file and where its result goes below the output folder."""

    source: Path
    relative: Path


def comparison_path(path: Path) -> Path:
    """Where the comparison of the result at `path` goes."""
    return path.with_name(f"{path.name}.compare.png")


def find_images(
    inputs: Sequence[str | os.PathLike], exclude: str | os.PathLike | None = None, compare: bool = False
) -> list[ImagePath]:
    """Expand files, folders (searched recursively for image files) and glob patterns.

    A file keeps its name, a file found in a folder or by a pattern its path below that folder or the pattern's fixed
    part; where two inputs would get one name, both keep their path below their common folder instead.

    Args:
        exclude: a folder left out of the search, i.e. the one that results are written to.
        compare: a comparison is written beside every result, whose name is taken then too.

    Raises:
        ImagePathError: an input does not exist or is empty, nothing was found, or two files would get one name.
    """
    found: dict[str, ImagePath] = {}
    for entry in map(os.fspath, inputs):
        for item in _expand(entry, None if exclude is None else Path(exclude).resolve()):
            found.setdefault(os.path.abspath(item.source), item)
    if not found:
        raise ImagePathError(f"no image files in {', '.join(map(repr, map(os.fspath, inputs)))}")
    return _without_collisions(list(found.values()), compare)


def check_outputs(images: Sequence[ImagePath], out: str | os.PathLike, compare: bool = False) -> None:
    """Refuse an output folder in which a result (or, with `compare`, a comparison) would overwrite an input.

    Raises:
        ImagePathError: it would, or `out` is a file.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ImagePathError(f"--out {out} is a file, not a folder")
    sources = {image.source.resolve(): image.source for image in images}
    for image in images:
        for written in _written(image, compare):
            if lost := sources.get((out / written).resolve()):
                raise ImagePathError(f"--out {out} would overwrite the input {lost}: choose another folder")


def _decode(image: Image.Image) -> LoadedImage:
    mode, format_name = image.mode, image.format or "PNG"
    format_name = "JPEG" if format_name == "MPO" else format_name  # a phone's JPEG with a second picture inside
    if format_name not in Image.SAVE:
        raise ValueError(f"Pillow reads {format_name} files but does not write them; convert it to PNG first")
    exif = image.getexif()
    orientation = exif.get(_ORIENTATION, 1)
    metadata = {key: image.info[key] for key in ("icc_profile", "dpi") if image.info.get(key)}
    if format_name in ("JPEG", "GIF") and image.info.get("comment"):
        metadata["comment"] = image.info["comment"]
    if format_name == "TIFF":
        for tag in [tag for tag in exif if tag not in _TIFF_DESCRIPTIVE]:
            del exif[tag]
        if any(tag in exif for tag in _TIFF_DIRECTORIES):
            metadata["compression"] = None  # Pillow's compressed TIFFs (libtiff) hold no directories
    if len(exif):
        metadata["exif"] = exif.tobytes()
    frames = getattr(image, "n_frames", 1)
    upright = ImageOps.exif_transpose(image) if orientation in _STORED_FROM_UPRIGHT else image
    if mode in _GREY_MODES and not mode.startswith("L") and not (mode == "1" and "transparency" in upright.info):
        grey, alpha = wide_grey(upright), None
        if "transparency" in upright.info:  # of sixteen bits, which Pillow does not convert
            alpha = Image.fromarray(
                np.where(np.asarray(upright) == upright.info["transparency"], 0, 255).astype(np.uint8)
            )
        array = np.repeat(grey[:, :, None], 3, axis=2)
    else:
        transparent = mode.endswith(("A", "a")) or "transparency" in upright.info
        rgb = upright.convert("RGBA") if transparent else upright.convert("RGB")
        alpha = rgb.getchannel("A") if transparent else None
        array = np.asarray(rgb.convert("RGB"), dtype=np.float32) / 255
    pixels = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32))
    return LoadedImage(pixels, mode, format_name, alpha, orientation, metadata, frames)


def wide_grey(image: Image.Image) -> np.ndarray:
    """(H, W) in [0, 1] of a grey picture of one, sixteen or thirty-two bits.

    Raises:
        ValueError: values outside the scale that its mode has, or NaN.
    """
    array = np.asarray(image).astype(np.float32)
    if image.mode == "1":
        return array
    top = 1.0 if image.mode == "F" else 65535.0
    if array.size and not (array.min() >= 0 and array.max() <= top):  # also false for NaN
        raise ValueError(f"mode {image.mode} with values outside [0, {top:g}] or NaN: its white is unknown")
    return array / np.float32(top)


def _grey_picture(grey: np.ndarray, like: LoadedImage) -> Image.Image:
    if like.mode == "1":
        grey = np.where(grey >= 0.5, 1.0, 0.0)
    if like.mode == "F":
        return Image.fromarray(grey.astype(np.float32))
    if like.mode.startswith("I"):
        sixteen = np.rint(grey.astype(np.float64) * 65535).astype(np.uint16)
        hole = _hole_of(like)
        if hole is not None:
            key, mask = hole
            sixteen[sixteen == key] = key + 1 if key < 65535 else key - 1
            sixteen[mask] = key
        picture = Image.fromarray(sixteen) if like.mode != "I" else Image.fromarray(sixteen.astype(np.int32))
        if hole is not None:
            picture.info["transparency"] = key
        return picture
    picture = Image.fromarray(np.rint(grey * 255).astype(np.uint8))
    if like.alpha is None:
        return picture if like.mode != "1" else picture.convert("1", dither=Image.Dither.NONE)
    return Image.merge("LA", (picture, like.alpha))


def _hole_of(like: LoadedImage) -> tuple[int, np.ndarray] | None:
    """The value of a sixteen-bit grey picture that is transparent, and where it has it."""
    mask = None if like.alpha is None else np.asarray(like.alpha) == 0
    if mask is None or not mask.any():
        return None
    return round(float(like.pixels[0].numpy()[mask][0]) * 65535), mask


def _colour_picture(rgb: Image.Image, like: LoadedImage) -> Image.Image:
    if like.mode == "P":
        return _palette_picture(rgb, like.alpha)
    if like.alpha is not None:
        rgb.putalpha(like.alpha)
        return rgb
    return rgb if like.mode in ("RGB", "RGBX") else rgb.convert(like.mode)


def _palette_picture(rgb: Image.Image, alpha: Image.Image | None) -> Image.Image:
    if alpha is None:
        return rgb.quantize(256, dither=Image.Dither.NONE)
    opacity = np.asarray(alpha)
    if not np.isin(opacity, (0, 255)).all():
        rgb.putalpha(alpha)
        return rgb
    picture = rgb.quantize(255, dither=Image.Dither.NONE)
    picture.paste(255, mask=Image.fromarray(np.where(opacity == 0, 255, 0).astype(np.uint8)))
    colours = picture.getpalette()[: 3 * 255]
    picture.putpalette(colours + [0] * (3 * 256 - len(colours)))  # PNG has transparency for colours of the palette only
    picture.info["transparency"] = 255
    return picture


def _expand(entry: str, exclude: Path | None) -> list[ImagePath]:
    if not entry:  # as a path it would be the working directory
        raise ImagePathError(
            "an input is empty, as of a variable that is not set; name a file or folder ('.': this one)"
        )
    path = Path(entry).expanduser()
    if path.is_file():
        return [ImagePath(path, Path(path.name))]
    if path.is_dir():
        exclude = _within(path, exclude)
        return [
            ImagePath(file, file.relative_to(path))
            for file in sorted(path.rglob("*"))
            if _is_image_name(file) and file.is_file() and not _inside(file, exclude)
        ]
    if not glob.has_magic(entry):
        raise ImagePathError(f"{entry}: no such file or folder")
    root = _fixed_part(path)
    exclude = _within(root, exclude)
    items = []
    for match in map(Path, sorted(glob.glob(str(path), recursive=True))):
        if match.is_file() and _is_image_name(match) and not _inside(match, exclude):
            items.append(ImagePath(match, match.relative_to(root)))
    if not items:
        raise ImagePathError(f"{entry}: the pattern matches no image file")
    return items


def _fixed_part(pattern: Path) -> Path:
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _is_image_name(path: Path) -> bool:
    format_name = Image.registered_extensions().get(path.suffix.lower())
    # EPS is a program that needs an interpreter; PDF and the like are written by Pillow but not read
    return format_name in Image.OPEN and format_name in Image.SAVE and format_name != "EPS"


def _inside(path: Path, folder: Path | None) -> bool:
    return folder is not None and path.resolve().is_relative_to(folder)


def _within(root: Path, exclude: Path | None) -> Path | None:
    """The folder to leave out of a search; none where it holds all that is searched."""
    return None if _inside(root, exclude) else exclude


def _written(image: ImagePath, compare: bool) -> list[Path]:
    """What is written of an image, below the output folder."""
    return [image.relative, *([comparison_path(image.relative)] if compare else [])]


def _without_collisions(images: list[ImagePath], compare: bool) -> list[ImagePath]:
    same_name = defaultdict(list)
    for image in images:
        for path in _written(image, compare):
            same_name[str(path).casefold()].append(image)  # some file systems do not tell a.png from A.PNG
    renamed = {}
    for group in same_name.values():
        if len(group) > 1:
            paths = [os.path.abspath(image.source) for image in group]
            common = os.path.commonpath([os.path.dirname(path) for path in paths])
            for image, path in zip(group, paths, strict=True):
                renamed[image] = ImagePath(image.source, Path(os.path.relpath(path, common)))
    images = [renamed.get(image, image) for image in images]
    names = defaultdict(list)
    for image in images:
        for path, what in zip(_written(image, compare), ("", "the comparison of "), strict=False):
            names[str(path).casefold()].append(f"{what}{image.source}")
    for name, sources in names.items():
        if len(sources) > 1:
            way_out = "purify them separately" + (", or without --compare" if compare else "")
            raise ImagePathError(f"{' and '.join(sources)} would both be written to {name}: {way_out}")
    return images


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
