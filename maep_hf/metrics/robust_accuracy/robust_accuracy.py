"""Accuracy on attacked images with its interval, and robust accuracy against the same images before the attack."""

import datasets
import evaluate
import numpy as np

from maep_hf.evaluation.statistics import share

_DESCRIPTION = """\
Share of attacked images that a (purified) classifier still names rightly, with Wilson's 95 % interval. With the
predictions on the clean images beside them it also gives the clean accuracy, the share named rightly both before and
after the attack, and the attack's success rate.
"""

_INPUTS = """
Args:
    predictions: N class indices predicted on the attacked images.
    references: N true class indices.
    clean_predictions (optional): N class indices predicted on the same images before the attack, in the same order.
        An argument of `compute`; of `add` and `add_batch` as well in the configuration "with_clean".

Returns:
    accuracy: share of the attacked images named rightly, 0 to 1.
    correct, n: the counts it is made of.
    interval_95: its Wilson interval [low, high], 0 to 1.
  and with `clean_predictions`
    clean_accuracy, clean_correct, clean_interval_95: the same on the images before the attack.
    robust_accuracy, robust_correct, robust_interval_95: named rightly before and after it.
    attack_success_rate: of the images named rightly before, the share that the attack turned; None if there were none.

Raises:
    ValueError: no predictions, different numbers of them, or a value that is no class index (0, 1, 2, ...).

Examples:
    >>> import evaluate
    >>> from maep_hf import metrics
    >>> robust_accuracy = evaluate.load(metrics.path("robust_accuracy"))
    >>> result = robust_accuracy.compute(predictions=[0, 1, 2, 0], references=[0, 1, 2, 3])
    >>> result["accuracy"], result["correct"], result["n"]
    (0.75, 3, 4)
"""

_CONFIGURATIONS = {
    "default": ("predictions", "references"),
    "with_clean": ("predictions", "references", "clean_predictions"),
}
# columns of the package's other module: `combine` hands every argument of `compute` to every module
_OF_OTHERS = {"purified_images", "clean_images"}


class RobustAccuracy(evaluate.Metric):
    """See `_DESCRIPTION` and `_INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in _CONFIGURATIONS:
            raise ValueError(f"config_name: {self.config_name!r} is none of {', '.join(_CONFIGURATIONS)}")
        # float64 holds every index; an integer column would cut probabilities down to class 0 without a word
        columns = {name: datasets.Value("float64") for name in _CONFIGURATIONS[self.config_name]}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(columns),
            format="numpy",
        )

    def _compute(self, predictions, references, clean_predictions=None, **others) -> dict:
        if unknown := set(others) - _OF_OTHERS:
            raise ValueError(f"{', '.join(sorted(unknown))}: no argument of robust_accuracy")
        references = _class_indices("references", references)
        predictions = _class_indices("predictions", predictions, len(references))
        hits = predictions == references
        result = _named("", "accuracy", hits)
        if clean_predictions is None:
            return result
        clean_hits = _class_indices("clean_predictions", clean_predictions, len(references)) == references
        result |= _named("clean_", "clean_accuracy", clean_hits)
        result |= _named("robust_", "robust_accuracy", hits & clean_hits)
        before, kept = result["clean_correct"], result["robust_correct"]
        return result | {"attack_success_rate": (before - kept) / before if before else None}


def _named(prefix: str, accuracy: str, hits: np.ndarray) -> dict:
    figures = share(hits)
    named = {
        accuracy: figures["correct"] / figures["n"],
        f"{prefix}correct": figures["correct"],
        f"{prefix}interval_95": [bound / 100 for bound in figures["interval_95"]],
    }
    return named if prefix else named | {"n": figures["n"]}


def _class_indices(name: str, values, count: int | None = None) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: not a list of class indices ({error})") from None
    if array.ndim != 1:
        raise ValueError(f"{name}: shape {array.shape}, but one class index an image is needed; for logits take argmax")
    if len(array) == 0:
        raise ValueError(f"{name}: empty, there is nothing to measure")
    if count is not None and len(array) != count:
        raise ValueError(f"{name}: {len(array)} of them, but {count} references")
    wrong = ~((array >= 0) & (array == np.floor(array)) & np.isfinite(array))
    if wrong.any():
        index = int(wrong.argmax())
        raise ValueError(f"{name}: {array[index]:g} at position {index} is no class index (0, 1, 2, ...)")
    return array
