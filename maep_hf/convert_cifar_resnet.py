"""Published CIFAR ResNet weights (akamaster/pytorch_resnet_cifar10 layout) to a transformers folder."""

import re
from pathlib import Path

from torch import Tensor
from transformers import ViTImageProcessorPil

from .configuration_cifar_resnet import CifarResNetConfig
from .data import CIFAR10_CLASSES
from .modeling_cifar_resnet import CifarResNetForImageClassification
from .published_weights import read_published_weights

# The published weights were trained with the statistics of ImageNet, not of CIFAR-10.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def rename_key(key: str) -> str:
    """The name in `CifarResNetForImageClassification` of a published tensor, e.g. `layer1.0.bn1.bias`."""
    key = re.sub(r"^layer([123])\.", lambda match: f"stages.{int(match[1]) - 1}.", key)
    return re.sub(r"^linear\.", "classifier.", key)


def image_processor(size: int = 32) -> ViTImageProcessorPil:
    """The processor that turns any image into `size` x `size` pixels normalised as the published weights expect."""
    # Works without torchvision; saved under the family name, so that either backend loads it.
    return ViTImageProcessorPil(
        size={"height": size, "width": size},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
        do_convert_rgb=True,
    )


def convert_state_dict(
    state_dict: dict[str, Tensor], labels: tuple[str, ...] | None = None
) -> CifarResNetForImageClassification:
    """Build the model that published weights belong to; depth, width and classes are read from their shapes.

    Args:
        state_dict: published tensors by name (`conv1`, `bn1`, `layer1..3.N`, `linear`).
        labels: class names; by default those of CIFAR-10 for ten classes, else `LABEL_0`, ...

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        ValueError: a tensor is missing, not expected, or has another shape; or `labels` has another length.
    """
    if "conv1.weight" not in state_dict or "linear.weight" not in state_dict:
        raise ValueError(
            "This is not a published CIFAR ResNet: it has no `conv1.weight` or no `linear.weight`. "
            f"Its first tensors are {sorted(state_dict)[:5]}."
        )
    width, num_channels = state_dict["conv1.weight"].shape[:2]
    num_labels = state_dict["linear.weight"].shape[0]
    if labels is None:
        labels = CIFAR10_CLASSES if num_labels == 10 else tuple(f"LABEL_{index}" for index in range(num_labels))
    if len(labels) != num_labels:
        raise ValueError(f"`labels` has {len(labels)} names, but the weights have {num_labels} classes.")
    blocks = len({match[1] for key in state_dict if (match := re.match(r"layer1\.(\d+)\.", key))})
    config = CifarResNetConfig(
        depth=6 * max(blocks, 1) + 2, width=width, num_channels=num_channels, id2label=dict(enumerate(labels))
    )
    model = CifarResNetForImageClassification(config)

    renamed = {rename_key(key): tensor for key, tensor in state_dict.items()}
    own = model.state_dict()
    # Files of torch < 0.4.1 have no batch counters; nothing here reads them, so they start at zero.
    missing = sorted(key for key in own.keys() - renamed.keys() if not key.endswith("num_batches_tracked"))
    unexpected = sorted(key for key in state_dict if rename_key(key) not in own)
    wrong = [
        f"{key}: {tuple(tensor.shape)} instead of {tuple(own[key].shape)}"
        for key, tensor in sorted(renamed.items())
        if key in own and tensor.shape != own[key].shape
    ]
    for problem, names in (("lacks", missing), ("has unexpected", unexpected), ("has other shapes for", wrong)):
        if names:
            raise ValueError(
                f"This is not a published CIFAR ResNet of depth {config.depth}: the file {problem} "
                f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}."
            )
    model.load_state_dict(renamed, strict=False)
    return model.eval()


def convert_file(source: str | Path, out: str | Path) -> CifarResNetForImageClassification:
    """Convert one published file into a folder for `pipeline("image-classification", model=out)`.

    Args:
        source: the weight file, `.safetensors` or the authors' own (see [`read_published_weights`]).
        out: the folder to write (made if absent): configuration, weights, image processor and the model's code.

    Returns:
        The converted model, in eval mode.

    Raises:
        FileNotFoundError: there is no file `source`.
        ValueError: the file holds no tensors, or not such a network (see `convert_state_dict`).
    """
    model = convert_state_dict(read_published_weights(source))
    model.save_pretrained(out)
    image_processor().save_pretrained(out)
    return model
