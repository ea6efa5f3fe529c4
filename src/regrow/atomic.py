"""Write files so that a reader finds either the whole new file or the old one.

What is not finished lies in a folder beside it, named ``.{name}.{random}.regrow.tmp``, whose lock the system
frees when its process dies. Whoever writes to the same place next removes the folders of dead processes.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from regrow.short import line, said

# The longest part of a file's name in the name of its temporary folder, which may have 255 bytes at most.
_SHORT = 50
_TEMPORARY = re.compile(r"\..+\.regrow\.tmp")


@contextmanager
def temporary_folder(place: Path, name: str) -> Iterator[Path]:
    """Yield a new folder in ``place``, hidden and named after ``name``; it is removed when the block ends.

    A process that is killed meanwhile leaves it, and the next call for the same ``place`` removes it.
    """
    sweep(place)
    while True:
        folder = Path(tempfile.mkdtemp(dir=place, prefix=f".{name[:_SHORT]}.", suffix=".regrow.tmp"))
        lock = _lock(folder)
        if folder.exists():  # if not, another process swept it before the lock was there
            break
        _unlock(lock)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def sweep(place: Path) -> None:
    """Remove the temporary folders in ``place`` whose processes have died."""
    try:
        left = [entry.path for entry in os.scandir(place) if _TEMPORARY.fullmatch(entry.name)]
    except OSError:  # writing to it will say what is wrong
        return
    for path in left:
        if not os.path.islink(path) and (lock := _lock(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            _unlock(lock)


def _lock(folder: str | Path) -> int | None:
    """Lock ``folder``; None where another process has it locked, or where folders cannot be locked."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (ModuleNotFoundError, AttributeError, OSError):  # Windows; or it is gone
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; that file replaces ``path`` when the block ends without an error.

    After an error the old file, if there was one, is unchanged, and no other file is left behind.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        OSError: it cannot be written; the message names ``path``, and not the temporary file.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {line(path.parent)} to write {line(path.name)!r} to.")
    # In a folder beside path: a writer may put more files there, and all of them are removed with it.
    with _named(path), temporary_folder(path.parent, path.name) as folder:
        temporary = folder / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files readable to their owner only
        move(temporary, path)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all, and wait until the disk has it.

    Raises:
        OSError: it cannot be written; the message names ``path``. The old file, if there was one, is
            unchanged.
    """
    path = Path(path)
    with _named(path), temporary_folder(path.parent, path.name) as folder:
        # Not under its own name: whoever looks for files of that name must not find this one.
        temporary = folder / "new"
        temporary.write_bytes(data)
        move(temporary, path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Give an ``OSError`` of the block a message that names ``path``."""
    try:
        yield
    except OSError as error:
        raise said(error, path, "written") from error


def move(temporary: Path, path: Path) -> None:
    """Rename ``temporary`` to ``path``, and wait until the disk has the content and the new name."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    try:
        folder = os.open(path.parent, os.O_RDONLY)  # the name is stored in the folder, not in the file
    except PermissionError:  # some systems do not open folders
        return
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
