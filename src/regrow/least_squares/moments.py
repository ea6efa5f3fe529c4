"""Least squares for one layer, from the second moments of what it reads and of what its outputs lack."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Candidates for the penalty of ``fit``, as shares of the mean square of the columns.
PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_AT_ONCE = 1 << 24  # numbers of the rows whose products are made at one time


@dataclass(frozen=True)
class Moments:
    """Sums over rows of inputs x and of what the outputs lack, r; in float64, on the CPU.

    Attributes:
        count: rows.
        x: [groups, columns], r: [groups, outputs]: sums.
        xx: [groups, columns, columns], xr: [groups, columns, outputs], rr: [groups, outputs]: sums of
            products.
        basis: [groups, inputs of the layer, columns], where x are coordinates (``in_span``); None where the
            columns are the layer's inputs.
    """

    count: int
    x: Tensor
    r: Tensor
    xx: Tensor
    xr: Tensor
    rr: Tensor
    basis: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, r: Tensor, basis: Tensor | None = None) -> Moments:
        """The moments of ``x`` [groups, rows, columns] and ``r`` [groups, rows, outputs]."""
        wide, count = torch.promote_types(x.dtype, torch.float32), x.shape[1]
        means = x.mean(1, dtype=wide), r.mean(1, dtype=wide)
        groups, _, columns = x.shape
        each = max(1, _AT_ONCE // max(1, groups * columns))
        sums: list[Tensor] = []
        for some, lack in zip(x.split(each, 1), r.split(each, 1), strict=True):
            # Beside large means, single precision would lose how much the numbers vary.
            a, b = some.to(wide) - means[0][:, None], lack.to(wide) - means[1][:, None]
            across = a.transpose(1, 2)
            with torch.autocast(x.device.type, enabled=False):  # this may be called in the middle of a pass
                parts = (a.sum(1), b.sum(1), across @ a, across @ b, b.square().sum(1))
            # Not every device has double precision.
            now = [part.cpu().double() for part in parts]
            sums = now if not sums else [one.add_(other) for one, other in zip(sums, now, strict=True)]
        mx, mr = (mean.cpu().double() for mean in means)
        sx, sr, xx, xr, rr = sums
        xx += _outer(sx, mx) + _outer(mx, sx + count * mx)
        xr += _outer(sx, mr) + _outer(mx, sr + count * mr)
        rr += mr * (2 * sr + count * mr)
        return cls(count, sx + count * mx, sr + count * mr, xx, xr, rr, basis)

    def __add__(self, other: Moments) -> Moments:
        mine, theirs = self._parts(), other._parts()
        x, r, xx, xr, rr = (a + b for a, b in zip(mine, theirs, strict=True))
        return Moments(self.count + other.count, x, r, xx, xr, rr, self.basis)

    def _parts(self) -> tuple[Tensor, ...]:
        return self.x, self.r, self.xx, self.xr, self.rr

    @property
    def inputs(self) -> int:
        """How many inputs the layer, or one group of it, has."""
        return self.xx.shape[-1] if self.basis is None else self.basis.shape[1]

    def squares(self, xx: Tensor) -> Tensor:
        """The sums of squares of the layer's inputs, [groups, inputs], by their products ``xx``."""
        if self.basis is None:
            return xx.diagonal(dim1=1, dim2=2)
        return ((self.basis @ xx) * self.basis).sum(2)

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
    """What is added to the weights [groups, columns, outputs] and the biases [groups, outputs] of a layer.

    The columns are those of the moments.
    """

    weights: Tensor
    shift: Tensor


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[:, :, None] * b[:, None]


