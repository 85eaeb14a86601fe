"""The ablation: every row trained from scratch at one small budget, measured gray-box, and put into one table.

python train/ablation.py --rows all --seeds 0 --dataset data/cifar10 --classifier data/classifiers/resnet56
python train/ablation.py --rows reference,mask-0 --seeds 0,1 --max_steps 1000

Rows stand in train/configs/ablation.yaml. The same command goes on where it was stopped, within a row too; two of them
at once share the rows between them. `table.md` and `table.png` in the output folder are rewritten after every row, and
from its records alone by `--tabulate true`.
"""

from __future__ import annotations

import gc
import json
import logging
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ablation_chart import write_chart
from ablation_rows import SCRIPTS, Ablation, Recipe, Row, argument_types
from ablation_table import write_table
from accelerate.state import AcceleratorState, GradientState
from filelock import Timeout
from rich.console import Console

from maep_hf.attacks import Attack, make_attack
from maep_hf.checkpoints import expanded, load_purifier
from maep_hf.classifier_sources import load_frozen_classifier
from maep_hf.data import load_image_dataset
from maep_hf.devices import pick_device
from maep_hf.evaluation import EvaluationImages, benchmark, read_images
from maep_hf.evaluation.fingerprint import Opaque, fingerprint
from maep_hf.locks import locked
from maep_hf.records import append_jsonl, describe_environment, read_jsonl
from maep_hf.training import parse_arguments, run_script
from maep_hf.training.arguments import ADDED_LATER, FREE_ARGUMENTS, KEPT_ARGUMENTS
from maep_hf.training.stages import AttackArguments, ModelArguments

TABLE = Path(__file__).parent / "configs" / "ablation.yaml"
RECORDS = "rows.jsonl"
FINISHED = "ablation_finished"
WEIGHTS = "classifier_fingerprint"  # of what rows are measured with; older records have the name alone
# What does not decide the weights that a finished stage has stored.
OF_NO_MATTER = FREE_ARGUMENTS - KEPT_ARGUMENTS - {"export_dtype"}
# What a row's own arguments are to blame for: a loss that is not finite, a surrogate that is not there, a full disk.
ROW_ERRORS = (ValueError, OSError, RuntimeError, SystemExit)


