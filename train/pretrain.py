"""Stage 1: masked pre-training with the joint reconstruction and purification loss (paper, Fig. 1a).

accelerate launch train/pretrain.py                          # the tiny recipe on uoft-cs/cifar10
accelerate launch train/pretrain.py --dataset data/cifar10   # local parquet or images
"""

from pathlib import Path

from accelerate.utils import set_seed

from maep_hf import MAEPModel
from maep_hf.training import DataArguments, LoopArguments, as_groups, parse_arguments, run_script, train
from maep_hf.training.purification import PurificationArguments
from maep_hf.training.stages import AttackArguments, ModelArguments, purification_task

RECIPE = Path(__file__).parent / "configs" / "pretrain_tiny_cifar10.yaml"


def main(argv: list[str] | None = None) -> Path:
    model_args, data, attack, purification, loop = parse_arguments(
        ModelArguments, DataArguments, AttackArguments, PurificationArguments, LoopArguments,
        default_recipe=RECIPE, argv=argv,
    )  # fmt: skip
    set_seed(loop.seed)
    model = MAEPModel(model_args.config(mask_ratio=purification.mask_ratio))
    task = purification_task(model, data, attack, purification)
    groups = as_groups(model=model_args, data=data, attack=attack, purification=purification, loop=loop)
    return train(task, loop, groups)


if __name__ == "__main__":
    run_script(main)
