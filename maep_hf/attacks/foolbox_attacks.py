"""Attacks of foolbox 3.3.4 (Rauber et al. 2020): one table, and a class for each way they have to be called."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Attack, AttackSpec, Option, import_library, perturbation_size
from .guard import Watched

GRADIENT_STEPS = {
    "fgsm": {"relative_step": 1.0, "steps": 1, "random_start": False},
    "fgsm-rs": {"relative_step": 1.25, "steps": 1, "random_start": True},  # Wong et al. 2020
    "bim": {"relative_step": 0.2, "random_start": False},
    "mi-fgsm": {"relative_step": None, "random_start": False, "gradient_norm": "L1"},  # Dong et al. 2018: eps / steps
    "pgd": {"relative_step": 0.25},
    "eot-pgd": {"relative_step": 0.25},
    "sparse-l1-descent": {"relative_step": 0.2, "random_start": False},
}
"""What tells the gradient attacks apart: the default step over eps, and what is no option of theirs."""
SMALLEST_NORM = 1e-12
"""Of foolbox, which divides by no less."""


@dataclass(frozen=True)
class FoolboxAttack(Attack):
    """An attack that foolbox runs as it is; its options are those of the foolbox class."""

    library = "foolbox"

    def __post_init__(self) -> None:
        self.build(import_library(self.library))  # refuses what foolbox refuses

    def run(self, model: Watched, pixels: Tensor, labels: Tensor, seed: int) -> Tensor:
        foolbox = import_library(self.library)
        with warnings.catch_warnings():
            for module in ("foolbox", "scipy", "torch.functional"):  # names that have moved, and what we handle here
                warnings.filterwarnings("ignore", module=module)
            wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=pixels.device)
            return self.attack(foolbox, wrapped, pixels, labels)

    def attack(self, foolbox: Any, model: Any, pixels: Tensor, labels: Tensor) -> Tensor:
        """Attacked images (B, C, H, W), of foolbox's model."""
        _, clipped, _ = self.build(foolbox)(model, pixels, labels, epsilons=self.radius)
        return clipped

    def build(self, foolbox: Any) -> Any:
        """The foolbox attack."""
        return self.foolbox_class(foolbox)(**self.options)

    def foolbox_class(self, foolbox: Any) -> type:
        return getattr(foolbox.attacks, self.spec.implementations[self.norm])


