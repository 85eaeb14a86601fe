"""A classifier's own image preprocessing as differentiable tensor operations.

What an attack differentiates is a path of tensors, while image processors work on 8-bit PIL images or NumPy arrays.
`PixelPreprocessing` is that path: resize, centre crop, normalise. `read_preprocessing` fills it in from an image
processor of transformers or from the `pretrained_cfg` of a timm model, neither of which is imported here.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# PIL's numbers for its filters, which image processors store as `resample`.
PIL_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")

# Whoever has no Python but a command line at hand cannot pass an argument.
ON_THE_COMMAND_LINE = "on the command line, name a function that returns such a PixelClassifier: python:MODULE:FUNCTION"

# What may part the tensor path from an image processor: PIL rounds to 8 bits, once or twice.
MAX_MEAN_DIFFERENCE = 2 / 255


@dataclass(frozen=True)
class PreprocessingSpec:
    """What is done to [0, 1] pixels before a classifier sees them, in this order; the default does nothing.

    Args:
        size: exact output (height, width) of the resize.
        shortest_edge: resize so that the shorter edge has this length; the aspect ratio is kept.
        longest_edge: with `shortest_edge`, the most that the longer edge may become.
        cover: resize so that (height, width) is just covered; the aspect ratio is kept.
        crop_size: centre crop to (height, width), padded with black where the image is smaller.
        interpolation: "nearest", "bilinear" or "bicubic", antialiased as PIL does it.
        reverse_channels: RGB to BGR.
        mean, std: per channel, in units of [0, 1] pixels: output = (pixels - mean) / std.
        num_channels: the channels that the classifier takes, where known.
        multiple_of: with `shortest_edge`, what both edges are rounded up to a multiple of.

    At most one of `size`, `shortest_edge` and `cover` is given.
    """

    size: tuple[int, int] | None = None
    shortest_edge: int | None = None
    longest_edge: int | None = None
    cover: tuple[int, int] | None = None
    crop_size: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    reverse_channels: bool = False
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    num_channels: int | None = None
    multiple_of: int | None = None

    def __repr__(self) -> str:
        # fingerprints are of it: those of records from before there was `multiple_of` stay what they are
        shown = [field.name for field in fields(self) if field.name != "multiple_of" or self.multiple_of is not None]
        return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def __post_init__(self):
        if self.interpolation not in INTERPOLATIONS and self.resizes:
            raise ValueError(
                f"The classifier resizes with `{self.interpolation}`, which has no differentiable tensor form here; "
                f"pass `interpolation` as one of {', '.join(INTERPOLATIONS)} to accept an approximation; "
                f"{ON_THE_COMMAND_LINE}."
            )
        if not all(value > 0 and math.isfinite(value) for value in self.std):
            raise ValueError(f"`image_std` must be positive and finite, got {self.std}.")

    @property
    def resizes(self) -> bool:
        """Whether any resize is part of it."""
        return self.size is not None or self.shortest_edge is not None or self.cover is not None

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(height, width) that the classifier sees, where the same for every image."""
        return self.crop_size or self.size

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after the resize of an image of this height and width."""
        if self.size is not None:
            return self.size
        if self.cover is not None:
            ratio = min(height / self.cover[0], width / self.cover[1])
            return round(height / ratio), round(width / ratio)
        if self.shortest_edge is None:
            return height, width
        short, long = min(height, width), max(height, width)
        exact: float = self.shortest_edge
        if self.longest_edge is not None and long / short * exact > self.longest_edge:
            exact = self.longest_edge * short / long
        new_short = int(round(exact))
        # Truncated, not rounded, and of the short edge before that was rounded: as transformers and torchvision do it.
        new_long = long if short == new_short else int(exact * long / short)
        if self.multiple_of is not None:
            new_short, new_long = (-(-edge // self.multiple_of) * self.multiple_of for edge in (new_short, new_long))
        return (new_short, new_long) if height <= width else (new_long, new_short)


class PixelPreprocessing(nn.Module):
    """(B, C, H, W) pixels in [0, 1] -> (B, C, h, w) as the classifier takes them; differentiable, without weights.

    Args:
        spec: what is to be done.
        always_resize: images that already have the classifier's input size are neither resized nor cropped, as
            robustness benchmarks feed them (a 224-pixel image goes into a 224-pixel network as it is). True does
            what the image processor would: e.g. resize such an image to 256 and crop it back.
    """

    def __init__(self, spec: PreprocessingSpec | None = None, *, always_resize: bool = False):
        super().__init__()
        self.spec = PreprocessingSpec() if spec is None else spec
        self.always_resize = always_resize
        self._register_statistics(torch.device("cpu"))

    def _register_statistics(self, device: torch.device) -> None:
        for name in ("mean", "std"):
            value = torch.tensor(getattr(self.spec, name), dtype=torch.float32, device=device).view(-1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # half() and bfloat16() are meant for the classifier; rounded statistics would shift every pixel.
        self._register_statistics(self.mean.device)
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Resize, crop and normalise; float32 (float64 stays) whatever comes in.

        Raises:
            ValueError: not four dimensions, or another number of channels than the classifier takes.
            TypeError: not floating point.
        """
        spec = self.spec
        check_pixels(pixel_values, spec.num_channels, "the classifier")
        pixels = pixel_values if pixel_values.dtype == torch.float64 else pixel_values.float()
        if self.always_resize or tuple(pixels.shape[-2:]) != spec.input_size:
            pixels = self._resize_and_crop(pixels)
        if spec.reverse_channels:
            pixels = pixels.flip(1)
        # The classifier may have been moved without this module.
        return (pixels - self.mean.to(pixels.device)) / self.std.to(pixels.device)

    def _resize_and_crop(self, pixels: Tensor) -> Tensor:
        spec = self.spec
        height, width = pixels.shape[-2:]
        target = spec.resized(height, width)
        if target != (height, width):
            if spec.interpolation == "nearest":
                pixels = F.interpolate(pixels, target, mode="nearest-exact")
            else:
                pixels = F.interpolate(pixels, target, mode=spec.interpolation, antialias=True, align_corners=False)
            if spec.interpolation == "bicubic":
                pixels = pixels.clamp(0, 1)  # the filter overshoots; 8-bit images are cut off in the same way
        if spec.crop_size is not None:
            pixels = center_crop(pixels, spec.crop_size)
        return pixels

    def extra_repr(self) -> str:
        """The specification, for `print(model)`."""
        return f"{self.spec}, always_resize={self.always_resize}"


