"""Parse the fractions, shares and readings that people type on a command line."""

from __future__ import annotations

import re

from regrow.short import short

_NUMBER = r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*"
_MOST = 1000


def parse_fractions(text: str) -> list[float]:
    """Parse per cent into fractions: ``"0-90"`` (every 10), ``"0-95:5"`` (every 5), ``"0,25,50"``, mixtures.

    Raises:
        ValueError: any other text, 100 % or more, or a number that looks like a fraction.
    """
    found: list[float] = []
    parts = text.split(",")
    if len(parts) > _MOST:
        raise ValueError(f"--fractions: {short(text)} are more than {_MOST:,} points.")
    for part in parts:
        match = re.fullmatch(rf"{_NUMBER}(?:-{_NUMBER}(?::{_NUMBER})?)?", part)
        first, last, step = (
            float(number) if number else None for number in (match.groups() if match else [None] * 3)
        )
        if first is None or step == 0 or (last is not None and last < first):
            raise ValueError(
                f"--fractions takes per cent such as 0-90, 0-95:5 or 0,25,50, got {short(text)}."
            )
        if last is None:
            found.append(first)
            continue
        step = step or 10.0
        if (last - first) / step >= _MOST:
            raise ValueError(f"--fractions: {short(text)} are more than {_MOST:,} points.")
        found += [first + index * step for index in range(int((last - first) / step + 1e-9) + 1)]
    for percent in found:
        if 0 < percent < 1:
            raise ValueError(f"--fractions are per cent: write {100 * percent:g} instead of {percent:g}.")
        if percent >= 100:
            raise ValueError(
                f"--fractions stay below 100 %, got {percent:g}: a layer keeps at least one filter."
            )
    return sorted({round(percent / 100, 6) for percent in found})


def parse_readings(text: str) -> list[str]:
    """Parse ``"zeroed,removed"`` into a list that has each name once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def parse_shares(text: str) -> float | dict[str, float]:
    """Parse ``"0.5"`` into a number, and ``"layer3=0.6,layer4=0.5"`` into {name: share}.

    Raises:
        ValueError: any other text, or a name that is there twice.
    """
    shares: dict[str, float] = {}
    try:
        if "=" not in text:
            return float(text)
        for part in text.split(","):
            name, _, share = (each.strip() for each in part.rpartition("="))
            if not name or name in shares:
                raise ValueError
            shares[name] = float(share)
    except ValueError:
        shown = text if len(text) <= 60 else f"{text[:57]}…"
        raise ValueError(
            "--fraction takes a share such as 0.5, or one for each of some layers, such as "
            f"layer3=0.6,layer4=0.5, each named once, got {shown!r}."
        ) from None
    return shares
