"""Find the first rung of a ladder at which a value has fallen to a limit, with few looks at values."""

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
    """Return the first of the rungs 1, 2, … ``rungs`` at which ``value`` is at most ``limit``, and its value.

    The search interpolates; after a step that narrows the bracket by less than half, it halves the bracket.
    It asks for the value of a rung once. If the values rise somewhere, the rung found is one at the edge of
    the limit, not always the first.

    Args:
        value: value of a rung; it should not rise from rung to rung.
        rungs: 1 or more.
        limit: below ``start``.
        start: the value that rung 0 would have; infinite if it is not known.
        close: a rung is good enough if its value is below ``limit`` by less than this.
        guess: a rung that is likely near the result; the search starts there.

    Returns:
        (rung, its value); the last rung and its value if that is above ``limit``.
    """
    low, above = 0, start
    high, below = rungs, math.nan

    def look(rung: int) -> bool:
        """Make ``rung`` one end of the bracket; return whether its value is within the limit."""
        nonlocal low, above, high, below
        found = value(rung)
        if found <= limit:
            high, below = rung, found
        else:
            low, above = rung, found
        return found <= limit

    rung, step = rungs if guess is None else guess, 1
    while not look(rung):
        if rung == rungs:
            return rung, above
        rung, step = min(rung + step, rungs), 2 * step
    while guess is not None and not low and limit - below >= close and high > 1:
        rung, step = max(high - step, 1), 2 * step
        look(rung)
    halve = False
    while limit - below >= close and high - low > 1:
        width = high - low
        middle = low + width // 2
        if not halve and math.isfinite(above):
            middle = low + round(width * (above - limit) / (above - below))
        look(min(max(middle, low + 1), high - 1))
        halve = high - low > width / 2
    return high, below