def center_crop(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """The central (height, width) of (..., H, W), padded with zeros where the image is smaller."""
    height, width = pixels.shape[-2:]
    missing_height, missing_width = max(size[0] - height, 0), max(size[1] - width, 0)
    if missing_height or missing_width:
        top, left = (missing_height + 1) // 2, (missing_width + 1) // 2
        pixels = F.pad(pixels, (left, missing_width - left, top, missing_height - top))
        height, width = pixels.shape[-2:]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return pixels[..., top : top + size[0], left : left + size[1]]


def check_pixels(pixel_values: Any, num_channels: int | None = None, taker: str = "the model") -> None:
    """Refuse what is not a floating (B, C, H, W) batch with `num_channels` channels.

    Args:
        taker: who takes them, for the error: "the classifier", "the purifier".

    Raises:
        TypeError: not a tensor, or not floating point.
        ValueError: not four dimensions, or another number of channels.
    """
    if not isinstance(pixel_values, Tensor):
        raise TypeError(f"`pixel_values` must be a tensor (B, C, H, W) in [0, 1], got {type(pixel_values).__name__}.")
    if not pixel_values.is_floating_point():
        raise TypeError(
            f"`pixel_values` must be floating point in [0, 1], got {pixel_values.dtype}; "
            "for 8-bit images pass `pixel_values.float() / 255`."
        )
    if pixel_values.ndim != 4:
        hint = "; add the batch dimension with `pixel_values[None]`" if pixel_values.ndim == 3 else ""
        raise ValueError(f"`pixel_values` must have the shape (B, C, H, W), got {tuple(pixel_values.shape)}{hint}.")
    channels = pixel_values.shape[1]
    if num_channels is not None and channels != num_channels:
        hint = ""
        if channels == 1:
            hint = f"; repeat grey images with `pixel_values.expand(-1, {num_channels}, -1, -1)`"
        elif pixel_values.shape[-1] == num_channels:
            hint = "; channels come second, not last: `pixel_values.permute(0, 3, 1, 2)`"
        elif channels == 3 and num_channels == 1:
            hint = "; average them with `pixel_values.mean(1, keepdim=True)`"
            if taker == "the classifier":
                # not done by itself: in an evaluation the bare classifier, too, has to be the one that averages
                averaging = "PixelClassifier(torch.nn.Sequential(torch.nn.AvgPool3d((3, 1, 1)), classifier))"
                hint = f"; to average them in front of a grey classifier, itself a PixelClassifier: `{averaging}`"
        raise ValueError(
            f"`pixel_values` has {channels} channels, but {taker} takes {num_channels} "
            f"(shape {tuple(pixel_values.shape)}){hint}."
        )


def check_range(pixel_values: Tensor) -> None:
    """Refuse pixels that are not in [0, 1], but for rounding.

    Raises:
        ValueError: values outside, or NaN.
    """
    low, high = (bound.item() for bound in pixel_values.detach().aminmax())
    if not (low >= -0.01 and high <= 1.01):  # also false for NaN
        raise ValueError(
            f"`pixel_values` must be in [0, 1], got values from {low:.4g} to {high:.4g}: divide 8-bit images by "
            "255, leave out mean and standard deviation, and look for NaN before this."
        )


def read_preprocessing(source: Any, *, geometry: bool = True, interpolation: Any = None) -> PreprocessingSpec:
    """Read what an image processor or a timm configuration says.

    Args:
        source: a transformers image processor, or a timm `pretrained_cfg` or `data_config` mapping.
        geometry: False leaves out resize and crop, whatever the source says of them.
        interpolation: in place of the source's filter, which may be one that is not available here.

    Raises:
        TypeError: it is neither of these.
        ValueError: it asks for something that has no form here (padding, an unknown filter, ...).
    """
    source = _get(source, "data_config", source)  # transformers' processor for timm models
    if _get(source, "input_size") is not None:
        return _read_timm(source, geometry, interpolation)
    # A processor's dictionary is not enough: what it leaves out has other values in other classes.
    switches = ("do_resize", "do_rescale", "do_normalize")
    if isinstance(source, Mapping) or all(getattr(source, name, None) is None for name in switches):
        raise TypeError(
            "`image_processor` must be an image processor of transformers (AutoImageProcessor.from_pretrained) or a "
            f"timm configuration, got {type(source).__name__}; or pass `size`, `image_mean` and `image_std`; "
            f"{ON_THE_COMMAND_LINE}."
        )
    return _read_processor(source, geometry, interpolation)


def explicit_preprocessing(
    spec: PreprocessingSpec,
    *,
    size: int | Sequence[int] | Mapping[str, int] | None = None,
    do_resize: bool | None = None,
    image_mean: float | Sequence[float] | None = None,
    image_std: float | Sequence[float] | None = None,
    interpolation: str | int | None = None,
    num_channels: int | None = None,
) -> PreprocessingSpec:
    """`spec` with what is given explicitly in place of what was read; see `PixelClassifier` for the arguments.

    Args:
        num_channels: of the classifier's input, where it says.

    Raises:
        ValueError: a size, filter or statistic that is not understood, or statistics of other channels.
    """
    if interpolation is not None:
        interpolation = _filter_name(interpolation)
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"`interpolation` must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}.")
        spec = replace(spec, interpolation=interpolation)
    if do_resize is False and size is not None:
        raise ValueError("`do_resize=False` contradicts `size`; give one of the two.")
    if do_resize is False or size is not None:
        unset = dict.fromkeys(("size", "shortest_edge", "longest_edge", "multiple_of", "cover", "crop_size"))
        spec = replace(spec, **unset)
    if size is not None:
        spec = replace(spec, **_read_size(size, square=True))
    elif do_resize and not spec.resizes:
        raise ValueError("`do_resize=True` needs a `size`: none could be read.")
    if image_mean is not None:
        spec = replace(spec, mean=_statistic(image_mean, "image_mean"))
    if image_std is not None:
        spec = replace(spec, std=_statistic(image_std, "image_std"))
    if len(spec.mean) > 1 and len(spec.std) > 1 and len(spec.mean) != len(spec.std):
        raise ValueError(f"`image_mean` has {len(spec.mean)} channels, `image_std` has {len(spec.std)}.")
    channels = max(len(spec.mean), len(spec.std))
    if num_channels is None:
        return replace(spec, num_channels=channels) if channels > 1 else spec
    if channels not in (1, num_channels):
        raise ValueError(
            f"The classifier takes {num_channels} channels, its mean and standard deviation are of {channels}: pass "
            f"`image_mean` and `image_std`, each one number or {num_channels}; {ON_THE_COMMAND_LINE}."
        )
    return replace(spec, num_channels=num_channels)


