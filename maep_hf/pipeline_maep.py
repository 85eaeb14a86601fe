"""The pipeline `image-purification`: images in, purified images out.

`import maep_hf` registers it. `pipe.save_pretrained` and `pipe.push_to_hub` copy this file beside the weights, for
people without the package, so it imports only what lies there.
"""

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import AutoModel, Pipeline

from .image_processing_maep import MAEPImageProcessor, channels_last, read_image

TASK = "image-purification"


class ImagePurificationPipeline(Pipeline):
    r"""
    Purifies images of any size with a [`MAEPModel`].

    Args:
        model (`MAEPModel`): The purifier, also inside a `PeftModel`; `pipeline(...)` takes its folder or Hub id too.
        image_processor (`MAEPImageProcessor`, *optional*): Default: the one saved with the model, else one that keeps
            every image's size.
        batch_size (`int`, defaults to 1): Images of a list to purify at once. Their sizes may differ: those of one size
            share a forward pass.
        mode (`str`), overlap (`float`), window_batch_size (`int`), strength (`float`): As in [`MAEPModel.purify`],
            whose defaults are those of the model's configuration.
        return_difference (`bool`, defaults to `False`): Return a dictionary with the magnified difference as well.
        difference_factor (`float`, defaults to 8): Its magnification.
        keep_mode (`bool`, defaults to `False`): Give every picture back in the mode it came in, by
            [`MAEPImageProcessor.post_process`]: grey as `"L"` or `"I;16"`, alpha as an opaque `"RGBA"`, a palette as
            `"P"` (dithered to the web palette, so better left off for those).
        timeout (`float`, defaults to 30): Seconds to wait for a URL.

    All but the first two are arguments of the call too, where they take precedence.

    Example:
        >>> pipe = pipeline("image-purification", model="checkpoints/maep-tiny-cifar10")
        >>> pipe("cat.png")
        <PIL.Image.Image image mode=RGB size=500x375>
        >>> pipe(["cat.png", "dog.png"], batch_size=2, return_difference=True)[0]["difference"]
        <PIL.Image.Image image mode=RGB size=500x375>
    """

    _load_processor = False
    # optional: without preprocessor_config.json there is nothing to set, see __init__
    _load_image_processor = None
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, model: Any, image_processor: Any = None, **kwargs: Any):
        if not callable(getattr(model, "purify", None)):
            raise ValueError(
                f"model: {type(model).__name__} is not a purifier; {TASK} takes a MAEPModel, its folder or Hub id."
            )
        if image_processor is None:
            image_processor = MAEPImageProcessor(do_convert_rgb=model.config.num_channels == 3)
        elif not callable(getattr(image_processor, "post_process", None)):
            raise ValueError(
                f"image_processor: {type(image_processor).__name__} does not give images back; pass a "
                "MAEPImageProcessor or leave it out."
            )
        _restore_class_names(model.config)
        super().__init__(model=model, image_processor=image_processor, **kwargs)

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Purify one image or many.

        Args:
            inputs: A path, an `http(s)` URL, a PIL image, or an array or tensor `(height, width)`, `(channels, height,
                width)` or `(height, width, channels)` with 1 to 4 channels: integers of 8 or 16 bits, floats in [0, 1].
                Many: a list, or an array or tensor with a batch dimension in front. A generator or a torch dataset is
                read lazily.
            kwargs: The options of the class.

        Returns:
            For an image, whatever it came as, the purified `PIL.Image` of its size (after the resize, if the image
            processor has one): 8-bit `"RGB"`, or `"L"` from a purifier of one channel; alpha is dropped, files are
            turned upright. With `keep_mode` the mode of the picture, or `"L"` for an array of one channel.

            With `return_difference`, a dictionary of that as `"purified"` and, as `"difference"`, a picture of
            `difference_factor * (purified - input)` around mid-grey. A list for many images, an iterator for a
            generator or dataset.

        Raises:
            TypeError: an unknown option.
            ValueError: what is no image or cannot be read (the message names the file), pixels out of range, or an
                option out of range.
        """
        if getattr(inputs, "ndim", 0) == 4 or (isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes))):
            inputs = list(inputs)
            if not inputs:
                return []
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        mode: str | None = None,
        overlap: float | None = None,
        window_batch_size: int | None = None,
        strength: float | None = None,
        return_difference: bool | None = None,
        difference_factor: float | None = None,
        keep_mode: bool | None = None,
        timeout: float | None = None,
        local_files_only: bool | None = None,  # transformers passes on what it has already acted upon
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        forward = {"mode": mode, "overlap": overlap, "window_batch_size": window_batch_size, "strength": strength}
        show = {"return_difference": return_difference, "difference_factor": difference_factor, "keep_mode": keep_mode}
        if unknown:
            options = ", ".join(["batch_size", "num_workers", "timeout", *forward, *show])
            raise TypeError(f"{', '.join(unknown)}: no such option of {TASK}; there are {options}.")
        if difference_factor is not None and not 0 < difference_factor < math.inf:
            raise ValueError(f"difference_factor={difference_factor} must be a positive number.")
        return tuple(
            {name: value for name, value in group.items() if value is not None}
            for group in ({"timeout": timeout}, forward, show)
        )

    def preprocess(self, image: Any, timeout: float = 30.0) -> dict[str, list]:
        """One image of any kind to its `(channels, height, width)` pixels in [0, 1] and its PIL mode."""
        if isinstance(image, (str, os.PathLike)):
            image = read_image(os.fspath(image), timeout)
        elif isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4:
            raise ValueError("Every entry of a list must be one image, not several: pass one flat list.")
        elif isinstance(image, Image.Image):
            image = ImageOps.exif_transpose(image)  # as a file is
        pixels = self.image_processor(image, return_tensors="pt").pixel_values[0]
        channels = self.model.config.num_channels
        if len(pixels) != channels:
            raise ValueError(
                f"The image has {len(pixels)} channels, the purifier takes {channels}: "
                + ("pass it as grey, image.convert('L')." if channels == 1 else "set do_convert_rgb=True.")
            )
        if isinstance(image, Image.Image):
            mode = image.mode
        else:
            given = 1 if image.ndim == 2 else image.shape[2 if channels_last(image) else 0]
            mode = "L" if given == 1 else "RGB"
        # Lists, not tensors: batches are then lists of these, whatever the sizes.
        return {"pixel_values": [pixels], "mode": [mode]}

    def _forward(
        self, inputs: dict[str, list], mode: str | None = None, **options: Any
    ) -> dict[str, list]:  # `mode` of purify, not of the pictures
        batched = isinstance(inputs["pixel_values"][0], list)
        images = [entry[0] for entry in inputs["pixel_values"]] if batched else inputs["pixel_values"]
        of_shape = defaultdict(list)
        for index, image in enumerate(images):
            of_shape[image.shape].append(index)
        purified: list[Any] = [None] * len(images)
        for indices in of_shape.values():
            results = self.model.purify(torch.stack([images[index] for index in indices]), mode=mode, **options)
            for index, result in zip(indices, results, strict=True):
                purified[index] = [result] if batched else result
        return {"purified": purified, **inputs}

    def postprocess(
        self,
        outputs: dict[str, list],
        return_difference: bool = False,
        difference_factor: float = 8.0,
        keep_mode: bool = False,
    ) -> Image.Image | dict[str, Image.Image]:
        """Purified pixels to a picture, and to that of the difference if asked."""
        purified, pixels = outputs["purified"][0].float(), outputs["pixel_values"][0]
        (image,) = self.image_processor.post_process(purified, modes=outputs["mode"] if keep_mode else None)
        if not return_difference:
            return image
        # As maep_hf.figures.difference_image, which does not lie beside the weights.
        (difference,) = self.image_processor.post_process((0.5 + difference_factor * (purified - pixels)).clamp(0, 1))
        return {"purified": image, "difference": difference}


def _restore_class_names(config: Any) -> None:
    # transformers replaces the names in a loaded `custom_pipelines` by classes, which then cannot be saved as JSON.
    for entry in (getattr(config, "custom_pipelines", None) or {}).values():
        entry["pt"] = [getattr(cls, "__name__", cls) for cls in entry.get("pt", ())]


# What saving writes into config.json. Set here as well as by the registration: a pipeline loaded as remote code, which
# registers nothing, then saves itself with its code.
ImagePurificationPipeline._registered_impl = {
    TASK: {"impl": ImagePurificationPipeline, "pt": (AutoModel,), "type": "image"}
}

__all__ = ["ImagePurificationPipeline"]