@dataclass(frozen=True)
class GradientAttack(FoolboxAttack):
    """FGSM and its iterations: the last iterate; of several restarts the first that fools the model, image by image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        values = self.parameters()
        if self.norm == "Linf" and values["step_size"] < 0.1 and values["steps"] * values["step_size"] < self.eps:
            warnings.warn(
                f"step_size: {values['steps']} x {values['step_size']:g} is far from filling a ball of {self.eps:g}; "
                "for Linf it is in units of 1/255, as eps: 2, not 2/255",
                stacklevel=5,
            )

    @property
    def name(self) -> str:
        steps = f"-{self.options['steps']}" if "steps" in self.options else ""
        eot = f"+EOT-{self.options['eot_samples']}" if self.options["eot_samples"] > 1 else ""
        restarts = self.options.get("restarts", 1)
        return f"{self.spec.title}{steps}{eot}" + (f" ({restarts} restarts)" if restarts > 1 else "")

    def parameters(self) -> dict[str, Any]:
        values = GRADIENT_STEPS[self.spec.name] | self.options
        relative = values.pop("relative_step") or 1 / values["steps"]
        return values | {"step_size": values.get("step_size") or relative * self.eps}

    def build(self, foolbox: Any) -> Any:
        values = self.parameters()
        values["abs_stepsize"] = self.in_pixels(values["step_size"])
        kind = raised(self.foolbox_class(foolbox))
        taken = inspect.signature(kind).parameters
        kind = averaged(kind, values["eot_samples"]) if values["eot_samples"] > 1 else kind
        attack = kind(**{name: value for name, value in values.items() if name in taken})
        return attack if values.get("restarts", 1) == 1 else attack.repeat(values["restarts"])


@dataclass(frozen=True)
class MomentumAttack(GradientAttack):
    """MI-FGSM: gradients are divided by their L1 norm before they are summed up (Dong et al. 2018, eq. 6).

    Foolbox divides them by the norm of the ball, in Linf by taking their signs, of which opposite ones cancel out.
    """

    def foolbox_class(self, foolbox: Any) -> type:
        from foolbox.attacks.gradient_descent_base import normalize_lp_norms

        def normalize(self: Any, gradients: Any, *, x: Any, bounds: Any) -> Any:
            return normalize_lp_norms(gradients, p=1)

        kind = super().foolbox_class(foolbox)
        return type(f"L1Normalised{kind.__name__}", (kind,), {"normalize": normalize})


def raised(kind: type) -> type:
    """A foolbox gradient attack that follows the smallest gradients too, as those of a confident model.

    Foolbox takes norms for 1e-12 at least, so that in L2 and L1 a smaller gradient makes hardly a step. Those that are
    not as small are left as they are, and so is what comes of them.
    """

    def normalize(self: Any, gradients: Any, **context: Any) -> Any:
        raw = gradients.raw
        largest = raw.abs().flatten(1).amax(1).view(-1, *[1] * (raw.ndim - 1))
        small = (largest > 0) & (largest < SMALLEST_NORM)
        if small.any():
            gradients = type(gradients)(torch.where(small, raw / largest, raw))
        return super(raising, self).normalize(gradients, **context)

    raising = type(f"Raised{kind.__name__}", (kind,), {"normalize": normalize})
    return raising


def averaged(kind: type, samples: int) -> type:
    """A foolbox gradient attack whose every gradient is the mean of `samples` passes (EOT, Athalye et al. 2018)."""

    def value_and_grad(self: Any, loss_fn: Callable, x: Any) -> tuple[Any, Any]:
        value, gradient = super(averaging, self).value_and_grad(loss_fn, x)
        for _ in range(samples - 1):
            another, other = super(averaging, self).value_and_grad(loss_fn, x)
            value, gradient = value + another, gradient + other
        return value / samples, gradient / samples

    averaging = type(f"EOT{kind.__name__}", (kind,), {"value_and_grad": value_and_grad})
    return averaging


@dataclass(frozen=True)
class MinimumNormAttack(FoolboxAttack):
    """Attacks that look for the smallest perturbation; with an eps, what is found is clipped to the ball."""

    def attack(self, foolbox: Any, model: Any, pixels: Tensor, labels: Tensor) -> Tensor:
        attack = self.build(foolbox)
        if self.norm == "L0":  # foolbox cannot clip to an L0 ball
            found, clipped, _ = attack(model, pixels, labels, epsilons=None)
            lost = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
            if self.eps is not None:
                lost = (perturbation_size(pixels, found, "L0") > self.eps).to(pixels.device)
        else:
            found, clipped, _ = attack(model, pixels, labels, epsilons=self.radius)
            lost = (found == 0).flatten(1).all(1)  # CW and EAD return a black image where they find nothing
        return torch.where(lost.view(-1, 1, 1, 1), pixels, clipped)


@dataclass(frozen=True)
class DecisionAttack(FoolboxAttack):
    """Attacks on the predicted class alone, from a start that the model has wrong: images blended with random noise.

    Images that are wrong already, and those for which no start is found, come back as they are.
    """

    def attack(self, foolbox: Any, model: Any, pixels: Tensor, labels: Tensor) -> Tensor:
        def predict(images: Tensor) -> Tensor:
            return model(images).argmax(-1)

        self._expect_determinism(model, pixels)
        attacked = pixels.clone()
        rows = (predict(pixels) == labels).nonzero().squeeze(1)
        if len(rows) == 0:
            return attacked
        search = foolbox.attacks.LinearSearchBlendedUniformNoiseAttack(
            steps=50, directions=self.options["init_directions"]
        )
        starts = search.run(model, pixels[rows], labels[rows]).clamp(0, 1)
        wrong = predict(starts) != labels[rows]
        while not wrong.all():  # again on those that are left: a batch's size may move a logit by a float error
            rows, starts = rows[wrong], starts[wrong]
            if len(rows) == 0:
                return attacked
            wrong = predict(starts) != labels[rows]
        try:
            _, found, _ = self.build(foolbox)(
                model, pixels[rows], labels[rows], epsilons=self.radius, starting_points=starts
            )
        except AssertionError as error:
            raise RuntimeError(f"{self.name} lost its starting points; {_RANDOM}") from error
        attacked[rows] = found
        return attacked

    def build(self, foolbox: Any) -> Any:
        options = {name: value for name, value in self.options.items() if name != "init_directions"}
        if self.spec.name == "hopskipjump":
            options["constraint"] = self.norm.lower()
        return self.foolbox_class(foolbox)(**options)

    def _expect_determinism(self, model: Any, pixels: Tensor) -> None:
        if not torch.allclose(model(pixels), model(pixels), rtol=1e-3, atol=1e-4):
            raise ValueError(f"{self.name} cannot be run here: {_RANDOM}")


_RANDOM = "it needs a model that answers the same twice; use square for a randomised one"


def _norms(pattern: str, *norms: str) -> dict[str | None, str]:
    return {norm: pattern.format(norm) for norm in norms}


EOT = Option(1, int, "passes that each gradient is averaged over")
RESTARTS = Option(1, int, "runs, of which the worst counts for each image")
STEP_SIZE = Option(None, float, "in the unit of eps", positive=True)
START = Option(True, bool, "start at a random point of the ball")
INIT_DIRECTIONS = Option(1000, int, "noise images tried for a start")
BALLS = ("Linf", "L2", "L1")


def _steps(default: int) -> Option:
    return Option(default, int, "gradient steps")


def _pgd(name: str, eot: int, description: str) -> AttackSpec:
    options = {"steps": _steps(20), "step_size": STEP_SIZE, "restarts": RESTARTS}
    options |= {"eot_samples": Option(eot, int, EOT.about), "random_start": START}
    return AttackSpec(
        name, "PGD", description, GradientAttack, _norms("{}ProjectedGradientDescentAttack", *BALLS), options
    )


SPECS = (
    AttackSpec(
        "fgsm", "FGSM", "one signed step (Goodfellow et al. 2015)", GradientAttack,
        _norms("{}FastGradientAttack", *BALLS), {"eot_samples": EOT},
    ),
    AttackSpec(
        "fgsm-rs", "FGSM-RS", "one step of 1.25 eps from a random start (Wong et al. 2020)", GradientAttack,
        _norms("{}ProjectedGradientDescentAttack", *BALLS),
        {"step_size": STEP_SIZE, "restarts": RESTARTS, "eot_samples": EOT},
    ),
    AttackSpec(
        "bim", "BIM", "iterated FGSM (Kurakin et al. 2017)", GradientAttack,
        _norms("{}BasicIterativeAttack", *BALLS), {"steps": _steps(10), "step_size": STEP_SIZE, "eot_samples": EOT},
    ),
    AttackSpec(
        "mi-fgsm", "MI-FGSM", "iterated FGSM with momentum (Dong et al. 2018)", MomentumAttack,
        _norms("{}MomentumIterativeFastGradientMethod", *BALLS),
        {
            "steps": _steps(10), "step_size": STEP_SIZE, "eot_samples": EOT,
            "momentum": Option(1.0, float, "decay of the accumulated gradient"),
        },
    ),
    _pgd("pgd", 1, "projected gradient descent from a random start (Madry et al. 2018); pgd-100 has 100 steps"),
    _pgd("eot-pgd", 20, "PGD on gradients averaged over passes, for randomised models (Athalye et al. 2018)"),
    AttackSpec(
        "sparse-l1-descent", "SLIDE", "PGD with sparse steps (Tramer & Boneh 2019)", GradientAttack,
        {"L1": "SparseL1DescentAttack"},
        {
            "steps": _steps(20), "step_size": STEP_SIZE, "restarts": RESTARTS, "eot_samples": EOT,
            "quantile": Option(0.99, float, "share of the values that a step leaves alone"),
        },
    ),
    AttackSpec(
        "cw-l2", "CW-L2", "smallest L2 perturbation by penalty (Carlini & Wagner 2017)", MinimumNormAttack,
        {"L2": "L2CarliniWagnerAttack"},
        {
            "steps": _steps(1000),
            "binary_search_steps": Option(9, int, "steps of the search for the penalty's weight"),
            "stepsize": Option(0.01, float, "learning rate of Adam", positive=True),
            "confidence": Option(0.0, float, "margin between the logits that is asked for"),
            "initial_const": Option(1e-3, float, "first weight of the penalty", positive=True),
            "abort_early": Option(True, bool, "stop where the loss no longer falls"),
        },
        unbounded=True,
    ),
    AttackSpec(
        "deepfool", "DeepFool", "steps to the linearised boundary (Moosavi-Dezfooli et al. 2016)", MinimumNormAttack,
        _norms("{}DeepFoolAttack", "Linf", "L2"),
        {
            "steps": _steps(50),
            "candidates": Option(10, int, "likeliest classes considered"),
            "overshoot": Option(0.02, float, "how far beyond the boundary, relative"),
        },
        unbounded=True,
    ),
    AttackSpec(
        "ead", "EAD", "elastic-net attack (Chen et al. 2018)", MinimumNormAttack, {"L1": "EADAttack"},
        {
            "steps": _steps(1000),
            "binary_search_steps": Option(9, int, "steps of the search for the penalty's weight"),
            "initial_stepsize": Option(0.01, float, "first step size", positive=True),
            "confidence": Option(0.0, float, "margin between the logits that is asked for"),
            "initial_const": Option(1e-3, float, "first weight of the penalty", positive=True),
            "regularization": Option(0.01, float, "weight of the L1 norm"),
            "decision_rule": Option("EN", str, "what the best one is the smallest in", ("EN", "L1")),
            "abort_early": Option(True, bool, "stop where the loss no longer falls"),
        },
        unbounded=True,
    ),
    AttackSpec(
        "ddn", "DDN", "direction and norm decoupled (Rony et al. 2019)", MinimumNormAttack, {"L2": "DDNAttack"},
        {
            "steps": _steps(100),
            "init_epsilon": Option(1.0, float, "first radius, in pixels", positive=True),
            "gamma": Option(0.05, float, "relative change of the radius a step"),
        },
        unbounded=True,
    ),
    AttackSpec(  # without L2: foolbox 3.3.4 forgets to project there
        "fmn", "FMN", "fast minimum norm (Pintor et al. 2021)", MinimumNormAttack,
        {"Linf": "LInfFMNAttack", "L1": "L1FMNAttack", "L0": "L0FMNAttack"},
        {
            "steps": _steps(100),
            "max_stepsize": Option(1.0, float, "first step size", positive=True),
            "gamma": Option(0.05, float, "relative change of the radius a step"),
        },
        unbounded=True,
    ),
    AttackSpec(
        "boundary", "Boundary", "random walk along the boundary (Brendel et al. 2018)", DecisionAttack,
        {"L2": "BoundaryAttack"},
        {
            "steps": Option(25000, int, "steps of the walk"),
            "spherical_step": Option(0.01, float, "first step around the image", positive=True),
            "source_step": Option(0.01, float, "first step towards the image", positive=True),
            "step_adaptation": Option(1.5, float, "factor by which the steps change", positive=True),
            "init_directions": INIT_DIRECTIONS,
        },
        needs_gradient=False, unbounded=True,
    ),
    AttackSpec(
        "hopskipjump", "HopSkipJump", "boundary's gradient estimated from decisions (Chen et al. 2020)", DecisionAttack,
        _norms("HopSkipJumpAttack", "Linf", "L2"),
        {
            "steps": Option(64, int, "estimates of the gradient"),
            "initial_gradient_eval_steps": Option(100, int, "queries of the first estimate"),
            "max_gradient_eval_steps": Option(10000, int, "queries of any estimate; memory grows with them"),
            "stepsize_search": Option(
                "geometric_progression", str, "how a step is chosen", ("geometric_progression", "grid_search")
            ),
            "gamma": Option(1.0, float, "width of the search for the boundary"),
            "init_directions": INIT_DIRECTIONS,
        },
        needs_gradient=False, unbounded=True,
    ),
    AttackSpec(
        "spatial", "Spatial", "rotation and translation (Engstrom et al. 2019)", FoolboxAttack, {None: "SpatialAttack"},
        {
            "max_translation": Option(3.0, float, "pixels"),
            "max_rotation": Option(30.0, float, "degrees"),
            "num_translations": Option(5, int, "points of the grid a direction"),
            "num_rotations": Option(5, int, "points of the grid"),
            "grid_search": Option(True, bool, "search a grid, otherwise at random"),
            "random_steps": Option(100, int, "draws of the random search"),
        },
        needs_gradient=False,
    ),
    AttackSpec(
        "additive-noise", "Additive noise", "the worst of many draws of noise: uniform for Linf, Gaussian for L2",
        FoolboxAttack,
        {
            "Linf": "LinfRepeatedAdditiveUniformNoiseAttack",
            "L2": "L2ClippingAwareRepeatedAdditiveGaussianNoiseAttack",
        },
        {"repeats": Option(100, int, "draws")}, needs_gradient=False,
    ),
    AttackSpec(
        "salt-and-pepper", "Salt and pepper", "as few black and white pixels as fool the model", MinimumNormAttack,
        {"L2": "SaltAndPepperNoiseAttack"},
        {
            "steps": Option(1000, int, "draws"),
            "across_channels": Option(True, bool, "change all channels of a pixel"),
        },
        needs_gradient=False, unbounded=True,
    ),
    AttackSpec(
        "blur-search", "Blur search", "as little Gaussian blur as fools the model", FoolboxAttack,
        {None: "GaussianBlurAttack"},
        {
            "steps": Option(100, int, "strengths tried"),
            "max_sigma": Option(None, float, "the strongest, in pixels; the image's side", positive=True),
        },
        needs_gradient=False,
    ),
    AttackSpec(
        "contrast-reduction", "Contrast reduction", "towards grey, as far as the ball allows", FoolboxAttack,
        {"L2": "L2ContrastReductionAttack"}, {"target": Option(0.5, float, "the grey, in [0, 1]")},
        needs_gradient=False,
    ),
)  # fmt: skip
