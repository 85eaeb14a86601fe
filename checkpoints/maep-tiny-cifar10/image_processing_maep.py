"""Images to what a purifier takes, [0, 1] pixels in three channels, and back to pictures."""

import os
from io import BytesIO
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling

SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


class MAEPImageProcessor(PilBackend):
    r"""
    Turns images into `pixel_values` for [`MAEPModel`]: float32, channels first, in [0, 1], **not** normalised by mean
    and standard deviation (the model does that itself). Any size is kept unless a resize is asked for.

    Takes PIL images of every mode, NumPy arrays, torch tensors, paths or URLs, and lists or batches of them. Grey and
    palette images become three channels, alpha is dropped. 8-bit integers are divided by 255, 16-bit ones by 65535;
    floats are taken to be in [0, 1] already and never divided.

    Args:
        do_resize (`bool`, defaults to `False`): Resize to `size`, with antialiasing.
        size (`dict`): `{"height": ..., "width": ...}` or `{"shortest_edge": ...}` (keeps the aspect ratio), in pixels;
            an integer is a square.
        resample (`PILImageResampling`, defaults to bicubic): Filter of the resize.
        do_rescale (`bool`, defaults to `True`): Bring integers to [0, 1]. `False` leaves their values as floats, for a
            caller that divides by itself.
        do_convert_rgb (`bool`, defaults to `True`): Make three channels of whatever there is. `False` keeps grey images
            at one channel, for a purifier with `num_channels=1`.

    Example:
        >>> processor = MAEPImageProcessor()
        >>> processor(Image.new("L", (40, 30)), return_tensors="pt").pixel_values.shape
        torch.Size([1, 3, 30, 40])
    """

    model_input_names = ["pixel_values"]
    do_resize = False
    size = None
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = False
    do_convert_rgb = True

    def _validate_preprocess_kwargs(
        self, do_normalize: bool | None = None, do_resize: bool | None = None, size: Any = None, **kwargs: Any
    ) -> None:
        if do_normalize:
            raise ValueError("do_normalize=True is not for a purifier: it takes [0, 1] pixels and normalises inside.")
        for name in ("do_center_crop", "do_pad"):
            if kwargs.get(name):
                raise ValueError(f"{name}=True is not for a purifier: it takes any size. Crop or pad images before.")
        if _is_last(kwargs.get("data_format")):
            raise ValueError("data_format='channels_last' is not for a purifier: it takes (channels, height, width).")
        if do_resize and size is None:
            raise ValueError("do_resize=True needs size, for example {'height': 224, 'width': 224}.")

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        # The inherited one refuses grey arrays of two dimensions.
        if isinstance(images, (list, tuple)):
            return [image for entry in images for image in self._prepare_images_structure(entry)]
        if isinstance(images, (str, os.PathLike)):
            return [read_image(os.fspath(images))]
        return list(images) if getattr(images, "ndim", 0) == 4 else [images]

    def process_image(
        self, image: Any, do_convert_rgb: bool | None = None, input_data_format: Any = None, **kwargs: Any
    ) -> np.ndarray:
        """One image of any kind to an array `(channels, height, width)` of its own number type.

        Raises:
            ValueError: not an image, an array whose channels cannot be found, or grey of 32 bits beyond 16.
        """
        if isinstance(image, Image.Image):
            return _from_pil(image, do_convert_rgb)
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu()
            image = (image.float() if image.dtype in (torch.bfloat16, torch.float16) else image).numpy()
        if not isinstance(image, np.ndarray) or image.ndim not in (2, 3):
            raise ValueError(
                "Images must be PIL images, arrays or tensors of 2 or 3 dimensions, paths, or lists of them; got "
                f"{getattr(image, 'shape', type(image).__name__)}."
            )
        if image.ndim == 2:
            image = image[None]
        elif channels_last(image, input_data_format):
            image = image.transpose(2, 0, 1)
        if image.shape[0] not in (1, 2, 3, 4):
            raise ValueError(f"An image must have 1 to 4 channels, first or last; got an array of shape {image.shape}.")
        if image.dtype == np.bool_:
            image = image.astype(np.uint8) * 255
        if not do_convert_rgb:
            return image
        return np.repeat(image[:1], 3, axis=0) if image.shape[0] <= 2 else image[:3]

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: Any,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        pixel_values = []
        for image in images:
            pixels = _to_unit(image, rescale_factor) if do_rescale else image.astype(np.float32)
            if do_resize:
                pixels = _resize(pixels, size, resample)
                if do_rescale:
                    pixels = pixels.clip(0, 1)  # bicubic overshoots
            pixel_values.append(np.ascontiguousarray(pixels))
        shapes = sorted({pixels.shape for pixels in pixel_values})
        if return_tensors is not None and len(shapes) > 1:
            raise ValueError(
                f"Images of different shapes ({', '.join(map(str, shapes))}) do not make one tensor: process "
                "them one by one, or pass do_resize=True with a size."
            )
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)

    def post_process(
        self,
        purified_pixel_values: torch.Tensor,
        target_sizes: list[tuple[int, int] | None] | None = None,
        modes: list[str | None] | str | None = None,
    ) -> list[Image.Image]:
        """Purified pixels to PIL images.

        Args:
            purified_pixel_values: `(batch, 1 or 3, height, width)` in [0, 1] (values outside are clipped), or one image
                without the batch.
            target_sizes: For every image `(height, width)` to resize to, or `None` to leave it.
            modes: PIL mode of every image, or one for all, such as those of the originals: `"L"`, `"RGBA"` (opaque),
                `"P"`, `"I;16"`. Default: `"RGB"`, or `"L"` for one channel.

        Returns:
            A list of 8-bit images (16-bit for `"I"` and `"I;16"`, float for `"F"`).

        Raises:
            ValueError: a wrong shape, or lists of another length than the batch.
        """
        values = torch.as_tensor(purified_pixel_values).detach()
        values = values[None] if values.ndim == 3 else values
        if values.ndim != 4 or values.shape[1] not in (1, 3):
            raise ValueError(
                f"purified_pixel_values must have shape (batch, 1 or 3, height, width), got {tuple(values.shape)}."
            )
        batch = len(values)
        modes = [modes] * batch if modes is None or isinstance(modes, str) else list(modes)
        target_sizes = [None] * batch if target_sizes is None else list(target_sizes)
        for name, given in (("modes", modes), ("target_sizes", target_sizes)):
            if len(given) != batch:
                raise ValueError(f"{name} has {len(given)} entries for a batch of {batch} images.")
        images = []
        for pixels, target, mode in zip(values.float().clamp(0, 1).cpu().numpy(), target_sizes, modes, strict=True):
            if target is not None and tuple(target) != pixels.shape[1:]:
                size = {"height": int(target[0]), "width": int(target[1])}
                pixels = _resize(pixels, size, self.resample).clip(0, 1)
            images.append(_to_pil(pixels, mode))
        return images


