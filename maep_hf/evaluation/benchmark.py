"""`benchmark`: one purifier, one classifier, one threat model, one attack, one record.

The images are attacked in batches of `batch_size`; each batch depends on the protocol alone. With a folder, every
finished batch is kept in it, so that an interrupted evaluation goes on where it was, several processes share the
batches, and another purifier is measured on the same gray-box images without attacking again.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attacks import Attack, make_attack
from ..classifier import LogitsError, PixelClassifier, PurifiedClassifier
from ..data import expect_classes, load_image_dataset, names_that_differ, numbers_as_text, same_names_in_order
from ..random_states import seeded
from ..randomised import is_randomised
from ..records import append_jsonl, describe_environment, read_jsonl
from .attacked_store import AttackedStore
from .checks import CheckResult, MaskingReport, attack_check, gradient_masking_checks, zero_check
from .fingerprint import Opaque, fingerprint
from .gradient_probe import gradient_probe
from .hidden_modules import expect_eval
from .images import EvaluationImages, fingerprint_images, read_images
from .judge import judge_batch, peak_memory, summarise, timed
from .kept_attacks import KeptAttacks
from .processes import process_state
from .progress import counted_calls
from .protocol import Protocol
from .results import WITHOUT_GRADIENT
from .threat_models import ADAPTIVE, attacked_model, check_attack

RESULTS = "results.jsonl"
CHECKS = "check_attacks.jsonl"
PICTURED = 10
CHECK_IMAGES = 50
_TOLD: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""What was said of a source's classes already: attacks make Python forget the warnings that it gave."""


@dataclass
class BenchmarkResult:
    """A record (see `protocol.py` and THREAT_MODELS.md), and the first images of the evaluation for a picture.

    Attributes:
        record: the JSON line.
        images: `clean`, `attacked` and, with a purifier, `purified`: up to 10 of each from the first
            batch, (N, 3, H, W) in [0, 1].
        resumed: how many batches came from an earlier, interrupted call; -1 when the whole record did.
    """

    record: dict
    images: dict[str, Tensor]
    resumed: int = 0


