"""Pictures of rows of images (training previews, `maep purify --compare`, the demo), and what every picture shares."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from .imageio import save_image

# readable on white for red-green colour-blind eyes as well
RIGHT, WRONG, NEUTRAL = "#0b7a3b", "#c2410c", "#374151"

# Okabe and Ito's colours, which colour-blind eyes tell apart; grey is for what is not defended or not attacked.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")
GREY, INK, GRID = "#5f5f5f", "#1f2937", "#e2e5e9"

_DPI = 100
_GAP, _MARGIN = 6, 14
_CAPTION, _TITLE_LINE, _TITLE_SIZE = 17, 21, 15
_LABEL_LINE, _LABEL_CHARACTER = 17, 7.6

Caption = str | tuple[str, str]


def new_figure(width: float, height: float, dpi: int = _DPI, **options: Any) -> Figure:
    """A white figure of `width` x `height` inches that [`save_figure`] can write. No pyplot: it keeps global state and
    picks a window system."""
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike, tight: Sequence[float] | None = None) -> Path:
    """Write the figure as a PNG, whole or not at all; returns the path.

    Args:
        figure: its texts are shown as they are, also the `$` of a file's or a model's name.
        path: of the PNG.
        tight: left, bottom, right and top of the share of the figure that its axes and their texts are fitted to; by
            default they stay where they are.

    Raises:
        OSError: the file cannot be written.
        maep_hf.imageio.ImageWriteError: its name is too long.
    """
    _take_no_formulas(figure)  # before anything measures a text
    if tight is not None:
        figure.tight_layout(rect=tight)
    figure.canvas.draw()
    save_image(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]), path, "PNG")
    return Path(path)


def whiskers(shares: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """For `errorbar`: how far each share's 95 % interval reaches below its `percent`, and how far above, in points."""
    return [
        [max(0, side * (share["percent"] - share["interval_95"][end])) for share in shares]
        for end, side in ((0, 1), (1, -1))
    ]


def _take_no_formulas(figure: Figure) -> None:
    """Matplotlib takes what stands between two `$` for a formula, and gives up where it is none."""
    logarithmic = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if axis.get_scale() == "log"]
    powers = {label for axis in logarithmic for tick in axis.get_major_ticks() for label in tick.findobj(Text)}
    for text in {*figure.findobj(Text)} - powers:  # whose ticks say 10 to the power of something
        text.set_parse_math(False)


def difference_image(image: Tensor, reference: Tensor, factor: float = 8.0) -> Tensor:
    """`image - reference` magnified `factor` times around mid-grey, cut to [0, 1]; grey means no difference.

    Args:
        image, reference: tensors of one shape, values in [0, 1].
    """
    if image.shape != reference.shape:
        raise ValueError(f"image: shape {tuple(image.shape)}, but the reference has {tuple(reference.shape)}")
    return (0.5 + factor * (image.float() - reference.float())).clamp(0, 1)


