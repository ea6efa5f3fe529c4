"""Lists as people type them on a command line."""

from __future__ import annotations

import re
from typing import TypeVar

from regrow.study.names import METHOD_ALIASES

T = TypeVar("T", int, str)


def parse_seeds(text: str) -> list[int]:
    """``"0,1,2"``, ``"0-4"`` or a mixture, in the order given.

    Raises:
        ValueError: anything else, or a seed given twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"--seeds takes numbers such as 0,1,2 or 0-4, got {text!r}.")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return _once("--seeds", seeds)


def parse_methods(text: str) -> list[str]:
    """``"standard,repr"`` as a list, the baseline first; other names of a method are replaced.

    Raises:
        ValueError: nothing, or a method given twice.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    methods = [METHOD_ALIASES.get(name, name) for name in names]
    if not methods:
        raise ValueError("--methods takes names such as standard,repr.")
    return _once("--methods", methods)


def _once(flag: str, values: list[T]) -> list[T]:
    twice = sorted({str(value) for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"{flag} names {', '.join(twice)} twice: a pair must not be counted twice.")
    return values
