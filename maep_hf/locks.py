"""Locks between processes, also of other users and other machines on a disk: a hidden file that is there only while
somebody holds it, or where one was killed, and then holds nobody up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

NoLocks = (OSError, NotImplementedError)
"""What [`locked`] raises where nothing can be locked."""


@contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Nobody else holds `path` meanwhile; the lock goes with the process.

    Args:
        path: of the lock's own file, in a folder that is there.
        timeout: seconds to wait for whoever holds it; without end for -1.

    Raises:
        Timeout: somebody still holds it.
        OSError, NotImplementedError: the file cannot be made, or its file system has no locks.
    """
    lock = FileLock(path, mode=0o666)  # another user may have the next turn
    own = _acquired(lock, timeout)
    try:
        yield
    finally:
        # While it is held: who has opened this file then finds that it is gone, and looks again. Not where another is
        # there by now; and Windows removes it on release.
        with suppress(OSError):
            if os.path.samestat(own, path.stat()):
                path.unlink()
        lock.release()


def _acquired(lock: FileLock, timeout: float) -> os.stat_result:
    """Which file it is that holds the lock now."""
    try:
        lock.acquire(timeout)
    except Timeout:
        if not isinstance(lock, SoftFileLock):
            raise
    if isinstance(lock, SoftFileLock):  # filelock puts it in the place of one without flock: it would outlive a kill
        lock.release()
        raise NotImplementedError("no flock")
    return Path(lock.lock_file).stat()
