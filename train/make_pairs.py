"""Store (image, adversarial image, label) pairs as a dataset, for training that does not attack while it runs.

python train/make_pairs.py --dataset data/cifar10 --output_dir data/pairs
accelerate launch train/pretrain.py --dataset data/pairs --validation_dataset data/cifar10
"""

from pathlib import Path

from maep_hf.pairs import PairsArguments, make_pairs
from maep_hf.training import parse_arguments, run_script
from maep_hf.training.stages import AttackArguments


def main(argv: list[str] | None = None) -> Path:
    pairs, attack = parse_arguments(PairsArguments, AttackArguments, argv=argv)
    return make_pairs(pairs, attack)


if __name__ == "__main__":
    run_script(main)
