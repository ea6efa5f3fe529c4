"""Read files that strangers may have written: plain files of a bounded size, and JSON."""

from __future__ import annotations

import json
import os
import stat
from typing import Any

from regrow.short import line, said, short

_MOST_DEEP = 100
_CHUNK = 1 << 16


def read_file(path: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of the plain file ``path``.

    Args:
        most: the size in bytes that is too much from the next byte on.

    Raises:
        ValueError: ``path`` is a folder, a pipe or a device, or larger than ``most``.
        FileNotFoundError: there is no such file.
        OSError: it cannot be read; the message names it.
    """
    try:
        # A pipe without a writer would be waited for.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NO_WAIT)) as file:
            found = os.fstat(file.fileno())
            check_plain(path, found, most)
            # Some files that the system makes up have no size, and a file may grow meanwhile.
            data = file.read(found.st_size + 1)
            while len(data) <= most and (more := file.read(min(_CHUNK, most + 1 - len(data)))):
                data += more
    except IsADirectoryError:
        raise ValueError(f"{line(path)} is a folder, not a file.") from None
    except OSError as error:
        raise said(error, path, "read") from None
    if len(data) > most:
        raise ValueError(_too_large(path, most))
    return data


_NO_WAIT = getattr(os, "O_NONBLOCK", 0)


def check_plain(path: str | os.PathLike[str], found: os.stat_result, most: int | None = None) -> None:
    """Raise ``ValueError`` unless ``path``, by its status, is a plain file of at most ``most`` bytes."""
    if stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{line(path)} is a folder, not a file.")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{line(path)} is not a plain file: a pipe or a device cannot be read here.")
    if most is not None and found.st_size > most:
        raise ValueError(_too_large(path, most))


def from_json(text: bytes | str, *, constants: bool = False) -> Any:
    """The value that ``text`` holds as JSON.

    Args:
        text: UTF-8 if it is bytes.
        constants: also read NaN, Infinity and -Infinity, which Python writes and JSON does not have.

    Raises:
        ValueError: it is not JSON, names a key twice in one object, or is nested deeper than 100 levels.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        data = json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            object_pairs_hook=_each_once,
            parse_constant=None if constants else refuse,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1:,} is not UTF-8 text") from None
    except RecursionError:
        raise ValueError(f"it is nested deeper than {_MOST_DEEP} levels") from None
    except ValueError as error:
        raise ValueError(line(error)) from None
    _check_depth(data)
    return data


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the key {short(twice)} is there twice")
    return found


def _check_depth(data: Any) -> None:
    level, depth = [data], 0
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        if depth > _MOST_DEEP:
            raise ValueError(f"it is nested deeper than {_MOST_DEEP} levels")
        level = [each for part in level for each in (part.values() if isinstance(part, dict) else part)]


def _too_large(path: str | os.PathLike[str], most: int) -> str:
    size = f"{most >> 20:,} MiB" if most >= 1 << 20 else f"{most:,} bytes"
    return f"{line(path)} is larger than {size}, the most that such a file may have."
