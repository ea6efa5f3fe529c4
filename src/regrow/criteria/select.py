"""Keep masks from scores: rank the filters, and drop a fraction of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from regrow.callers import warn
from regrow.filters import excluded
from regrow.given import check_mapping, tensor_given
from regrow.numbers import together
from regrow.suggest import nearest

SCOPES = ("global", "layer")


def check_selection(fraction: float, scope: str, floor: float) -> None:
    """Raise ``ValueError`` for a fraction outside [0, 1), a floor outside [0, 1] or an unknown scope."""
    if not (isinstance(fraction, int | float) and 0 <= fraction < 1):
        raise ValueError(
            f"fraction is the share of filters removed, 0 <= fraction < 1, got {fraction!r}. For 30 % write "
            "fraction=0.3."
        )
    if not (isinstance(floor, int | float) and 0 <= floor <= 1):
        raise ValueError(
            f"floor is the share of each layer kept alive, 0 <= floor <= 1, got {floor!r}. For a tenth write "
            "floor=0.1."
        )
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}{nearest(str(scope), SCOPES)}")


def select(
    scores: Mapping[str, Tensor],
    fraction: float,
    *,
    scope: str = "global",
    floor: float = 0.1,
    exclude: Iterable[str] = (),
) -> dict[str, Tensor]:
    """Keep masks that drop the filters with the lowest scores.

    Args:
        scores: {name: Tensor[filters]}, higher = keep, as ``score`` gives them.
        fraction: share of the ranked filters to drop, rounded to a whole number of filters.
        scope: ``"global"`` ranks all filters of all layers together (RePr §3), ``"layer"`` drops the
            same share of each layer.
        floor: share of each layer that stays alive whatever its scores are, rounded up to at least one
            filter.
        exclude: names of layers that are not ranked: their filters are neither dropped nor counted.

    Returns:
        {name: BoolTensor[filters]} on the CPU for every ranked layer, True = alive. Of filters with equal
        scores the first in order of layer and index is dropped first, on every machine and rank.

    Raises:
        ValueError: arguments out of range, unknown names, nothing left to rank, NaN scores.

    Warns:
        UserWarning: the floor leaves fewer filters to drop than ``fraction`` asks for, so fewer are dropped.
    """
    check_mapping(scores, "scores", "one score per filter, as regrow.score gives them")
    check_selection(fraction, scope, floor)
    out = excluded(exclude, scores)
    given = {
        name: tensor_given(values, f"scores[{name!r}]") for name, values in scores.items() if name not in out
    }
    for name, values in given.items():
        if values.is_complex():
            raise ValueError(f"scores[{name!r}] must hold real numbers, got {values.dtype}.")
    near = together([values.detach().double().flatten() for values in given.values()])
    ranked = {name: mine.view(given[name].shape) for name, mine in zip(given, near, strict=True)}
    if not ranked:
        raise ValueError("no layer is left to select from: exclude fewer layers.")
    for name, values in ranked.items():
        if values.dim() != 1 or not len(values):
            raise ValueError(f"scores[{name!r}] must hold one number per filter, got {list(values.shape)}.")
        if values.isnan().any():
            raise ValueError(f"scores[{name!r}] holds NaN: look for NaN weights in that layer.")

    sizes = {name: len(values) for name, values in ranked.items()}
    # 0.07 · 100 is 7.000000000000001 in binary: without the 1e-9 an eighth filter would be protected.
    room = {name: size - max(1, math.ceil(floor * size - 1e-9)) for name, size in sizes.items()}
    if scope == "layer":
        wanted = {name: _rounded(fraction * size) for name, size in sizes.items()}
        counts = {name: min(wanted[name], room[name]) for name in ranked}
        keep = {name: _without_lowest(values, counts[name]) for name, values in ranked.items()}
        asked, got = sum(wanted.values()), sum(counts.values())
    else:
        asked = _rounded(fraction * sum(sizes.values()))
        got = min(asked, sum(room.values()))
        # The best filters of each layer, as many as the floor asks for, cannot be dropped. A greedy walk from
        # the lowest score upwards would spare the same filters.
        spared = torch.cat([_without_lowest(values, room[name]) for name, values in ranked.items()])
        order = torch.cat(list(ranked.values())).argsort(stable=True)
        flat = torch.ones(len(order), dtype=torch.bool)
        flat[order[~spared[order]][:got]] = False
        keep = dict(zip(ranked, flat.split(list(sizes.values())), strict=True))
    if got < asked:
        warn(
            f"floor={floor} leaves {got} of the {asked} filters to drop that fraction={fraction} asks for: "
            f"{got} are dropped. Lower the floor or the fraction."
        )
    return keep


def _rounded(count: float) -> int:
    return math.floor(count + 0.5 + 1e-9)


def _without_lowest(values: Tensor, count: int) -> Tensor:
    keep = torch.ones(len(values), dtype=torch.bool)
    keep[values.argsort(stable=True)[:count]] = False
    return keep
