"""One process at a time in a run folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder``, which is made if it is not there; the system lets go when this process dies.

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
            # While it is held: a file that someone else has locked meanwhile must not go.
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
