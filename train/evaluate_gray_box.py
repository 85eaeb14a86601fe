"""Gray-box accuracy of a purifier under PGD, with its protocol: tables, a picture and the records.

python train/evaluate_gray_box.py --dataset data/cifar10 --out runs/evaluation
python train/evaluate_gray_box.py --purifier runs/finetune-tiny-cifar10 --classifiers checkpoints/resnet20-cifar10 OTHER
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from maep_hf.attacks import LinfPGD
from maep_hf.checkpoints import CLASSIFIER, PURIFIER, load_purifier
from maep_hf.data import load_image_dataset
from maep_hf.evaluation import THREAT_MODEL, evaluate_gray_box, print_table
from maep_hf.figures import difference_image, image_grid
from maep_hf.training import Augmentation, parse_arguments
from maep_hf.training.run_folder import describe_environment, write_json
from maep_hf.training.samples import collate, read_first
from maep_hf.training.stages import load_surrogates

PICTURED = 10


@dataclass
class EvaluationArguments:
    purifier: str | None = field(default=None, metadata={"help": f"folder or Hub id; default: {PURIFIER}"})
    classifiers: list[str] = field(
        default_factory=lambda: [f"checkpoints/{CLASSIFIER}"], metadata={"help": "folders or Hub ids"}
    )
    dataset: str = field(default="uoft-cs/cifar10", metadata={"help": "Hub id, folder, .parquet or embedded:cifar10"})
    split: str = field(default="test", metadata={"help": "split of the dataset"})
    max_images: int = field(default=1000, metadata={"help": "the first so many images"})
    image_size: int = field(default=32, metadata={"help": "side of the images, pixels"})
    eps: float = field(default=8.0, metadata={"help": "L-infinity radius, units of 1/255"})
    steps: int = field(default=20, metadata={"help": "steps of PGD"})
    step_size: float = field(default=2.0, metadata={"help": "step of PGD, units of 1/255"})
    seed: int = field(default=0, metadata={"help": "seed of the random start"})
    batch_size: int = field(default=100, metadata={"help": "images at once"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})
    out: str | None = field(default=None, metadata={"help": "folder for results.json and the pictures"})


def main(argv: list[str] | None = None) -> list[dict]:
    (args,) = parse_arguments(EvaluationArguments, argv=argv)
    purifier = load_purifier(args.purifier, device=args.device)
    attack = LinfPGD(eps=args.eps, steps=args.steps, step_size=args.step_size, seed=args.seed)
    dataset = load_image_dataset(args.dataset, args.split)
    samples = read_first(dataset, Augmentation(args.image_size, crop="center", flip=False), args.max_images)
    batch = {name: value.to(args.device) for name, value in collate(samples).items()}
    out = Path(args.out) if args.out else None
    records = []
    for name in args.classifiers:
        (classifier,) = load_surrogates([name])
        classifier.to(args.device)
        result = evaluate_gray_box(
            classifier, purifier, batch["pixel_values"], batch["labels"], attack, args.batch_size, progress=True
        )
        result.record |= {
            "threat_model": THREAT_MODEL,
            "attack": attack.record(),
            "seed": attack.seed,
            "purifier": Path(args.purifier or PURIFIER).name,
            "classifier": Path(name).name,
            "dataset": Path(args.dataset).name,
            "split": args.split,
            "images": f"the first {len(samples)} of {args.split}",
            "counted": "right: the prediction is the label",
            "threads": torch.get_num_threads(),
        }
        records.append(result.record)
        print_table(Console(), result, f"{attack.name}, {THREAT_MODEL}, {Path(name).name}", "accuracy")
        if out:
            out.mkdir(parents=True, exist_ok=True)
            shown = {key: value[:PICTURED] for key, value in result.images.items()}
            rows = {"clean": shown["clean"], "attacked": shown["attacked"], "purified": shown["purified_attacked"]}
            rows["purified − clean\n× 8"] = difference_image(rows["purified"], rows["clean"], 8)
            image_grid(rows, out / f"{Path(name).name}.png", title=f"{attack.name}, {THREAT_MODEL}, {Path(name).name}")
            write_json(out / "results.json", {"environment": describe_environment(), "results": records})
    return records


if __name__ == "__main__":
    main()