def in_span(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``x`` [groups, rows, inputs] as coordinates [groups, rows, rows], and their basis [groups, inputs,
    rows].

    The basis is orthonormal and spans the rows, of which there are fewer than inputs. The weights of a ridge
    regression lie in this span, so it can be done with the coordinates: in a small part of the time.
    """
    basis, factor = torch.linalg.qr(x.transpose(1, 2).cpu().double())
    return factor.transpose(1, 2), basis


def none(moments: Moments) -> Change:
    """No change at all."""
    return Change(torch.zeros_like(moments.xr), torch.zeros_like(moments.r))


def mean_shift(moments: Moments) -> Change:
    """The mean of what the outputs lack, as a shift of the biases."""
    return Change(torch.zeros_like(moments.xr), moments.r / moments.count)


class Ridge:
    """The changes with the smallest squared error and squared length.

    The length counts a penalty times the mean square of the columns that vary. Columns that do not vary keep
    their weights, so an error of 0 changes nothing.

    Args:
        shifts: whether the layer has biases to shift.
    """

    def __init__(self, moments: Moments, *, shifts: bool) -> None:
        self._moments, self._shifts = moments, shifts
        xx, xr = moments.about_means() if shifts else (moments.xx, moments.xr)
        power, whole = moments.squares(xx), moments.squares(moments.xx)
        # What is smaller than this beside the columns' squares is rounding.
        varies = power > 1e-10 * whole + 1e-24 * whole.sum(1, keepdim=True) + torch.finfo(power.dtype).tiny
        self._power = power.where(varies, 0).sum(1) / varies.sum(1).clamp_min(1)
        if moments.basis is not None:
            varies = varies.any(1, keepdim=True).expand(xr.shape[:2])
        self._found = varies.any(0).nonzero().flatten()
        self._varies = varies[:, self._found]
        self._xx, self._xr = xx[:, self._found[:, None], self._found], xr[:, self._found]
        if not self._varies.all():  # in some of the groups
            self._xx *= self._varies[:, :, None] & self._varies[:, None]
            self._xr *= self._varies[:, :, None]

    def change(self, penalty: float) -> Change:
        """The change for a penalty, a share of the mean square of the columns."""
        moments, systems = self._moments, self._xx.clone()
        systems.diagonal(dim1=1, dim2=2).add_((penalty * self._power[:, None]).where(self._varies, 1))
        factors, failed = torch.linalg.cholesky_ex(systems)
        weights = torch.zeros_like(moments.xr)
        weights[:, self._found] = torch.cholesky_solve(self._xr, factors).where(failed[:, None, None] == 0, 0)
        shift = (moments.r - (moments.x[:, None] @ weights)[:, 0]) / moments.count
        return Change(weights, shift if self._shifts else torch.zeros_like(shift))


def fit(
    halves: Sequence[Moments], *, shifts: bool, penalties: Sequence[float] = PENALTIES
) -> tuple[Change, dict[str, Any]]:
    """The best change of a layer: by ridge, by a mean shift, or none.

    The penalty, and whether there is a gain at all, is seen on the half of the rows that the weights were not
    fitted to. With one half alone the largest penalty is taken.

    Args:
        halves: the moments of one or two halves of the pictures.

    Returns:
        The change, in the layer's inputs, and a record: how ("least squares", "mean", "none"), penalty, and
        error: the share of the squared error on all rows that is left.
    """
    total = halves[0] if len(halves) == 1 else halves[0] + halves[1]
    fallback = mean_shift if shifts else none
    change, how, penalty = fallback(total), "mean" if shifts else "none", None
    if len(halves) == 1:
        penalty = max(penalties)
    else:
        pairs = [(halves[0], halves[1]), (halves[1], halves[0])]
        least = sum(other.error(fallback(half)) for half, other in pairs)
        ridges = [(Ridge(half, shifts=shifts), other) for half, other in pairs]
        best, error = _lowest(
            lambda each: sum(other.error(ridge.change(each)) for ridge, other in ridges), sorted(penalties)
        )
        if error < least:
            penalty = best
    if penalty is not None:
        found = Ridge(total, shifts=shifts).change(penalty)
        if total.error(found) < total.error(change):
            change, how = found, "least squares"
    before, after = total.error(none(total)), total.error(change)
    if after >= before:
        change, how, after = none(total), "none", before
    if total.basis is not None:
        change = Change(total.basis @ change.weights, change.shift)
    return change, {
        "how": how,
        "penalty": penalty if how == "least squares" else None,
        "error": after / before if before else 0.0,
    }


def _lowest(error: Callable[[float], float], values: Sequence[float]) -> tuple[float, float]:
    """The value with the lowest error, and this error: from the middle, downhill."""
    error, at = functools.cache(error), len(values) // 2
    while True:
        beside = (values[i] for i in (at + 1, at - 1) if 0 <= i < len(values))
        better = next((value for value in beside if error(value) < error(values[at])), None)
        if better is None:
            return values[at], error(values[at])
        at = values.index(better)
