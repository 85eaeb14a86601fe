"""What the guidance of a purifier compares: a surrogate's logits, or the features before its last layer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..classifier import PixelClassifier

GUIDED_BY = ("logits", "features")


def divergence(clean_logits: Tensor, logits: Tensor) -> Tensor:
    """`KL(softmax(clean_logits) || softmax(logits))`, nats, the mean over the batch of two (B, classes)."""
    return F.kl_div(logits.log_softmax(-1), clean_logits.log_softmax(-1), reduction="batchmean", log_target=True)


class Guide:
    """A frozen surrogate as the guidance sees it: [0, 1] pixels (B, 3, H, W) to (B, width), differentiable.

    Liao et al. 2018 (high-level representation guided denoiser) guide by the logits or by the features of the last
    convolution; here the features are what the last linear layer sees of them.

    Args:
        surrogate: the classifier.
        num_classes: width of its logits.
        by: `logits`, or `features`: the input of the linear layer it lists last, averaged over tokens where it has any.

    Raises:
        ValueError: features are asked for and it has no linear layer, or (when called) does not run it.
    """

    def __init__(self, surrogate: PixelClassifier, num_classes: int, by: str = "logits"):
        self.surrogate = surrogate
        layers = [module for module in surrogate.modules() if isinstance(module, nn.Linear)] if by == "features" else []
        if by == "features" and not layers:
            raise ValueError(
                f"guidance_by=features: {type(surrogate.classifier).__name__} has no linear layer to take them from; "
                "use logits"
            )
        self.layer = layers[-1] if layers else None
        self.width = num_classes if self.layer is None else self.layer.in_features

    def __call__(self, pixel_values: Tensor) -> Tensor:
        if self.layer is None:
            return self.surrogate(pixel_values).float()
        seen: list[Tensor] = []
        handle = self.layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self.surrogate(pixel_values)
        finally:
            handle.remove()
        if not seen or len(seen[-1]) != len(pixel_values):
            raise ValueError(
                f"guidance_by=features: the last linear layer of {type(self.surrogate.classifier).__name__} does not "
                "see its features; use logits"
            )
        features = seen[-1].float()
        return features if features.ndim == 2 else features.flatten(1, -2).mean(dim=1)
