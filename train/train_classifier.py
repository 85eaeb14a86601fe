"""Train a CIFAR ResNet (He et al. 2016, section 4.2), or any architecture of transformers from random weights, on any
image-classification dataset.

accelerate launch train/train_classifier.py --dataset data/cifar10 --output_dir runs/resnet20
accelerate launch train/train_classifier.py --config train/configs/regnet_classifier_cifar10.yaml --dataset data/cifar10
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from maep_hf.configuration_cifar_resnet import CifarResNetConfig
from maep_hf.convert_cifar_resnet import image_processor
from maep_hf.training import (
    Augmentation,
    ClassificationTask,
    DataArguments,
    LoopArguments,
    as_groups,
    parse_arguments,
    run_script,
    train,
)


@dataclass
class ClassifierArguments:
    architecture: str = field(
        default=CifarResNetConfig.model_type,
        metadata={"help": "model type of transformers (cifar_resnet, regnet, convnext, mobilenet_v2, vit, ...)"},
    )
    architecture_options: str = field(
        default="{}", metadata={"help": "values of its configuration as JSON; of a cifar_resnet give depth and width"}
    )
    depth: int = field(default=20, metadata={"help": "layers of the cifar_resnet, 6n+2"})
    width: int = field(default=16, metadata={"help": "channels of the cifar_resnet's first stage"})
    label_smoothing: float = field(default=0.0, metadata={"help": "share of the target spread over all classes"})
    padding: int = field(default=4, metadata={"help": "reflected border before the random crop, pixels"})

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing={self.label_smoothing}: must be in [0, 1]")
        if self.padding < 0:
            raise ValueError(f"padding={self.padding}: must not be negative")


def make_classifier(args: ClassifierArguments, class_names: list[str], image_size: int) -> PreTrainedModel:
    """An untrained classifier of images of `image_size` x `image_size` pixels.

    Raises:
        ValueError: no such architecture, none that classifies images, or options that its configuration does not have.
    """
    names = dict(enumerate(class_names))
    labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    options = _options(args)
    if args.architecture == CifarResNetConfig.model_type:
        options = {"depth": args.depth, "width": args.width} | options
    try:
        known = AutoConfig.for_model(args.architecture)
    except ValueError as error:
        raise ValueError(f"architecture={args.architecture!r}: transformers has no such model type") from error
    unknown = sorted(name for name in options if not hasattr(known, name))
    if unknown:
        raise ValueError(f"architecture_options: {type(known).__name__} has no {', '.join(unknown)}")
    if hasattr(known, "image_size"):
        options.setdefault("image_size", image_size)
    try:
        config: PreTrainedConfig = AutoConfig.for_model(args.architecture, **labels, **options)
        return AutoModelForImageClassification.from_config(config)
    except (TypeError, ValueError, IndexError, ZeroDivisionError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"architecture={args.architecture!r} makes no image classifier: {reason}") from error


def _options(args: ClassifierArguments) -> dict[str, Any]:
    try:
        options = json.loads(args.architecture_options)
    except json.JSONDecodeError as error:
        raise ValueError(f"architecture_options: no JSON ({error}); give such as '{{\"depths\": [1, 2]}}'") from error
    if not isinstance(options, dict):
        raise ValueError("architecture_options: must be a JSON object of the configuration's values")
    return options


def main(argv: list[str] | None = None) -> Path:
    recipe = Path(__file__).parent / "configs" / "resnet20_cifar10.yaml"
    classifier, data, loop = parse_arguments(
        ClassifierArguments, DataArguments, LoopArguments, default_recipe=recipe, argv=argv
    )
    set_seed(loop.seed)
    train_data, validation_data = data.load()
    size = data.image_size or 32
    model = make_classifier(classifier, train_data.find_class_names(), size)
    task = ClassificationTask(
        model,
        image_processor(size),
        train_data,
        validation_data,
        Augmentation(size, data.crop, classifier.padding, data.flip, data.max_zoom, data.zoom_share, data.resize),
        data.validation_images,
        classifier.label_smoothing,
    )
    return train(task, loop, as_groups(classifier=classifier, data=data, loop=loop))


if __name__ == "__main__":
    run_script(main)
