"""Orthogonal restart: new directions for dropped filters (RePr, §3)."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.filters import unit_rows


def orthogonal_rows(kept: Tensor, dropped: Tensor, *, generator: torch.Generator) -> tuple[Tensor, bool]:
    """New rows for dropped filters, orthogonal to the kept rows and to the dropped ones' old values.

    While the null space of all those rows has room, the new rows are random directions inside it,
    orthogonal to each other too. Where it has not (1×1 and wide layers), they are the directions the
    existing rows cover least: right singular vectors in ascending order of their singular value. Should
    more rows be wanted than a filter has weights, the rest are random directions.

    Args:
        kept: [k, D], the current rows of the filters that stayed, k ≥ 1.
        dropped: [d, D], the rows of the dropped filters as they were when they were dropped.
        generator: a CPU generator; the same state gives the same rows on every device and rank.

    Returns:
        [d, D] on the device and in the type of ``kept``, each as long as the mean kept row; and whether
        the fallback was needed, because the null space was too small.
    """
    wanted, dimension = dropped.shape
    kept_rows, dropped_rows = kept.detach().double().cpu(), dropped.detach().double().cpu()
    old = torch.cat([unit_rows(kept_rows), unit_rows(dropped_rows)])
    length = kept_rows.norm(dim=1).mean()
    if length == 0:
        length = dropped_rows.norm(dim=1).mean()
    random = torch.randn(wanted, dimension, generator=generator, dtype=torch.float64)

    fallback = False
    if dimension - len(old) >= wanted:
        basis = torch.linalg.qr(old.T).Q
        new = _orthonormal(_away_from(basis, random))
    else:
        _, singular, directions = torch.linalg.svd(old, full_matrices=True)
        size = torch.zeros(dimension, dtype=torch.float64)
        size[: len(singular)] = singular
        null = int((size <= 1e-9 * size.max()).sum())
        fallback = null < wanted
        if fallback:
            count = min(wanted, dimension)
            new = torch.cat([directions[dimension - count :].flip(0), unit_rows(random[count:])])
        else:
            basis = directions[: dimension - null].T
            new = _orthonormal(_away_from(basis, random))
    return (new * length).to(kept), fallback


def _away_from(basis: Tensor, vectors: Tensor) -> Tensor:
    # Twice: what rounding leaves of the first projection is removed by the second.
    for _ in range(2):
        vectors = vectors - (vectors @ basis) @ basis.T
    return vectors


def _orthonormal(vectors: Tensor) -> Tensor:
    return torch.linalg.qr(vectors.T).Q.T
