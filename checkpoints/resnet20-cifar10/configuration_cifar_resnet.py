"""Configuration of the CIFAR ResNet (He et al. 2016, "Deep Residual Learning", section 4.2)."""

from transformers import PreTrainedConfig


class CifarResNetConfig(PreTrainedConfig):
    """Sizes of a CIFAR ResNet.

    Args:
        depth: number of weighted layers, `6n + 2` with `n >= 1` blocks in each of the three stages
            (20, 32, 44, 56, 110 in He et al.).
        width: channels of the first stage; the second and third have twice and four times as many.
        num_channels: channels of the input images.
        num_labels, id2label, label2id: the classes, as in every transformers configuration. Where only `id2label`
            is given, `label2id` is its inverse; a `num_labels` that disagrees replaces both, with a warning.

    Raises:
        ValueError: a value is not an integer of the allowed range, or the two label maps disagree.
    """

    model_type = "cifar_resnet"

    depth: int = 20
    width: int = 16
    num_channels: int = 3

    def __post_init__(self, **kwargs):
        for name in ("depth", "width", "num_channels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        if self.depth < 8 or (self.depth - 2) % 6:
            below = max(8, self.depth - (self.depth - 2) % 6)
            raise ValueError(
                f"`depth` must be 6n + 2 with n >= 1 (8, 14, 20, 26, 32, ...), got {self.depth}; "
                f"the nearest that fit are {below} and {below + 6}."
            )
        if self.id2label is not None:
            # transformers keeps an absent label2id absent, and a conflicting one as it is.
            inverse = {label: int(index) for index, label in self.id2label.items()}
            if self.label2id is None:
                self.label2id = inverse
            if sorted(inverse.values()) != list(range(len(self.id2label))):
                raise ValueError(
                    f"`id2label` must name the classes 0 to {len(self.id2label) - 1} with distinct labels, "
                    f"got {self.id2label}."
                )
            if self.label2id != inverse:
                raise ValueError(
                    f"`label2id` {self.label2id} is not the inverse of `id2label` {self.id2label}; give both, or "
                    "`id2label` alone for a new configuration."
                )
        super().__post_init__(**kwargs)

    @property
    def blocks_per_stage(self) -> int:
        """The `n` of `depth = 6n + 2`."""
        return (self.depth - 2) // 6


__all__ = ["CifarResNetConfig"]
