"""Canonical correlation of activations: how alike two layers are, whatever the order of their filters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regrow.given import is_real, tensor_given


@dataclass(frozen=True)
class CanonicalCorrelation:
    """How alike two sets of activations are.

    Attributes:
        coefficients: Tensor[k], float64, descending, each in [0, 1]: the canonical correlations.
        mean: their mean (SVCCA).
        weighted: their mean, in which a direction of the first set counts as much as it accounts for the
            activations of that set (PWCCA); directions of noise then count little.
    """

    coefficients: Tensor
    mean: float
    weighted: float


class TooFewSamples(ValueError):
    """There are fewer samples than directions, so that some canonical correlations are 1 by chance."""


@dataclass(frozen=True)
class Directions:
    """The directions in which activations vary.

    Attributes:
        basis: [samples, k], orthonormal columns.
        loadings: [k, units], ``basis.T @ activations``.
    """

    basis: Tensor
    loadings: Tensor


def canonical_correlation(a: Tensor, b: Tensor, *, variance: float = 0.99) -> CanonicalCorrelation:
    """The canonical correlation of two sets of activations on the same samples (Hotelling 1936).

    Of each set the directions that hold ``variance`` of its variance are kept, and the canonical
    correlations are the singular values of ``Q_a.T @ Q_b``, where Q has these directions as orthonormal
    columns. Their mean is SVCCA (Raghu et al. 2017, arXiv 1706.05806); ``weighted`` is PWCCA (Morcos et al.
    2018, arXiv 1806.05759, eq. 4). With ``variance=1`` the coefficients do not change when either set is
    multiplied by an invertible matrix.

    Args:
        a, b: activations [samples, units], of equally many samples. Means are subtracted here.
        variance: share of the variance to keep, 0 < variance ≤ 1.

    Returns:
        The coefficients, one for each direction of the set that has fewer, and their means.

    Raises:
        ValueError: not two matrices of finite real numbers with equally many rows, activations that are
            equal on all samples, or fewer samples than directions (``TooFewSamples``).
    """
    check_variance(variance)
    first, second = matrix_given(a, "a"), matrix_given(b, "b")
    if len(first) != len(second):
        raise ValueError(
            f"a and b must be activations of the same samples, and have {len(first)} and {len(second)} rows."
        )
    both = []
    for name, activations in (("a", first), ("b", second)):
        directions = directions_of(activations, variance)
        if directions is None:
            raise ValueError(f"the activations in {name} are the same on all samples: nothing correlates.")
        both.append(directions)
    return correlate(*both)


def check_variance(variance: Any) -> None:
    """Raise ``ValueError`` unless ``variance`` is a share above 0, up to 1."""
    if not is_real(variance) or not 0 < variance <= 1:
        raise ValueError(
            f"variance is the share of the variance to keep, 0 < variance <= 1, got {variance!r}. Try 0.99."
        )


def matrix_given(values: Any, name: str) -> Tensor:
    """``values`` as a float64 matrix on the CPU. Raises ``ValueError`` unless it holds finite numbers."""
    tensor = tensor_given(values, name).detach()
    if tensor.dim() != 2 or not tensor.numel() or tensor.is_complex():
        raise ValueError(
            f"{name} must be a matrix [samples, units] of real numbers, got {tensor.dtype} of shape "
            f"{list(tensor.shape)}. Of a picture [batch, channels, …], pool or flatten the places first."
        )
    matrix = tensor.to("cpu", torch.float64)
    if not matrix.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite activations.")
    return matrix


def directions_of(activations: Tensor, variance: float) -> Directions | None:
    """The leading directions of float64 ``activations``; None where they are the same on all samples."""
    # Numbers that are far from 1 would be out of range when they are squared.
    scale = activations.abs().max()
    centred = activations / torch.where(scale > 0, scale, 1)
    centred = centred - centred.mean(0)
    q, r = torch.linalg.qr(centred)
    u, lengths, right = torch.linalg.svd(r, full_matrices=False)
    tolerance = max(centred.shape) * torch.finfo(torch.float64).eps
    rank = int((lengths > tolerance * max(1.0, float(lengths[0]))).sum())
    if rank == 0:
        return None
    if variance < 1:
        held = (lengths**2).cumsum(0) / (lengths**2).sum()
        # 1e-12: rounding must not add a direction where the share is met exactly.
        rank = min(rank, int((held < variance - 1e-12).sum()) + 1)
    return Directions(q @ u[:, :rank], lengths[:rank, None] * right[:rank])


def correlate(one: Directions, other: Directions) -> CanonicalCorrelation:
    """The canonical correlation of two sets of directions. Raises ``TooFewSamples``."""
    samples, together = len(one.basis), one.basis.shape[1] + other.basis.shape[1]
    if samples <= together:
        raise TooFewSamples(
            f"{samples} samples are too few for {one.basis.shape[1]} and {other.basis.shape[1]} directions, "
            f"which correlate by chance: pass more than {together} samples, or keep less variance."
        )
    u, found, _ = torch.linalg.svd(one.basis.T @ other.basis, full_matrices=False)
    coefficients = found.clamp(0, 1)
    weights = (u.T @ one.loadings).abs().sum(1)
    weighted = float((weights * coefficients).sum() / weights.sum())
    return CanonicalCorrelation(coefficients, float(coefficients.mean()), weighted)
