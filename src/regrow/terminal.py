"""Standard output and standard error that cannot end a run: by a character, or by a pipe that was closed."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from typing import Any

_SPELLED = {
    "−": "-",
    "–": "-",
    "—": "-",
    "±": "+/-",
    "×": "x",
    "·": ".",
    "…": "...",
    "→": "->",
    "≤": "<=",
    "≥": ">=",
    "²": "^2",
    "³": "^3",
    "’": "'",
    "“": '"',
    "”": '"',
    "•": "*",
    "\u00a0": " ",
}
_ACROSS, _DOWN = "─━╌╍╴╶╸╺═", "│┃║╷╵"


def take_over() -> None:
    """From now on standard output and standard error spell what they cannot encode, and never raise an error.

    A stream that the process was started without goes to the null device: a file that is opened later would
    take its number, and get what libraries print.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    codecs.register_error("regrow-spelled", _spelled)
    sys.stdout, sys.stderr = _lasting(sys.stdout, 1), _lasting(sys.stderr, 2)


def lost_output() -> str | None:
    """Why standard output could not be written, such as a full disk; None if it could.

    A reader that has closed the pipe, as ``head`` does, has what it wants.
    """
    stream = sys.stdout
    if stream is not None:
        stream.flush()
    lost = getattr(getattr(getattr(stream, "buffer", None), "raw", None), "lost", None)
    return None if lost is None or lost.errno == errno.EPIPE else os.strerror(lost.errno)


def _lasting(stream: Any, number: int) -> Any:
    """``stream`` with the same encoding, but without errors."""
    if stream is None:
        stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # unbuffered, as with python -u, the buffer is the file itself
    if type(raw) is not io.FileIO:  # the console of Windows, or a test's
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_File(raw.fileno(), "wb", closefd=False)),
        encoding=stream.encoding,
        errors="regrow-spelled",
        line_buffering=stream.line_buffering or number == 2,
        write_through=stream.write_through,
    )


class _File(io.FileIO):
    """A file that drops what cannot be written, and remembers the first error in ``lost``."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(data).nbytes


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_spell, error.object[error.start : error.end])), error.end


def _spell(letter: str) -> str:
    if letter in _SPELLED:
        return _SPELLED[letter]
    if "\u2500" <= letter <= "\u257f":  # lines of tables
        return "-" if letter in _ACROSS else "|" if letter in _DOWN else "+"
    return letter.encode("ascii", errors="backslashreplace").decode("ascii")
