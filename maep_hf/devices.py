"""Where models run: a device by its name on the command line."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """`auto` is cuda, mps or cpu, the first there is; anything else as torch spells it.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
