"""Arguments of the training loop, named as in `transformers.TrainingArguments` where both have them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from importlib.util import find_spec

from ..data import EMBEDDED_DATASETS, DataError, ImageDataset, load_image_dataset, normalised_names, same_names_in_order
from ..storage import STORED_DTYPES

logger = logging.getLogger(__name__)


@dataclass
class LoopArguments:
    """What [`maep_hf.training.train`] needs besides the task.

    Raises:
        ValueError: a value out of its range; the message names it.
    """

    output_dir: str = field(
        default="runs/maep", metadata={"help": "run folder: records, checkpoints and the final model"}
    )
    max_steps: int = field(default=1000, metadata={"help": "optimizer steps of the whole run"})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "images per process and micro-batch"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "micro-batches per optimizer step"})
    optimizer: str = field(default="adamw", metadata={"help": "adamw or sgd (Nesterov momentum 0.9)"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate; cosine decay to 0"})
    weight_decay: float = field(
        default=0.05, metadata={"help": "on weight matrices and filters, not on norms and biases"}
    )
    warmup_steps: int = field(default=100, metadata={"help": "steps of linear warm-up"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient clipping; 0 turns it off"})
    ema_decay: float = field(
        default=0.0, metadata={"help": "decay of the averaged weights that are kept; 0 turns it off"}
    )
    mixed_precision: str = field(
        default="no",
        metadata={
            "help": "no, bf16, fp16 (a GPU only; attacks and validation stay in float32) or auto: bf16 on a GPU or a "
            "processor (AMX) that has it"
        },
    )
    channels_last: bool = field(default=True, metadata={"help": "memory format of convolutions"})
    torch_compile: bool = field(default=False, metadata={"help": "compile the model"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute activations to save memory"})
    seed: int = field(default=0, metadata={"help": "seed of weights, order and every random draw"})
    logging_steps: int = field(default=20, metadata={"help": "steps between records of the training loss"})
    eval_steps: int = field(default=500, metadata={"help": "steps between validation lines and previews"})
    save_steps: int = field(default=500, metadata={"help": "steps between checkpoints"})
    save_total_limit: int = field(default=2, metadata={"help": "checkpoints kept"})
    cpu_threads: int = field(default=0, metadata={"help": "threads a process uses on a CPU; 0 shares the cores evenly"})
    dataloader_num_workers: int = field(default=0, metadata={"help": "processes that read images"})
    report_to: str = field(default="none", metadata={"help": "none, tensorboard or trackio"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "start over in a folder that holds a run"})
    push_to_hub: bool = field(default=False, metadata={"help": "push the model (or adapter) and its card to the Hub"})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "repository, OWNER/NAME or NAME; the folder's name by default"}
    )
    hub_private: bool = field(default=False, metadata={"help": "make a new repository private"})
    hub_strategy: str = field(default="end", metadata={"help": "end, or every_save: in the background, and at the end"})
    hub_base_model: str | None = field(
        default=None, metadata={"help": "Hub id of an adapter's base that was loaded from a folder"}
    )
    export_dtype: str = field(
        default="float32",
        metadata={"help": "number type of the stored model: float32, float16 or bfloat16; checkpoints are exact"},
    )

    def __post_init__(self) -> None:
        for name in ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps",
                     "eval_steps", "save_steps", "save_total_limit"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "cpu_threads",
                     "dataloader_num_workers"):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: must be in [0, 1)")
        choices = {"optimizer": ("adamw", "sgd"), "mixed_precision": ("no", "bf16", "fp16", "auto"),
                   "report_to": ("none", "tensorboard", "trackio"), "hub_strategy": ("end", "every_save"),
                   "export_dtype": STORED_DTYPES}  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        if self.report_to != "none" and find_spec(self.report_to) is None:  # Accelerate would go on without a word
            raise ValueError(f"report_to={self.report_to!r}: it is not installed; pip install {self.report_to}")


# Which weights are validated and saved of those that are trained.
KEPT_ARGUMENTS = frozenset({"start_share", "start_share_of"})
# May change between the first start of a run and a later one: none of them changes what is trained.
FREE_ARGUMENTS = KEPT_ARGUMENTS | frozenset(
    {
        "overwrite_output_dir",
        "report_to",
        "save_total_limit",
        "save_steps",
        "dataloader_num_workers",
        "cpu_threads",
        "output_dir",
        "push_to_hub",
        "hub_model_id",
        "hub_private",
        "hub_strategy",
        "hub_base_model",
        "export_dtype",
    }
)

# What a run reads, and an overwrite must not remove.
SOURCE_ARGUMENTS = frozenset({"dataset", "validation_dataset", "model", "adapter", "start_share_of", "surrogates"})

# What arguments that came later were before: run folders from then lack them.
ADDED_LATER = {
    "square": 0.0,
    "pgd_l2": 0.0,
    "pgd_random_start": 1.0,
    "l2_eps_min": 0.1,
    "l2_eps_max": 0.75,
    "guidance_by": "logits",
    "guidance_kl_weight": 0.0,
    "guidance_surrogate": "any",
    "local_branch_channels": None,
    "local_branch_layers": None,
    "input_diversity": 0.0,
    "smoothed_gradient": 0.0,
    "window_overlap": None,
    "validation_config": None,
    "start_share": 0.0,
    "start_share_of": None,
    "architecture": "cifar_resnet",
    "architecture_options": "{}",
}


@dataclass
class DataArguments:
    """Which images, and how they are cut.

    Raises:
        ValueError: a value out of its range; the message names it.
        maep_hf.data.DataError: on loading, when the dataset cannot be read or used.
    """

    dataset: str = field(
        default="uoft-cs/cifar10",
        metadata={"help": "Hub id, folder of images or parquet, .parquet file, saved dataset, or embedded:cifar10"},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration name of a Hub dataset"})
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    validation_dataset: str | None = field(
        default=None, metadata={"help": "dataset to validate on; the same by default"}
    )
    validation_split: str = field(default="test", metadata={"help": "split to validate on"})
    validation_config: str | None = field(default=None, metadata={"help": "configuration name of validation_dataset"})
    image_column: str | None = field(
        default=None,
        metadata={"help": "column of images, also of a validation_dataset that has it; found by itself if alone"},
    )
    label_column: str | None = field(
        default=None, metadata={"help": "column of class indices, likewise; found by itself"}
    )
    streaming: bool = field(default=False, metadata={"help": "read while training instead of downloading first"})
    max_train_images: int | None = field(default=None, metadata={"help": "use only the first so many training images"})
    validation_images: int = field(
        default=256, metadata={"help": "validate on the first so many images, as they are stored"}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "side of a training image, pixels; the model's by default"}
    )
    crop: str = field(
        default="mixed", metadata={"help": "native, resized, mixed or center: how larger pictures are cut"}
    )
    resize: int | None = field(
        default=None, metadata={"help": "short side of a resized picture before the cut; image_size by default"}
    )
    flip: bool = field(default=True, metadata={"help": "mirror half of the images"})
    max_zoom: float = field(
        default=1.0, metadata={"help": "enlarge images up to so many times before a window is cut; 1 is off"}
    )
    zoom_share: float = field(default=0.5, metadata={"help": "share of the images that are enlarged"})

    def __post_init__(self) -> None:
        if self.validation_images < 1:
            raise ValueError(f"validation_images={self.validation_images}: must be at least 1")
        if self.max_train_images is not None and self.max_train_images < 1:
            raise ValueError(f"max_train_images={self.max_train_images}: must be at least 1")
        if self.validation_config is not None and self.validation_dataset is None:
            raise ValueError(
                f"validation_config={self.validation_config!r}: is of a validation_dataset, and none is given; "
                "dataset_config names that of the dataset"
            )

    def load(self, labelled: bool = True) -> tuple[ImageDataset, ImageDataset]:
        """The training and the validation images.

        Args:
            labelled: their labels are used, so that both must mean the same classes.

        Raises:
            maep_hf.data.DataError: a dataset that cannot be read or used, or two that name their classes differently.
        """
        described = {"config_name": self.dataset_config, "image_column": self.image_column,
                     "label_column": self.label_column, "streaming": self.streaming}  # fmt: skip
        train_data = load_image_dataset(self.dataset, self.train_split, max_images=self.max_train_images, **described)
        try:
            if self.validation_dataset is not None:  # its columns may have other names
                described |= {"config_name": self.validation_config, "columns_where_found": True}
            own = load_image_dataset(self.validation_dataset or self.dataset, self.validation_split, **described)
        except DataError as error:
            raise DataError(
                f"{error} (validation_dataset, validation_config and validation_split say what to validate on)"
            ) from error
        if same_names_in_order(train_data.class_names, own.class_names) is not None:
            raise DataError(
                "the validation dataset has the training dataset's classes in another order; bring one into the order "
                "of the other with datasets' align_labels_with_mapping"
            )
        if labelled and _mean_other_classes(train_data.class_names or [], own.class_names or []):
            raise DataError(
                f"validation_dataset={self.validation_dataset or self.dataset!r} names {len(own.class_names)} classes "
                f"and the training dataset {len(train_data.class_names)}, some alike and some not, so that its labels "
                "mean others: name one of the same classes, or give it their indices with datasets' "
                "align_labels_with_mapping"
            )
        embedded = self.dataset in EMBEDDED_DATASETS
        if not (self.streaming or embedded) and train_data.fingerprint == own.fingerprint:
            logger.warning(
                "training and validation images are the same: name others with validation_dataset or validation_split"
            )
        return train_data, own


def _mean_other_classes(names: list[str], own: list[str]) -> bool:
    """Whether `own` classes are of one kind with those of training, and some have another index or are not there."""
    names, own = normalised_names(names), normalised_names(own)
    return bool(set(names) & set(own)) and own != names[: len(own)]