def benchmark(
    classifier: nn.Module | Callable[[Tensor], Any],
    purifier: Any = None,
    dataset: str | EvaluationImages | tuple[Tensor, Tensor] = "uoft-cs/cifar10",
    *,
    threat_model: str = "gray-box",
    attack: str | Attack = "autoattack",
    norm: str | None = None,
    eps: float | None = None,
    attack_options: Mapping[str, Any] | None = None,
    split: str = "test",
    dataset_config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    max_images: int | None = 1000,
    image_size: int | None = None,
    batch_size: int = 100,
    seed: int = 0,
    source: nn.Module | None = None,
    purify_kwargs: Mapping[str, Any] | None = None,
    passes: int | None = None,
    checks: bool = True,
    check_images: int = CHECK_IMAGES,
    classifier_name: str | None = None,
    purifier_name: str | None = None,
    source_name: str | None = None,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> BenchmarkResult:
    """Clean and robust accuracy of a purifier in front of a classifier, with the whole protocol.

    Args:
        classifier: see [`PixelClassifier`]; may be one already.
        purifier: a `MAEPModel`, also with a PEFT adapter; any module or callable from images to images of the same
            shape; `None` measures the bare classifier (as `white-box`, since there is nothing it does not see).
        dataset: Hub id, folder, file or `embedded:cifar10`; [`EvaluationImages`]; or pixels (N, 3, H, W) in [0, 1]
            and labels (N,).
        threat_model: `gray-box`, `bpda`, `white-box`, `black-box` or `transfer`; see [`attacked_model`].
        attack: a name of [`ATTACKS`], or an attack made by [`make_attack`].
        norm: `Linf`, `L2` or `L1`; the attack's first one when `None`.
        eps: radius; in units of 1/255 for Linf (8 = 8/255), of pixels in [0, 1] for L2 and L1. The attack's own
            default when `None`.
        attack_options: further options of [`make_attack`].
        split, dataset_config, image_column, label_column: of a dataset given by name, see [`load_image_dataset`].
        max_images, image_size: see [`read_images`]; `max_images` holds for tensors too.
        batch_size: images attacked at once; part of the protocol, since attacks draw per batch.
        seed: of every batch's attack and of a randomised purifier's draws.
        source: surrogate pipeline for `transfer`, [0, 1] pixels to logits. A `PixelClassifier` or `PurifiedClassifier`
            with the classifier's class names in another order, or else the dataset's, is put into that order meanwhile.
        purify_kwargs: for every call of the purifier, such as `{"overlap": 0.5}`.
        passes: final passes over the attacked images, averaged; 10 by default where purifier or classifier draws at
            random, otherwise 1.
        checks: run the gradient-masking checks with `bpda` and `white-box` (with a purifier).
        check_images: on how many of the first images.
        classifier_name, purifier_name, source_name: what the record calls them.
        device: where everything runs; that of the classifier when `None`.
        out: folder for the attacked batches, what the checks' attacks left and `results.jsonl`; `None` keeps nothing.
            All processes must see it.
        progress: show a bar.

    Raises:
        DataError: the dataset cannot be used.
        ValueError: an unknown name or option, labels outside the classifier's classes, logits that are not finite, an
            attack that the threat model does not allow, a classifier without a gradient that the attack needs, or one
            that fails on images of this size; batch normalisation in training mode, out of reach of `eval()`.
        OSError: `out` cannot be written.
    """
    state = process_state()
    if not isinstance(classifier, PixelClassifier):
        classifier = PixelClassifier(classifier)
    device = torch.device(device) if device is not None else _device(classifier, state)
    classifier.to(device).eval()
    if isinstance(purifier, nn.Module):
        purifier.to(device).eval()
    for name, count in (("batch_size", batch_size), ("max_images", max_images), ("passes", passes)):
        if count is not None and count < 1:
            raise ValueError(f"{name}={count}: must be at least 1")
    if isinstance(attack, str):
        attack = make_attack(attack, norm=norm, eps=eps, **(attack_options or {}))
    elif norm is not None or eps is not None or attack_options:
        raise ValueError("attack: it is made already; give norm, eps and attack_options to make_attack")
    check_attack(threat_model, attack)
    if source is not None:
        source.to(device).eval()
    for name, model in (("classifier", classifier), ("purifier", purifier), ("source", source)):
        expect_eval(name, model)
    if purifier is None and threat_model in ("gray-box", "bpda"):
        threat_model = "white-box"
    if isinstance(dataset, str):
        loaded = load_image_dataset(
            dataset, split, config_name=dataset_config, image_column=image_column, label_column=label_column
        )
        images = read_images(loaded, max_images, image_size, Path(dataset).name, split)
    else:
        images = _images(dataset, max_images)
    names = list((classifier.id2label or {}).values())
    images = images.in_order_of(names)
    wanted = _names_to_match(source, names, images.class_names, warn=state.is_main_process)
    with _in_order_of(wanted, source):
        pixels, _ = images.batch(0, min(2, len(images)), device)
        classes = _check_labels(classifier, pixels, images)

        defended = PurifiedClassifier(
            purifier, classifier, purify_kwargs=purify_kwargs if purifier is not None else None
        )
        target = attacked_model(threat_model, classifier, purifier, source, purify_kwargs)
        purified_pixels = PurifiedClassifier(purifier, nn.Flatten(), purify_kwargs=defended.purify_kwargs)
        random_purifier = purifier is not None and is_randomised(purified_pixels, pixels)
        random_classifier = is_randomised(classifier, pixels)
        randomised = random_purifier or random_classifier
        passes = passes or (10 if randomised else 1)
        bare_passes = passes if random_classifier or purifier is None else 1
        protocol = Protocol(
            threat_model=threat_model,
            attack=attack.record(num_classes=classes),
            seed=seed,
            batch_size=batch_size,
            passes=passes,
            dataset=images.describe(),
            classifier={
                "name": classifier_name or _name(classifier.classifier),
                "fingerprint": _fingerprint("classifier", classifier, out),
            },
            purifier=_describe_purifier(purifier, purifier_name, purify_kwargs, random_purifier, out),
            source=_describe_source(source, source_name, out) if threat_model == "transfer" else None,
        )
        # there is something to sweep, and someone who meant it
        ball = attack.norm in ("Linf", "L2", "L1") and attack.eps is not None and not attack.control
        adaptive = purifier is not None and threat_model in ADAPTIVE
        checked = min(check_images, len(images)) if checks and ball and adaptive else 0
        folder = Path(out) if out is not None else None
        store = AttackedStore(None if folder is None else folder / "attacked" / protocol.attacked_key())
        check_source = _fingerprint("source", source, out) if checked and source is not None else None
        known = _known_record(folder, protocol.key, checked, check_source)
        if known is not None:
            return BenchmarkResult(
                known, _pictures(store, images.batch(0, batch_size, device), defended, seed), resumed=-1
            )

        if folder is not None:  # before hours go by
            folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder).close()
        gradient = None
        # where there is a purifier before the attacked classifier, the checks ask; of a source there are no others
        if attack.needs_gradient and target in (classifier, source):
            gradient = _probed(target, images.batch(0, batch_size, device), protocol, state)

        rows: list[dict[str, Any]] = []
        resumed = 0
        starts = range(0, len(images), batch_size)
        mine = starts[state.process_index :: state.num_processes]
        title = f"{attack.name}, {threat_model}"
        bar = tqdm(mine, desc=title, unit="batch", disable=not (progress and state.is_main_process))
        shown: dict[str, object] = {}
        for start in bar:
            x, y = images.batch(start, start + batch_size, device)
            attacked, about = store.load(start, x, y)
            if attacked is None:
                with peak_memory(device) as memory, counted_calls(target, bar, shown):
                    attacked, seconds = timed(lambda x=x, y=y: attack(target, x, y, seed=seed), device)
                about = {"attack_seconds": seconds, "memory_bytes_per_image": memory.risen / len(x)}
                store.save(start, x, y, attacked, about)
            else:
                resumed += 1
            rows.extend(judge_batch(classifier, defended, x, attacked, y, passes, seed, about, start, bare_passes))
            shown["robust"] = f"{100 * sum(row['right_purified_attacked'] for row in rows) / len(rows):.1f}%"
            bar.set_postfix(shown)
        rows = gather_object(rows) if state.num_processes > 1 else rows
        report = None
        if checked:
            options = {
                "threat_model": threat_model, "seed": seed, "randomised": randomised, "source": source,
                "batch_size": batch_size,
            }  # fmt: skip
            first = images.batch(0, checked, device)
            report = _checks(defended, first, attack, rows, options, check_source, folder, progress)
        record = protocol.record() | summarise(rows, purified=purifier is not None, passes=passes)
        record["checks"] = report
        if gradient is not None and target is source and not _alone(source):
            record["checks"] = _source_check(gradient, record)
        elif gradient is not None:
            record["gradient"] = gradient
        record["environment"] = describe_environment() | {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "processes": state.num_processes,
        }
        if folder is not None and state.is_main_process:
            append_jsonl(folder / RESULTS, record)
        state.wait_for_everyone()
        return BenchmarkResult(record, _pictures(store, images.batch(0, batch_size, device), defended, seed), resumed)


