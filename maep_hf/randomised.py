"""Randomised purification, the mean over random masks at test time, and how to tell whether a model is random."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .classifier import PixelClassifier, PurifiedClassifier, find_purify
from .defences import _check_integer, call_purifier, check_purifier
from .random_states import random_states_kept, seed_everything


class RandomisedPurifier(nn.Module):
    """Purify under `draws` random masks and take the mean of the results.

    Every image of every draw has a mask of its own. One call takes one number from PyTorch's global CPU generator,
    which seeds all its masks: `torch.manual_seed` repeats them, on any device; of images in windows with the same
    `window_batch_size`, whose default is another on another device. Differentiable through all draws. The purifier is
    put into eval mode here and nothing else of it is changed.

    An attack on it must average its gradient over calls (EOT), and its accuracy is that of repeated final passes.

    Args:
        purifier: has `purify(pixel_values, mask_ratio=, generator=)`, as a `MAEPModel` has, also wrapped by PEFT.
        mask_ratio: share of the patches to hide, in [0, 1). 0: one plain pass, deterministic, and `draws` is 1.
        draws: how many masks, at least 1. Time grows in proportion, and so does memory with gradients.
        seed: a number: every call on a batch uses the same masks. An image alone or at another place of a batch gets
            others, so the purifier still counts as random. None: new masks in every call.
        purify_kwargs: further arguments of `purify`, e.g. `{"overlap": 0.5}`.

    Attributes:
        randomised: whether two calls on one image differ.

    Raises:
        TypeError: the purifier takes no random mask, or an option has the wrong type.
        ValueError: an option is out of range, or a positive `mask_ratio` hides no patch.
    """

    def __init__(
        self,
        purifier: Any,
        mask_ratio: float = 0.5,
        draws: int = 1,
        *,
        seed: int | None = None,
        purify_kwargs: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        check_purifier(purifier)
        parameters = inspect.signature(find_purify(purifier) or purifier).parameters
        if not {"mask_ratio", "generator"} <= set(parameters):
            raise TypeError(
                f"`purifier` must have a method purify(pixel_values, mask_ratio=, generator=), as MAEPModel has; "
                f"{type(purifier).__name__} has none. Leave it as it is: `is_randomised` says whether it is random."
            )
        if isinstance(mask_ratio, bool) or not isinstance(mask_ratio, int | float):
            raise TypeError(f"mask_ratio={mask_ratio!r} must be a number.")
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio={mask_ratio} must be at least 0 and less than 1.")
        _check_integer("draws", draws, 1)
        if seed is not None:
            _check_integer("seed", seed, 0, 2**63 - 1)
        set_twice = sorted({"mask_ratio", "generator"} & set(purify_kwargs or {}))
        if set_twice:
            raise TypeError(f"`purify_kwargs` must not have {', '.join(set_twice)}: use `mask_ratio` and `seed`.")
        num_patches = getattr(getattr(purifier, "config", None), "num_patches", None)
        if mask_ratio and isinstance(num_patches, int) and min(round(num_patches * mask_ratio), num_patches - 1) == 0:
            raise ValueError(f"mask_ratio={mask_ratio} hides none of {num_patches} patches: raise it, or give 0.")
        self.purifier = purifier
        self.mask_ratio = float(mask_ratio)
        self.draws = draws if mask_ratio else 1
        self.seed = seed
        self.purify_kwargs = dict(purify_kwargs or {})
        self.eval()

    @property
    def randomised(self) -> bool:
        """Whether one image may come out in more than one way: a mask is drawn. A seed repeats the masks of a batch,
        but which of them an image gets still depends on its place in it."""
        return self.mask_ratio > 0

    @property
    def config(self) -> Any:
        """The purifier's configuration, or None."""
        return getattr(self.purifier, "config", None)

    def purify(self, pixel_values: Tensor, generator: torch.Generator | None = None, **purify_kwargs: Any) -> Tensor:
        """The mean of the purified images: (B, C, H, W) in [0, 1], of the shape and dtype of `pixel_values`.

        Args:
            pixel_values: (B, C, H, W) in [0, 1], any size that the purifier takes.
            generator: draws the masks instead of the global one, or of `seed`.
            **purify_kwargs: further arguments of the purifier's `purify`, over those given before.

        Raises:
            TypeError, ValueError: see `call_purifier` and the purifier.
        """
        options = self.purify_kwargs | purify_kwargs
        if not self.mask_ratio:
            return call_purifier(self.purifier, pixel_values, mask_ratio=0.0, generator=None, **options)
        if generator is None:
            seed = torch.randint(2**62, ()).item() if self.seed is None else self.seed
            generator = torch.Generator().manual_seed(seed)
        total = None
        for _ in range(self.draws):
            purified = call_purifier(
                self.purifier, pixel_values, mask_ratio=self.mask_ratio, generator=generator, **options
            )
            if self.draws == 1:
                return purified
            part = purified.to(torch.promote_types(purified.dtype, torch.float32))
            total = part if total is None else total + part
        return (total / self.draws).to(purified.dtype)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """As `purify`."""
        return self.purify(pixel_values, **kwargs)

    def record(self) -> dict[str, Any]:
        """Its parameters, JSON; `purify_kwargs` must be so too."""
        return {
            "mask_ratio": self.mask_ratio,
            "draws": self.draws,
            "seed": self.seed,
            "purify_kwargs": dict(self.purify_kwargs),
            "randomised": self.randomised,
        }

    def extra_repr(self) -> str:
        return f"mask_ratio={self.mask_ratio:g}, draws={self.draws}, seed={self.seed}"


