"""Modules for the `evaluate` library that come with the package and load without a network.

    evaluate.load(maep_hf.metrics.path("robust_accuracy"))

Each folder holds one script, which `evaluate` copies to its cache and runs there, and a card, `README.md`.
"""

from pathlib import Path

NAMES = ("robust_accuracy", "purification_quality")


def path(name: str) -> str:
    """The folder of the module `name`, as `evaluate.load` and `evaluate.combine` take it.

    Raises:
        ValueError: there is no module of this name; the message lists those there are.
    """
    if name not in NAMES:
        raise ValueError(f"name: there is no module {name!r}; choose one of {', '.join(NAMES)}")
    return str(Path(__file__).resolve().parent / name)
