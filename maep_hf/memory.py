"""The memory of a program on a CPU."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's <malloc.h>


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, for its next tensors; returns whether that could be arranged.

    glibc takes every tensor above 32 MiB from the system and gives it back at once, so that each pass pays for its
    pages again: more than half the time of an attack on 224-pixel images was spent so. For whole programs (`maep`, the
    training scripts), not for a library: the process then stays as large as it ever was. Left alone where a `MALLOC_`
    variable says what the user wants, or where there is no glibc.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
