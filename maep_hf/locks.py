"""Locks between processes, also of other users and other machines on a disk: a hidden file that is there only while
somebody holds it, or where one was killed, and then holds nobody up."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

logger = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, unguarded: str, advice: str, timeout: float = -1) -> Iterator[None]:
    """Nobody else holds `path` meanwhile; the lock goes with the process. Where there are no locks, a warning says so.

    Args:
        path: of the lock's own file, in a folder that is there.
        unguarded: what the warning says, before the reason; the same one is given once.
        advice: what it says after that.
        timeout: seconds to wait for whoever holds it; without end for -1.

    Raises:
        Timeout: somebody still holds it.
    """
    lock, own = FileLock(path, mode=0o666), None  # another user may have the next turn
    try:
        own = _acquired(lock, timeout)
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        _warn(unguarded, f"{type(error).__name__}: {error}", advice)
    try:
        yield
    finally:
        # While it is held: who has opened this file then finds that it is gone, and looks again. Not where another is
        # there by now; and Windows removes it on release.
        with suppress(OSError):
            if own is not None and os.path.samestat(own, path.stat()):
                path.unlink()
        lock.release()


@cache
def _warn(unguarded: str, reason: str, advice: str) -> None:
    logger.warning("%s (%s): %s", unguarded, reason, advice)


def _acquired(lock: FileLock, timeout: float) -> os.stat_result:
    """Which file it is that holds the lock now.

    Raises:
        Timeout: somebody else has it.
        OSError, NotImplementedError: the file cannot be made, or its file system has no locks.
    """
    try:
        lock.acquire(timeout)
    except Timeout:
        if not isinstance(lock, SoftFileLock):
            raise
    if isinstance(lock, SoftFileLock):  # filelock puts it in the place of one without flock: it would outlive a kill
        lock.release()
        raise NotImplementedError("no flock")
    return Path(lock.lock_file).stat()