@torch.no_grad()
def is_randomised(module: Callable[..., Any], pixels: Tensor, passes: int = 3) -> bool:
    """Whether a purifier, a classifier or both together answer one input in more than one way.

    True where the module, or a module within it, declares `randomised = True`; else where `passes` runs on `pixels`,
    each from another random state, do not agree. The random states of PyTorch (CPU, CUDA, MPS), NumPy and Python are
    left as they were; a generator that the module keeps for itself moves on, as in any call. Differences below 1e-5
    of the largest value are taken for rounding. The module is run in the mode it is in.

    Args:
        module: anything with a method `purify`, a `PurifiedClassifier`, or a module or callable that takes images and
            returns a tensor (or an object with `logits` or `purified_pixel_values`).
        pixels: (B, C, H, W) in [0, 1], a few images. A defence that acts on rare occasions needs more of them, or
            more passes, to be seen.
        passes: at least 2.

    Raises:
        TypeError: the module cannot be called or returns no tensor.
        ValueError: fewer than 2 passes, or no images.
    """
    check_purifier(module)
    _check_integer("passes", passes, 2)
    if not pixels.numel():
        raise ValueError("`pixels` has no images: give at least one.")
    parts = module.modules() if isinstance(module, nn.Module) else [module]
    if any(getattr(part, "randomised", False) is True for part in parts):
        return True
    whole = isinstance(module, PurifiedClassifier | PixelClassifier)  # their method `purify` is only the first half
    run = module if whole else find_purify(module) or module
    with random_states_kept():
        first = None
        for seed in range(passes):
            seed_everything(seed)
            output = _tensor(run(pixels))
            if first is None:
                first = output
                continue
            tolerance = 1e-5 * first.abs().nan_to_num(0, 0, 0).max().clamp_min(1e-30).item()
            if not torch.allclose(output, first, rtol=0, atol=tolerance, equal_nan=True):
                return True
    return False


def _tensor(output: Any) -> Tensor:
    for name in ("logits", "purified_pixel_values"):
        output = getattr(output, name, output)
    if not isinstance(output, Tensor):
        raise TypeError(f"`module` must return a tensor, or an object with `logits`, got {type(output).__name__}.")
    return output.detach().clone()
