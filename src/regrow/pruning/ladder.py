"""The first rung of a ladder where a quantity has fallen to a limit, with few looks."""

from __future__ import annotations

import math
from collections.abc import Callable


def first_within(
    value: Callable[[int], float],
    rungs: int,
    limit: float,
    *,
    start: float,
    close: float = 0.0,
    guess: int | None = None,
) -> tuple[int, float]:
    """The first of the rungs 1, 2, … ``rungs`` at which ``value`` is at most ``limit``.

    Interpolates, and halves where that does not narrow the bracket by half; ``value`` is asked once for a
    rung. Where it rises in between, the rung found is one at the limit's edge, not always the first.

    Args:
        value: of a rung; not rising.
        rungs: 1 or more.
        limit: below ``start``.
        start: what ``value`` would be on rung 0; infinite if that is not known.
        close: a rung whose value is below ``limit`` by less than this is good enough.
        guess: a rung that may be the one, or near it: looked at first, and its surroundings next.

    Returns:
        (rung, its value). Where even the last one is above ``limit``: the last, and its value.
    """
    low, above = 0, start
    high, below = rungs, math.nan
    rung, step = rungs if guess is None else guess, 1
    while math.isnan(below):
        found = value(rung)
        if found <= limit:
            high, below = rung, found
        elif rung == rungs:
            return rung, found
        else:
            low, above = rung, found
            rung, step = min(rung + step, rungs), 2 * step
    while guess is not None and not low and limit - below >= close and high > 1:
        rung, step = max(high - step, 1), 2 * step
        found = value(rung)
        if found > limit:
            low, above = rung, found
        else:
            high, below = rung, found
    halve = False
    while limit - below >= close and high - low > 1:
        width = high - low
        middle = low + width // 2
        if not halve and math.isfinite(above):
            middle = low + round(width * (above - limit) / (above - below))
        middle = min(max(middle, low + 1), high - 1)
        found = value(middle)
        if found <= limit:
            high, below = middle, found
        else:
            low, above = middle, found
        halve = high - low > width / 2
    return high, below
