"""Values, texts and errors from anywhere, short enough for a message of one line."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

_VALUE, _LINE = 80, 200
_LONG = 100  # bits; the repr of a whole number of thousands of digits is refused by Python


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, _VALUE - 10, _VALUE - 10
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = 6

    def repr_int(self, value: int, level: int) -> str:  # noqa: ARG002
        if value.bit_length() <= _LONG:
            return repr(value)
        digits = math.ceil(value.bit_length() * math.log10(2))
        return f"{'-' if value < 0 else ''}(a number of {digits:,} digits)"

    def repr_bytes(self, value: bytes, level: int) -> str:  # noqa: ARG002
        return repr(value[: self.maxother])


_short = _Short()


def short(value: Any) -> str:
    """``repr(value)`` in at most 80 characters, whatever the size, the depth and the kind of ``value``."""
    return line(_short.repr(value), _VALUE)


def line(text: object, most: int = _LINE) -> str:
    """``str(text)`` in one printable line of at most ``most`` characters, without its middle if need be."""
    # A line that is cut needs no more than its ends, and a text may be very long.
    whole = str(text)
    whole = whole if len(whole) <= 4 * most else f"{whole[: 2 * most]} {whole[-2 * most :]}"
    plain = " ".join("".join(c if c.isprintable() else " " for c in whole).split())
    if len(plain) <= most and len(str(text)) <= 4 * most:
        return plain
    tail = most // 3
    return f"{plain[: most - tail - 1]}…{plain[-tail:]}"


def listed(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(short, names[:3])) + more


def by_reason(reasons: Mapping[str, str]) -> str:
    """The first three reasons, each once behind the names that have it, and how many more there are."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    given = [f"{listed(having)}: {reason}" for reason, having in names.items()]
    more = [f"and {len(given) - 3} more reasons"] if len(given) > 3 else []
    return "; ".join(given[:3] + more)


def said(error: OSError, path: str | os.PathLike[str], done: str) -> OSError:
    """``error`` anew, of its own kind, with a message for people: "PATH cannot be ``done``: the reason"."""
    if error.strerror is None or error.errno is None:  # its message was written for people
        return error
    kind = type(error) if type(error).__module__ == "builtins" else OSError
    anew = kind(f"{line(path)} cannot be {done}: {error.strerror}.")
    anew.strerror = error.strerror
    return anew
