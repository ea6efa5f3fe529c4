"""Write files so that a reader finds either the whole new file or the old one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; that file replaces ``path`` when the block ends without an error.

    After an error the old file, if there was one, is unchanged, and no other file is left behind.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name!r} to.")
    # In a folder beside path: a writer may put more files there, and all of them are removed with it.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files readable to their owner only
        _replace(temporary, path)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all, and wait until the disk has it.

    A process that is killed meanwhile may leave a file named ``.{name}.{pid}.tmp`` beside it.

    Raises:
        OSError: it cannot be written. The old file, if there was one, is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        _replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _replace(temporary: Path, path: Path) -> None:
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
