"""Classifiers that take [0, 1] pixels and return a logits tensor, bare or behind a purifier.

`PixelClassifier` puts a classifier's own resize and normalisation in front of it as differentiable tensor operations,
so that an attack's eps is in pixels and its gradient reaches them. `PurifiedClassifier` puts a purifier before that.
Both are plain callables `tensor -> tensor`, as foolbox, RobustBench and AutoAttack expect a model to be.
"""

import json
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from . import modeling_cifar_resnet  # noqa: F401  registers the CIFAR ResNet with the Auto classes
from .checkpoints import expanded, readable_weights
from .data import same_names_in_order
from .preprocessing import (
    ON_THE_COMMAND_LINE,
    PixelPreprocessing,
    PreprocessingSpec,
    check_against_processor,
    check_pixels,
    explicit_preprocessing,
    read_preprocessing,
)

HUB_ARGUMENTS = (
    "revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder", "force_download", "proxies",
    "code_revision",
)  # fmt: skip


class LogitsError(TypeError, ValueError):
    """A classifier that returns no logits: a wrong type, and what the command line tells in one line."""


class PixelClassifier(nn.Module):
    """[0, 1] pixels (B, C, H, W), any H and W, to logits (B, K), differentiable end to end.

    The preprocessing is read from, in this order: `image_processor`; the attribute `image_processor` of the
    classifier; timm's `pretrained_cfg` (or the older `default_cfg`), of the model or of its configuration; for a
    transformers model, also wrapped by PEFT, torch.compile or for several devices, the image processor saved beside
    its weights (`config._name_or_path`). Where there is none, the classifier is taken to accept [0, 1] pixels itself;
    for a transformers model, and for a module of one's own that carries the configuration of one, that is a warning.

    The classifier is put into eval mode here: batch statistics and dropout would make every evaluation wrong.
    Nothing else of it is changed: its parameters keep `requires_grad`, dtype and device. A program of `torch.export`
    keeps the mode that it was exported in.

    Args:
        classifier: an `AutoModelForImageClassification`, a timm model, any module or callable that takes a (B, C, H,
            W) batch and returns a tensor (B, K), or an object or mapping with such `logits`.
        image_processor: a transformers image processor, or a timm `pretrained_cfg`.
        size: an integer or (height, width) to resize to, whatever the aspect ratio, or a dictionary as image
            processors have it (height and width, or shortest_edge). Replaces the resize *and* crop that were read.
        image_mean, image_std: per channel or one number, for [0, 1] pixels: logits = f((pixels - mean) / std).
        interpolation: "nearest", "bilinear" or "bicubic" (antialiased).
        do_resize: False: no resize and no crop.
        always_resize: also resize and crop images that already have the classifier's input size (False: such images
            go in as they are, as robustness benchmarks do it; a processor that resizes to 256 and crops 224 would
            otherwise enlarge a 224-pixel image).

    Raises:
        TypeError: the classifier cannot be called, or is a name; or `image_processor` is not one.
        ValueError: the preprocessing has no tensor form here, or is not what the image processor itself does; or an
            image processor is saved beside the weights and cannot be loaded, and neither a timm configuration nor
            explicit arguments (`size` or `do_resize=False`, `image_mean`, `image_std`) stand in for it.
    """

    def __init__(
        self,
        classifier: nn.Module | Callable[[Tensor], Any],
        image_processor: Any = None,
        *,
        size: int | Sequence[int] | Mapping[str, int] | None = None,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        interpolation: str | int | None = None,
        do_resize: bool | None = None,
        always_resize: bool = False,
    ):
        super().__init__()
        if isinstance(classifier, str):
            raise TypeError(f"`classifier` must be a model, got a name; use load_classifier({classifier!r}).")
        if isinstance(classifier, PixelClassifier | PurifiedClassifier):
            raise TypeError(f"`classifier` is a {type(classifier).__name__} already; use it as it is.")
        if not callable(classifier):
            raise TypeError(f"`classifier` must be a module or a callable, got {type(classifier).__name__}.")
        self.classifier = classifier

        explicit = {
            "size": size,
            "do_resize": do_resize,
            "image_mean": image_mean,
            "image_std": image_std,
        }
        source = image_processor
        if source is None:
            source = find_preprocessing(classifier, required=not _is_said(**explicit))
        explicit["interpolation"] = interpolation
        spec = PreprocessingSpec()
        if source is not None:
            # What explicit arguments replace may be beyond what can be read.
            geometry = size is None and do_resize is not False
            spec = read_preprocessing(source, geometry=geometry, interpolation=interpolation)
        elif isinstance(self.config, PreTrainedConfig) and image_mean is None and image_std is None:
            own = "" if _transformers_model(classifier) is not None else (
                "; 0 and 1 where it normalises itself (it has a transformers configuration, and is no such model)"
            )  # fmt: skip
            warnings.warn(
                f"No image processor was found for {type(classifier).__name__}: it receives [0, 1] pixels without "
                f"normalisation. Pass `image_processor`, or `image_mean` and `image_std`{own}.",
                stacklevel=2,
            )
        spec = explicit_preprocessing(spec, **explicit, num_channels=self._channels())
        self.preprocessing = PixelPreprocessing(spec, always_resize=always_resize)

        if callable(source) and all(value is None for value in explicit.values()):
            check_against_processor(self.preprocessing, source)
        self.preprocessing.to(placement(classifier)[0])
        self.register_buffer("class_order", None, persistent=False)
        self.eval()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits of a batch of images.

        Args:
            pixel_values: (B, C, H, W) in [0, 1], floating point; moved to the classifier's device and, after the
                preprocessing in float32, cast to its dtype.

        Returns:
            (B, K), in float32 whatever the classifier's precision (float64 stays float64). NaN stays NaN.

        Raises:
            TypeError: not a floating-point tensor, or the classifier returns no logits ([`LogitsError`]).
            ValueError: another shape, or number of channels, than the classifier takes.
        """
        device, dtype = placement(self.classifier)
        if isinstance(pixel_values, Tensor):
            pixel_values = pixel_values.to(device)
        inputs = self.preprocessing(pixel_values).to(dtype)
        inner = unwrapped(self.classifier)
        if isinstance(inner, PreTrainedModel):
            output = self.classifier(**{inner.main_input_name: inputs})
        else:
            output = self.classifier(inputs)
        logits = _logits(output)
        if logits.ndim != 2 or logits.shape[0] != pixel_values.shape[0]:
            raise ValueError(
                f"The classifier must return logits of the shape (B, K), got {tuple(logits.shape)} "
                f"for {pixel_values.shape[0]} images."
            )
        logits = logits if self.class_order is None else logits[:, self.class_order.to(logits.device)]
        return logits if logits.dtype == torch.float64 else logits.float()

    def train(self, mode: bool = True) -> Self:
        """As of any module; exported programs inside keep their mode."""
        _set_mode(self, mode)
        return self

    def match_classes(self, names: Sequence[str] | None) -> bool:
        """Put the logits into the order of a dataset's class names, where those are the classifier's in another order.

        A folder of images has its classes in the order of the alphabet, which need not be the classifier's; where the
        names are not the same, nothing is known and nothing changed.

        Args:
            names: in the order of the dataset's labels; `None` where it has none.

        Returns:
            Whether the order is another one now.
        """
        found = same_names_in_order(list((self.id2label or {}).values()), names)
        if found is None:
            return False
        order = torch.tensor(found)
        self.class_order = order if self.class_order is None else self.class_order.cpu()[order]
        return True

    @property
    def config(self) -> Any:
        """The classifier's configuration, or None."""
        return getattr(unwrapped(self.classifier), "config", None)

    @property
    def num_labels(self) -> int | None:
        """The number of classes K, where the classifier says."""
        for owner, name in ((self.config, "num_labels"), (unwrapped(self.classifier), "num_classes")):
            if isinstance(getattr(owner, name, None), int):
                return getattr(owner, name)
        return None

    @property
    def id2label(self) -> dict[int, str] | None:
        """Class names by index, in its order, where the classifier has them."""
        names = getattr(self.config, "id2label", None)
        if not isinstance(names, Mapping):
            return None
        # a configuration made with keys of text is stored as "0", "1", "10", "2", ...
        names = dict(sorted((int(index), name) for index, name in names.items()))
        if self.class_order is None:
            return names
        return {index: names[own] for index, own in enumerate(self.class_order.tolist())}

    def _channels(self) -> int | None:
        for owner, name in ((self.config, "num_channels"), (unwrapped(self.classifier), "in_chans")):
            if isinstance(getattr(owner, name, None), int):
                return getattr(owner, name)
        return None


