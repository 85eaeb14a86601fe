"""`maep evaluate`: every combination of purifier, classifier, threat model, attack and radius that was asked for, into
one folder of records, tables and pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..attacks import Attack, attack_options, make_attack
from ..attacks.registry import find_attack
from ..checkpoints import CLASSIFIER, PURIFIER, CheckpointError, load_purifier
from ..classifier import PurifiedClassifier
from ..classifier_sources import PYTHON, TIMM, call_named, load_frozen_classifier
from ..data import load_image_dataset
from ..defences import make_defence
from ..devices import pick_device
from ..figures import difference_image, image_grid
from ..randomised import RandomisedPurifier
from ..rescaled import RescaledPurifier
from .benchmark import CHECK_IMAGES, RESULTS, BenchmarkResult, benchmark
from .images import read_images
from .processes import process_state
from .report import report
from .results import attack_name
from .threat_models import THREAT_MODELS, check_attack

DEFENCE = "defence:"
NONE = "none"
WEIGHTS = (".safetensors", ".pt", ".pth", ".th", ".tar")  # not part of a name
DIFFERENCE_FACTOR = 8
PICTURE_COLUMNS = 8


@dataclass
class EvaluationArguments:
    """What `maep evaluate` measures; lists are combined with each other.

    Args:
        purifiers: folders or Hub ids (also of a PEFT adapter), `defence:NAME` for a classical one, `none`, or
            `python:MODULE:FUNCTION[:ARGUMENT]`: what a function makes, see [`python_purifier`].
        classifiers: folders or Hub ids, `timm:NAME` or `python:MODULE:FUNCTION[:ARGUMENT]`, see
            [`load_frozen_classifier`].
        dataset, split, dataset_config, image_column, label_column: see [`load_image_dataset`].
        max_images, image_size: see [`read_images`].
        threat_models: see [`benchmark`].
        attacks: names, each as NAME, NAME:NORM or NAME:NORM:EPS (`autoattack:L2:0.5`).
        norm: of the attacks that do not say theirs; each one's first by default.
        eps: radii of the attacks in `norm` (Linf by default) that do not say theirs; each one's own by default.
        attack_options: for every attack that has an option of that name, such as `{"steps": 40}`, or for one attack,
            such as `{"cw-l2.steps": 50}`.
        seed, batch_size, passes: see [`benchmark`].
        random_mask_ratio, draws: purify under `draws` random masks of this ratio and average.
        eot_samples: passes that gradients are averaged over, for a randomised purifier.
        mode, overlap: of windows, for images of another size than the purifier's; for the purifiers that have them,
            `source_purifier` among them.
        strength: factor on the correction, for the same purifiers.
        scale: purify images resized by this factor, see [`RescaledPurifier`].
        source_classifier, source_purifier: the surrogate pipeline of the threat model `transfer`.
        checks, check_images: gradient-masking checks of adaptive threat models.
        device: `auto`, `cpu`, `cuda`, ...
        out: folder of `results.jsonl`, the tables and the pictures.
    """

    purifiers: list[str] = field(default_factory=lambda: [f"checkpoints/{PURIFIER}"])
    classifiers: list[str] = field(default_factory=lambda: [f"checkpoints/{CLASSIFIER}"])
    dataset: str = "uoft-cs/cifar10"
    split: str = "test"
    dataset_config: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    max_images: int | None = 1000
    image_size: int | None = None
    threat_models: list[str] = field(default_factory=lambda: ["gray-box"])
    attacks: list[str] = field(default_factory=lambda: ["autoattack"])
    norm: str | None = None
    eps: list[float] = field(default_factory=list)
    attack_options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    batch_size: int = 100
    passes: int | None = None
    random_mask_ratio: float = 0.0
    draws: int = 1
    eot_samples: int = 1
    mode: str | None = None
    overlap: float | None = None
    strength: float | None = None
    scale: float = 1.0
    source_classifier: str | None = None
    source_purifier: str | None = None
    checks: bool = True
    check_images: int = CHECK_IMAGES
    device: str = "auto"
    out: str | Path = "evaluation"


def run_evaluation(args: EvaluationArguments, console: Console | None = None) -> list[dict]:
    """Measure every combination, one record each, then write the tables and pictures; returns the records.

    What `results.jsonl` in `args.out` has already is not measured again.

    Raises:
        ValueError, OSError: as [`benchmark`] and the loaders.
    """
    state = process_state()
    console = console or Console()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    shared = args.device == "auto" and state.num_processes > 1
    device = state.device if shared else pick_device(args.device)
    measured = _combinations(args, console if state.is_main_process else None)
    dataset = load_image_dataset(
        args.dataset,
        args.split,
        config_name=args.dataset_config,
        image_column=args.image_column,
        label_column=args.label_column,
    )
    images = read_images(dataset, args.max_images, args.image_size, _short(args.dataset), args.split)
    source_name = "+".join(_short(name) for name in (args.source_purifier, args.source_classifier) if name)

    models = {name: _load_purifier(name, args, device) for name in args.purifiers}  # all, before hours go by
    before = args.source_purifier or NONE  # the surrogate pipeline's, which takes images as the purifiers do
    sources = {before: _load_purifier(before, args, device)} if args.source_classifier else {}
    options = _purify_options(args, models | sources)
    source = None
    if args.source_classifier:
        surrogate = load_frozen_classifier(args.source_classifier)
        source = PurifiedClassifier(sources[before], surrogate, purify_kwargs=options[before]).to(device)
    classifiers = {name: load_frozen_classifier(name) for name in args.classifiers}
    records = []
    for (classifier_name, classifier), (purifier_name, purifier) in product(classifiers.items(), models.items()):
        for threat_model, attack in measured:
            result = benchmark(
                classifier,
                purifier,
                images,
                max_images=None,
                threat_model=threat_model,
                attack=attack,
                batch_size=args.batch_size,
                seed=args.seed,
                source=source,
                purify_kwargs=options[purifier_name],
                passes=args.passes,
                checks=args.checks,
                check_images=args.check_images,
                classifier_name=_short(classifier_name),
                purifier_name=_short(purifier_name),
                source_name=source_name or None,
                device=device,
                out=out,
            )
            records.append(result.record)
            if state.is_main_process:
                _picture(result, out)
                _print_checks(result.record, console)
                if result.resumed:
                    what = "in results.jsonl already" if result.resumed < 0 else f"{result.resumed} batches were there"
                    console.print(f"{_title(result.record)}: {what}", highlight=False, soft_wrap=True)
    state.wait_for_everyone()
    if state.is_main_process:
        report(out / RESULTS, out, console)
    return records


def _combinations(args: EvaluationArguments, console: Console | None) -> list[tuple[str, Attack]]:
    """Threat models with the attacks that they allow; everything that can be wrong is, before a model is loaded.

    Raises:
        ValueError: as [`make_attacks`]; draws of no random masks; an unknown threat model, `transfer` without a
            source, a purifier without the classifier of the source, or one that allows none of the attacks.
    """
    if args.draws > 1 and not args.random_mask_ratio:
        raise ValueError(f"draws={args.draws}: there is nothing to draw without random masks; give random_mask_ratio")
    if args.source_purifier and not args.source_classifier:
        raise ValueError("source_purifier is put in front of source_classifier: give that too, or leave both out")
    attacks = make_attacks(args)
    found: list[tuple[str, Attack]] = []
    for threat_model in args.threat_models:
        if threat_model not in THREAT_MODELS:
            raise ValueError(f"threat_model={threat_model!r}: must be one of {', '.join(THREAT_MODELS)}")
        if threat_model == "transfer" and not args.source_classifier:
            raise ValueError("threat_model='transfer' needs source_classifier: the pipeline that is attacked instead")
        black_box = threat_model == "black-box"
        allowed = [attack for attack in attacks if not (black_box and attack.needs_gradient)]
        if not allowed:
            check_attack(threat_model, attacks[0])
        left_out = [attack.name for attack in attacks if attack not in allowed]
        if left_out and console:
            console.print(f"black-box: left out {', '.join(left_out)}, which use gradients", highlight=False)
        found += [(threat_model, attack) for attack in allowed]
    return found


def _purify_options(args: EvaluationArguments, purifiers: Mapping[str, Any]) -> dict[str, dict[str, Any] | None]:
    """`mode`, `overlap` and `strength` for each purifier that has them: a defence or a peer works without."""
    given = {name: getattr(args, name) for name in ("mode", "overlap", "strength") if getattr(args, name) is not None}
    found: dict[str, dict[str, Any] | None] = {}
    for name, purifier in purifiers.items():
        while isinstance(purifier, RescaledPurifier | RandomisedPurifier):  # they hand options on
            purifier = purifier.purifier
        purify = getattr(purifier, "purify", None)
        known = signature(purify).parameters if callable(purify) else {}
        found[name] = None if purifier is None else {key: value for key, value in given.items() if key in known}
    if unused := [name for name in given if not any(name in (options or {}) for options in found.values())]:
        raise ValueError(f"{unused[0]}: none of {', '.join(purifiers)} has it; leave it out")
    return found


def _print_checks(record: dict, console: Console) -> None:
    for check in (record["checks"] or {}).get("results", ()):
        undecided = "unknown" if check.get("data") else "not run"  # what was run has figures
        mark = {True: "passed", False: "FAILED", None: undecided}[check["passed"]]
        style = "bold red" if check["passed"] is False else ""
        console.print(f"  {mark} {check['name']}: {check['detail']}", style=style, highlight=False, soft_wrap=True)


def _load_purifier(name: str, args: EvaluationArguments, device: torch.device) -> Any:
    if name == NONE:
        return None
    if name.startswith(DEFENCE):
        purifier: Any = make_defence(name.removeprefix(DEFENCE))
    elif name.startswith(PYTHON):
        purifier = python_purifier(name)
    else:
        path = Path(name)
        released = path.parts == ("checkpoints", PURIFIER) and not path.is_dir()
        purifier = load_purifier(None if released else name)
    if args.random_mask_ratio:
        try:
            purifier = RandomisedPurifier(purifier, mask_ratio=args.random_mask_ratio, draws=args.draws)
        except TypeError as error:
            raise ValueError(f"random_mask_ratio: {name} takes no random masks ({error})") from error
    if args.scale != 1:
        purifier = RescaledPurifier(purifier, args.scale)
    return purifier.to(device).eval() if isinstance(purifier, torch.nn.Module) else purifier


def python_purifier(name: str) -> Any:
    """The purifier that `python:MODULE:FUNCTION[:ARGUMENT]` names: what the function returns for the argument, a text.

    The module is one on the path or in the working directory. A purifier is a module or callable from images
    (B, 3, H, W) in [0, 1] to images of the same shape, or has a method `purify` that is one.

    Raises:
        CheckpointError: there is no such module or function, it cannot make a purifier, or it makes none.
    """
    purifier = call_named(name, "purifier")
    if not callable(purifier) and not callable(getattr(purifier, "purify", None)):
        raise CheckpointError(
            f"purifier {name!r}: its function returned {type(purifier).__name__}, which purifies nothing"
        )
    return purifier


def make_attacks(args: EvaluationArguments) -> list[Attack]:
    """The attacks that were asked for, each once.

    Raises:
        ValueError: an unknown name, norm or option, a radius out of range, an option, `norm` or `eps` that none of them
            takes.
    """
    options = args.attack_options | ({"eot_samples": args.eot_samples} if args.eot_samples > 1 else {})
    attacks: dict[str, Attack] = {}
    used: set[str] = set()
    eps_norm, eps_used, norm_used = args.norm or "Linf", False, False
    for word in args.attacks:
        name, norm, eps, *more = *word.split(":"), *[""] * max(0, 2 - word.count(":"))
        if more:
            raise ValueError(f"attack={word!r} is not of the form NAME, NAME:NORM or NAME:NORM:EPS")
        try:
            radii = [float(eps)] if eps else None
        except ValueError as error:
            raise ValueError(f"attack={word!r}: the radius {eps!r} is no number") from error
        known = attack_options(name)
        has = {key: value for key, value in options.items() if key in known}
        own = _options_of(name, options)
        used |= {*has, *own}
        has |= {key.rpartition(".")[2]: options[key] for key in own}
        bounded = find_attack(name)[0].norms != (None,)  # a corruption is by none, and passes over what the others take
        norm = norm or (args.norm if bounded else None)
        norm_used |= bounded
        plain = make_attack(name, norm=norm, **has)
        if radii is None:  # a radius for Linf means nothing in another norm, nor to a corruption
            meant = (plain.norm or "").lower() == eps_norm.lower() and not plain.control
            radii = args.eps if args.eps and meant else [None]
            eps_used |= meant
        for radius in radii:
            attack = make_attack(name, norm=norm, eps=radius, **has)
            attacks[str(attack.record())] = attack
    if missing := sorted(set(options) - used):
        raise ValueError(f"attack_options: none of {', '.join(args.attacks)} has {', '.join(missing)}")
    if args.norm and not norm_used:
        raise ValueError(
            f"norm: none of {', '.join(args.attacks)} takes it: they are bounded by no norm, got {args.norm!r}; "
            "leave it out"
        )
    if args.eps and not eps_used:
        raise ValueError(
            f"eps: none of {', '.join(args.attacks)} takes it: it is for attacks in {eps_norm} that do not say their "
            "radius; give norm, or the radius with the attack, as NAME:NORM:EPS"
        )
    return list(attacks.values())


def _options_of(name: str, options: Mapping[str, Any]) -> list[str]:
    """The keys of options for this attack alone (`pgd.steps`), whose name is as free as that of an attack.

    Those for `pgd` are for `pgd-100` too, but for the steps, which it says itself; those for `pgd-100` for it alone
    and before those for `pgd`.
    """
    spec, implied = find_attack(name)
    found = []
    for key in options:
        prefix, dot, option = key.rpartition(".")
        try:
            meant, said = find_attack(prefix) if dot else (None, {})
        except ValueError:  # no attack's, which the caller says
            continue
        if meant is spec and (said == implied or not said and option not in implied):
            found.append((len(said), key))
    return [key for _, key in sorted(found, key=lambda item: item[0])]


def _short(name: str) -> str:
    """A name that says nothing of the machine: the folder's own, the Hub id, or the function or timm name."""
    if name.startswith(PYTHON):  # the argument may be a folder, or a file of weights
        path = Path(name.rpartition(":")[2])
        while path.suffix in WEIGHTS:
            path = path.with_suffix("")
        return path.name
    if name.startswith(TIMM):
        return name.rpartition(":")[2]
    path = Path(name)
    return path.name if path.exists() or path.is_absolute() or name.startswith((".", "~", "checkpoints/")) else name


