"""When RePr cuts and restores filters, and the learning rate of every step. Imports no PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Cycle:
    """RePr's schedule: ``cycles`` times ``full`` epochs, then ``sub`` epochs without some of the filters.

    With ``sub`` 0 filters are dropped and restored at once.
    """

    full: int
    sub: int
    cycles: int

    @property
    def last_restore(self) -> int:
        """The number of epochs after which the last filters have been restored."""
        return (self.full + self.sub) * self.cycles

    def check(self, epochs: int) -> None:
        """Raise ``ValueError`` unless at least one epoch is left after the last restore."""
        if self.last_restore >= epochs:
            raise ValueError(
                f"{self.cycles} cycles of {self.full} full and {self.sub} sub epochs take "
                f"{self.last_restore} epochs, and at least one must follow the last restore to heal: train "
                f"for {self.last_restore + 1} epochs or more, not {epochs}, or shorten the cycles."
            )


def place_cycle(
    epochs: int, *, full: int | None = None, sub: int | None = None, cycles: int | None = None
) -> Cycle:
    """Place RePr's cycles in ``epochs``, and choose the lengths that are not given.

    About 30 % of the epochs stay for annealing after the last restore. The rest is divided into three
    cycles, fewer if it is short, and each cycle two to one into full and sub, as in the paper
    (arXiv 1811.07275: S1 = 20, S2 = 10, N = 3).
    """
    room = epochs - max(1, math.ceil(0.3 * epochs))
    if full is not None and sub is not None:
        return Cycle(full, sub, cycles if cycles is not None else max(1, min(3, room // (full + sub))))
    if cycles is None:
        shortest = 3 if full is None and sub is None else (full or 1) + (1 if sub is None else sub)
        cycles = max(1, min(3, room // shortest))
    length = max(2, room // cycles)
    if full is not None:
        return Cycle(full, max(1, length - full), cycles)
    if sub is None:
        sub = max(1, round(length / 3))
    return Cycle(max(1, length - sub), sub, cycles)


def rate_factor(schedule: str, step: int, steps: int, hold: int) -> float:
    """The learning rate at ``step`` of ``steps``, as a share of the highest.

    Args:
        schedule: ``"hold-cosine"`` (1 for ``hold`` steps, then half a cosine to 0), ``"cosine"`` (the
            same without holding), ``"step"`` (a tenth from half the steps on, a hundredth from three
            quarters) or ``"constant"``.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return 0.1 ** ((step >= steps / 2) + (step >= steps * 3 / 4))
    start = hold if schedule == "hold-cosine" else 0
    if step < start:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start)))
