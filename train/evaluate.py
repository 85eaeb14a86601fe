"""Gray-box accuracy of a purifier under PGD, with its protocol: a table, a picture and a record.

python train/evaluate.py --dataset data/cifar10 --classifier checkpoints/resnet20-cifar10 --max_images 1000
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from maep_hf.attacks import LinfPGD
from maep_hf.checkpoints import PURIFIER, load_purifier
from maep_hf.data import load_image_dataset
from maep_hf.evaluation import THREAT_MODEL, evaluate_gray_box, print_table
from maep_hf.training import Augmentation, parse_arguments
from maep_hf.training.run_folder import describe_environment, write_json
from maep_hf.training.samples import collate, read_first
from maep_hf.training.stages import load_surrogates


@dataclass
class EvaluationArguments:
    purifier: str | None = field(
        default=None, metadata={"help": f"folder or Hub id; the released {PURIFIER} by default"}
    )
    classifier: str = field(default="checkpoints/resnet20-cifar10", metadata={"help": "folder or Hub id"})
    dataset: str = field(
        default="uoft-cs/cifar10", metadata={"help": "Hub id, folder, parquet file or embedded:cifar10"}
    )
    split: str = field(default="test", metadata={"help": "split"})
    max_images: int = field(default=1000, metadata={"help": "the first so many images"})
    image_size: int = field(default=32, metadata={"help": "side of the images, pixels"})
    eps: float = field(default=8.0, metadata={"help": "L-infinity radius, units of 1/255"})
    steps: int = field(default=20, metadata={"help": "steps of PGD"})
    step_size: float = field(default=2.0, metadata={"help": "step of PGD, units of 1/255"})
    seed: int = field(default=0, metadata={"help": "seed of the random start"})
    batch_size: int = field(default=100, metadata={"help": "images at once"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})
    out: str | None = field(default=None, metadata={"help": "JSON file for the record"})


def main(argv: list[str] | None = None) -> dict:
    (args,) = parse_arguments(EvaluationArguments, argv=argv)
    purifier = load_purifier(args.purifier, device=args.device)
    (classifier,) = load_surrogates([args.classifier])
    classifier.to(args.device)
    dataset = load_image_dataset(args.dataset, args.split)
    attack = LinfPGD(eps=args.eps, steps=args.steps, step_size=args.step_size, seed=args.seed)
    samples = read_first(dataset, Augmentation(args.image_size, crop="center", flip=False), args.max_images)
    batch = collate(samples)
    pixels, labels = batch["pixel_values"].to(args.device), batch["labels"].to(args.device)
    result = evaluate_gray_box(classifier, purifier, pixels, labels, attack, args.batch_size, progress=True)
    result.record |= {
        "threat_model": THREAT_MODEL,
        "attack": attack.record(),
        "seed": attack.seed,
        "purifier": args.purifier or PURIFIER,
        "classifier": args.classifier if not os.path.isabs(args.classifier) else Path(args.classifier).name,
        "dataset": args.dataset if not os.path.isabs(args.dataset) else Path(args.dataset).name,
        "split": args.split,
        "images": f"the first {len(samples)}",
        "threads": torch.get_num_threads(),
    }
    print_table(Console(), result, f"{attack.name}, {THREAT_MODEL}, {result.record['classifier']}", "accuracy")
    if args.out:
        path = Path(args.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result.record | {"environment": describe_environment()})
    return result.record


if __name__ == "__main__":
    main()
