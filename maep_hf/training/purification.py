"""Training a purifier: pairs of attacked and clean images, the joint loss, and optional guidance by the classifier."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adaptation import describe_base
from ..attacks import AttackMixture, AttackParameters, perturb, pgd
from ..classifier import PixelClassifier
from ..classifier_sources import count_classes, match_classes
from ..data import OTHER_CLASSES, DataError, ImageDataset, expect_classes
from ..evaluation import psnr
from ..figures import difference_image, image_grid
from ..modeling_maep import MAEPOutput, MAEPWindows
from ..tensors import weights_fingerprint
from .guidance import GUIDED_BY, Guide, divergence
from .run_folder import preprocessing_of
from .samples import Augmentation, Draw
from .task import Task

logger = logging.getLogger(__name__)

VALIDATION_ATTACK = {"eps": 8.0, "steps": 10, "step_size": 2.0}
CHUNK = 128  # windows that a purifier, and small images that a classifier, validates at once
PIXELS_AT_ONCE = 2**20  # what bounds a classifier's batch of large images
PREVIEW_IMAGES = 8


@dataclass
class PurificationArguments:
    """The loss and the surrogates.

    Args:
        surrogates: names or folders of the frozen classifiers that are attacked.
        mask_ratio: share of hidden patches (paper: 0.5 in pre-training, 0 in finetuning).
        guidance_weight: weight of `|f(P(x_a)) - f(x)|_1` of the surrogate (Liao et al. 2018); 0 turns it off.
        guidance_kl_weight: weight of `KL(f(x) || f(P(x_a)))` between the surrogate's predicted probabilities, in nats
            (the robust term of TRADES, Zhang et al. 2019, with a purifier in place of robust weights); beside
            `guidance_weight` or alone. 0 turns it off.
        guidance_by: `logits`, or `features`, those before the surrogate's last linear layer, for `guidance_weight`.
        guidance_surrogate: with several surrogates, the one that was `attacked` guides an image, or `any` of them.
            Where the dataset stores attacked images, its column `surrogate` says which one was, and any of them guides
            an image that was attacked on none or on one that is not among `surrogates`.
        attack_labels: `true` attacks away from the dataset's label, `predicted` from the surrogate's own prediction.
        window_overlap: overlap of the windows that images larger than the purifier's own size are cut into, as a
            fraction of a window, [0, 0.9]; the model's own (`MAEPConfig.window_overlap`) by default.
    """

    surrogates: list[str] = field(
        default_factory=lambda: ["checkpoints/resnet20-cifar10"],
        metadata={"help": "frozen classifiers that training images are attacked on: folders or Hub ids"},
    )
    mask_ratio: float = field(default=0.5, metadata={"help": "share of hidden patches"})
    guidance_weight: float = field(default=0.0, metadata={"help": "weight of the distance in the surrogate; 0 is off"})
    guidance_kl_weight: float = field(
        default=0.0, metadata={"help": "weight of the divergence of the surrogate's probabilities; 0 is off"}
    )
    guidance_by: str = field(default="logits", metadata={"help": "logits, or features: what the distance is between"})
    guidance_surrogate: str = field(
        default="attacked", metadata={"help": "attacked, or any: which of the surrogates guides an image"}
    )
    attack_labels: str = field(default="true", metadata={"help": "true or predicted"})
    window_overlap: float | None = field(
        default=None, metadata={"help": "overlap of windows over larger images; the model's own by default"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"mask_ratio={self.mask_ratio}: must be in [0, 1)")
        for name in ("guidance_weight", "guidance_kl_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if self.guidance_by not in GUIDED_BY:
            raise ValueError(f"guidance_by={self.guidance_by!r}: must be {' or '.join(GUIDED_BY)}")
        if self.guidance_kl_weight and self.guidance_by != "logits":
            raise ValueError(
                f"guidance_kl_weight={self.guidance_kl_weight}: features make no probabilities; use guidance_by=logits"
            )
        if self.guidance_surrogate not in ("attacked", "any"):
            raise ValueError(f"guidance_surrogate={self.guidance_surrogate!r}: must be attacked or any")
        if self.attack_labels not in ("true", "predicted"):
            raise ValueError(f"attack_labels={self.attack_labels!r}: must be true or predicted")
        if self.window_overlap is not None and not 0 <= self.window_overlap <= 0.9:
            raise ValueError(f"window_overlap={self.window_overlap}: must be in [0, 0.9]")

    @property
    def guided(self) -> bool:
        return self.guidance_weight > 0 or self.guidance_kl_weight > 0


@dataclass(frozen=True)
class PairDraw:
    """Random numbers of one sample: the noise that its mask comes from, its attack, and the surrogate that guides it.

    Args:
        mixture: what attacks are drawn from.
        image_size: side of the square, pixels.
        patches: number of patches in all windows over it.
        stored: the dataset brings its attacked images, so that no attack is drawn.
        guided_by_attacked: the guide is the attacked surrogate, and not drawn apart from it.
        surrogate_column: where `stored`, the column that names it; `None` if there is none.
        surrogates: the names it is looked up among.
    """

    mixture: AttackMixture
    image_size: int
    patches: int
    stored: bool = False
    guided_by_attacked: bool = False
    surrogate_column: str | None = None
    surrogates: tuple[str, ...] = ()

    def __call__(self, rng: np.random.Generator, row: dict) -> dict[str, Tensor]:
        drawn = {"mask_noise": torch.from_numpy(rng.random(self.patches, dtype="float32"))}
        drawn["guidance_surrogate"] = torch.tensor(int(rng.integers(self.mixture.num_surrogates)))
        if not self.stored:
            drawn |= self.mixture.draw(rng, (3, self.image_size, self.image_size))
            if self.guided_by_attacked:
                drawn["guidance_surrogate"] = drawn["attack_surrogate"]
        elif self.guided_by_attacked and self.surrogate_column and row[self.surrogate_column] in self.surrogates:
            drawn["guidance_surrogate"] = torch.tensor(self.surrogates.index(row[self.surrogate_column]))
        return drawn


def _shapes(model: nn.Module) -> list[torch.Size]:
    return [weight.shape for weight in model.parameters()]


class PurificationTask(Task):
    """Stages 1 to 3 of the method: what differs between them is the mask ratio and which weights are trainable.

    Images larger than the purifier's windows are attacked whole, purified in the windows that `MAEPModel.purify` lays
    over them, and judged by the surrogate whole again; the pixel losses are means over the windows.

    Args:
        model: a `MAEPModel`, or a PEFT-wrapped one.
        image_processor: saved beside the model.
        surrogates: frozen classifiers from [0, 1] pixels to logits; the first one also validates.
        mixture: attacks that pairs are drawn from; unused where the dataset stores attacked images.
        arguments: see [`PurificationArguments`].
        start_share: share, [0, 1), of the weights of `start` in those that are validated and saved, the rest being the
            trained ones' (WiSE-FT, Wortsman et al. 2022, section 3).
        start: a model that the trained one descends from; `model` as it is now by default.

    Raises:
        maep_hf.data.DataError: labels are asked for that the data do not have, or that do not fit a surrogate.
        ValueError: no surrogates, images that this purifier does not take in windows, or a `start` of other shapes.
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
        start_share: float = 0.0,
        start: nn.Module | None = None,
    ):
        super().__init__(model, train_data, validation_data, augmentation, validation_images)
        self.start_share = start_share
        # A copy from before the loop loads a checkpoint: a resumed run averages with the same weights.
        self._start = copy.deepcopy(start or model).requires_grad_(False) if start_share else None
        self._starts_elsewhere = start is not None
        if self._start is not None and _shapes(self._start) != _shapes(model):
            raise ValueError("start_share_of: its weights are not of the trained model's shapes; take one of its chain")
        if not surrogates:
            raise ValueError("surrogates: at least one classifier is needed to make and to judge attacked images")
        self.image_processor = image_processor
        self.surrogates = [surrogate.eval().requires_grad_(False) for surrogate in surrogates]
        self.mixture, self.arguments = mixture, arguments
        self._validation: dict[str, Tensor] | None = None
        self._check_size()  # before surrogates run at that size
        size = augmentation.image_size
        self.num_classes = [count_classes(surrogate, size, size) for surrogate in self.surrogates]
        self.guides = [
            Guide(surrogate, classes, arguments.guidance_by)
            for surrogate, classes in zip(self.surrogates, self.num_classes, strict=True)
            if arguments.guided
        ]
        widths = sorted({guide.width for guide in self.guides})
        if arguments.guidance_kl_weight and len(widths) > 1:
            raise ValueError(
                f"guidance_kl_weight: the surrogates have {' and '.join(map(str, widths))} classes; take surrogates of "
                "the same classes, or guidance_weight alone"
            )
        if arguments.guidance_by == "features" and len(widths) > 1:
            raise ValueError(
                f"guidance_by=features: the surrogates have {' and '.join(map(str, widths))} features; take surrogates "
                "of one width, or logits"
            )
        self._check_labels()
        if arguments.attack_labels == "true":
            match_classes(self.surrogates, self.train_data.class_names)
        self._warn_of_guides()

    def _check_labels(self) -> None:
        if self.arguments.attack_labels == "predicted":
            return
        for role, data in (("training", self.train_data), ("validation", self.validation_data)):
            if data.label_column is None:
                raise DataError(f"the {role} dataset has no labels: {data.no_labels}, or use attack_labels=predicted")
        found, named = self.train_data.num_classes, self.train_data.class_names is not None
        for classes in self.num_classes:
            expect_classes(found, classes, "a surrogate", OTHER_CLASSES, named)

    def _check_size(self) -> None:
        config, size = self.model.config, self.augmentation.image_size
        if size != config.image_size and config.purify_mode != "windows":
            raise ValueError(
                f"image_size={size}: this purifier has purify_mode={config.purify_mode!r}; only in mode 'windows' are "
                f"images trained on that are not of its native {config.image_size} pixels"
            )

    def _warn_of_guides(self) -> None:
        """Stored attacked images that nothing guides by the surrogate they were made on."""
        arguments, data = self.arguments, self.train_data
        matched = arguments.guidance_surrogate == "attacked" and len(self.guides) > 1
        if not matched or data.adversarial_column is None or data.streaming:
            return
        names = set(data.rows.unique(data.surrogate_column)) - {None} if data.surrogate_column else set()
        unknown = sorted(map(str, names - set(arguments.surrogates)))
        if unknown or not names:
            logger.warning(
                "any of the surrogates guides stored images that %s: name the same ones in surrogates, or only one",
                f"were attacked on {', '.join(unknown)}" if unknown else "no column `surrogate` tells of",
            )

    def to(self, device: torch.device) -> None:
        super().to(device)
        for surrogate in self.surrogates:
            surrogate.to(device)

    @torch.no_grad()
    def kept(self, model: nn.Module) -> nn.Module:
        """`model`, or a new one between where it started and where it is; see `start_share`."""
        if self._start is None:
            return model
        average = copy.deepcopy(model)
        for weight, before in zip(average.parameters(), self._start.to(self.device).parameters(), strict=True):
            weight.copy_(self.start_share * before + (1 - self.start_share) * weight)
        return average

    def describe_start(self) -> dict[str, str]:
        described = super().describe_start()
        if self._start is not None and self._starts_elsewhere:
            described["start_share_of"] = describe_base(self._start)["fingerprint"]
        return described

    def describe_frozen(self) -> dict[str, str]:
        named = zip(self._names, self.surrogates, strict=True)
        weights = {f"surrogates[{name}]": weights_fingerprint(surrogate) for name, surrogate in named}
        return weights | preprocessing_of(self._names, self.surrogates)

    def draw(self) -> Draw:
        data, size = self.train_data, self.augmentation.image_size
        return PairDraw(
            self.mixture,
            size,
            self._patches(size),
            stored=data.adversarial_column is not None,
            guided_by_attacked=self.arguments.guidance_surrogate == "attacked",
            surrogate_column=data.surrogate_column,
            surrogates=tuple(self.arguments.surrogates),
        )

    @property
    def _names(self) -> list[str]:
        """What the surrogates are called."""
        names = self.arguments.surrogates
        return names if len(names) == len(self.surrogates) else [str(index) for index in range(len(self.surrogates))]

    def _labels(self, batch: dict[str, Tensor], role: str) -> Tensor | None:
        """The labels that images are attacked away from; `None` where those are the surrogates' own predictions.

        Raises:
            maep_hf.data.DataError: one is beyond a surrogate's classes.
        """
        if self.arguments.attack_labels == "predicted":
            return None
        largest, classes = int(batch["labels"].max()), min(self.num_classes)
        if largest >= classes:
            raise DataError(
                f"an image of the {role} dataset has the class index {largest}, and a surrogate only {classes} classes "
                f"(0 to {classes - 1}): {OTHER_CLASSES}"
            )
        return batch["labels"]

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Attack the batch, unless it comes with attacked images: adds `attacked` and, for guidance, `clean_values`."""
        clean = batch["pixel_values"]
        if "adversarial_pixel_values" in batch:
            batch["attacked"] = batch["adversarial_pixel_values"]  # a stored dataset has its own share of clean pairs
        else:
            parameters = AttackParameters.from_batch(batch)
            labels = self._labels(batch, "training")
            batch["attacked"] = perturb(self.surrogates, clean, labels, parameters, self._names)
        if self.arguments.guided:
            with torch.no_grad():
                batch["clean_values"] = self._guide_values(clean, batch["guidance_surrogate"])
        return batch

    def _guide_values(self, pixel_values: Tensor, surrogate: Tensor) -> Tensor:
        """Each sample's logits (or features) in the surrogate drawn to guide it; the shorter ones end in zeros."""
        if len(self.guides) == 1:
            return self.guides[0](pixel_values)
        width = max(guide.width for guide in self.guides)
        found = pixel_values.new_zeros((len(pixel_values), width), dtype=torch.float32)
        for index, guide in enumerate(self.guides):
            rows = (surrogate == index).nonzero().squeeze(1)
            if len(rows):
                values = guide(pixel_values[rows])
                found = found.index_put((rows,), F.pad(values, (0, width - values.shape[1])))
        return found

    def _windows(self, height: int, width: int, like: Tensor | None = None) -> MAEPWindows | None:
        """The windows over images that are not of the native size, laid as `purify` lays them."""
        config = self.model.config
        if (height, width) == (config.image_size, config.image_size):
            return None
        where = {} if like is None else {"device": like.device, "dtype": like.dtype}
        overlap = self.arguments.window_overlap
        overlap = config.window_overlap if overlap is None else overlap
        return MAEPWindows(height, width, config.image_size, overlap, **where)

    def _patches(self, size: int) -> int:
        """Patches in all windows over an image of `size` x `size` pixels."""
        windows, config = self._windows(size, size), self.model.config
        return (1 if windows is None else len(windows)) * (config.image_size // config.patch_size) ** 2

    def purify(
        self,
        model: nn.Module,
        pixel_values: Tensor,
        clean: Tensor | None = None,
        mask_ratio: float = 0.0,
        noise: Tensor | None = None,
    ) -> MAEPOutput:
        """Purify whole images in one call of `model`, which may be wrapped for distributed training.

        Args:
            model: the purifier, as the loop prepared it.
            pixel_values: (B, 3, H, W) in [0, 1].
            clean: the clean images, of the same shape; with them the losses are returned, means over the windows.
            mask_ratio: share of each window's patches to hide.
            noise: (B, patches of all windows), what the masks are drawn from.

        Returns:
            The model's output, with `purified_pixel_values` (B, 3, H, W): at mask ratio 0 and in eval mode those of
            `MAEPModel.purify`.
        """
        windows = self._windows(*pixel_values.shape[2:], like=pixel_values)
        if windows is None:
            return model(pixel_values=pixel_values, clean_pixel_values=clean, mask_ratio=mask_ratio, noise=noise)
        cut = windows.cut(pixel_values)
        output = model(
            pixel_values=cut,
            clean_pixel_values=None if clean is None else windows.cut(clean),
            mask_ratio=mask_ratio,
            noise=None if noise is None else noise.reshape(len(cut), -1),
        )
        output.purified_pixel_values = windows.blend(pixel_values, output.purified_pixel_values - cut)
        return output

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        output = self.purify(
            model, batch["attacked"], batch["pixel_values"], self.arguments.mask_ratio, batch["mask_noise"]
        )
        losses = {
            "loss": output.loss,
            "reconstruction_loss": output.reconstruction_loss,
            "purification_loss": output.purification_loss,
        }
        if self.arguments.guided:
            values = self._guide_values(output.purified_pixel_values, batch["guidance_surrogate"])
            if self.arguments.guidance_weight:
                losses["guidance_loss"] = (values - batch["clean_values"]).abs().mean()
                losses["loss"] = losses["loss"] + self.arguments.guidance_weight * losses["guidance_loss"]
            if self.arguments.guidance_kl_weight:
                losses["guidance_kl_loss"] = divergence(batch["clean_values"], values)
                losses["loss"] = losses["loss"] + self.arguments.guidance_kl_weight * losses["guidance_kl_loss"]
        return losses

    def _validation_set(self) -> dict[str, Tensor]:
        """The fixed subset with its attacked version (PGD-10 at 8/255 on the first surrogate), made once."""
        if self._validation is None:
            batch = self.validation_batch()
            clean, labels = batch["pixel_values"], self._labels(batch, "validation")
            predicted = torch.cat([self._predict(chunk) for chunk in clean.split(self._images_at_once)])
            if labels is None:
                labels = predicted
            elif labels.min() < 0:
                raise DataError(
                    "an image of the validation dataset has no label: leave such images out of it, or use "
                    "attack_labels=predicted"
                )
            else:
                self._warn_of_labels(100 * (predicted == labels).float().mean().item())
            pairs = zip(clean.split(self._images_at_once), labels.split(self._images_at_once), strict=True)
            options = VALIDATION_ATTACK | {"name": self._names[0]}
            attacked = [pgd(self.surrogates[0], x, y, seed=i, **options) for i, (x, y) in enumerate(pairs)]
            self._validation = {"clean": clean, "labels": labels, "attacked": torch.cat(attacked)}
        return self._validation

    def _warn_of_labels(self, accuracy: float) -> None:
        chance = 100 / self.num_classes[0]
        if accuracy < 2 * chance:
            logger.warning(
                "the first surrogate gives %.1f %% of the validation images the dataset's label (chance: %.1f %%): if "
                "the labels are not those it was trained on, use attack_labels=predicted",
                accuracy, chance,
            )  # fmt: skip

    @property
    def _images_at_once(self) -> int:
        """Images that a surrogate is run on, and attacked, at once in validation."""
        return max(1, min(CHUNK, PIXELS_AT_ONCE // self.augmentation.image_size**2))

    @property
    def _purified_at_once(self) -> int:
        """Images that the purifier is run on at once in validation."""
        size = self.augmentation.image_size
        windows = self._windows(size, size)
        return CHUNK if windows is None else max(1, CHUNK // len(windows))

    @torch.no_grad()
    def _predict(self, pixel_values: Tensor) -> Tensor:
        return self.surrogates[0](pixel_values).argmax(-1)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss parts, PSNR (dB) and accuracy (%), gray-box, on the validation subset.

        With `attack_labels=predicted` there is no accuracy but agreement: the share of images that the first surrogate
        puts into the class that it predicts for the clean image. The loss with masks (`reconstruction_loss`) is left
        out where images take several windows and training has no masks.

        Raises:
            maep_hf.data.DataError: with `attack_labels=true`, an image has no label, or one beyond the classes.
        """
        data = self._validation_set()
        clean, attacked, labels = data["clean"], data["attacked"], data["labels"]
        with_masks = self._windows(*clean.shape[2:]) is None or self.arguments.mask_ratio > 0
        noise = None
        if with_masks:
            shape = (len(clean), self._patches(clean.shape[-1]))
            noise = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(clean.device)
        sums: dict[str, float] = {}
        outputs: dict[str, list[Tensor]] = {"clean": [], "attacked": []}
        for rows in torch.arange(len(clean)).split(self._purified_at_once):
            x, x_a = clean[rows], attacked[rows]
            full = self.purify(model, x_a, x)
            outputs["attacked"].append(full.purified_pixel_values)
            outputs["clean"].append(self.purify(model, x).purified_pixel_values)
            parts = {"purification_loss": full.purification_loss}
            if noise is not None:
                masked = self.purify(model, x_a, x, mask_ratio=0.5, noise=noise[rows])
                parts["reconstruction_loss"] = masked.reconstruction_loss
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(rows) / len(clean)
        purified = {name: torch.cat(values) for name, values in outputs.items()}
        judged = {
            "clean": clean,
            "attacked": attacked,
            "clean_purified": purified["clean"],
            "attacked_purified": purified["attacked"],
        }
        score = "accuracy"
        if self.arguments.attack_labels == "predicted":
            score = "agreement"
            del judged["clean"]  # 100 by definition
        return (
            sums
            | {
                "psnr_clean": psnr(purified["clean"], clean),
                "psnr_attacked": psnr(attacked, clean),
                "psnr_purified": psnr(purified["attacked"], clean),
            }
            | {f"{score}_{name}": self._score(images, labels) for name, images in judged.items()}
        )

    def _score(self, pixel_values: Tensor, labels: Tensor) -> float:
        """Share of the images that the first surrogate puts into `labels`, in percent."""
        predicted = torch.cat([self._predict(chunk) for chunk in pixel_values.split(self._images_at_once)])
        return 100 * (predicted == labels).float().mean().item()

    @torch.no_grad()
    def preview(self, model: nn.Module, path: Path) -> None:
        data = self._validation_set()
        clean, attacked = data["clean"][:PREVIEW_IMAGES], data["attacked"][:PREVIEW_IMAGES]
        purified = torch.cat(
            [self.purify(model, part).purified_pixel_values for part in attacked.split(self._purified_at_once)]
        )
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
