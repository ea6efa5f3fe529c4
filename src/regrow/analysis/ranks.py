"""Correlation of two lists of numbers, by value (Pearson) and by rank (Spearman)."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    """The rank of each of ``values`` [n], from 1, float64; equal values share the mean of their ranks."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[place]


def pearson(x: Tensor, y: Tensor) -> float | None:
    """Pearson's correlation of ``x`` and ``y`` [n]; None where one of them is the same everywhere."""
    x, y = _unit(x), _unit(y)
    if not x.any() or not y.any():
        return None
    return float((x @ y).clamp(-1, 1))


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Spearman's correlation: that of the ranks. None where ``x`` or ``y`` is the same everywhere."""
    return pearson(ranks(x), ranks(y))


def _unit(values: Tensor) -> Tensor:
    """``values`` less their mean, scaled to length 1; zeros where all are equal."""
    values = values.double()
    if not len(values) or bool((values == values[0]).all()):
        return torch.zeros_like(values)
    values = values / values.abs().max()
    values = values - values.mean()
    return values / torch.linalg.vector_norm(values)