@torch.no_grad()
def check_against_processor(preprocessing: PixelPreprocessing, image_processor: Any) -> None:
    """Compare the tensor path with the processor itself on a few images, to catch what it does beyond its options.

    A processor that fails on one of them is a warning.

    Raises:
        ValueError: the two differ by more than 8-bit rounding explains.
    """
    from PIL import Image

    spec = preprocessing.spec
    for image in _test_images(spec):
        pil = Image.fromarray(image.numpy() if image.shape[-1] == 3 else image[..., 0].numpy())
        try:
            expected = torch.as_tensor(image_processor(images=pil, return_tensors="pt")["pixel_values"]).float()
        except Exception as error:
            warnings.warn(f"{type(image_processor).__name__} could not be run on a test image: {error}", stacklevel=3)
            return
        actual = preprocessing((image.permute(2, 0, 1)[None].float() / 255).to(preprocessing.mean.device)).cpu()
        if expected.shape != actual.shape:
            difference = f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
        else:
            error = ((expected - actual).abs() * preprocessing.std.cpu()).mean().item()
            if error <= MAX_MEAN_DIFFERENCE:
                continue
            difference = f"mean difference {error * 255:.1f}/255"
        raise ValueError(
            f"The preprocessing of {type(image_processor).__name__} is not fully described by its options: as tensor "
            f"operations it gives another result ({difference}). Pass `size`, `image_mean` and `image_std` "
            f"explicitly, or wrap the classifier in a module that takes [0, 1] pixels; {ON_THE_COMMAND_LINE}."
        )


