"""Accuracy over a sequence of tasks: what a comparison compares, and each task. Imports no PyTorch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from regrow.study.paired import Paired, Spread, paired, spread, t_interval

if TYPE_CHECKING:
    from regrow.study.records import RunRecord


@dataclass(frozen=True)
class TaskPoint:
    """One method in one task, over its seeds, at the end of the task.

    Attributes:
        n: the number of seeds.
        accuracy: on the task's test pictures, as fractions.
        interval: 95 % t interval of the mean accuracy; None for a single seed and for equal accuracies.
        difference: the paired difference to the baseline in percentage points; None for the baseline itself,
            and for a method that shares no seed with it.
    """

    n: int
    accuracy: Spread
    interval: tuple[float, float] | None
    difference: Paired | None


def mean_after_switch(accuracies: Sequence[float]) -> float | None:
    """The mean of the accuracies of all tasks but the first; None for a single task."""
    return statistics.fmean(accuracies[1:]) if len(accuracies) > 1 else None


def compared_accuracy(result: Mapping[str, Any]) -> float:
    """The accuracy in ``result`` that a comparison compares, as a fraction.

    That is the mean over the tasks behind the first switch, or test accuracy for a single task.
    """
    mean: float | None = result.get("mean_accuracy_after_switch")
    accuracy: float = result["test_accuracy"]
    return accuracy if mean is None else mean


def tasks_of(result: Mapping[str, Any]) -> int:
    """The number of tasks that the run of ``result`` has trained; 1 in records of earlier versions."""
    return len(result.get("task_accuracies") or (0.0,))


def measure(tasks: int) -> str:
    """What ``compared_accuracy`` of a run with so many tasks is, in words."""
    if tasks == 1:
        return "test accuracy"
    return "test accuracy in task 2" if tasks == 2 else f"mean test accuracy in tasks 2 to {tasks}"


def outcome(result: Mapping[str, Any]) -> str:
    """What ``result`` says about a finished run, in a line."""
    accuracy = f"{measure(tasks_of(result))} {compared_accuracy(result):.2%}"
    return f"{accuracy}, trained in {result['train_seconds']:.1f} s"


def task_points(
    runs: Mapping[int, RunRecord], baseline: Mapping[int, RunRecord] | None = None
) -> tuple[TaskPoint, ...]:
    """A point for each task of a sequence; none for runs with a single task.

    Args:
        runs: {seed: finished run} of one method.
        baseline: the same of the method to compare with.
    """
    mine, reference = _accuracies(runs), _accuracies(baseline or {})
    tasks = max(map(len, mine.values()), default=0)
    if tasks < 2:
        return ()
    points = []
    for task in range(tasks):
        found, other = _in_task(mine, task), _in_task(reference, task)
        points.append(
            TaskPoint(
                n=len(found),
                accuracy=spread(list(found.values())),
                interval=t_interval(list(found.values())),
                difference=paired(
                    {seed: 100 * value for seed, value in other.items()},
                    {seed: 100 * value for seed, value in found.items()},
                )
                if found.keys() & other.keys()
                else None,
            )
        )
    return tuple(points)


def switches(run: RunRecord) -> list[int]:
    """The last epoch of each task of ``run`` but the last."""
    return [one["epoch"] for one, next_ in pairwise(run.epochs) if one.get("task") != next_.get("task")]


def _accuracies(runs: Mapping[int, RunRecord]) -> dict[int, list[float]]:
    return {seed: (run.result or {}).get("task_accuracies") or [] for seed, run in runs.items()}


def _in_task(accuracies: Mapping[int, Sequence[float]], task: int) -> dict[int, float]:
    """{seed: accuracy} of the runs that have the task, counted from 0."""
    return {seed: values[task] for seed, values in accuracies.items() if task < len(values)}