@dataclass
class AblationArguments:
    rows: str = field(default="all", metadata={"help": "names of rows, with commas between them, or all"})
    seeds: str = field(default="0", metadata={"help": "seeds, with commas between them"})
    table: str = field(default=str(TABLE), metadata={"help": "YAML file of the rows"})
    max_steps: int = field(default=800, metadata={"help": "optimizer steps of a row, both stages together"})
    dataset: str = field(default="uoft-cs/cifar10", metadata={"help": "images to train on"})
    classifier: str = field(
        default="data/classifiers/resnet56", metadata={"help": "classifier, never a surrogate, to measure on"}
    )
    attacks: str = field(default="pgd-20,fgsm,mi-fgsm", metadata={"help": "attacks to measure under"})
    eps: float = field(default=8.0, metadata={"help": "their radius, units of 1/255"})
    evaluation_dataset: str | None = field(default=None, metadata={"help": "images to measure on; dataset by default"})
    split: str = field(default="test", metadata={"help": "their split"})
    images: int = field(default=500, metadata={"help": "how many of the first of them"})
    batch_size: int = field(default=100, metadata={"help": "images attacked and purified at once"})
    output_dir: str = field(default="runs/ablation", metadata={"help": "folder of all rows, records and the table"})
    cpu_threads: int = field(default=0, metadata={"help": "threads on a CPU; 0 takes all cores"})
    device: str = field(default="auto", metadata={"help": "where rows are measured: auto, cpu, cuda, ..."})
    list_rows: bool = field(default=False, metadata={"help": "only list the rows and what they change"})
    tabulate: bool = field(default=False, metadata={"help": "only write table and picture anew, from the records"})

    def __post_init__(self) -> None:
        self.output_dir = expanded(self.output_dir)
        for name in ("max_steps", "images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not split_list(self.attacks):
            raise ValueError("attacks: name at least one, such as pgd-20")
        try:
            if not self.seed_list or min(self.seed_list) < 0:
                raise ValueError("none, or a negative one")
        except ValueError as error:
            raise ValueError(f"seeds={self.seeds!r}: must be integers of at least 0, such as 0,1 ({error})") from error

    @property
    def seed_list(self) -> list[int]:
        return [int(word) for word in split_list(self.seeds)]


def split_list(text: str) -> list[str]:
    """Words with commas between them, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


@dataclass
class Judge:
    """What every row is measured with; the attacked images are made once and shared through `folder`."""

    classifier: Any
    classifier_name: str
    images: EvaluationImages
    attacks: dict[str, Attack]
    eps: float
    batch_size: int
    device: Any
    folder: Path

    @classmethod
    def of(cls, args: AblationArguments) -> Judge:
        """Load the classifier and the images and make the attacks.

        Raises:
            ValueError, OSError: as the loaders and [`make_attack`].
        """
        dataset = args.evaluation_dataset or args.dataset
        images = read_images(load_image_dataset(dataset, args.split), args.images, None, Path(dataset).name, args.split)
        attacks = {name: make_attack(name, eps=args.eps) for name in split_list(args.attacks)}
        classifier = load_frozen_classifier(args.classifier)
        folder, device = Path(args.output_dir) / "evaluation", pick_device(args.device)
        return cls(classifier, Path(args.classifier).name, images, attacks, args.eps, args.batch_size, device, folder)

    def describe(self) -> dict[str, Any]:
        """The protocol, as far as it does not depend on the row."""
        attacks = {name: attack.record() for name, attack in self.attacks.items()}
        described = {"classifier": self.classifier_name, "dataset": self.images.describe(), "attacks": attacks}
        with suppress(Opaque):  # a function's classifier that nothing tells from another
            described[WEIGHTS] = fingerprint(self.classifier)
        return plain(described | {"eps": self.eps, "batch_size": self.batch_size, "threat_model": "gray-box"})

    def __call__(self, folder: Path, name: str) -> dict[str, Any]:
        """Accuracy in percent of the purifier in `folder`: clean, under each attack, the worst, and undefended."""
        purifier = load_purifier(folder, device=self.device)
        found: dict[str, Any] = {"percent": {"attacks": {}}, "undefended": {"attacks": {}}, "keys": {}}
        with held(self.folder):  # or two ablations at once would both make the attacked images
            for attack_name, attack in self.attacks.items():
                record = benchmark(
                    self.classifier, purifier, self.images, max_images=None, threat_model="gray-box", attack=attack,
                    batch_size=self.batch_size, classifier_name=self.classifier_name, purifier_name=name,
                    device=self.device, out=self.folder, progress=False,
                ).record  # fmt: skip
                accuracy = {key: share["percent"] for key, share in record["accuracy"].items() if share}
                found["percent"]["attacks"][attack_name] = accuracy["purified_attacked"]
                found["percent"]["clean"] = accuracy["purified_clean"]
                found["undefended"]["attacks"][attack_name] = accuracy["attacked"]
                found["undefended"]["clean"] = accuracy["clean"]
                found["keys"][attack_name] = record["key"]
        found["percent"]["worst"] = min(found["percent"]["attacks"].values())
        found["parameters"] = sum(parameter.numel() for parameter in purifier.parameters())
        return found


def held(path: Path, timeout: float = -1) -> AbstractContextManager[None]:
    """Nobody else trains or measures in `path` meanwhile; `Timeout` after `timeout` seconds, never for -1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unguarded, advice = f"{path} cannot be locked", "start no other ablation there now"
    return locked(path.with_name(f".{path.name}.lock"), unguarded, advice, timeout)


def plain(value: Any) -> Any:
    """As it comes back from a JSON file."""
    return json.loads(json.dumps(value, default=str))


def run_recipe(recipe: Recipe, folder: Path, model: Path | None = None) -> Path:
    """Train one stage in `folder`, or go on with it; its recipe is kept beside the folder.

    Raises:
        ValueError: arguments that the script refuses, or a finished stage of other ones.
    """
    if (folder / FINISHED).is_file():
        check_finished(recipe, folder, model)
        return folder
    values = recipe.values | {"output_dir": folder.as_posix()} | ({"model": model.as_posix()} if model else {})
    path = folder.with_name(f"{folder.name}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    command = f"# accelerate launch train/{recipe.script}.py --config {path.as_posix()}\n"
    path.write_text(command + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    GradientState._reset_state()
    AcceleratorState._reset_state()  # the next row may have another precision
    try:
        SCRIPTS[recipe.script].main(["--config", str(path)])
    finally:
        gc.collect()
    (folder / FINISHED).touch()
    return folder


def same_protocol(known: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two rows were measured alike; by the classifier's name where one does not say its fingerprint."""
    left_out = () if WEIGHTS in known and WEIGHTS in now else (WEIGHTS,)
    one, other = ({name: value for name, value in each.items() if name not in left_out} for each in (known, now))
    return one == other


def stage_folders(row: Row, recipes: list[Recipe], seed: int, out: Path) -> list[Path]:
    """Where a row's stages are trained: the last one in its own folder, the first of two where others find it."""
    shared = [out / "stage1" / f"{recipes[0].key}-seed{seed}"] if len(recipes) > 1 else []
    return [*shared, out / f"{row.name}-seed{seed}"]


def check_finished(recipe: Recipe, folder: Path, model: Path | None = None) -> None:
    """Refuse a finished stage that was trained by other arguments, which would be reported as of these.

    Args:
        recipe: the stage as it is asked for now.
        folder: where it is, or will be, trained.
        model: what it starts from.

    Raises:
        ValueError: there is a finished stage of other arguments; it names them.
    """
    if not (folder / FINISHED).is_file():
        return
    groups = json.loads((folder / "run.json").read_text())["arguments"].values()
    stored = {name: value for group in groups for name, value in group.items()}
    values = recipe.values | ({"model": model.as_posix()} if model else {})
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "recipe.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        parsed = parse_arguments(*argument_types(recipe.script), argv=["--config", str(path)])
    now = {name: value for group in plain([asdict(group) for group in parsed]) for name, value in group.items()}
    for each in (stored, now) if model else ():
        each["model"] = Path(each["model"]).name  # it says of which arguments; the folders may have been moved since
    different = [
        f"{recipe.script}.{name}: {there!r} there, {value!r} now"
        for name, value in now.items()
        if name not in OF_NO_MATTER and (there := stored.get(name, ADDED_LATER.get(name, value))) != value
    ]
    if different:
        raise ValueError(
            f"{folder} holds a finished stage of other arguments ({'; '.join(different)}): give another output_dir"
        )


def train_row(row: Row, recipes: list[Recipe], seed: int, out: Path, console: Console) -> Path:
    """Train a row's stages; a first stage of the same arguments is trained once for all rows that have it."""
    first, *rest = recipes
    folder, target = (stage_folders(row, recipes, seed, out)[index] for index in (0, -1))
    with held(folder) if rest else nullcontext():  # a row of one stage is trained in its own folder, held already
        console.print(f"{row.name}, seed {seed}: stage 1, {first.values['max_steps']} steps, {folder.name}")
        run_recipe(first, folder)
    for recipe in rest:
        console.print(f"{row.name}, seed {seed}: stage 2, {recipe.values['max_steps']} steps")
        run_recipe(recipe, target, model=folder)
        folder = target
    return folder


def training_time(folders: list[Path]) -> dict[str, float]:
    """Seconds of training without validation and checkpoints, and the share of them that attacks took."""
    seconds, attack, images = 0.0, 0.0, 0
    for folder in folders:
        arguments = json.loads((folder / "run.json").read_text())["arguments"]["loop"]
        per_step = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
        last = 0
        for line in read_jsonl(folder / "metrics.jsonl"):
            if "images_per_second" in line:
                spent = (line["step"] - last) * per_step / line["images_per_second"]
                seconds, attack = seconds + spent, attack + spent * line["attack_time_share"]
                images, last = images + (line["step"] - last) * per_step, line["step"]
    return {"training_seconds": seconds, "attack_time_share": attack / seconds, "images": images}


def check_recipe(row: Row, recipe: Recipe, folder: Path) -> None:
    """Let the script's own parser read the recipe before anything is trained.

    Raises:
        ValueError: it refuses it; the parser has said why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / f"{row.name}.yaml"
        path.write_text(yaml.safe_dump(recipe.values), encoding="utf-8")
        try:
            parsed = parse_arguments(*argument_types(recipe.script), argv=["--config", str(path)])
        except SystemExit as error:
            raise ValueError(f"row {row.name}: {recipe.script} does not take its arguments (see above)") from error
    try:
        for group in parsed:  # values that are out of range only together
            if isinstance(group, ModelArguments):
                group.config()
            elif isinstance(group, AttackArguments):
                group.mixture(1)
    except ValueError as error:
        raise ValueError(f"row {row.name}: {error}") from error


def chosen_rows(ablation: Ablation, args: AblationArguments, console: Console) -> list[Row]:
    """The rows that were asked for; of `all`, those that the scripts have no argument for are passed over.

    Raises:
        ValueError: an unknown row, or one that was named and cannot be run.
    """
    names = list(ablation.rows) if args.rows.strip() == "all" else split_list(args.rows)
    if unknown := [name for name in names if name not in ablation.rows]:
        raise ValueError(f"rows: there is no {', '.join(unknown)}; there are: {', '.join(ablation.rows)}")
    found = []
    for row in map(ablation.rows.__getitem__, names):
        if missing := ablation.missing(row):
            what = f"row {row.name}: the stage scripts have no argument {', '.join(missing)}"
            if args.rows.strip() != "all":
                raise ValueError(what)
            console.print(f"passed over: {what}", highlight=False)
            continue
        found.append(row)
    if not found:
        raise ValueError("rows: none was named")
    return found


def check_same(known: Mapping[str, Any], training: Any, budget: Mapping[str, Any], out: Path) -> None:
    """Refuse a folder whose rows are not of this ablation.

    Args:
        known: a record of the folder.
        training: the stages of the same row and seed as they are asked for now, `None` where they are not.
        budget: what all rows of one table have in common.

    Raises:
        ValueError: another budget, or other arguments of the same row.
    """
    different = [f"{name}: {known['budget'].get(name)!r} there, {value!r} now" for name, value in budget.items()
                 if known["budget"].get(name) != value]  # fmt: skip
    if not different and training is not None and known["training"] != training:
        different = [differences(known["training"], training)]
    if different:
        raise ValueError(
            f"{out / RECORDS} has row {known['row']}, seed {known['seed']} with other arguments "
            f"({'; '.join(different)}): give another output_dir"
        )


def differences(stored: Any, now: Any) -> str:
    """What differs between the stages of two trainings, in words."""
    if len(stored) != len(now):
        return f"{len(stored)} stages there, {len(now)} now"
    found = []
    for there, here in zip(stored, now, strict=True):
        for name in sorted(set(there) | set(here)):
            if there.get(name) != here.get(name):
                found.append(f"{there['script']}.{name}: {there.get(name)!r} there, {here.get(name)!r} now")
    return "; ".join(found)


def run_row(
    row: Row, seed: int, recipes: list[Recipe], budget: Mapping[str, Any], judge: Judge, out: Path, console: Console
) -> dict[str, Any]:
    """Train and measure a row with a seed; what its arguments are to blame for becomes a record with `failed`."""
    record: dict[str, Any] = {"key": f"{row.name}-seed{seed}", "row": row.name, "seed": seed, "group": row.group,
                              "change": row.change, "budget": budget, "training": described(recipes)}  # fmt: skip
    try:
        folder = train_row(row, recipes, seed, out, console)
        record |= training_time(stage_folders(row, recipes, seed, out)) | judge(folder, record["key"])
        record |= {"evaluation": judge.describe(), "environment": describe_environment()}
    except ROW_ERRORS as error:
        record["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return record


def described(recipes: list[Recipe]) -> list[dict[str, Any]]:
    """The stages' arguments, without what decides nothing."""
    return plain([{"script": recipe.script} | recipe.values | {"cpu_threads": None} for recipe in recipes])


def write_results(
    folder: Path, records: list[dict[str, Any]], evaluation: Any, order: list[str]
) -> list[dict[str, Any]]:
    """Write the table and its picture in `folder`, of the records measured by the protocol `evaluation` and of those
    that failed; returns the table's rows."""
    alike = [known for known in records if "evaluation" not in known or same_protocol(known["evaluation"], evaluation)]
    rows = write_table(folder, alike, order)
    write_chart(folder / "table.png", rows)
    return rows


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    (args,) = parse_arguments(AblationArguments, argv=argv)
    console, out = Console(), Path(args.output_dir)
    ablation = Ablation.read(args.table)
    if args.list_rows:
        for row in ablation.rows.values():
            console.print(f"{row.name}: {row.group}: {row.change}", highlight=False)
        return []
    if args.tabulate:
        if not (records := read_jsonl(out / RECORDS)):
            raise ValueError(f"output_dir: there are no records in {out / RECORDS}")
        last = next((known["evaluation"] for known in reversed(records) if "evaluation" in known), None)
        return write_results(out, records, last, list(ablation.rows))
    rows = chosen_rows(ablation, args, console)
    plan = {}
    for seed in args.seed_list:  # a whole seed first, so that there is a whole table early
        for row in rows:
            recipes = ablation.recipes(row, args.max_steps, seed, args.dataset, args.cpu_threads)
            for recipe in recipes:
                check_recipe(row, recipe, out)
            plan[row.name, seed] = row, recipes
    budget = {"max_steps": args.max_steps, "dataset": args.dataset}
    for known in read_jsonl(out / RECORDS):
        planned = plan.get((known["row"], known["seed"]))
        measured = planned and "failed" not in known
        check_same(known, described(planned[1]) if measured else None, budget, out)
    for (_, seed), (row, recipes) in plan.items():
        models: list[Path | None] = [None]
        for recipe, folder in zip(recipes, stage_folders(row, recipes, seed, out), strict=True):
            check_finished(recipe, folder, models[-1])
            models.append(folder)
    judge = Judge.of(args)
    evaluation = judge.describe()
    failed = []

    def tabulate() -> list[dict[str, Any]]:
        return write_results(out, read_jsonl(out / RECORDS), evaluation, list(ablation.rows))

    for number, ((name, seed), (row, recipes)) in enumerate(plan.items(), 1):
        console.rule(f"{number} of {len(plan)}: {name}, seed {seed}")
        try:
            with held(out / f"{name}-seed{seed}", timeout=0):
                known = {record["key"]: record for record in read_jsonl(out / RECORDS)}.get(f"{name}-seed{seed}")
                if known is not None and "evaluation" in known and same_protocol(known["evaluation"], evaluation):
                    console.print(f"{name}, seed {seed}: finished before")
                    continue
                record = run_row(row, seed, recipes, budget, judge, out, console)
        except Timeout:
            console.print(f"{name}, seed {seed}: another ablation is at it")
            continue
        append_jsonl(out / RECORDS, record)
        tabulate()
        if "failed" in record:
            failed.append(record["key"])
            console.print(f"{record['key']}: {record['failed']}", style="bold red", highlight=False)
        else:
            shown = ", ".join(f"{attack} {value:.1f}" for attack, value in record["percent"]["attacks"].items())
            console.print(f"{record['key']}: clean {record['percent']['clean']:.1f}, {shown}", highlight=False)
    table = tabulate()
    console.print((out / "table.md").read_text(encoding="utf-8"), highlight=False, soft_wrap=True, markup=False)
    if failed:
        raise ValueError(f"{len(failed)} of {len(plan)} failed: {', '.join(failed)}; the same command tries them again")
    return table


if __name__ == "__main__":
    logging.getLogger("maep_hf").setLevel(logging.INFO)
    run_script(main)