def _images(dataset: EvaluationImages | tuple[Tensor, Tensor], max_images: int | None) -> EvaluationImages:
    if isinstance(dataset, tuple):
        dataset = EvaluationImages(*map(torch.as_tensor, dataset))
        if dataset.pixels.dtype != torch.uint8 and (dataset.pixels.min() < 0 or dataset.pixels.max() > 1):
            raise ValueError("dataset: pixels must be in [0, 1]; divide 8-bit images by 255")
    return dataset.first(max_images)


@torch.no_grad()
def _check_labels(classifier: PixelClassifier, pixels: Tensor, images: EvaluationImages) -> int:
    """The number of classes, once it is known that the labels are among them."""
    try:
        logits = classifier(pixels)
    except (LogitsError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        height, width = pixels.shape[-2:]
        said = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"classifier: it fails on images of {height} x {width} ({type(error).__name__}: {said}); if it takes "
            "another size, give image_size (--image-size), or a classifier that resizes"
        ) from error
    if not torch.isfinite(logits).all():
        raise ValueError("classifier: its logits are not finite (NaN or inf) on the first images of the dataset")
    classes = logits.shape[1]
    if classes < 2:
        raise ValueError("classifier: it has a single class; accuracy under attack needs at least two")
    hint = "give a classifier of this dataset's classes"
    low, high = int(images.labels.min()), int(images.labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"dataset: labels go from {low} to {high}, the classifier knows 0 to {classes - 1}: {hint}")
    expect_classes(images.classes, classes, "the classifier", hint)
    return classes


def _classes_of(source: nn.Module | None) -> PixelClassifier | None:
    """What of a source knows its classes by name."""
    inner = source.classifier if isinstance(source, PurifiedClassifier) else source
    return inner if isinstance(inner, PixelClassifier) else None


