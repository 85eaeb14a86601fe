"""Train a CIFAR ResNet (He et al. 2016, section 4.2) on any image-classification dataset.

accelerate launch train/train_classifier.py --dataset data/cifar10 --output_dir runs/resnet20
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import set_seed
from transformers import ViTImageProcessor

from maep_hf.configuration_cifar_resnet import CifarResNetConfig
from maep_hf.modeling_cifar_resnet import CifarResNetForImageClassification
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
    depth: int = field(default=20, metadata={"help": "layers of the ResNet, 6n+2"})
    width: int = field(default=16, metadata={"help": "channels of the first stage"})
    label_smoothing: float = field(default=0.0, metadata={"help": "share of the target spread over all classes"})
    padding: int = field(default=4, metadata={"help": "reflected border before the random crop, pixels"})


def main(argv: list[str] | None = None) -> Path:
    recipe = Path(__file__).parent / "configs" / "resnet20_cifar10.yaml"
    classifier, data, loop = parse_arguments(
        ClassifierArguments, DataArguments, LoopArguments, default_recipe=recipe, argv=argv
    )
    set_seed(loop.seed)
    train_data, validation_data = data.load()
    names = dict(enumerate(train_data.find_class_names()))
    model = CifarResNetForImageClassification(
        CifarResNetConfig(
            depth=classifier.depth, width=classifier.width, id2label=names, label2id={v: k for k, v in names.items()}
        )
    )
    size = data.image_size or 32
    processor = ViTImageProcessor(
        size={"height": size, "width": size}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    task = ClassificationTask(
        model,
        processor,
        train_data,
        validation_data,
        Augmentation(size, data.crop, padding=classifier.padding, flip=data.flip, resize=data.resize),
        data.validation_images,
        classifier.label_smoothing,
    )
    return train(task, loop, as_groups(classifier=classifier, data=data, loop=loop))


if __name__ == "__main__":
    run_script(main)