def _test_images(spec: PreprocessingSpec) -> Iterator[Tensor]:
    """8-bit images (H, W, C) of two aspect ratios, larger than what the classifier sees.

    Smooth ones, on which colours and their order are seen, and noise, on which a shift or a stretch by a pixel is. Of
    an image that is padded one pixel more may be on the left or on the right, which depends on the backend: no noise.
    """
    height, width = spec.input_size or (spec.shortest_edge or 32,) * 2
    channels = 1 if spec.num_channels == 1 else 3
    generator = torch.Generator().manual_seed(0)
    for edges in ((height * 5 // 4 + 3, width * 7 // 4 + 5), (height * 8 // 5 + 2, width * 6 // 5 + 3)):
        edges = tuple(edge | 1 for edge in edges)  # else a pixel may stand just between two, either of them the nearest
        y, x = torch.meshgrid(*(torch.linspace(0, 1, edge) for edge in edges), indexing="ij")
        smooth = torch.stack([x * 0.8 + 0.1, y * 0.9, 0.6 - x * y * 0.5], -1)[..., :channels]
        yield (smooth * 255).round().to(torch.uint8)
        if all(edge >= cropped for edge, cropped in zip(spec.resized(*edges), spec.crop_size or (0, 0), strict=True)):
            # filters do not reach the ends of the scale, where PIL cuts off after each of its two passes
            yield torch.randint(64, 192, (*edges, channels), generator=generator, dtype=torch.uint8)


def _get(source: Any, name: str, default: Any = None) -> Any:
    value = source.get(name, default) if isinstance(source, Mapping) else getattr(source, name, default)
    return default if value is None else value


def _filter_name(value: Any) -> str:
    """A filter's name from PIL's number or enumeration, torchvision's enumeration or a string."""
    if isinstance(value, int):
        if value not in PIL_FILTERS:
            raise ValueError(f"`resample` must be one of PIL's filters {PIL_FILTERS}, got {value}.")
        return PIL_FILTERS[value]
    return str(getattr(value, "value", value)).lower()


def _pair(value: Any, name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(edge, int) and not isinstance(edge, bool) and edge > 0 for edge in pair):
        raise ValueError(f"`{name}` must be a positive integer or a (height, width) of two, got {value!r}.")
    return pair


def _statistic(value: Any, name: str) -> tuple[float, ...]:
    values = (value,) if isinstance(value, int | float) else tuple(float(entry) for entry in value)
    if not values or not all(math.isfinite(entry) for entry in values):
        raise ValueError(f"`{name}` must be one finite number or one per channel, got {value!r}.")
    return values


def _read_size(size: Any, square: bool) -> dict[str, Any]:
    """Fields of `PreprocessingSpec` from an integer, a (height, width), or transformers' dictionary."""
    if isinstance(size, int):
        return {"size": _pair(size, "size")} if square else {"shortest_edge": _pair(size, "size")[0]}
    if isinstance(size, Sequence) and not isinstance(size, str):
        return {"size": _pair(size, "size")}
    height, width, shortest, longest = (_get(size, key) for key in ("height", "width", "shortest_edge", "longest_edge"))
    if height and width:
        return {"size": _pair((height, width), "size")}
    if shortest:
        return {"shortest_edge": _pair(shortest, "size")[0], "longest_edge": longest}
    raise ValueError(
        f"`size` must be an integer, (height, width), or a dictionary with height and width or with shortest_edge, "
        f"got {size!r}; pass `size` explicitly; {ON_THE_COMMAND_LINE}."
    )


def _read_timm(config: Any, geometry: bool, interpolation: Any) -> PreprocessingSpec:
    channels, height, width = _get(config, "input_size")
    fields: dict[str, Any] = {}
    if geometry:
        crop_pct = _get(config, "crop_pct", 0.875)
        mode = _get(config, "crop_mode", "center")
        scaled = math.floor(height / crop_pct), math.floor(width / crop_pct)
        if mode == "squash":
            fields["size"] = scaled
        elif mode == "center":
            fields.update({"shortest_edge": scaled[0]} if height == width else {"cover": scaled})
        else:
            raise ValueError(
                f"timm's `crop_mode={mode!r}` has no tensor form here; pass `size` explicitly; {ON_THE_COMMAND_LINE}."
            )
        fields["crop_size"] = (height, width)
        name = _filter_name(_get(config, "interpolation", "bicubic") if interpolation is None else interpolation)
        fields["interpolation"] = "bilinear" if name == "random" else name
    return PreprocessingSpec(
        **fields,
        mean=_statistic(_get(config, "mean", (0.485, 0.456, 0.406)), "mean"),
        std=_statistic(_get(config, "std", (0.229, 0.224, 0.225)), "std"),
        num_channels=channels,
    )


def _read_processor(processor: Any, geometry: bool, interpolation: Any) -> PreprocessingSpec:
    name = type(processor).__name__
    fields: dict[str, Any] = {}
    size, crop_size = _get(processor, "size"), _get(processor, "crop_size")
    if geometry and size is not None and _get(processor, "do_resize"):
        fields = _read_size(size, square=_get(processor, "default_to_square", True))
        fields["interpolation"] = _filter_name(
            _get(processor, "resample", 2) if interpolation is None else interpolation
        )
    if geometry and crop_size is not None and _get(processor, "do_center_crop"):
        fields["crop_size"] = _read_size(crop_size, square=True).get("size")
    if "interpolation" in fields:
        _enlarge_before_crop(fields, name, _get(processor, "crop_pct"))
    if name.startswith("TextNet") and "shortest_edge" in fields:
        fields["multiple_of"] = _get(processor, "size_divisor")

    # Processors compute (pixels * scale + offset - mean) / std from pixels in 0..255: told in [0, 1] pixels here.
    scale, offset = 255.0, 0.0
    if getattr(processor, "do_rescale", True):
        scale = 255.0 * _get(processor, "rescale_factor", 1 / 255)
        offset = -1.0 if _get(processor, "rescale_offset") else 0.0
    mean, std = (0.0,), (1.0,)
    if _get(processor, "do_normalize"):
        mean = _statistic(_get(processor, "image_mean", 0.0), "image_mean")
        std = _statistic(_get(processor, "image_std", 1.0), "image_std")
    if name.startswith("EfficientNet") and _get(processor, "include_top"):
        # These divide by the standard deviation a second time, also where they do not normalise.
        again = _statistic(_get(processor, "image_std", 1.0), "image_std")
        std = tuple(first * second for first, second in zip(std * (len(again) // len(std)), again, strict=True))
    channels = max(len(mean), len(std))
    return PreprocessingSpec(
        **fields,
        reverse_channels=bool(_get(processor, "do_flip_channel_order")),
        mean=tuple((value - offset) / scale for value in mean),
        std=tuple(value / scale for value in std),
        num_channels=channels if channels > 1 else None,
    )


def _enlarge_before_crop(fields: dict[str, Any], name: str, crop_pct: float | None) -> None:
    """The processors of a few model families resize to more than their `size`, and then crop."""
    shortest, exact = fields.get("shortest_edge"), fields.get("size")
    if name.startswith("Levit") and shortest:
        fields["shortest_edge"] = int(256 / 224 * shortest)
    elif crop_pct and name.startswith("PoolFormer"):
        if shortest or (exact and exact[0] == exact[1]):
            fields.update(size=None, shortest_edge=int((shortest or exact[0]) / crop_pct))
        elif exact:
            fields["size"] = (int(exact[0] / crop_pct), int(exact[1] / crop_pct))
    elif crop_pct and shortest:  # ConvNeXT and what follows it
        if shortest < 384:
            fields["shortest_edge"] = int(shortest / crop_pct)
            fields.setdefault("crop_size", (shortest, shortest))
        else:
            fields.update(shortest_edge=None, size=(shortest, shortest))


def preprocessing_text(model: nn.Module) -> str | None:
    """What a classifier does to its pixels first, which its weights do not tell; `None` where nothing says it."""
    found = [module for module in model.modules() if isinstance(module, PixelPreprocessing)]
    return "; ".join(f"{each.spec!r}{', always resized' if each.always_resize else ''}" for each in found) or None
