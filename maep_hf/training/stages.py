"""What the purifier's training scripts share: arguments in, a [`PurificationTask`] out."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from ..attacks import AttackMixture
from ..checkpoints import load_frozen_classifier
from ..classifier import PixelClassifier
from ..configuration_maep import MAEPConfig
from ..image_processing_maep import MAEPImageProcessor
from .arguments import DataArguments
from .purification import PurificationArguments, PurificationTask
from .samples import Augmentation

SIZES = ("tiny", "small", "base")


@dataclass
class AttackArguments:
    """Shares of the training attacks and their ranges; see [`AttackMixture`]."""

    clean: float = field(default=0.15, metadata={"help": "share of images left clean"})
    fgsm: float = field(default=0.2, metadata={"help": "share attacked by FGSM"})
    fgsm_rs: float = field(default=0.15, metadata={"help": "share attacked by FGSM with random start"})
    mi_fgsm: float = field(default=0.15, metadata={"help": "share attacked by momentum FGSM"})
    pgd: float = field(default=0.35, metadata={"help": "share attacked by PGD"})
    eps_min: float = field(default=2.0, metadata={"help": "smallest radius, units of 1/255"})
    eps_max: float = field(default=12.0, metadata={"help": "largest radius, units of 1/255"})
    attack_steps: int = field(default=10, metadata={"help": "largest number of steps of the iterated attacks"})

    def mixture(self, num_surrogates: int) -> AttackMixture:
        """The mixture over so many classifiers.

        Raises:
            ValueError: shares or ranges that make no mixture.
        """
        return AttackMixture(
            clean=self.clean,
            fgsm=self.fgsm,
            fgsm_rs=self.fgsm_rs,
            mi_fgsm=self.mi_fgsm,
            pgd=self.pgd,
            eps_min=self.eps_min,
            eps_max=self.eps_max,
            max_steps=self.attack_steps,
            num_surrogates=num_surrogates,
        )


@dataclass
class ModelArguments:
    """A new purifier: a size, and the fields of `MAEPConfig` that are most often changed."""

    size: str = field(default="tiny", metadata={"help": "tiny, small or base"})
    patch_size: int | None = field(
        default=None, metadata={"help": "side of a patch, pixels; the size's own by default"}
    )
    residual: bool = field(default=True, metadata={"help": "predict a correction instead of pixels"})
    local_branch_layers: int | None = field(default=None, metadata={"help": "convolution blocks; 0 is the pure form"})
    pixel_loss: str = field(default="l2", metadata={"help": "l1, l2 or charbonnier, on visible pixels"})
    reconstruction_loss_weight: float = field(default=1.0, metadata={"help": "weight of the error on hidden patches"})
    purification_loss_weight: float = field(default=1.0, metadata={"help": "weight of the error on visible patches"})

    def config(self, **more) -> MAEPConfig:
        """The configuration.

        Raises:
            ValueError: an unknown size, or a field out of its range.
        """
        if self.size not in SIZES:
            raise ValueError(f"size={self.size!r}: must be one of {', '.join(SIZES)}")
        names = ("patch_size", "residual", "local_branch_layers", "pixel_loss", "reconstruction_loss_weight",
                 "purification_loss_weight")  # fmt: skip
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return getattr(MAEPConfig, self.size)(**chosen, **more)


def load_surrogates(names: list[str]) -> list[PixelClassifier]:
    """Frozen classifiers by folder or Hub id; `checkpoints/NAME` is found from any working directory."""
    return [load_frozen_classifier(name) for name in names]


def purification_task(
    model: nn.Module, data: DataArguments, attack: AttackArguments, purification: PurificationArguments
) -> PurificationTask:
    """Load data and surrogates and put the task together.

    Raises:
        maep_hf.data.DataError: data that cannot be used; checked before anything is trained.
    """
    size = data.image_size or model.config.image_size
    if size != model.config.image_size:
        raise ValueError(f"image_size={size}: the purifier's windows are {model.config.image_size} pixels wide")
    train_data, validation_data = data.load()
    surrogates = load_surrogates(purification.surrogates)
    return PurificationTask(
        model,
        MAEPImageProcessor(),
        surrogates,
        train_data,
        validation_data,
        Augmentation(size, data.crop, flip=data.flip),
        attack.mixture(len(surrogates)),
        purification,
        data.validation_images,
    )
