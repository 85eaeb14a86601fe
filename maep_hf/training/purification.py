"""Training a purifier: pairs of attacked and clean images, the joint loss, and optional guidance by the classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..attacks import AttackMixture, AttackParameters, perturb, pgd
from ..classifier import PixelClassifier
from ..data import DataError, ImageDataset
from ..evaluation import psnr
from ..figures import difference_image, image_grid
from .samples import Augmentation, Draw
from .task import Task

VALIDATION_ATTACK = {"eps": 8.0, "steps": 10, "step_size": 2.0}
CHUNK = 128
PREVIEW_IMAGES = 8


@dataclass
class PurificationArguments:
    """The loss and the surrogates.

    Args:
        surrogates: names or folders of the frozen classifiers that are attacked.
        mask_ratio: share of hidden patches (paper: 0.5 in pre-training, 0 in finetuning).
        guidance_weight: weight of `|f(P(x_a)) - f(x)|_1` on the surrogate's logits (Liao et al. 2018); 0 turns it off.
        attack_labels: `true` attacks away from the dataset's label, `predicted` from the surrogate's own prediction.
    """

    surrogates: list[str] = field(
        default_factory=lambda: ["checkpoints/resnet20-cifar10"],
        metadata={"help": "frozen classifiers that training images are attacked on: folders or Hub ids"},
    )
    mask_ratio: float = field(default=0.5, metadata={"help": "share of hidden patches"})
    guidance_weight: float = field(default=0.0, metadata={"help": "weight of the surrogate's logit distance; 0 is off"})
    attack_labels: str = field(default="true", metadata={"help": "true or predicted"})

    def __post_init__(self) -> None:
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"mask_ratio={self.mask_ratio}: must be in [0, 1)")
        if self.guidance_weight < 0:
            raise ValueError(f"guidance_weight={self.guidance_weight}: must not be negative")
        if self.attack_labels not in ("true", "predicted"):
            raise ValueError(f"attack_labels={self.attack_labels!r}: must be true or predicted")


@dataclass(frozen=True)
class PairDraw:
    """Random numbers of one sample: the noise that its mask comes from, its attack, and the surrogate that guides it.

    The guide is drawn apart from the attacked surrogate: a correction that undoes an attack only in the eyes of the
    classifier that was attacked does not transfer.

    Args:
        mixture: what attacks are drawn from.
        image_size: side of the square, pixels.
        patches: number of patches in it.
        stored: the dataset brings its attacked images, so that no attack is drawn.
    """

    mixture: AttackMixture
    image_size: int
    patches: int
    stored: bool = False

    def __call__(self, rng: np.random.Generator) -> dict[str, Tensor]:
        drawn = {"mask_noise": torch.from_numpy(rng.random(self.patches, dtype="float32"))}
        drawn["guidance_surrogate"] = torch.tensor(int(rng.integers(self.mixture.num_surrogates)))
        return drawn if self.stored else drawn | self.mixture.draw(rng, (3, self.image_size, self.image_size))


class PurificationTask(Task):
    """Stages 1 to 3 of the method: what differs between them is the mask ratio and which weights are trainable.

    Args:
        model: a `MAEPModel`, or a PEFT-wrapped one.
        image_processor: saved beside the model.
        surrogates: frozen classifiers from [0, 1] pixels to logits; the first one also validates.
        mixture: attacks that pairs are drawn from; unused where the dataset stores attacked images.
        arguments: see [`PurificationArguments`].
    """

    name = "purifier"

    def __init__(
        self,
        model: nn.Module,
        image_processor,
        surrogates: Sequence[PixelClassifier],
        train_data: ImageDataset,
        validation_data: ImageDataset,
        augmentation: Augmentation,
        mixture: AttackMixture,
        arguments: PurificationArguments,
        validation_images: int = 256,
    ):
        super().__init__(model, train_data, validation_data, augmentation, validation_images)
        if not surrogates:
            raise ValueError("surrogates: at least one classifier is needed to make and to judge attacked images")
        self.image_processor = image_processor
        self.surrogates = [surrogate.eval().requires_grad_(False) for surrogate in surrogates]
        self.mixture, self.arguments = mixture, arguments
        self._check_labels()
        self._validation: dict[str, Tensor] | None = None

    def _check_labels(self) -> None:
        if self.arguments.attack_labels == "predicted":
            return
        for role, data in (("training", self.train_data), ("validation", self.validation_data)):
            if data.label_column is None:
                raise DataError(
                    f"the {role} dataset has no labels: name them with label_column, or use attack_labels=predicted"
                )
        found = self.train_data.num_classes
        for surrogate in self.surrogates:
            classes = surrogate.num_labels
            if found and classes and found > classes:
                raise DataError(
                    f"the dataset has {found} classes and a surrogate only {classes}: "
                    "give a surrogate of this dataset, or attack_labels=predicted"
                )

    def to(self, device: torch.device) -> None:
        super().to(device)
        for surrogate in self.surrogates:
            surrogate.to(device, memory_format=torch.channels_last)

    def draw(self) -> Draw:
        stored = self.train_data.adversarial_column is not None
        return PairDraw(self.mixture, self.augmentation.image_size, self._patches(self.model), stored)

    def _labels(self, batch: dict[str, Tensor]) -> Tensor | None:
        return None if self.arguments.attack_labels == "predicted" else batch["labels"]

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Attack the batch, unless it comes with attacked images: adds `attacked` and, for guidance, `clean_logits`."""
        clean = batch["pixel_values"]
        if "adversarial_pixel_values" in batch:
            batch["attacked"] = batch["adversarial_pixel_values"]  # a stored dataset has its own share of clean pairs
        else:
            parameters = AttackParameters.from_batch(batch)
            batch["attacked"] = perturb(self.surrogates, clean, self._labels(batch), parameters)
        if self.arguments.guidance_weight:
            with torch.no_grad():
                batch["clean_logits"] = self._surrogate_logits(clean, batch["guidance_surrogate"])
        return batch

    def _surrogate_logits(self, pixel_values: Tensor, surrogate: Tensor) -> Tensor:
        """Each sample's logits on the surrogate drawn to guide it."""
        if len(self.surrogates) == 1:
            return self.surrogates[0](pixel_values).float()
        classes = max(model.num_labels for model in self.surrogates)
        logits = pixel_values.new_zeros((len(pixel_values), classes), dtype=torch.float32)
        for index, model in enumerate(self.surrogates):
            rows = (surrogate == index).nonzero().squeeze(1)
            if len(rows):
                values = model(pixel_values[rows]).float()
                logits = logits.index_put((rows,), nn.functional.pad(values, (0, classes - values.shape[1])))
        return logits

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        output = model(
            pixel_values=batch["attacked"],
            clean_pixel_values=batch["pixel_values"],
            mask_ratio=self.arguments.mask_ratio,
            noise=batch["mask_noise"],
        )
        losses = {
            "loss": output.loss,
            "reconstruction_loss": output.reconstruction_loss,
            "purification_loss": output.purification_loss,
        }
        if self.arguments.guidance_weight:
            logits = self._surrogate_logits(output.purified_pixel_values, batch["guidance_surrogate"])
            losses["guidance_loss"] = (logits - batch["clean_logits"]).abs().mean()
            losses["loss"] = losses["loss"] + self.arguments.guidance_weight * losses["guidance_loss"]
        return losses

    def _validation_set(self) -> dict[str, Tensor]:
        """The fixed subset with its attacked version (PGD-10 at 8/255 on the first surrogate), made once."""
        if self._validation is None:
            batch = self.validation_batch()
            labels = self._labels(batch)
            if labels is None:
                with torch.no_grad():
                    labels = torch.cat([self.surrogates[0](x).argmax(-1) for x in batch["pixel_values"].split(CHUNK)])
            pairs = zip(batch["pixel_values"].split(CHUNK), labels.split(CHUNK), strict=True)
            attacked = [pgd(self.surrogates[0], x, y, seed=i, **VALIDATION_ATTACK) for i, (x, y) in enumerate(pairs)]
            self._validation = {"clean": batch["pixel_values"], "labels": labels, "attacked": torch.cat(attacked)}
        return self._validation

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss parts without and with masks, PSNR (dB) and accuracy (%), gray-box, on the validation subset."""
        data = self._validation_set()
        clean, attacked, labels = data["clean"], data["attacked"], data["labels"]
        noise = torch.rand(len(clean), self._patches(model), generator=torch.Generator().manual_seed(0))
        noise = noise.to(clean.device)
        sums: dict[str, float] = {}
        outputs: dict[str, list[Tensor]] = {"clean": [], "attacked": []}
        for rows in torch.arange(len(clean)).split(CHUNK):
            x, x_a = clean[rows], attacked[rows]
            full = model(pixel_values=x_a, clean_pixel_values=x, mask_ratio=0.0)
            masked = model(pixel_values=x_a, clean_pixel_values=x, mask_ratio=0.5, noise=noise[rows])
            outputs["attacked"].append(full.purified_pixel_values)
            outputs["clean"].append(model(pixel_values=x, mask_ratio=0.0).purified_pixel_values)
            parts = {"purification_loss": full.purification_loss, "reconstruction_loss": masked.reconstruction_loss}
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(rows) / len(clean)
        purified = {name: torch.cat(values) for name, values in outputs.items()}
        return sums | {
            "psnr_clean": psnr(purified["clean"], clean),
            "psnr_attacked": psnr(attacked, clean),
            "psnr_purified": psnr(purified["attacked"], clean),
            "accuracy_clean": self._accuracy(clean, labels),
            "accuracy_attacked": self._accuracy(attacked, labels),
            "accuracy_clean_purified": self._accuracy(purified["clean"], labels),
            "accuracy_attacked_purified": self._accuracy(purified["attacked"], labels),
        }

    def _patches(self, model: nn.Module) -> int:
        return (model.config.image_size // model.config.patch_size) ** 2

    def _accuracy(self, pixel_values: Tensor, labels: Tensor) -> float:
        logits = torch.cat([self.surrogates[0](chunk) for chunk in pixel_values.split(CHUNK)])
        return 100 * (logits.argmax(-1) == labels).float().mean().item()

    @torch.no_grad()
    def preview(self, model: nn.Module, path: Path) -> None:
        data = self._validation_set()
        clean, attacked = data["clean"][:PREVIEW_IMAGES], data["attacked"][:PREVIEW_IMAGES]
        purified = model(pixel_values=attacked, mask_ratio=0.0).purified_pixel_values
        rows = {
            "clean": clean,
            "attacked": attacked,
            "purified": purified,
            "correction x8": difference_image(purified, attacked),
        }
        image_grid({name: value.float().cpu() for name, value in rows.items()}, path)

    def export(self, model: nn.Module, folder: Path) -> None:
        if hasattr(model, "merge_and_unload"):
            from ..adaptation import save_adapter_run

            save_adapter_run(model, folder)
        else:
            model.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