def _title(record: dict) -> str:
    protocol = record["protocol"]
    purifier = protocol["purifier"]["name"] if protocol["purifier"] else "no purifier"
    names = (attack_name(protocol["attack"]), protocol["threat_model"], purifier, protocol["classifier"]["name"])
    return ", ".join(names)


def _picture(result: BenchmarkResult, out: Path, count: int = PICTURE_COLUMNS) -> None:
    rows: dict[str, torch.Tensor] = {name: batch[:count] for name, batch in result.images.items()}
    if "attacked" not in rows:
        return
    last = "purified" if "purified" in rows else "attacked"
    rows[f"{last} − clean\n× {DIFFERENCE_FACTOR}"] = difference_image(rows[last], rows["clean"], DIFFERENCE_FACTOR)
    image_grid(rows, out / "pictures" / f"{result.record['key']}.png", title=_title(result.record))


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """`name=value` words to a dictionary; values are read as YAML, so numbers and lists come out as such.

    Raises:
        ValueError: a word without `=`, or whose value is no YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    # YAML 1.1 takes 1e-3, which has neither a point nor a sign before its exponent, for text
    number = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))

    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ValueError(f"attack option {word!r} is not of the form name=value")
        try:
            options[name] = yaml.load(value, Loader)
        except yaml.YAMLError as error:
            reason = getattr(error, "problem", None) or error
            raise ValueError(f"attack option {word!r}: its value cannot be read ({reason})") from error
    return options
