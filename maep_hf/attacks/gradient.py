"""First-order L-infinity and L2 attacks for training and quick validation, all as one iteration.

FGSM (Goodfellow et al. 2015), FGSM with random start (Wong et al. 2020), BIM, MI-FGSM (Dong et al. 2018) and PGD
(Madry et al. 2018) differ only in the number of steps, the step size, the start and the momentum; DI-FGSM (Xie et al.
2019) and TI-FGSM (Dong et al. 2019) in what they do to the image or its gradient. Each sample of a batch carries its
own set of those, so a mixed batch costs no more than its gradients. Evaluation uses attack libraries instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

Classifier = Callable[[Tensor], Tensor]


@dataclass
class AttackParameters:
    """Parameters of each sample's attack, tensors of shape (B,) unless said otherwise.

    Args:
        eps: radius in pixel units ([0, 1], so 8/255 is 0.0314), in the L2 norm that of the whole image.
        step_size: step in the same units.
        steps: number of gradient steps; with 0 the start is the attacked image.
        momentum: decay of the accumulated gradient (MI-FGSM uses 1, the others 0).
        start: start point in units of eps, in [-1, 1], shape (B, C, H, W) (0 starts at the clean image); in the L2
            norm of length 1 at most.
        surrogate: index of the classifier that the sample is attacked on.
        l2: whether the ball and the steps are those of the L2 norm; bool.
        smoothing: standard deviation, pixels, of the Gaussian that the gradient is smoothed by (TI-FGSM); 0 is off.
        views: how each step sees the image (DI-FGSM), shape (B, any number, 3), used in turns: its scale, in (0, 1],
            and where it lies in the room left on black, across and down, in [-1, 1]. Scale 1 is the image itself, no
            views at all are too.
    """

    eps: Tensor
    step_size: Tensor
    steps: Tensor
    momentum: Tensor
    start: Tensor
    surrogate: Tensor
    l2: Tensor
    smoothing: Tensor
    views: Tensor

    @classmethod
    def from_batch(cls, batch: dict[str, Tensor]) -> AttackParameters:
        """Collect the parameters that [`AttackMixture.draw`] put into a batch."""
        return cls(**{field.name: batch[f"attack_{field.name}"] for field in fields(cls)})


def perturb(
    classifiers: Sequence[Classifier],
    pixel_values: Tensor,
    labels: Tensor | None,
    parameters: AttackParameters,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Attack every sample by its own parameters: ascend the cross-entropy inside the eps ball and [0, 1].

    Args:
        classifiers: frozen surrogates from [0, 1] pixels to logits.
        pixel_values: (B, C, H, W) in [0, 1], float32 (in 16 bits rounding passes the radius).
        labels: (B,) integers; `None` or negative entries stand for the surrogate's own prediction on the clean image.
        parameters: see [`AttackParameters`].
        names: what an error calls the classifiers; their places by default.

    Returns:
        Attacked images, same shape, detached; `|x_a - x| <= eps` holds for every pixel, or for the image's length.

    Raises:
        ValueError: pixels in 16 bits, or a classifier whose logits or gradients are not finite on some image, which
            would then be left as it is and still pass for attacked.
    """
    x = pixel_values.detach()
    if x.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"pixel_values: float32 is needed to keep a radius of a few 255ths, got {x.dtype}; use .float()"
        )
    if not len(x):
        return x.clone()
    eps, step_size, momentum = (
        value.to(x).view(-1, 1, 1, 1) for value in (parameters.eps, parameters.step_size, parameters.momentum)
    )
    lower, upper = (x - eps).clamp_(min=0), (x + eps).clamp_(max=1)
    l2 = parameters.l2.to(x.device).view(-1, 1, 1, 1)
    any_l2 = bool(parameters.l2.any())
    smoothing = parameters.smoothing.to(x)
    any_smoothing = bool((smoothing > 0).any())
    views = parameters.views.to(x)

    def project(moved: Tensor, rows: Tensor | slice) -> Tensor:
        inside = torch.minimum(torch.maximum(moved, lower[rows]), upper[rows])
        if not any_l2:
            return inside
        change = moved - x[rows]
        shrunk = x[rows] + change * (eps[rows] / _length(change)).clamp(max=1)
        return torch.where(l2[rows], shrunk.clamp(0, 1), inside)

    adversarial = project(x + eps * parameters.start.to(x), slice(None))
    labels = _complete_labels(classifiers, x, labels, parameters.surrogate)
    direction = torch.zeros_like(x)
    finite = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for step in range(int(parameters.steps.max())):
        for index, classifier in enumerate(classifiers):
            rows = ((parameters.steps > step) & (parameters.surrogate == index)).nonzero().squeeze(1)
            if len(rows) == 0:
                continue
            view = views[rows, step % views.shape[1]] if views.shape[1] else None
            gradient = input_gradient(classifier, adversarial[rows], labels[rows], view)
            if any_smoothing:
                gradient = _smooth(gradient, smoothing[rows])
            norm = gradient.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
            finite[rows] &= norm.isfinite().flatten()  # neither is that of a gradient, or of logits, with NaN or inf
            direction[rows] = momentum[rows] * direction[rows] + gradient / norm
            unit = direction[rows].sign()
            if any_l2:
                unit = torch.where(l2[rows], direction[rows] / _length(direction[rows]), unit)
            adversarial[rows] = project(adversarial[rows] + step_size[rows] * unit, rows)
    if not finite.all():  # asked once a batch, for a GPU has to finish for it
        lost = parameters.surrogate.to(x.device)[~finite].tolist()
        places = [names[index] if names else f"classifier {index + 1}" for index in sorted(set(lost))]
        raise ValueError(
            f"logits or gradients of {', '.join(places)} are not finite (NaN, inf) on {len(lost)} of {len(x)} images, "
            "which cannot be attacked on it: give other surrogates, mend its weights or preprocessing, or run it in "
            "float32"
        )
    return adversarial


