"""What the purifier's training scripts share: arguments in, a [`PurificationTask`] out."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..attacks import AttackMixture
from ..checkpoints import expanded, read_model
from ..classifier import PixelClassifier
from ..classifier_sources import load_frozen_classifier
from ..configuration_maep import MAEPConfig
from ..image_processing_maep import MAEPImageProcessor
from ..modeling_maep import MAEPModel
from .arguments import DataArguments
from .purification import PurificationArguments, PurificationTask
from .samples import Augmentation

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

SIZES = ("tiny", "small", "base")


@dataclass
class AttackArguments:
    """Shares of the training attacks and their ranges; see [`AttackMixture`]."""

    clean: float = field(default=0.15, metadata={"help": "share of images left clean"})
    fgsm: float = field(default=0.2, metadata={"help": "share attacked by FGSM"})
    fgsm_rs: float = field(default=0.15, metadata={"help": "share attacked by FGSM with random start"})
    mi_fgsm: float = field(default=0.15, metadata={"help": "share attacked by momentum FGSM"})
    pgd: float = field(default=0.35, metadata={"help": "share attacked by PGD"})
    square: float = field(default=0.0, metadata={"help": "share of stripes and squares, as in the Square attack"})
    pgd_l2: float = field(default=0.0, metadata={"help": "share attacked by PGD in the L2 norm"})
    pgd_random_start: float = field(default=1.0, metadata={"help": "share of PGD that starts at a random point"})
    eps_min: float = field(default=2.0, metadata={"help": "smallest radius, units of 1/255"})
    eps_max: float = field(default=12.0, metadata={"help": "largest radius, units of 1/255"})
    l2_eps_min: float = field(default=0.1, metadata={"help": "smallest L2 radius, of images with pixels in [0, 1]"})
    l2_eps_max: float = field(default=0.75, metadata={"help": "largest L2 radius, of images with pixels in [0, 1]"})
    attack_steps: int = field(default=10, metadata={"help": "largest number of steps of the iterated attacks"})
    input_diversity: float = field(
        default=0.0, metadata={"help": "share of the attacks that look at the image shrunk and shifted (DI-FGSM)"}
    )
    smoothed_gradient: float = field(
        default=0.0, metadata={"help": "share of the attacks that smooth their gradient (TI-FGSM)"}
    )

    def __post_init__(self) -> None:
        if self.attack_steps < 2:
            raise ValueError(f"attack_steps={self.attack_steps}: at least 2 are needed for the iterated attacks")

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
            square=self.square,
            pgd_l2=self.pgd_l2,
            pgd_random_start=self.pgd_random_start,
            eps_min=self.eps_min,
            eps_max=self.eps_max,
            l2_eps_min=self.l2_eps_min,
            l2_eps_max=self.l2_eps_max,
            max_steps=self.attack_steps,
            input_diversity=self.input_diversity,
            smoothed_gradient=self.smoothed_gradient,
            num_surrogates=num_surrogates,
        )


@dataclass
class ModelArguments:
    """A new purifier: a size, and the fields of `MAEPConfig` that are most often changed."""

    size: str = field(default="tiny", metadata={"help": "tiny, small or base"})
    patch_size: int | None = field(
        default=None, metadata={"help": "side of a patch, pixels; the size's own by default"}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "width of the encoder"})
    intermediate_size: int | None = field(default=None, metadata={"help": "width of its MLPs"})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "blocks of the encoder"})
    residual: bool = field(default=True, metadata={"help": "predict a correction instead of pixels"})
    local_branch_layers: int | None = field(default=None, metadata={"help": "convolution blocks; 0 is the pure form"})
    local_branch_channels: int | None = field(default=None, metadata={"help": "channels of these convolutions"})
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
        names = [each.name for each in fields(self) if each.name != "size"]
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return getattr(MAEPConfig, self.size)(**chosen, **more)


@dataclass
class LoraArguments:
    """The LoRA update; see [`maep_hf.adaptation.default_lora_config`]."""

    lora_rank: int = field(default=4, metadata={"help": "rank of the LoRA update"})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "scale of the update times its rank; twice the rank by default"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the input of the update"})
    lora_targets: list[str] | None = field(
        default=None,
        metadata={"help": "names of the layers that are adapted, or all; attention and MLP of every block by default"},
    )

    @classmethod
    def of(cls, model: PeftModel) -> LoraArguments:
        """Those of the active adapter, which it keeps however it is trained on."""
        config = model.peft_config[model.active_adapter]
        targets = config.target_modules
        return cls(
            lora_rank=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            lora_targets=[targets] if isinstance(targets, str) else sorted(targets),
        )

    def adapt(self, model: MAEPModel, scope: str) -> PeftModel:
        """The purifier with its weights frozen and a trainable update beside them.

        Args:
            model: a trained purifier.
            scope: `decoder` (stage 2) or `all` (stage 3).

        Raises:
            ValueError: an untrained purifier, or arguments out of range.
        """
        from ..adaptation import add_lora, default_lora_config, trainable_share

        config = default_lora_config(
            model, scope, self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets
        )
        adapted = add_lora(model, config)
        logger.info("LoRA: %.2f %% of the purifier's parameters are trained", 100 * trainable_share(adapted))
        return adapted


def load_trainable(name_or_path: str, **chosen: Any) -> MAEPModel:
    """A purifier to go on training, by folder or Hub id; in float32, for in 16 bits most updates would be rounded away.

    Args:
        name_or_path: folder or Hub id.
        chosen: fields of its configuration; those that are `None` stay as they are.

    Raises:
        maep_hf.checkpoints.CheckpointError: no such model, it is not a purifier, or its weights are cut off.
    """
    given = {key: value for key, value in chosen.items() if value is not None}
    return read_model(expanded(name_or_path), dtype=torch.float32, **given)


def load_surrogates(names: list[str]) -> list[PixelClassifier]:
    """Frozen classifiers by folder or Hub id; `checkpoints/NAME` is found from any working directory."""
    return [load_frozen_classifier(name) for name in names]


def purification_task(
    model: nn.Module,
    data: DataArguments,
    attack: AttackArguments,
    purification: PurificationArguments,
    start_share: float = 0.0,
    start: nn.Module | None = None,
) -> PurificationTask:
    """Load data and surrogates and put the task together.

    Args:
        model: the purifier, also one with LoRA beside its weights.
        data: with an `image_size` other than the purifier's own, whole images of that size are attacked and judged,
            and purified in windows.
        start_share, start: see [`PurificationTask`].

    Raises:
        maep_hf.data.DataError: data that cannot be used; checked before anything is trained.
        ValueError: an image size below 1, or one that this purifier does not take in windows; see [`PurificationTask`].
    """
    size = model.config.image_size if data.image_size is None else data.image_size
    if size < 1:
        raise ValueError(f"image_size={size}: must be at least 1 pixel")
    train_data, validation_data = data.load(labelled=purification.attack_labels == "true")
    surrogates = load_surrogates(purification.surrogates)
    return PurificationTask(
        model,
        MAEPImageProcessor(),
        surrogates,
        train_data,
        validation_data,
        Augmentation(
            size, data.crop, flip=data.flip, max_zoom=data.max_zoom, zoom_share=data.zoom_share, resize=data.resize
        ),
        attack.mixture(len(surrogates)),
        purification,
        data.validation_images,
        start_share,
        start,
    )
