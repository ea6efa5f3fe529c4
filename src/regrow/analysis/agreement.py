"""How well criteria agree with the oracle: correlations of their scores, by value and by rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regrow.analysis.ranks import pearson, spearman
from regrow.criteria.batches import Loss
from regrow.criteria.score import CRITERIA, Criterion, check_criterion, score
from regrow.given import check_module, names_given
from regrow.looking.images import check_batches

VERSION = 1
ORACLE = "oracle"


def criteria_against_oracle(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    criteria: Iterable[str] | Mapping[str, Criterion] | None = None,
    exclude: Iterable[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """How the scores of each criterion correlate with those of the oracle (RePr, arXiv 1811.07275).

    The oracle's score of a filter is how much the loss rises when this filter alone is dropped. The paper
    reports for ``ortho`` a correlation of 0.38 of the values and of 0.58 of the ranks.

    Args:
        model: any module with convolutions; it is only read.
        batches: (inputs, labels), all of which are kept in memory: a few hundred pictures.
        loss: as ``score`` takes it (default: cross entropy).
        criteria: names as ``score`` takes them, or {name: name or function of the model} (default: all
            criteria that regrow has).
        exclude: qualified names of convolutions, or of containers of convolutions, to leave out.
        seed: for ``"random"``.

    Returns:
        JSON-able record as ``agreement`` gives it.

    Raises:
        ValueError: as ``score``.
    """
    check_module(model, "criteria_against_oracle")
    check_batches(batches, "batches")
    if criteria is None:
        criteria = [name for name in CRITERIA if name != ORACLE]
    named: Mapping[str, Criterion] = (
        criteria
        if isinstance(criteria, Mapping)
        else {name: name for name in names_given(criteria, "criteria")}
    )
    for each in named.values():
        check_criterion(each)
    settings: dict[str, Any] = {
        "exclude": names_given(exclude, "exclude"),
        "seed": seed,
        "batches": list(batches),
        "loss": loss,
    }
    oracle = score(model, ORACLE, **settings)
    return agreement({name: score(model, each, **settings) for name, each in named.items()}, oracle)


def agreement(scores: Mapping[str, Mapping[str, Tensor]], oracle: Mapping[str, Tensor]) -> dict[str, Any]:
    """The correlations of scores with those of the oracle, over all layers together and in each layer.

    Args:
        scores: {criterion: {qualified name: Tensor[filters]}}.
        oracle: {qualified name: Tensor[filters]}. Layers that only one of the two has are left out.

    Returns:
        JSON-able record: version, filters (how many are compared), criteria {criterion: pearson, spearman,
        layers {qualified name: pearson, spearman}}. ``pearson`` is of the values and ``spearman`` of the
        ranks; None stands where a criterion or the oracle gives all filters the same score.
    """
    found: dict[str, Any] = {}
    filters = 0
    for criterion, of_layers in scores.items():
        names = [name for name in oracle if name in of_layers]
        pairs = {
            name: (of_layers[name].detach().cpu().double(), oracle[name].detach().cpu().double())
            for name in names
        }
        together = _both(
            torch.cat([torch.empty(0), *(mine for mine, _ in pairs.values())]),
            torch.cat([torch.empty(0), *(best for _, best in pairs.values())]),
        )
        found[criterion] = {**together, "layers": {name: _both(*pair) for name, pair in pairs.items()}}
        filters = sum(len(oracle[name]) for name in names)
    return {"version": VERSION, "filters": filters, "criteria": found}


def _both(mine: Tensor, best: Tensor) -> dict[str, float | None]:
    finite = mine.isfinite() & best.isfinite()
    mine, best = mine[finite], best[finite]
    return {"pearson": pearson(mine, best), "spearman": spearman(mine, best)}
