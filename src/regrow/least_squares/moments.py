"""Least squares for one layer, from the second moments of what it reads and of what its outputs lack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Candidates for the penalty of ``fit``, as shares of the mean square of the columns.
PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class Moments:
    """Sums over rows of inputs x and of what the outputs lack, r; in float64, on the CPU.

    Attributes:
        count: rows.
        x: [groups, columns], r: [groups, outputs]: sums.
        xx: [groups, columns, columns], xr: [groups, columns, outputs], rr: [groups, outputs]: sums of
            products.
    """

    count: int
    x: Tensor
    r: Tensor
    xx: Tensor
    xr: Tensor
    rr: Tensor

    @classmethod
    def of(cls, x: Tensor, r: Tensor) -> Moments:
        """The moments of ``x`` [groups, rows, columns] and ``r`` [groups, rows, outputs]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x, r = x.to(wide), r.to(wide)
        across = x.transpose(1, 2)
        parts = (x.sum(1), r.sum(1), across @ x, across @ r, r.square().sum(1))
        # Not every device has double precision.
        return cls(x.shape[1], *(part.cpu().double() for part in parts))

    def __add__(self, other: Moments) -> Moments:
        mine, theirs = self._parts(), other._parts()
        return Moments(self.count + other.count, *(a + b for a, b in zip(mine, theirs, strict=True)))

    def _parts(self) -> tuple[Tensor, ...]:
        return self.x, self.r, self.xx, self.xr, self.rr

    def is_finite(self) -> bool:
        """Whether no sum is NaN or infinite."""
        return all(bool(part.isfinite().all()) for part in self._parts())

    def about_means(self) -> tuple[Tensor, Tensor]:
        """``xx`` and ``xr`` of x and r less their means."""
        x = self.x[..., None] / self.count
        return self.xx - x @ self.x[:, None], self.xr - x @ self.r[:, None]

    def error(self, change: Change) -> float:
        """The sum of squares of the rows of r that is left after ``change``."""
        weights, shift = change.weights, change.shift
        cross = (weights * (self.x[..., None] * shift[:, None] - self.xr)).sum()
        quadratic = (weights * (self.xx @ weights)).sum()
        left = self.rr.sum() + quadratic + 2 * cross + (shift * (self.count * shift - 2 * self.r)).sum()
        return max(0.0, float(left))


@dataclass(frozen=True)
class Change:
    """What is added to the weights [groups, columns, outputs] and the biases [groups, outputs] of a layer."""

    weights: Tensor
    shift: Tensor


def none(moments: Moments) -> Change:
    """No change at all."""
    return Change(torch.zeros_like(moments.xr), torch.zeros_like(moments.r))


def mean_shift(moments: Moments) -> Change:
    """The mean of what the outputs lack, as a shift of the biases."""
    return Change(torch.zeros_like(moments.xr), moments.r / moments.count)


def ridge(moments: Moments, penalty: float, *, shifts: bool) -> Change:
    """The change with the smallest squared error and squared length.

    The length counts ``penalty`` times the mean square of the columns that vary. Columns that do not vary
    keep their weights, so an error of 0 changes nothing.

    Args:
        shifts: whether the layer has biases to shift.
    """
    xx, xr = moments.about_means() if shifts else (moments.xx, moments.xr)
    power = xx.diagonal(dim1=1, dim2=2)
    # What is smaller than this beside the columns' squares is rounding.
    varies = power > 1e-10 * moments.xx.diagonal(dim1=1, dim2=2) + torch.finfo(power.dtype).tiny
    weights = torch.zeros_like(xr)
    for group, columns in enumerate(varies):
        found = columns.nonzero().flatten()
        if len(found):
            system = xx[group][found[:, None], found]
            system.diagonal().add_(penalty * power[group, found].mean())
            factor, failed = torch.linalg.cholesky_ex(system)
            if not failed:
                weights[group, found] = torch.cholesky_solve(xr[group, found], factor)
    shift = (moments.r - (moments.x[:, None] @ weights)[:, 0]) / moments.count
    return Change(weights, shift if shifts else torch.zeros_like(shift))


def fit(
    halves: Sequence[Moments], *, shifts: bool, penalties: Sequence[float] = PENALTIES
) -> tuple[Change, dict[str, Any]]:
    """The best change of a layer: by ridge, by a mean shift, or none.

    The penalty, and whether there is a gain at all, is seen on the half of the rows that the weights were not
    fitted to. With one half alone the largest penalty is taken.

    Args:
        halves: the moments of one or two halves of the pictures.

    Returns:
        The change, and a record: how ("least squares", "mean", "none"), penalty, and error: the share of the
        squared error on all rows that is left.
    """
    total = halves[0] if len(halves) == 1 else halves[0] + halves[1]
    fallback = mean_shift if shifts else none
    change, how, penalty = fallback(total), "mean" if shifts else "none", None
    if len(halves) == 1:
        penalty = max(penalties)
    else:
        pairs = [(halves[0], halves[1]), (halves[1], halves[0])]
        least = sum(other.error(fallback(half)) for half, other in pairs)
        for each in penalties:
            error = sum(other.error(ridge(half, each, shifts=shifts)) for half, other in pairs)
            if error < least:
                least, penalty = error, each
    if penalty is not None:
        found = ridge(total, penalty, shifts=shifts)
        if total.error(found) < total.error(change):
            change, how = found, "least squares"
    before, after = total.error(none(total)), total.error(change)
    if after >= before:
        change, how, after = none(total), "none", before
    return change, {
        "how": how,
        "penalty": penalty if how == "least squares" else None,
        "error": after / before if before else 0.0,
    }