def image_grid(
    rows: Mapping[str, Tensor],
    path: str | os.PathLike,
    *,
    title: str = "",
    captions: Mapping[str, Sequence[Caption]] | None = None,
    magnify: int | None = None,
    cell: int = 128,
    largest: int = 1024,
) -> Path:
    """Draw rows of images, one row per entry with its name at the left, and write a PNG atomically.

    Small images are enlarged by a whole number with hard pixel edges, large ones reduced by averaging; pixels of the
    picture are otherwise those of the tensors, drawn without any resampling.

    Args:
        rows: name -> (N, C, H, W) in [0, 1], C 1 or 3, the same N, H and W in every row; a name may have several lines.
        path: the PNG file; its folder is made.
        title: one or more lines above the picture.
        captions: row name -> N texts below its images, each plain or `(text, colour)`; `RIGHT` and `WRONG` are colours.
        magnify: whole-number enlargement; by default the largest that keeps an image within `cell` pixels.
        cell: size in pixels that small images are enlarged towards.
        largest: longest side in pixels that an image may take; larger ones are reduced.

    Returns:
        The path written.

    Raises:
        ValueError: no rows, rows of different shapes, or captions that do not belong to a row or miss an image.
        OSError, maep_hf.imageio.ImageWriteError: as [`save_figure`].
    """
    captions = captions or {}
    count, height, width = _check(rows, captions, magnify)
    scale = magnify or max(1, cell // max(height, width))
    shrink = min(1.0, largest / (max(height, width) * scale))
    cell_w, cell_h = max(1, round(width * scale * shrink)), max(1, round(height * scale * shrink))

    label_w = round(_LABEL_CHARACTER * max(len(line) for name in rows for line in name.split("\n"))) + 2 * _MARGIN
    title_h = _MARGIN + (_TITLE_LINE * (title.count("\n") + 1) + _GAP if title else 0)
    row_h = {
        name: max(cell_h, _LABEL_LINE * (name.count("\n") + 1)) + (_CAPTION if name in captions else 0) for name in rows
    }
    total_w = label_w + count * (cell_w + _GAP) - _GAP + _MARGIN
    total_w = max(total_w, round(8.2 * max(map(len, title.split("\n")))) + 2 * _MARGIN, _width(title) + 2 * _MARGIN)
    total_h = title_h + sum(row_h.values()) + _GAP * (len(rows) - 1) + _MARGIN

    figure = new_figure(total_w / _DPI, total_h / _DPI)  # figimage puts pixels down one to one

    def write(x: float, y: float, text: str, size: float, color: str = NEUTRAL, **options) -> None:
        figure.text(x / total_w, 1 - y / total_h, text, fontsize=size * 72 / _DPI, color=color, **options)

    if title:
        write(_MARGIN, _MARGIN, title, _TITLE_SIZE, ha="left", va="top", fontweight="bold", linespacing=1.35)
    top = title_h
    for name, images in rows.items():
        write(label_w - _MARGIN, top + cell_h / 2, name, 13, ha="right", va="center", linespacing=1.3)
        for index in range(count):
            left = label_w + index * (cell_w + _GAP)
            array = _pixels(images[index], cell_w, cell_h, scale)
            figure.figimage(array, xo=left, yo=total_h - top - cell_h, origin="upper")
            if name in captions:
                text, color = _caption(captions[name][index])
                text = _fit(text, cell_w + _GAP)
                write(left + cell_w / 2, top + cell_h + 2, text, 11, color, ha="center", va="top")
        top += row_h[name] + _GAP
    return save_figure(figure, path)


def _width(title: str) -> int:
    """Pixels that a title takes."""
    text = new_figure(1, 1).text(0, 0, title, fontsize=_TITLE_SIZE * 72 / _DPI, fontweight="bold", parse_math=False)
    return math.ceil(text.get_window_extent().width)


def _check(rows: Mapping[str, Tensor], captions: Mapping[str, Sequence[Caption]], magnify: int | None) -> tuple:
    if not rows:
        raise ValueError("rows: there are none to draw")
    if magnify is not None and magnify < 1:
        raise ValueError(f"magnify: {magnify} is not a positive whole number")
    shapes = {name: tuple(images.shape) for name, images in rows.items()}
    count, _, height, width = shape = next(iter(shapes.values())) if all(map(_is_batch, shapes.values())) else (0,) * 4
    if 0 in shape or any((n, h, w) != (count, height, width) for n, _, h, w in shapes.values()):
        raise ValueError(f"rows: need (N, 1 or 3, H, W) of the same N, H and W in every row, not {shapes}")
    for name, texts in captions.items():
        if name not in rows:
            raise ValueError(f"captions: {name!r} is not a row; the rows are {list(rows)}")
        if len(texts) != count:
            raise ValueError(f"captions: {len(texts)} texts for the {count} images of row {name!r}")
    return count, height, width


def _is_batch(shape: tuple) -> bool:
    return len(shape) == 4 and shape[1] in (1, 3)


def _pixels(image: Tensor, width: int, height: int, scale: int) -> np.ndarray:
    """(height, width, 3) uint8."""
    array = image.detach().to("cpu", torch.float32).nan_to_num(0.0).clamp(0, 1)
    array = (array.expand(3, -1, -1).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    enlarged = array.repeat(scale, axis=0).repeat(scale, axis=1)
    if enlarged.shape[:2] == (height, width):
        return enlarged
    return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BOX))


def _caption(caption: Caption) -> tuple[str, str]:
    return (caption, NEUTRAL) if isinstance(caption, str) else caption


def _fit(text: str, width: float) -> str:
    most = max(4, int(width / 6.4))
    return text if len(text) <= most else text[: most - 1] + "…"