class PurifiedClassifier(nn.Module):
    """purify -> preprocess -> classify: [0, 1] pixels (B, C, H, W) to logits (B, K), differentiable end to end.

    Purifier and classifier are put into eval mode here and nothing else of them is changed, so gradients also reach
    their parameters where these require them. To train a purifier through a frozen classifier, freeze the classifier's
    parameters and call `model.purifier.train()`; `model.train()` would put the classifier into training mode too.

    Purifier and classifier must take the same number of channels. In front of a grey classifier, a `PixelClassifier`,
    `PixelClassifier(nn.Sequential(nn.AvgPool3d((3, 1, 1)), classifier))` averages the three of an RGB purifier; given
    so, gray-box attacks differentiate the average too.

    Args:
        purifier: a `MAEPModel` (or anything with a method `purify`), also wrapped by PEFT or DistributedDataParallel;
            any module or callable that maps images to images of the same shape; or None for the bare classifier.
        classifier: see `PixelClassifier`; may be one already.
        image_processor: see `PixelClassifier`.
        purify_kwargs: arguments for every call of the purifier, e.g. `{"overlap": 0.5}`.
        **kwargs: passed on to `PixelClassifier`.

    Raises:
        TypeError: the purifier cannot be called, or options are given for a classifier that is wrapped already.
    """

    def __init__(
        self,
        purifier: nn.Module | Callable[[Tensor], Tensor] | None,
        classifier: nn.Module | Callable[[Tensor], Any],
        image_processor: Any = None,
        *,
        purify_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        if isinstance(purifier, str):
            raise TypeError(f"`purifier` must be a model, got a name; use MAEPModel.from_pretrained({purifier!r}).")
        if purifier is not None and not callable(purifier) and not callable(getattr(purifier, "purify", None)):
            raise TypeError(
                f"`purifier` must have a method `purify`, be callable or None, got {type(purifier).__name__}."
            )
        if purifier is None and purify_kwargs:
            raise TypeError("`purify_kwargs` is given, but `purifier` is None.")
        if isinstance(classifier, PixelClassifier):
            if image_processor is not None or kwargs:
                given = [*(["image_processor"] if image_processor is not None else []), *kwargs]
                raise TypeError(f"`classifier` is a PixelClassifier already: give {', '.join(given)} to that one.")
        else:
            classifier = PixelClassifier(classifier, image_processor, **kwargs)
        self.purifier = purifier
        self.classifier = classifier
        self.purify_kwargs = dict(purify_kwargs or {})
        self.eval()

    def purify(self, pixel_values: Tensor) -> Tensor:
        """The images as the classifier's preprocessing receives them: (B, C, H, W) in [0, 1], same shape as given.

        Raises:
            TypeError: not a floating-point tensor, or the purifier returns no tensor.
            ValueError: another shape, or number of channels, than the purifier takes; or the purifier returns
                another shape than it was given.
        """
        if self.purifier is None:
            check_pixels(pixel_values)
            return pixel_values
        num_channels = getattr(getattr(self.purifier, "config", None), "num_channels", None)
        check_pixels(pixel_values, num_channels if isinstance(num_channels, int) else None, "the purifier")
        return call_purifier(self.purifier, pixel_values, **self.purify_kwargs)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits (B, K) of the purified images; `pixel_values` (B, C, H, W) in [0, 1]. Errors as in `purify`."""
        return self.classifier(self.purify(pixel_values))

    def train(self, mode: bool = True) -> Self:
        """As of any module; exported programs inside keep their mode."""
        _set_mode(self, mode)
        return self

    @property
    def config(self) -> Any:
        """The classifier's configuration, or None."""
        return self.classifier.config

    @property
    def num_labels(self) -> int | None:
        """The number of classes K, where the classifier says."""
        return self.classifier.num_labels

    @property
    def id2label(self) -> dict[int, str] | None:
        """Class names by index, where the classifier has them."""
        return self.classifier.id2label


def load_classifier(
    name_or_path: str,
    *,
    image_processor: Any = None,
    size: int | Sequence[int] | Mapping[str, int] | None = None,
    image_mean: float | Sequence[float] | None = None,
    image_std: float | Sequence[float] | None = None,
    interpolation: str | int | None = None,
    do_resize: bool | None = None,
    always_resize: bool = False,
    **hub_kwargs: Any,
) -> PixelClassifier:
    """Load a classifier and its image processor, ready to be attacked: eval mode, no gradients for its parameters.

    It computes in float32, whatever its weights are stored in: in 16 bits the gradients of a confident classifier are
    rounded to zero, attacks find no way, and it looks robust. Another `dtype` is at the caller's own risk.

    Args:
        name_or_path: a model id of the Hub, or a folder; `timm:NAME` for a pretrained timm model (`pip install timm`);
            `python:MODULE:FUNCTION[:ARGUMENT]` for what a function makes, see
            [`classifier_sources.load_frozen_classifier`].
        image_processor, size, image_mean, image_std, interpolation, do_resize, always_resize: see `PixelClassifier`.
        **hub_kwargs: for `AutoModelForImageClassification.from_pretrained` (`revision`, `token`, `dtype`,
            `local_files_only`, `trust_remote_code`, ...); those that name the source go to the image processor too.
            None for `timm:` and `python:`.

    Raises:
        OSError: there is no such model, or the Hub cannot be reached.
        ValueError: it is no image classifier, or its weights lack some of the network (an untrained head); or its
            preprocessing is none that `PixelClassifier` takes. A [`CheckpointError`] where its weights are cut off,
            timm is not installed, or there is no such timm model, module or function.
        TypeError: `hub_kwargs` for `timm:` or `python:`.
    """
    from .classifier_sources import is_made, made_classifier  # which itself needs what is here

    name = expanded(name_or_path)
    explicit = {"size": size, "do_resize": do_resize, "image_mean": image_mean, "image_std": image_std}
    others = {"interpolation": interpolation, "always_resize": always_resize}
    if is_made(name):
        if hub_kwargs:
            raise TypeError(f"{', '.join(hub_kwargs)}: only for a folder or Hub id, not for {name!r}; leave it out.")
        made = made_classifier(name, image_processor=image_processor, **explicit, **others)
        return made.requires_grad_(False).eval()
    dtype = {} if "torch_dtype" in hub_kwargs else {"dtype": torch.float32}  # transformers' older name for it
    with readable_weights(name):
        try:
            model, info = AutoModelForImageClassification.from_pretrained(
                name, output_loading_info=True, **dtype | hub_kwargs
            )
        except OSError as error:
            raise OSError(
                f"The classifier {str(name_or_path)!r} could not be loaded: {error}\n"
                "Give a folder written by `save_pretrained` or a model id that the Hub has."
            ) from error
        except ValueError as error:
            raise ValueError(f"{str(name_or_path)!r} could not be loaded as an image classifier: {error}") from error
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("num_batches_tracked"))
    if missing:
        raise ValueError(
            f"{str(name_or_path)!r} is not a trained image classifier: its weights lack {', '.join(missing[:4])}"
            f"{f' and {len(missing) - 4} more' if len(missing) > 4 else ''}. Fine-tune it first."
        )
    if image_processor is None:
        source = {key: value for key, value in hub_kwargs.items() if key in HUB_ARGUMENTS and value is not None}
        required = not _is_said(**explicit) and _stated_preprocessing(model) is None
        image_processor = _saved_image_processor(name, required, **source)
    model.requires_grad_(False)
    return PixelClassifier(model, image_processor, **explicit, **others)


