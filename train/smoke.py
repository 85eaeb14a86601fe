"""The whole chain on the 20 embedded CIFAR-10 images in under two minutes: classifier, pairs, both stages, report.

    python train/smoke.py                      # writes runs/smoke

It shows that every part works here. Twenty images train no purifier worth using.
"""

from dataclasses import dataclass, field
from pathlib import Path

import finetune
import make_pairs
import pretrain
import train_classifier

from maep_hf.evaluation.run import EvaluationArguments, run_evaluation
from maep_hf.training import parse_arguments

DATA = "embedded:cifar10"


@dataclass
class SmokeArguments:
    output_dir: str = field(default="runs/smoke", metadata={"help": "folder for all runs of the chain"})
    cpu_threads: int = field(default=0, metadata={"help": "threads; 0 takes all cores"})


def main(argv: list[str] | None = None) -> list[dict]:
    (args,) = parse_arguments(SmokeArguments, argv=argv)
    out = Path(args.output_dir)
    classifier, pairs, first, second = (str(out / name) for name in ("classifier", "pairs", "pretrain", "finetune"))
    threads = ["--cpu_threads", str(args.cpu_threads)]
    train_classifier.main([*_recipe("classifier"), "--output_dir", classifier, *threads])
    make_pairs.main(["--dataset", DATA, "--surrogates", classifier, "--output_dir", pairs])
    purifier = ["--surrogates", classifier, "--validation_dataset", DATA, *threads]
    pretrain.main([*_recipe("pretrain"), *purifier, "--dataset", pairs, "--output_dir", first])
    finetune.main([*_recipe("finetune"), *purifier, "--model", first, "--output_dir", second])
    return run_evaluation(
        EvaluationArguments([second], [classifier], DATA, attacks=["pgd"], device="cpu", out=out / "report")
    )


def _recipe(stage: str) -> list[str]:
    return ["--config", str(Path(__file__).parent / "configs" / f"smoke_{stage}.yaml")]


if __name__ == "__main__":
    main()
