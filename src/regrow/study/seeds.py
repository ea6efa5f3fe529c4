"""Parse the lists that people type on a command line or in a study file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

from regrow.short import line, short
from regrow.study.names import METHOD_ALIASES

T = TypeVar("T", int, str)
MOST_RUNS = 10_000


def parse_seeds(text: str, where: str = "--seeds") -> list[int]:
    """Parse ``"0,1,2"``, ``"0-4"`` or a mixture into seeds, in the order given.

    Args:
        text: the seeds.
        where: the name of the option or key, for error messages.

    Raises:
        ValueError: any other text, a seed given twice, or more than 10,000.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,30})\s*(?:-\s*(\d{1,30})\s*)?", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"{where} takes numbers such as 0,1,2 or 0-4, got {short(text)}.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last - first >= MOST_RUNS - len(seeds):
            raise ValueError(f"{where}: {short(text)} are more than {MOST_RUNS:,} seeds.")
        seeds += range(first, last + 1)
    return _once(where, seeds)


def seeds_of(value: object, where: str = "seeds") -> list[int]:
    """Read seeds from a YAML value: ``3``, ``"0-4"``, ``[0, 1, 2]`` or a list of such, in that order.

    Raises:
        ValueError: as ``parse_seeds``, or an empty list.
    """
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"{where} is an empty list: write 0-4, or [0, 1, 2].")
    if any(isinstance(each, bool) or not isinstance(each, int | str) for each in values):
        raise ValueError(f"{where} takes numbers such as 0-4 or [0, 1, 2], got {short(value)}.")
    return parse_seeds(",".join(map(str, values)), where)


def parse_methods(text: str) -> list[str]:
    """Parse ``"standard,repr"`` into a list, the baseline first; aliases of a method are replaced.

    Raises:
        ValueError: no method, or one given twice.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    methods = [METHOD_ALIASES.get(name, name) for name in names]
    if not methods:
        raise ValueError("--methods takes names such as standard,repr.")
    return _once("--methods", methods)


def as_ranges(seeds: Iterable[int]) -> str:
    """Seeds in ascending order, as people type them: ``"0-2, 7"``."""
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and parts[-1][-1] == seed - 1:
            parts[-1][1:] = [seed]
        else:
            parts.append([seed])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _once(where: str, values: list[T]) -> list[T]:
    twice = [value for value, times in Counter(values).items() if times > 1]
    if twice:
        raise ValueError(
            f"{where} names {line(', '.join(map(str, twice)))} twice: a pair must not be counted twice."
        )
    return values