def read_image(source: str, timeout: float = 30.0) -> Image.Image:
    """An image file or `http(s)` URL, upright and in its own mode (transformers' `load_image` clips 16 bits to 8).

    Args:
        source: path or URL.
        timeout: seconds to wait for a URL.

    Raises:
        ValueError: it cannot be read; the message names it.
    """
    try:
        file: Any = source
        if source.startswith(("http://", "https://")):
            # with a name of its own: many sites turn urllib's away
            with urlopen(Request(source, headers={"User-Agent": "maep_hf"}), timeout=timeout) as response:
                file = BytesIO(response.read())
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image)
    except Exception as error:  # a broken file raises nearly anything, depending on the decoder
        raise ValueError(f"{source}: not an image file or the URL of one that can be read: {error}") from error


def _from_pil(image: Image.Image, rgb: bool | None) -> np.ndarray:
    if image.mode in SIXTEEN_BIT_MODES or image.mode == "F":
        # convert("RGB") would clip these to 8 bits.
        array = np.asarray(image)
        if image.mode != "F":
            if array.size and not (array.min() >= 0 and array.max() <= 65535):
                raise ValueError(f"mode {image.mode} with values outside [0, 65535] or NaN: its white is unknown")
            array = array.astype(np.uint16)
        return np.repeat(array[None], 3 if rgb else 1, axis=0)
    if rgb or image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode in ("1", "LA") and not rgb else "RGB")
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def channels_last(array: Any, input_data_format: Any = None) -> bool:
    """Whether the channels of an array or tensor of three dimensions are taken to be the last."""
    if input_data_format is not None:
        return _is_last(input_data_format)
    return array.shape[0] not in (1, 3, 4) and array.shape[2] in (1, 2, 3, 4)


def _is_last(data_format: Any) -> bool:
    return str(getattr(data_format, "value", data_format)) == "channels_last"


def _to_unit(image: np.ndarray, rescale_factor: float) -> np.ndarray:
    if np.issubdtype(image.dtype, np.integer):
        sixteen = image.dtype.kind == "u" and image.dtype.itemsize == 2  # in either order of bytes
        factor = 1 / 65535 if sixteen else rescale_factor
        pixels = (image * np.float64(factor)).astype(np.float32)
    else:
        pixels = image.astype(np.float32)
    if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(
            f"Pixels of type {image.dtype} from {image.min()} to {image.max()} do not lie in [0, 1]: pass 8-bit images "
            "as integers, float images in [0, 1] without mean and standard deviation and without NaN."
        )
    return pixels


def _resize(pixels: np.ndarray, size: Any, resample: Any) -> np.ndarray:
    """Resize `(channels, height, width)` floats channel by channel, without rounding to 8 bits."""
    _, height, width = pixels.shape
    size = {key: value for key, value in dict(size).items() if value is not None}
    if set(size) == {"height", "width"}:
        new_height, new_width = size["height"], size["width"]
    elif set(size) == {"shortest_edge"}:
        scale = size["shortest_edge"] / min(height, width)
        new_height, new_width = round(height * scale), round(width * scale)
    else:
        raise ValueError(f"size must have the keys height and width, or shortest_edge; got {size}.")
    resample = PILImageResampling.BICUBIC if resample is None else resample
    channels = [Image.fromarray(np.ascontiguousarray(c)).resize((new_width, new_height), resample) for c in pixels]
    return np.stack([np.asarray(channel) for channel in channels])


def _to_pil(pixels: np.ndarray, mode: str | None) -> Image.Image:
    if mode is not None and (mode in SIXTEEN_BIT_MODES or mode == "F"):
        grey = pixels[0] if len(pixels) == 1 else np.tensordot((0.299, 0.587, 0.114), pixels, axes=1)
        if mode == "F":
            return Image.fromarray(grey.astype(np.float32))
        grey = (grey * 65535).round().astype(np.uint16)
        return Image.fromarray(grey.astype(np.int32)) if mode == "I" else Image.fromarray(grey)
    array = (pixels * 255).round().astype(np.uint8)
    image = Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))
    return image if mode is None or mode == image.mode else image.convert(mode)


# With this, every save_pretrained writes this file and its auto_map entry.
MAEPImageProcessor.register_for_auto_class()

__all__ = ["MAEPImageProcessor"]
