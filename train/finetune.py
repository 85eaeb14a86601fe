"""Stage 2: finetuning without masks (paper, Fig. 1b), all weights or LoRA on the decoder.

accelerate launch train/finetune.py --model runs/pretrain-tiny-cifar10 --dataset data/cifar10
accelerate launch train/finetune.py --model runs/pretrain-tiny-cifar10 --trainable decoder_lora
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import set_seed

from maep_hf.growth import grow_local_branch
from maep_hf.training import DataArguments, LoopArguments, as_groups, parse_arguments, run_script, train
from maep_hf.training.purification import PurificationArguments
from maep_hf.training.stages import AttackArguments, LoraArguments, load_trainable, purification_task

RECIPE = Path(__file__).parent / "configs" / "finetune_tiny_cifar10.yaml"


@dataclass
class FinetuneArguments:
    model: str = field(
        default="runs/pretrain-tiny-cifar10", metadata={"help": "purifier to start from: folder or Hub id"}
    )
    trainable: str = field(default="all", metadata={"help": "all weights, or decoder_lora"})
    start_share: float = field(
        default=0.0,
        metadata={"help": "share of the weights started from in those that are validated and saved (WiSE-FT)"},
    )
    start_share_of: str | None = field(
        default=None,
        metadata={"help": "an earlier purifier of the same chain whose share that is; the one started from by default"},
    )
    local_branch_channels: int | None = field(
        default=None,
        metadata={"help": "widen the local branch to so many channels (Net2Net); the model's own by default"},
    )
    local_branch_layers: int | None = field(
        default=None, metadata={"help": "deepen it to so many convolution blocks; the model's own by default"}
    )
    pixel_loss: str | None = field(default=None, metadata={"help": "l1, l2 or charbonnier; the model's own by default"})
    purification_loss_weight: float | None = field(
        default=None, metadata={"help": "weight of the pixel loss; the model's own by default"}
    )

    def __post_init__(self) -> None:
        if self.trainable not in ("all", "decoder_lora"):
            raise ValueError(f"trainable={self.trainable!r}: must be all or decoder_lora")
        if not 0 <= self.start_share < 1:
            raise ValueError(f"start_share={self.start_share}: must be in [0, 1)")
        if self.start_share and self.trainable != "all":
            raise ValueError(f"start_share={self.start_share}: needs trainable=all; scale an adapter instead")
        if self.start_share_of and not self.start_share:
            raise ValueError(f"start_share_of={self.start_share_of!r}: give start_share, how much of it is kept")
        if self.grows and self.trainable != "all":
            raise ValueError("local_branch_channels, local_branch_layers: need trainable=all, an adapter fits one size")

    @property
    def grows(self) -> bool:
        return self.local_branch_channels is not None or self.local_branch_layers is not None


def main(argv: list[str] | None = None) -> Path:
    finetune, lora, data, attack, purification, loop = parse_arguments(
        FinetuneArguments, LoraArguments, DataArguments, AttackArguments, PurificationArguments, LoopArguments,
        default_recipe=RECIPE, argv=argv,
    )  # fmt: skip
    given = [name for name, value in vars(LoraArguments()).items() if getattr(lora, name) != value]
    if given and finetune.trainable == "all":
        raise ValueError(f"{given[0]}: all weights are trained; give trainable=decoder_lora, or leave it out")
    set_seed(loop.seed)
    model = load_trainable(
        finetune.model,
        pixel_loss=finetune.pixel_loss,
        purification_loss_weight=finetune.purification_loss_weight,
    )
    if finetune.grows:
        model = grow_local_branch(model, finetune.local_branch_channels, finetune.local_branch_layers)
    groups = as_groups(finetune=finetune, data=data, attack=attack, purification=purification, loop=loop)
    if finetune.trainable == "decoder_lora":
        model = lora.adapt(model, scope="decoder")
        groups |= as_groups(lora=lora)
    start = load_trainable(finetune.start_share_of) if finetune.start_share_of else None
    task = purification_task(model, data, attack, purification, finetune.start_share, start)
    return train(task, loop, groups)


if __name__ == "__main__":
    run_script(main)
