"""Classifiers by name: a folder or Hub id, a timm model, or a Python function that makes one."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .checkpoints import CheckpointError, expanded, released_checkpoint
from .data import names_that_differ, numbers_as_text
from .folding import fold_batch_norm
from .random_states import seeded

if TYPE_CHECKING:
    from .classifier import PixelClassifier

logger = logging.getLogger(__name__)

TIMM, PYTHON = "timm:", "python:"
# Model types that declare each convolution's normalisation right after it and call it there.
FOLDED = ("cifar_resnet", "mobilenet_v2", "regnet", "resnet")


def load_frozen_classifier(name: str | os.PathLike) -> PixelClassifier:
    """Load a classifier that is only run and attacked: eval mode, no gradients for its parameters.

    Batch normalisation is folded into the convolutions where the network is known here: the same function, faster.

    Args:
        name: folder or Hub id of a transformers image classifier (`checkpoints/NAME` is found from any working
            directory); `timm:NAME` for a pretrained timm model; `python:MODULE:FUNCTION[:ARGUMENT]` for a function, in
            a module on the path or in the working directory, that returns (for the argument, a text) a module from
            (B, C, H, W) pixels in [0, 1] to logits (B, K), or a [`PixelClassifier`]. Its memory format is the
            function's choice: where nothing in it takes a `view` of what convolutions return,
            `.to(memory_format=torch.channels_last)` makes it faster on a processor.

    Raises:
        CheckpointError: there is no such module, function or timm model, or it makes no classifier.
        OSError, ValueError: as [`load_classifier`].
    """
    name = os.fspath(name)
    loaded = made_classifier(name) if is_made(name) else _from_folder_or_hub(expanded(name))
    loaded = loaded.requires_grad_(False).eval()
    return loaded if name.startswith(PYTHON) else _channels_last(loaded)  # in which a user's own `view` may fail


def is_made(name: str) -> bool:
    """Whether a classifier's name is one that timm or a Python function makes, not a folder or Hub id."""
    return name.startswith((TIMM, PYTHON))


def made_classifier(name: str, **preprocessing: Any) -> PixelClassifier:
    """The classifier that `timm:NAME` or `python:MODULE:FUNCTION[:ARGUMENT]` names.

    Args:
        name: see [`load_frozen_classifier`].
        **preprocessing: arguments of [`PixelClassifier`]; of a function that returns one, none may be given.

    Raises:
        CheckpointError: there is no such module, function or timm model, or it makes no classifier.
        ValueError: the preprocessing is none that `PixelClassifier` takes.
    """
    if name.startswith(TIMM):
        return _from_timm(name.removeprefix(TIMM), preprocessing)
    return _from_python(name, preprocessing)


def _channels_last(classifier: PixelClassifier) -> PixelClassifier:
    """On a processor convolutions are a sixth to a fourth faster so; weights of 3D convolutions have no such format."""
    if any(weight.dim() == 5 for weight in (*classifier.parameters(), *classifier.buffers())):
        return classifier
    return classifier.to(memory_format=torch.channels_last)


@torch.no_grad()
def count_classes(classifier: PixelClassifier, height: int, width: int) -> int:
    """The width of a classifier's logits, measured on a black picture of so many pixels.

    What it says of its classes (`num_labels`) is stale where somebody replaced its head, or takes a part of its logits.
    All random states stay as they were.
    """
    with seeded(0):
        return classifier(torch.zeros(1, 3, height, width)).shape[1]


def match_classes(classifiers: Sequence[PixelClassifier], names: Sequence[str] | None) -> None:
    """Put the logits of each into the order of a dataset's class names, where it has the same in another order."""
    for classifier in classifiers:
        own = list((classifier.id2label or {}).values())
        if differ := names_that_differ(names, own):
            logger.warning("a surrogate's class names are not the dataset's (%s); taken by index", differ)
        if doubt := numbers_as_text(own, names):
            logger.warning("the dataset: %s", doubt)
    if any([classifier.match_classes(names) for classifier in classifiers]):  # a list: of all, not of the first
        logger.warning(
            "the dataset's classes stand in another order than those of the surrogates: they are matched by name"
        )


def call_named(name: str, kind: str) -> Any:
    """What the function of `python:MODULE:FUNCTION[:ARGUMENT]` returns, for the argument, a text, where one is given.

    Raises:
        CheckpointError: the name has another form, there is no such module or function, or the function failed.
    """
    module, _, rest = name.removeprefix(PYTHON).partition(":")
    function, given, argument = rest.partition(":")
    make = _import_function(module, function, name, kind)
    try:
        return make(argument) if given else make()
    except CheckpointError:
        raise
    except Exception as error:  # it is the user's own code, which may raise anything
        raise CheckpointError(f"{kind} {name!r}: {function} failed: {_said(error)}") from error


def _said(error: Exception) -> str:
    """What an error of somebody else's code says and its type, without which a `KeyError` is hardly one, in a line."""
    return f"{' '.join(str(error).split())} ({type(error).__name__})".lstrip()


def _import_function(module_name: str, function_name: str, name: str, kind: str) -> Any:
    if not module_name or not function_name:
        raise CheckpointError(f"{kind} {name!r}: a Python {kind} is named python:MODULE:FUNCTION")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        told = f"the module {module_name} cannot be imported: {_said(error)}"
        raise CheckpointError(f"{kind} {name!r}: {told}") from error
    finally:
        sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise CheckpointError(f"{kind} {name!r}: {module_name} has no function {function_name}")
    return function


def _from_python(name: str, preprocessing: Mapping[str, Any]) -> PixelClassifier:
    from .classifier import PixelClassifier

    made = call_named(name, "classifier")
    if not isinstance(made, nn.Module):
        raise CheckpointError(
            f"classifier {name!r} returned {type(made).__name__}: it must return an nn.Module from pixels to logits"
        )
    if isinstance(made, PixelClassifier):
        if given := [key for key, value in preprocessing.items() if value not in (None, False)]:
            raise CheckpointError(
                f"classifier {name!r} returned a PixelClassifier, which has its preprocessing: give {', '.join(given)} "
                "to that one, in the function"
            )
        return made
    try:
        return PixelClassifier(made, **preprocessing)
    except TypeError as error:  # a purifier before it, say
        raise CheckpointError(f"classifier {name!r}: {error}") from error


def _from_timm(name: str, preprocessing: Mapping[str, Any]) -> PixelClassifier:
    from .classifier import PixelClassifier

    try:
        timm = importlib.import_module("timm")  # by name: it needs torchvision, and few users need it
    except ImportError as error:
        raise CheckpointError(f"classifier timm:{name}: timm is not installed (pip install timm)") from error
    try:
        model = timm.create_model(name, pretrained=True)
    except RuntimeError as error:
        raise CheckpointError(f"classifier timm:{name}: {error}") from error
    return PixelClassifier(model, **preprocessing)


def _from_folder_or_hub(name: str) -> PixelClassifier:
    from .classifier import load_classifier

    path = Path(name)
    released = path.parts[:1] == ("checkpoints",) and len(path.parts) == 2 and not path.is_dir()
    loaded = load_classifier(str(released_checkpoint(path.name)) if released else name)
    if loaded.config.model_type in FOLDED:
        fold_batch_norm(loaded.classifier)
    return loaded
