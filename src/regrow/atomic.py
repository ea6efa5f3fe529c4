"""Files that are there whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name to write to; it takes the place of ``path`` when the block ends without an error.

    After an error the old file, if there was one, is as it was, and nothing else is left behind.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name!r} to.")
    # A folder of its own, in the same one: a writer may put more than one file there, and all of it goes.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors writes for the owner's eyes alone
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all, and wait until the disk has it.

    A process that is killed meanwhile may leave a file named ``.{name}.{pid}.tmp`` beside it.

    Raises:
        OSError: it cannot be written. The old file, if there was one, is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names of the files in ``folder``: a rename is in none of the files."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # some systems open no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