def _names_to_match(
    source: nn.Module | None, names: Sequence[str], dataset: Sequence[str] | None, warn: bool
) -> Sequence[str] | None:
    """The classes in whose order a source's logits stand for the labels of the attack; `None` where its own is right.

    Args:
        names: the classifier's; where the source has others, the dataset's count, as its labels were put into the
            classifier's order before.
        dataset: its names in the order of its labels.
        warn: of another order, and of names that nothing is known by.
    """
    model = _classes_of(source)
    if model is None:
        return None
    own = list((model.id2label or {}).values())
    for wanted, whose in ((names, "classifier"), (dataset, "dataset")):
        if same_names_in_order(own, wanted) is not None:
            if warn:
                _say_once(model, f"its classes stand in another order than the {whose}'s; they are matched by name")
            return wanted
    said = []
    differ = {"classifier": names_that_differ(own, names), "dataset": names_that_differ(own, dataset)}
    found = [
        f"its class names are not the {whose}'s ({text}); taken by index" for whose, text in differ.items() if text
    ]
    # where classifier and dataset differ too, and the source from one of them alone, it has the names of the other
    if len(found) == 2 or not names_that_differ(names, dataset):
        said += found[:1]
    doubt = numbers_as_text(own, dataset)
    if doubt and set(own) != set(names):  # else it was told of the dataset
        said.append(f"taken by index; of the dataset, {doubt}")
    for text in said if warn else ():
        _say_once(model, text)
    return None


@contextmanager
def _in_order_of(names: Sequence[str] | None, source: nn.Module | None) -> Iterator[None]:
    """Match a source to these classes; afterwards it has its own order again, for another classifier's is another."""
    model = _classes_of(source)
    if model is None or names is None:
        yield
        return
    own = model.class_order
    model.match_classes(names)
    try:
        yield
    finally:
        model.class_order = own


def _say_once(model: nn.Module, text: str) -> None:
    told = _TOLD.setdefault(model, set())
    if text not in told:
        told.add(text)
        warnings.warn(f"source: {text}", stacklevel=4)


def _alone(source: nn.Module) -> bool:
    """Whether nothing stands before the source's classifier."""
    return getattr(source, "purifier", None) is None


def _probed(target: nn.Module, batch: tuple[Tensor, Tensor], protocol: Protocol, state: PartialState) -> dict[str, int]:
    """How many of the first images give the attacked classifier's pixels no gradient; some are a warning."""
    argument = "classifier" if protocol.source is None else "source"
    name = f"{argument} {getattr(protocol, argument)['name']}"
    found = gradient_probe(target, *batch, name=name, seed=protocol.seed, required=_alone(target))
    if found["zero"] and state.is_main_process:
        warnings.warn(
            f"{name}: the gradient is zero for {found['zero']} of the first {found['images']} images, on which an "
            "attack that follows it fails; 16 bits, saturated logits or a purifier that cuts it do that, and the "
            "figure is too high",
            stacklevel=3,
        )
    return found


def _source_check(gradient: Mapping[str, int], record: Mapping[str, Any]) -> dict | None:
    """The failed check of a source whose purifier lets too little of the gradient through; `None` where it does not.

    A figure of zero cannot be too high.
    """
    count, zero = gradient["images"], gradient["zero"]
    accuracy = record["accuracy"]
    if zero <= WITHOUT_GRADIENT * count or not (accuracy["purified_attacked"] or accuracy["attacked"])["percent"]:
        return None
    detail = f"the source gives {count - zero} of {count} images a gradient; take another surrogate, or square"
    data = {"images_without_gradient": zero, "n": count}
    return MaskingReport([CheckResult("gradient", False, detail, data)]).record()