def pgd(
    classifier: Classifier,
    pixel_values: Tensor,
    labels: Tensor | None,
    *,
    eps: float = 8.0,
    steps: int = 20,
    step_size: float = 2.0,
    random_start: bool = True,
    seed: int = 0,
    name: str = "the classifier",
) -> Tensor:
    """PGD with one set of parameters for the whole batch; `eps` and `step_size` in units of 1/255.

    Returns:
        Attacked images (B, C, H, W) in [0, 1], detached.

    Raises:
        ValueError: as [`perturb`], which calls the classifier `name`.
    """
    size = (len(pixel_values),)
    generator = torch.Generator().manual_seed(seed)
    start = (
        torch.rand(pixel_values.shape, generator=generator) * 2 - 1 if random_start else torch.zeros(pixel_values.shape)
    )
    device = pixel_values.device
    parameters = AttackParameters(
        eps=torch.full(size, eps / 255, device=device),
        step_size=torch.full(size, step_size / 255, device=device),
        steps=torch.full(size, steps, device=device),
        momentum=torch.zeros(size, device=device),
        start=start.to(device),
        surrogate=torch.zeros(size, dtype=torch.long, device=device),
        l2=torch.zeros(size, dtype=torch.bool, device=device),
        smoothing=torch.zeros(size, device=device),
        views=torch.ones((*size, 0, 3), device=device),
    )
    return perturb([classifier], pixel_values, labels, parameters, [name])


def _length(change: Tensor) -> Tensor:
    """L2 norm of every image, (B, 1, 1, 1)."""
    return torch.linalg.vector_norm(change, dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(change.dtype).tiny)


def input_gradient(classifier: Classifier, pixel_values: Tensor, labels: Tensor, view: Tensor | None = None) -> Tensor:
    """Gradient of the cross-entropy at the pixels, of each image on its own, (B, C, H, W).

    Args:
        classifier: pixels to logits.
        pixel_values: (B, C, H, W).
        labels: (B,).
        view: what the classifier sees in place of the images, (B, 3) as in [`AttackParameters`].
    """
    with torch.inference_mode(False), torch.enable_grad():
        # what was made in inference mode takes no part in a gradient, its copy does
        pixel_values, labels = (each.clone() if each.is_inference() else each for each in (pixel_values, labels))
        leaf = pixel_values.detach().requires_grad_()
        seen = leaf if view is None else _look(leaf, view)
        loss = F.cross_entropy(classifier(seen).float(), labels, reduction="sum")
        return torch.autograd.grad(loss, leaf)[0]


def _look(pixel_values: Tensor, view: Tensor) -> Tensor:
    """Each image shrunk and laid on black: `view` is (B, 3), as in [`AttackParameters`]; those of scale 1 stay."""
    rows = (view[:, 0] < 1).nonzero().squeeze(1)
    if len(rows) == 0:
        return pixel_values
    chosen, scale, place = pixel_values[rows], view[rows, :1], view[rows, 1:]
    # from where in the image, in [-1, 1], a place of the result comes: it is linear, with the same scale both ways
    towards = torch.eye(2, 3, dtype=view.dtype, device=view.device) / scale[:, :, None]
    towards[:, :, 2] = -place * (1 - scale) / scale
    grid = F.affine_grid(towards, list(chosen.shape), align_corners=False)
    small = F.grid_sample(chosen, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return pixel_values.index_put((rows,), small)


def _smooth(gradient: Tensor, deviation: Tensor) -> Tensor:
    """Each gradient convolved with a Gaussian of its own standard deviation in pixels, (B,); 0 leaves it as it is."""
    width = deviation.clamp_min(1e-3).view(-1, 1, 1, 1)

    def weights(count: int) -> Tensor:
        places = torch.arange(count, dtype=gradient.dtype, device=gradient.device)
        return torch.exp(-(((places[:, None] - places[None]) / width) ** 2) / 2)

    return weights(gradient.shape[2]) @ gradient @ weights(gradient.shape[3])


@torch.no_grad()
def _complete_labels(classifiers, pixel_values, labels, surrogate) -> Tensor:
    labels = torch.full_like(surrogate, -1) if labels is None else labels.to(surrogate.device, torch.long)
    for index, classifier in enumerate(classifiers):
        rows = ((labels < 0) & (surrogate == index)).nonzero().squeeze(1)
        if len(rows):
            labels = labels.index_put((rows,), classifier(pixel_values[rows]).argmax(dim=-1))
    return labels
