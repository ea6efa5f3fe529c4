"""Compare runs at equal compute: the best accuracy of each within the cost of its seed's cheapest run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from regrow.study.records import RunRecord

Unit = Literal["flops", "seconds"]


@dataclass(frozen=True)
class EqualCompute:
    """Best validation accuracy within the compute that the cheapest run of the same seed spent.

    ``accuracies`` are fractions, {method: {seed: accuracy}}, without the runs that finished no epoch
    within it; ``budgets`` are in ``unit``, {seed: compute}.
    """

    unit: Unit
    budgets: Mapping[int, float]
    accuracies: Mapping[str, Mapping[int, float]]


def equal_compute(runs: Mapping[str, Mapping[int, RunRecord]]) -> EqualCompute | None:
    """Compare runs at equal compute: training FLOPs if every epoch has them, else seconds of training.

    Args:
        runs: {method: {seed: finished run}}.

    Returns:
        None if no seed has runs, with epochs, of two methods.
    """
    every = [run for of_method in runs.values() for run in of_method.values()]
    unit: Unit = "flops" if all(spent(run, "flops") is not None for run in every) else "seconds"
    seeds = sorted({seed for of_method in runs.values() for seed in of_method})
    budgets: dict[int, float] = {}
    accuracies: dict[str, dict[int, float]] = {method: {} for method in runs}
    for seed in seeds:
        costs = {
            method: cost
            for method, of_method in runs.items()
            if seed in of_method and (cost := spent(of_method[seed], unit))
        }
        if len(costs) < 2:
            continue
        budgets[seed] = min(cost[-1] for cost in costs.values())
        for method, cost in costs.items():
            reached = best_within(runs[method][seed], cost, budgets[seed])
            if reached is not None:
                accuracies[method][seed] = reached
    return EqualCompute(unit, budgets, accuracies) if budgets else None


def spent(run: RunRecord, unit: Unit) -> list[float] | None:
    """The compute that ``run`` had spent after each epoch; None if the record of an epoch lacks it."""
    costs = [cost for epoch in run.epochs if (cost := epoch.get(unit)) is not None]
    return list(accumulate(costs)) if len(costs) == len(run.epochs) else None


def best_within(run: RunRecord, cost: list[float], budget: float) -> float | None:
    """The best validation accuracy of the epochs that ended within ``budget``; None if none did.

    If the whole run was within ``budget``, the accuracy of the finished run counts as well, because its batch
    norms may have been re-estimated after the last epoch.

    Args:
        run: a finished run.
        cost: the compute it had spent after each epoch, as :func:`spent` returns it.
        budget: compute in the same unit.
    """
    reached = [
        epoch["validation_accuracy"]
        for epoch, so_far in zip(run.epochs, cost, strict=True)
        if so_far <= budget and epoch["validation_accuracy"] is not None
    ]
    if run.result is not None and cost and cost[-1] <= budget:
        reached.append(run.result["validation_accuracy"])
    return max(reached, default=None)