def _device(classifier: nn.Module, state: PartialState) -> torch.device:
    if state.num_processes > 1:
        return state.device
    parameter = next(classifier.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _name(model: Any) -> str:
    folder = getattr(getattr(model, "config", None), "_name_or_path", None)
    return Path(folder).name if folder else getattr(model, "name", None) or type(model).__name__


def _describe_purifier(
    purifier: Any, name: str | None, options: Mapping | None, randomised: bool, out: str | Path | None
) -> dict | None:
    if purifier is None:
        return None
    described = {
        "name": name or _name(purifier),
        "fingerprint": _fingerprint("purifier", purifier, out),
        "options": dict(options or {}),
    }
    if callable(getattr(purifier, "record", None)):
        described["options"] |= purifier.record()
    adapters = getattr(purifier, "active_adapters", None)
    if isinstance(adapters, list):  # of PEFT; without one, transformers has a method of this name that raises
        described["adapter"] = ", ".join(adapters)
    return described | {"randomised": randomised}


def _source_name(source: nn.Module) -> str:
    """With the purifier that stands in it."""
    if _alone(source) or not isinstance(source, PurifiedClassifier):
        return _name(source)
    return f"{_name(source.purifier)}+{_name(source.classifier.classifier)}"


def _describe_source(source: nn.Module, name: str | None, out: str | Path | None) -> dict:
    described = {"name": name or _source_name(source), "fingerprint": _fingerprint("source", source, out)}
    options = source.purify_kwargs if isinstance(source, PurifiedClassifier) else None
    return described | ({"options": options} if options else {})


def _fingerprint(argument: str, model: Any, out: str | Path | None) -> str:
    """Of a callable that says nothing of itself, one that no other has, so that nothing stored is taken for it."""
    try:
        return fingerprint(model)
    except Opaque as error:
        warnings.warn(f"{argument}: {error}; what is stored of it is never used again", stacklevel=3)
        return f"opaque-{secrets.token_hex(6)}" if out is not None else "opaque"


def _known_record(folder: Path | None, key: str, checked: int, source: str | None) -> dict | None:
    """What was measured already, its figure checked on so many images, and by attacks from this source."""
    for record in read_jsonl(folder / RESULTS) if folder else ():
        if record.get("key") == key and (not checked or _checked_enough(record.get("checks"), checked, source)):
            return record
    return None


def _checked_enough(checks: Mapping | None, wanted: int, source: str | None) -> bool:
    """Whether stored checks were on as many images as are wanted and transferred from the source where one is given,
    or of a figure of zero, which needs none."""
    if not checks:
        return False
    if [check["name"] for check in checks["results"]] == ["attack"]:
        return True
    if source is not None and checks.get("check_source") != source:
        return False
    unknown = 0 if "images" in checks["failed"] else wanted  # of records that do not say it yet
    return checks.get("check_images", unknown) >= wanted


def _checks(
    defended: PurifiedClassifier,
    images: tuple[Tensor, Tensor],
    attack: Attack,
    rows: list[dict[str, Any]],
    options: dict[str, Any],
    source: str | None,
    folder: Path | None,
    progress: bool,
) -> dict:
    """The masking checks of an evaluated attack; a figure of zero needs no more than to be one."""
    if any(row["right_purified_clean"] for row in rows) and not any(row["right_purified_attacked"] for row in rows):
        report = MaskingReport([zero_check(attack.name, len(rows))])
    else:
        report = _masking_report(defended, images, attack, options, source, folder, progress)
        if report.used:
            first = (row for row in sorted(rows, key=lambda row: row["index"]) if row["index"] < len(images[0]))
            stayed = torch.tensor([row["right_purified_attacked"] >= 0.5 for row in first])
            report.results.append(attack_check(report, stayed, attack.name))
    of_source = {} if source is None else {"check_source": source}
    return report.record() | {"check_images": len(images[0])} | of_source


def _masking_report(
    defended: PurifiedClassifier,
    images: tuple[Tensor, Tensor],
    attack: Attack,
    options: dict[str, Any],
    source: str | None,
    folder: Path | None,
    progress: bool,
) -> MaskingReport:
    """The checks of a pipeline by attacks of their own; those that an earlier evaluation ran are not run again."""
    state = process_state()
    report = None
    if state.is_main_process:
        options |= {"norm": attack.norm, "eps": attack.eps, "eot_samples": attack.record().get("eot_samples", 1)}
        if folder is not None:
            about = [options[name] for name in ("threat_model", "seed", "norm", "eps", "eot_samples")]
            about += [_fingerprint("purifier", defended, folder), fingerprint_images(*images)]
            about.append(min(options["batch_size"], len(images[0])))
            about.append(source)
            options["kept"] = KeptAttacks(folder / CHECKS, about)
        shown: dict[str, object] = {}
        bar = tqdm(desc="gradient-masking checks", unit="attack", disable=not progress)

        def say(check: str, done: int, total: int) -> None:
            shown["check"] = check
            if not done:
                bar.reset(total)
            bar.set_postfix(shown, refresh=False)
            bar.update(done - bar.n)

        with bar, counted_calls(defended.classifier, bar, shown):
            report = gradient_masking_checks(defended, *images, progress=say, **options)
    return gather_object([report])[0] if state.num_processes > 1 else report


@torch.no_grad()
def _pictures(
    store: AttackedStore, batch: tuple[Tensor, Tensor], defended: PurifiedClassifier, seed: int
) -> dict[str, Tensor]:
    """The first images of the first batch; more are not kept without a folder."""
    clean = batch[0][:PICTURED]
    attacked, _ = store.load(0, *batch)
    if attacked is None:
        return {"clean": clean.cpu()}
    attacked = attacked[:PICTURED]
    shown = {"clean": clean, "attacked": attacked}
    if defended.purifier is not None:
        with seeded(seed):
            shown["purified"] = defended.purify(attacked)
    return {name: value.cpu() for name, value in shown.items()}