def _set_mode(module: nn.Module, mode: bool) -> None:
    """Training or evaluation mode for a module and what is in it, but for programs of `torch.export`, which refuse."""
    module.training = mode
    for child in module.children():
        try:
            child.train(mode)
        except NotImplementedError:  # from it, or from something in it
            _set_mode(child, mode)


def unwrapped(module: Any) -> Any:
    """What a `DataParallel` or `DistributedDataParallel` holds; anything else as it is."""
    while isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        module = module.module
    return module


def _transformers_model(classifier: Any) -> PreTrainedModel | None:
    """The transformers model that a classifier is, also through parallel wrappers, `torch.compile` and PEFT."""
    while not isinstance(classifier, PreTrainedModel):
        inner = unwrapped(classifier)
        if inner is classifier and isinstance(classifier, nn.Module):
            base = getattr(classifier, "get_base_model", None)
            inner = base() if callable(base) else getattr(classifier, "_orig_mod", classifier)
        if inner is classifier:
            return None
        classifier = inner
    return classifier


def placement(module: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and dtype that a module's input follows, those of its first weights; `None` where it has none.

    Weights that accelerate keeps elsewhere until they are used (`device_map`, offloading) say no device: its hooks move
    the input themselves.
    """
    dtype = None
    for parameter in module.parameters() if isinstance(module, nn.Module) else ():
        if parameter.is_floating_point():
            dtype = dtype or parameter.dtype
            if parameter.device.type != "meta":
                return parameter.device, dtype
    return None, dtype


def find_preprocessing(classifier: Any, required: bool = False) -> Any:
    """The image processor or timm configuration that belongs to a classifier, or None (see `PixelClassifier`).

    Args:
        required: an image processor that is saved beside the weights and cannot be loaded is an error, not None.

    Raises:
        ValueError: it is, and there is no other.
    """
    stated = _stated_preprocessing(classifier)
    model = _transformers_model(classifier)
    if stated is None and model is not None and getattr(model.config, "_name_or_path", None):
        return _saved_image_processor(model.config._name_or_path, required)
    return stated


def _stated_preprocessing(classifier: Any) -> Any:
    """What of the preprocessing the classifier itself carries, or None."""
    classifier = unwrapped(classifier)
    config = getattr(classifier, "config", None)
    if isinstance(config, PreTrainedConfig) and _transformers_model(classifier) is None:
        config = None  # of a model inside, before which the module itself may normalise
    for owner, name in (
        (classifier, "image_processor"),
        (classifier, "pretrained_cfg"),
        (classifier, "default_cfg"),
        (config, "pretrained_cfg"),
    ):
        found = getattr(owner, name, None)
        if found is not None and (name == "image_processor" or "input_size" in _as_mapping(found)):
            return found if name == "image_processor" else _as_mapping(found)
    return None


def _is_said(size: Any, do_resize: bool | None, image_mean: Any, image_std: Any) -> bool:
    """Whether explicit arguments say all of the preprocessing."""
    return (size is not None or do_resize is False) and image_mean is not None and image_std is not None


def _saved_image_processor(name_or_path: str, required: bool, **kwargs: Any) -> Any:
    """The image processor beside a model's weights, or None where there is none.

    One that is there and cannot be loaded is an error where it is `required`: without it a classifier would run on
    pixels that are not normalised.
    """
    try:
        # unless it is said, nobody is asked whether code of its own may run
        return AutoImageProcessor.from_pretrained(name_or_path, **{"trust_remote_code": False} | kwargs)
    except Exception as error:  # a damaged file or code of its own raises anything
        if not required or not _has_image_processor(name_or_path, kwargs):
            return None
        raise ValueError(
            f"The image processor of {str(name_or_path)!r} could not be loaded "
            f"({textwrap.shorten(f'{type(error).__name__}: {error}', 500, placeholder=' ...')}), and without it the "
            "classifier's normalisation is not known. Mend or install what it lacks, or pass `image_processor`, or "
            f"`size` (or `do_resize=False`), `image_mean` and `image_std`; {ON_THE_COMMAND_LINE}."
        ) from error


def _has_image_processor(name_or_path: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a folder, or what is stored here of a repository, has the file of an image processor."""
    known = ("revision", "cache_dir", "subfolder")
    options = {key: value for key, value in kwargs.items() if key in known} | {"local_files_only": True}
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            path = Path(cached_file(name_or_path, name, **options))
        except (OSError, ValueError):
            continue
        try:
            if name.startswith("pre") or "image_processor" in json.loads(path.read_text()):
                return True  # else it is a processor of text alone
        except (OSError, ValueError):
            return True
    return False


def _as_mapping(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    return config.to_dict() if hasattr(config, "to_dict") else vars(config)


def _logits(output: Any) -> Tensor:
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise LogitsError(
            f"The classifier must return a tensor (B, K) or an object with `logits`, got {type(output).__name__}; "
            "wrap it in a function that returns its logits."
        )
    return logits


def call_purifier(purifier: Any, pixel_values: Tensor, **kwargs: Any) -> Tensor:
    """Run whatever maps images to images: its method `purify` where it has one, else the object itself.

    Args:
        purifier: see `PurifiedClassifier`.
        pixel_values: (B, C, H, W) in [0, 1]; moved to the device of the purifier's parameters.
        **kwargs: for the purifier.

    Returns:
        (B, C, H, W), the same shape.

    Raises:
        TypeError: not a floating-point tensor, or the purifier returns no tensor.
        ValueError: another shape, or the purifier does not keep the shape.
    """
    check_pixels(pixel_values)
    pixel_values = pixel_values.to(placement(purifier)[0])
    output = (find_purify(purifier) or purifier)(pixel_values, **kwargs)
    output = getattr(output, "purified_pixel_values", output)
    if not isinstance(output, Tensor):
        raise TypeError(f"`purifier` must return a tensor of images, got {type(output).__name__}.")
    if output.shape != pixel_values.shape:
        raise ValueError(
            f"`purifier` must keep the shape of the images: it was given {tuple(pixel_values.shape)} and returned "
            f"{tuple(output.shape)}."
        )
    return output


def find_purify(purifier: Any) -> Callable[..., Tensor] | None:
    """The method `purify`, also through PEFT (whose adapters live inside the base model) and parallel wrappers."""
    for candidate in (purifier, unwrapped(purifier)):
        if callable(getattr(candidate, "purify", None)):
            return candidate.purify
        base = getattr(candidate, "get_base_model", None)
        if callable(base) and callable(getattr(base(), "purify", None)):
            return base().purify
    return None
