"""DISCO on the purifier's own pairs: the same images, attacks, surrogates, draws and loop, its own network and loss.

accelerate launch -m train.baselines.train_disco --dataset data/cifar10       (from the repository's root)
maep evaluate --purifier python:train.baselines.disco:load:runs/disco-cifar10
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import set_seed

from maep_hf.training import DataArguments, LoopArguments, as_groups, parse_arguments, run_script, train
from maep_hf.training.purification import PurificationArguments
from maep_hf.training.stages import AttackArguments, purification_task

from .disco import DiscoConfig, DiscoModel

RECIPE = Path(__file__).parent.parent / "configs" / "disco_cifar10.yaml"


@dataclass
class DiscoArguments:
    encoder_channels: int = field(default=64, metadata={"help": "channels of the encoder"})
    encoder_blocks: int = field(default=16, metadata={"help": "residual blocks of the encoder"})
    local_ensemble: bool = field(default=True, metadata={"help": "four features predict each pixel, as published"})
    patch_size: int = field(
        default=4, metadata={"help": "that of the purifier it is compared with, so that both see the same pairs"}
    )


def main(argv: list[str] | None = None) -> Path:
    disco, data, attack, purification, loop = parse_arguments(
        DiscoArguments, DataArguments, AttackArguments, PurificationArguments, LoopArguments,
        default_recipe=RECIPE, argv=argv,
    )  # fmt: skip
    set_seed(loop.seed)
    model = DiscoModel(DiscoConfig(image_size=data.image_size or 32, **vars(disco)))
    task = purification_task(model, data, attack, purification)
    groups = as_groups(disco=disco, data=data, attack=attack, purification=purification, loop=loop)
    return train(task, loop, groups)


if __name__ == "__main__":
    run_script(main)
