"""New rows for dropped filters: orthogonal directions (RePr, arXiv 1811.07275, §3), or numbers drawn anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regrow.filters import row_lengths, unit_rows


def orthogonal_rows(kept: Tensor, dropped: Tensor, *, generator: torch.Generator) -> tuple[Tensor, bool]:
    """New rows for dropped filters, orthogonal to the kept rows and to the old rows of the dropped filters.

    If the null space of these rows has at least d dimensions, the new rows are random orthogonal directions
    in it. If it is smaller (1×1 and wide layers), the new rows are the directions that the existing rows
    cover least: right singular vectors in ascending order of their singular values. If d > D, the rows after
    the first D are random directions.

    Args:
        kept: [k, D], the current rows of the kept filters, k ≥ 1.
        dropped: [d, D], the rows of the dropped filters at the time of the drop.
        generator: a CPU generator; the same state gives the same rows on every device and rank.

    Returns:
        The new rows, [d, D] on the device and in the type of ``kept``, each with the mean length of the kept
        rows; and whether the null space was too small.
    """
    wanted, dimension = dropped.shape
    kept_rows, dropped_rows = kept.detach().double().cpu(), dropped.detach().double().cpu()
    old = torch.cat([unit_rows(kept_rows), unit_rows(dropped_rows)])
    length = row_lengths(kept_rows).mean()
    if length == 0:
        length = row_lengths(dropped_rows).mean()
    random = torch.randn(wanted, dimension, generator=generator, dtype=torch.float64)

    fallback = False
    if dimension - len(old) >= wanted:
        new = _orthonormal(random, torch.linalg.qr(old.T).Q)
    else:
        _, singular, directions = torch.linalg.svd(old, full_matrices=True)
        null = dimension - int((singular > 1e-9 * singular.max()).sum())
        fallback = null < wanted
        if fallback:
            count = min(wanted, dimension)
            new = torch.cat([directions[dimension - count :].flip(0), unit_rows(random[count:])])
        else:
            new = _orthonormal(random, directions[: dimension - null].T)
    return (new * length).to(kept), fallback


def drawn_as_new(weight: Tensor, shape: Sequence[int], *, generator: torch.Generator) -> Tensor:
    """Numbers as PyTorch draws them for a new layer with this weight: uniform in ±1/√(inputs of a filter).

    Args:
        weight: the weight of a convolution or a linear layer, in PyTorch's order of dimensions.
        shape: of the numbers wanted.
        generator: a CPU generator; the same state gives the same numbers on every device and rank.

    Returns:
        Tensor of ``shape`` on the device and in the type of ``weight``.
    """
    bound = weight[0].numel() ** -0.5
    return ((torch.rand(shape, generator=generator) * 2 - 1) * bound).to(weight)


def _orthonormal(vectors: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows, made from ``vectors`` and orthogonal to the columns of ``basis``."""
    for _ in range(2):  # rounding leaves a remainder, which the second projection removes
        vectors = vectors - (vectors @ basis) @ basis.T
    return torch.linalg.qr(vectors.T).Q.T
