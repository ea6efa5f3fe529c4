"""Criteria that score filters, each a pure function of a weight; ``score`` finds them by name."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from regrow.filters import check_finite, eligible, row_lengths, rows, unit_rows
from regrow.given import check_module, check_seed, check_weight
from regrow.modules import filters_first
from regrow.numbers import numbers
from regrow.suggest import nearest


def overlap(weight: Tensor) -> Tensor:
    """The overlap of each filter with the other filters of its layer (RePr, arXiv 1811.07275, eq. 1–2).

    ``O[f] = Σ_j |Ŵ Ŵᵀ − I|[f, j] / J``, where ``Ŵ`` has J rows of unit length. High = redundant.
    A row of zeros has overlap 0, and adds nothing to the overlap of the other rows.

    Args:
        weight: [filters, channels, *kernel] of an ungrouped convolution; of a transposed one, which has its
            channels first, ``weight.transpose(0, 1)``.

    Returns:
        Tensor[filters], each in [0, 1), float32 (float64 for float64 weights).

    Raises:
        ValueError: ``weight`` is not a tensor of real numbers, or is empty.
    """
    check_weight(weight, "overlap")
    if weight.dim() == 0 or not weight[:1].numel() or weight.is_complex():
        raise ValueError(
            f"overlap takes a weight [filters, channels, …] of real numbers, and got {weight.dtype} of shape "
            f"{list(weight.shape)}."
        )
    matrix = rows(weight.detach())
    if matrix.dtype != torch.float64:
        matrix = matrix.float()
    unit = unit_rows(matrix)
    cosine = (unit @ unit.T).abs_()
    cosine.fill_diagonal_(0)
    return cosine.sum(1) / len(matrix)


def ortho(weight: Tensor) -> Tensor:
    """The negative overlap (RePr, eq. 2): high = no other filter has a similar direction. Tensor[filters]."""
    return -overlap(weight)


def ortho_corrected(weight: Tensor) -> Tensor:
    """``ortho`` divided by the |cos| that random unit vectors of dimension D have on average, about
    sqrt(2 / (π D)): without this, filters with few weights score lower. Tensor[filters]."""
    return ortho(weight) / math.sqrt(2 / (math.pi * rows(weight).shape[1]))


def l1(weight: Tensor) -> Tensor:
    """Sum of the absolute weights of each filter (Li et al. 2017). Tensor[filters], float64."""
    return row_lengths(rows(weight.detach()), 1)


def l2(weight: Tensor) -> Tensor:
    """Euclidean length of each filter. Tensor[filters], float64."""
    return row_lengths(rows(weight.detach()))


WEIGHT_CRITERIA = {"ortho": ortho, "ortho-corrected": ortho_corrected, "l1": l1, "l2": l2}
CRITERIA = (*WEIGHT_CRITERIA, "random")


def check_criterion(criterion: str) -> None:
    """Raise ``ValueError``, with similar names, if ``criterion`` is not in ``CRITERIA``."""
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}{nearest(str(criterion), CRITERIA)}")


def score(
    model: nn.Module, criterion: str = "ortho", *, exclude: Iterable[str] = (), seed: int | None = None
) -> dict[str, Tensor]:
    """Score every filter of every ungrouped convolution, transposed ones too; higher = keep.

    Args:
        model: any module with convolutions; it is only read.
        criterion: ``"ortho"`` (RePr's overlap), ``"ortho-corrected"``, ``"l1"``, ``"l2"`` or ``"random"``.
        exclude: qualified names of convolutions, or of containers of convolutions, to leave out.
        seed: for ``"random"``; the same seed gives the same scores.

    Returns:
        {qualified name: Tensor[filters]} on the device of the weights.

    Raises:
        ValueError: unknown criterion or layer name, no convolution left, NaN, infinite or complex weights,
            ``"random"`` without a seed.
    """
    check_module(model, "score")
    check_criterion(criterion)
    convs = eligible(model, exclude)
    check_finite(convs)
    if criterion != "random":
        of = WEIGHT_CRITERIA[criterion]
        scores = {name: of(filters_first(conv, conv.weight)) for name, conv in convs.items()}
        finite = numbers([values.isfinite().all() for values in scores.values()])
        if infinite := [name for name, is_finite in zip(scores, finite, strict=True) if not is_finite]:
            raise ValueError(
                f"the weights of {infinite[0]!r} are so large that {criterion} is beyond float64: "
                "divide them by 1e10, say."
            )
        return scores
    if seed is None:
        raise ValueError("criterion 'random' needs a seed: score(model, 'random', seed=0)")
    check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(conv.out_channels, generator=generator).to(conv.weight.device)
        for name, conv in convs.items()
    }
