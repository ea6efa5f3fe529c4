"""Let only one process at a time train in a run folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, which is made if missing; the system frees it when this process dies.

    Raises:
        BlockingIOError: another process holds it; the message names it.
        OSError: the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            # Remove the file while the lock is held: later it could be another process's lock.
            (folder / NAME).unlink(missing_ok=True)
            os.close(descriptor)


def _acquire(folder: Path) -> int | None:
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return None
    path = folder / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise BlockingIOError(
                f"{folder} is being trained by {holder}: wait for it, stop it, or choose another --out."
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether ``path`` names the open file: its last holder may have removed it just before it was locked."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
