"""Stage 3: LoRA adaptation of a trained purifier to another domain (PEFT), its own weights frozen.

accelerate launch train/adapt_lora.py --dataset data/imagenet --surrogates timm:resnet50.a1_in1k
accelerate launch train/adapt_lora.py --config train/configs/adapt_lora_tiny_imagenet.yaml \\
    --dataset data/tiny-imagenet --validation_split validation

Writes the adapter to OUTPUT_DIR/adapter and the merged purifier to OUTPUT_DIR.
"""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate.utils import set_seed

from maep_hf.adaptation import load_adapter
from maep_hf.training import DataArguments, LoopArguments, as_groups, parse_arguments, run_script, train
from maep_hf.training.purification import PurificationArguments
from maep_hf.training.stages import AttackArguments, LoraArguments, load_trainable, purification_task

logger = logging.getLogger(__name__)

RECIPE = Path(__file__).parent / "configs" / "adapt_lora_imagenet.yaml"


@dataclass
class AdaptArguments:
    model: str = field(
        default="checkpoints/maep-tiny-cifar10", metadata={"help": "trained purifier to adapt: folder or Hub id"}
    )
    adapter: str | None = field(
        default=None,
        metadata={"help": "adapter of it to go on training, folder or Hub id; its rank and targets stay"},
    )
    lora_scope: str | None = field(default="all", metadata={"help": "blocks that are adapted: all, or decoder"})
    pixel_loss: str | None = field(default=None, metadata={"help": "l1, l2 or charbonnier; the model's own by default"})
    purification_loss_weight: float | None = field(
        default=None, metadata={"help": "weight of the pixel loss; the model's own by default"}
    )


@dataclass
class UnlabelledArguments(PurificationArguments):
    """As in the other stages, but nothing is masked, and images need no labels."""

    mask_ratio: float = field(default=0.0, metadata={"help": "share of hidden patches"})
    attack_labels: str = field(default="predicted", metadata={"help": "true or predicted"})


def main(argv: list[str] | None = None) -> Path:
    adapt, lora, data, attack, purification, loop = parse_arguments(
        AdaptArguments, LoraArguments, DataArguments, AttackArguments, UnlabelledArguments, LoopArguments,
        default_recipe=RECIPE, argv=argv,
    )  # fmt: skip
    set_seed(loop.seed)
    base = load_trainable(
        adapt.model, pixel_loss=adapt.pixel_loss, purification_loss_weight=adapt.purification_loss_weight
    )
    if adapt.adapter:
        model = load_adapter(base, adapt.adapter, trainable=True)
        # the record tells what is trained, not what a recipe has for a new adapter
        lora, adapt = LoraArguments.of(model), replace(adapt, lora_scope=None)
        logger.info(
            "adapter=%r keeps its own rank (%d), alpha, dropout and targets; arguments of a new one do not count",
            adapt.adapter, lora.lora_rank,
        )  # fmt: skip
    else:
        model = lora.adapt(base, adapt.lora_scope)
    groups = as_groups(adapt=adapt, lora=lora, data=data, attack=attack, purification=purification, loop=loop)
    return train(purification_task(model, data, attack, purification), loop, groups)


if __name__ == "__main__":
    run_script(main)
