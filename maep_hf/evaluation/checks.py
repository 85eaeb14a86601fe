"""Checks for gradient masking, after Carlini et al. 2019 and Athalye et al. 2018: signs that an adaptive figure is not
the defence's robustness but the attack's failure.

Each compares attacks on the same few images, so that small samples suffice: one attack is held to be stronger than
another only where the images that it alone breaks outnumber the opposite beyond chance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from ..attacks import make_attack
from ..attacks.autoattack import square_starts
from ..classifier import PurifiedClassifier
from ..random_states import seeded
from .threat_models import attacked_model

SIGNIFICANCE = 0.01
STEPS = (1, 5, 20, 60)
SWEEP_STEPS = 20
# radii of the sweep as multiples of eps; the last one is large enough to turn any image into any other
MULTIPLES = (0.5, 1, 2, 4)
LARGEST = {"Linf": 128.0, "L2": 24.0, "L1": 900.0}
ALMOST_NOTHING = 5.0  # percent that may stay right at the largest radius
SQUARE_QUERIES = 300
CLEAN = "no attack"
LEAST_EOT = 10
LEAST_IMAGES = 20
"""With fewer, the sign test can hardly tell one attack from another."""
LEAST_TOLD = math.floor(math.log(SIGNIFICANCE, 0.5)) + 1
"""With fewer, it never can: one attack alone may break all of them, and that is not beyond chance."""
TOO_FEW = "; too few images to tell"


@dataclass
class CheckResult:
    """One check: whether it passed (`None`: it was left out, or there were too few images to tell), what was seen in
    words, and the figures behind it."""

    name: str
    passed: bool | None
    detail: str
    data: dict = field(default_factory=dict)


@dataclass
class MaskingReport:
    """All checks of one defended classifier at one radius.

    Attributes:
        results: one for each check, in the order they ran.
        used: which of the given images the pipeline has right, and the checks attacked (indices).
        survivors: for each of those, whether it stayed right under every attack of the checks at eps.
    """

    results: list[CheckResult]
    used: list[int] = field(default_factory=list)
    survivors: list[bool] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        return [result.name for result in self.results if result.passed is False]

    @property
    def reliable(self) -> bool:
        return not self.failed

    def record(self) -> dict:
        return {
            "reliable": self.reliable,
            "failed": self.failed,
            "results": [asdict(result) for result in self.results],
        }


def attack_check(report: MaskingReport, right: Tensor, name: str) -> CheckResult:
    """Whether the evaluated attack is as strong as those of the checks: a weak one says nothing of robustness.

    Args:
        report: of the same pipeline and radius.
        right: (N,) which of the check's images stayed right under the evaluated attack.
        name: of that attack.
    """
    evaluated, survivors = right[torch.tensor(report.used, dtype=torch.long)], torch.tensor(report.survivors)
    detail = f"{name}: {_percent(evaluated):.0f} % right, all attacks of the checks: {_percent(survivors):.0f} %"
    data = {"percent": _percent(evaluated), "checks_percent": _percent(survivors), "n": len(evaluated)}
    return _compared("attack", not _stronger(survivors, evaluated), detail, "; the evaluated attack is too weak", data)


def zero_check(name: str, count: int) -> CheckResult:
    """Of an attack that left none of `count` images right: masking makes a figure too high, and zero cannot be that."""
    return CheckResult("attack", True, f"{name}: none of {count} images right, no attack does more", {"n": count})


def gradient_masking_checks(
    defended: PurifiedClassifier,
    pixels: Tensor,
    labels: Tensor,
    *,
    threat_model: str = "white-box",
    norm: str = "Linf",
    eps: float = 8.0,
    seed: int = 0,
    batch_size: int = 100,
    randomised: bool = False,
    eot_samples: int = 1,
    source: nn.Module | None = None,
    kept: MutableMapping[str, list[bool]] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> MaskingReport:
    """Attack the pipeline on a few images in the ways that expose a gradient that leads nowhere.

    Args:
        defended: purifier and classifier.
        pixels: (N, 3, H, W) in [0, 1]; those that the pipeline has wrong already are left out.
        labels: (N,).
        threat_model: `white-box`, or `bpda`, whose attack takes the identity for the purifier's gradient; either is
            judged on the pipeline itself.
        norm, eps: of the evaluation that is checked (eps in units of 1/255 for Linf, of pixels for L2 and L1).
        batch_size: images attacked and classified at once, so many as the evaluation itself has in memory.
        randomised: whether the purifier draws at random.
        eot_samples: passes that the evaluation's attack averages gradients over.
        source: surrogate pipeline to transfer from, beside the bare classifier and the pipeline by the gradient that
            the evaluation's attack does not take (BPDA for `white-box`, the full one for `bpda`).
        kept: by attack, which images it left right; what is there is not attacked again, what is not is put in.
        progress: called before each attack and at the end, with the check that it belongs to, how many attacks are
            done, and of how many.

    Returns:
        A report with one result a check: `gradient`, `randomness`, `eps sweep`, `step sweep`, `black-box` (left out
        where Square cannot start on images of this size), `transfer`.
    """
    kept = {} if kept is None else kept
    bare, purifier = defended.classifier, defended.purifier

    def attacked_under(name: str) -> nn.Module:
        return attacked_model(name, bare, purifier, purify_kwargs=defended.purify_kwargs)

    view = attacked_under(threat_model)
    if CLEAN not in kept:
        with seeded(seed):
            kept[CLEAN] = _right(defended, pixels, labels, batch_size).tolist()
    right = torch.tensor(kept[CLEAN], device=labels.device)
    used = right.nonzero().flatten()
    pixels, labels = pixels[right], labels[right]
    if not len(pixels):
        return MaskingReport([CheckResult("images", False, "the pipeline has no image right: nothing to check")])
    results = []
    if len(pixels) < LEAST_IMAGES:
        few = f"the pipeline has {len(pixels)} images right; at least {LEAST_IMAGES} are needed to tell attacks apart"
        results.append(CheckResult("images", False, few, {"n": len(pixels)}))
    with seeded(seed):
        results.append(_gradient(view, pixels, labels, batch_size))
    if randomised:
        results.append(_randomness(eot_samples))

    sources = {"the bare classifier": bare}
    if purifier is not None and threat_model == "white-box":
        sources["BPDA"] = attacked_under("bpda")
    elif purifier is not None:
        sources["the full gradient"] = attacked_under("white-box")
    if source is not None:
        sources["the surrogate pipeline"] = source
    radii, queried = _radii(norm, eps), square_starts(norm, *pixels.shape[-2:])
    total, done = len(radii) + len({*STEPS} - {SWEEP_STEPS}) + queried + len(sources), 0
    eot = {"eot_samples": eot_samples} if eot_samples > 1 else {}

    def survivors(check: str, target: str, model: nn.Module, name: str, radius: float, **options) -> Tensor:
        nonlocal done
        if progress:
            progress(check, done, total)
        attack = make_attack(name, norm=norm, eps=radius, **options)
        key = f"{target}: {json.dumps(attack.record())}"
        if key not in kept:
            batches = _batches(pixels, labels, batch_size)
            attacked = torch.cat([attack(model, *batch, seed=seed) for batch in batches])
            with seeded(seed + 1):  # not the draws that the attack saw
                kept[key] = _right(defended, attacked, labels, batch_size).tolist()
        done += 1
        return torch.tensor(kept[key])

    def pgd(check: str, target: str, model: nn.Module, radius: float, steps: int = SWEEP_STEPS) -> Tensor:
        # the step covers the ball from the start however few there are
        step_size = radius * max(0.25, 1 / steps)
        return survivors(check, target, model, "pgd", radius, steps=steps, step_size=step_size, **eot)

    sweep = {radius: pgd("eps sweep", threat_model, view, radius) for radius in radii}
    results.append(_eps_sweep(sweep))
    steps = {
        count: sweep[eps] if count == SWEEP_STEPS else pgd("step sweep", threat_model, view, eps, count)
        for count in STEPS
    }
    results.append(_step_sweep(steps))
    white_box = steps[STEPS[-1]]
    together = torch.stack([*steps.values(), sweep[eps]]).all(0)
    if queried:
        square = survivors("black-box", threat_model, view, "square", eps, n_queries=SQUARE_QUERIES)
        together &= square
        results.append(_not_stronger("black-box", f"Square ({SQUARE_QUERIES} queries)", square, white_box))
    else:
        height, width = pixels.shape[-2:]
        why = f"Square cannot start in {norm} on images of {height} x {width}"
        results.append(CheckResult("black-box", None, f"left out: {why}"))
    for name, model in sources.items():
        transferred = pgd("transfer", name, model, eps)
        together &= transferred
        results.append(_not_stronger("transfer", f"PGD-{SWEEP_STEPS} from {name}", transferred, white_box))
    if progress:
        progress("done", done, total)
    return MaskingReport(results, used.tolist(), together.tolist())


def _batches(pixels: Tensor, labels: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(pixels.split(batch_size), labels.split(batch_size), strict=True)


@torch.no_grad()
def _right(model: nn.Module, pixels: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    return torch.cat([model(x).argmax(-1) == y for x, y in _batches(pixels, labels, batch_size)])


def _percent(right: Tensor) -> float:
    return 100 * right.float().mean().item()


def margin_gradient(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """Of the logit margin, which does not saturate as the cross-entropy does."""
    inputs = pixels.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = model(inputs)
        own = logits.gather(1, labels[:, None]).squeeze(1)
        others = logits.scatter(1, labels[:, None], float("-inf")).amax(1)
        margin = (own - others).sum()
        return torch.autograd.grad(margin, inputs)[0] if margin.requires_grad else torch.zeros_like(inputs)


def _gradient(model: nn.Module, pixels: Tensor, labels: Tensor, batch_size: int) -> CheckResult:
    gradient = torch.cat([margin_gradient(model, *batch) for batch in _batches(pixels, labels, batch_size)])
    flat = gradient.flatten(1)
    finite = torch.isfinite(flat).all(1)
    nonzero = (flat != 0).float().mean(1)
    dead = (nonzero < 0.01) | ~finite  # a classifier that crops leaves some pixels without one
    data = {
        "finite_percent": _percent(finite),
        "images_without_gradient": int(dead.sum()),
        "nonzero_pixels_percent": 100 * nonzero.mean().item(),
        "n": len(pixels),
    }
    detail = f"{len(pixels) - int(dead.sum())} of {len(pixels)} images have a finite gradient that is not zero"
    return CheckResult("gradient", not bool(dead.any()), detail, data)


def _randomness(eot_samples: int) -> CheckResult:
    passed = eot_samples >= LEAST_EOT
    detail = f"the purifier draws at random; the attack averages {eot_samples} passes of at least {LEAST_EOT}"
    return CheckResult("randomness", passed, detail, {"eot_samples": eot_samples})


def _radii(norm: str, eps: float) -> list[float]:
    smallest, largest = (0.1, 255.0) if norm == "Linf" else (0.0, float("inf"))  # what an attack takes
    radii = {float(eps) if multiple == 1 else multiple * eps for multiple in MULTIPLES}
    radii = {radius for radius in radii if smallest <= radius <= largest}
    return sorted(radii | {min(largest, max(LARGEST[norm], 4 * eps))})


def _eps_sweep(sweep: dict[float, Tensor]) -> CheckResult:
    accuracy = {radius: _percent(right) for radius, right in sweep.items()}
    radii = list(sweep)
    rising = [
        f"{smaller:g} -> {larger:g}"
        for smaller, larger in zip(radii, radii[1:], strict=False)
        if _stronger(sweep[smaller], sweep[larger])
    ]
    last = accuracy[radii[-1]]
    allowed = max(ALMOST_NOTHING, 100 / len(sweep[radii[-1]]))
    passed = last <= allowed and not rising
    detail = ", ".join(f"eps {radius:g}: {value:.0f} %" for radius, value in accuracy.items())
    if last > allowed:
        detail += f"; {last:.0f} % stay right where anything can be reached"
    why = f"; a larger radius helps the defender ({', '.join(rising)})" if rising else ""
    data = {"eps": radii, "percent": list(accuracy.values()), "n": len(sweep[radii[0]])}
    return _compared("eps sweep", passed, detail, why, data)


def _step_sweep(steps: dict[int, Tensor]) -> CheckResult:
    counts = list(steps)
    last = steps[counts[-1]]
    rising = [str(count) for count in counts[:-1] if _stronger(steps[count], last)]
    detail = ", ".join(f"{count} steps: {_percent(right):.0f} %" for count, right in steps.items())
    why = f"; {counts[-1]} steps leave the defender more than {', '.join(rising)}"
    data = {"steps": counts, "percent": [_percent(right) for right in steps.values()], "n": len(last)}
    return _compared("step sweep", not rising, detail, why, data)


def _not_stronger(name: str, attack: str, weaker: Tensor, white_box: Tensor) -> CheckResult:
    detail = f"{attack}: {_percent(weaker):.0f} % right, adaptive PGD-{STEPS[-1]}: {_percent(white_box):.0f} %"
    data = {"percent": _percent(weaker), "white_box_percent": _percent(white_box), "n": len(weaker)}
    why = "; another attacker is the stronger one"
    return _compared(name, not _stronger(weaker, white_box), detail, why, data)


def _compared(name: str, passed: bool, detail: str, why_not: str, data: dict) -> CheckResult:
    """A check by the sign test, which on too few images (`data["n"]`) finds nothing and so has nothing passed."""
    if passed and data["n"] < LEAST_TOLD:
        return CheckResult(name, None, detail + TOO_FEW, data)
    return CheckResult(name, passed, detail if passed else detail + why_not, data)


def _stronger(a: Tensor, b: Tensor) -> bool:
    """Whether attack `a`, of which (N,) images stayed right, breaks more of them than `b` beyond chance: sign test."""
    from scipy.stats import binomtest

    only_a, only_b = int((~a & b).sum()), int((a & ~b).sum())
    if only_a <= only_b:
        return False
    return binomtest(only_a, only_a + only_b, alternative="greater").pvalue < SIGNIFICANCE
