"""Write files so that a reader finds either the whole new file or the old one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from regrow.short import line, said

# The longest part of a file's name in the name of its temporary file, which may be no longer than 255 bytes.
_SHORT = 50


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
    beside = f".{path.name[:_SHORT]}."
    with _named(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=beside) as folder:
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
        OSError: it cannot be written; the message names ``path``. The old file, if there was one, is
            unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:_SHORT]}.{os.getpid()}.tmp")
    with _named(path):
        try:
            temporary.write_bytes(data)
            _replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # what went wrong first is what to say
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Give an ``OSError`` of the block a message that names ``path``."""
    try:
        yield
    except OSError as error:
        raise said(error, path, "written") from error


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
