from pathlib import Path
from typing import Any

import pytest

from regrow.study.records import RunRecord
from regrow.study.sequences import (
    compared_accuracy,
    mean_after_switch,
    measure,
    outcome,
    switches,
    task_points,
    tasks_of,
)


def result(*accuracies: float) -> dict[str, Any]:
    return {
        "test_accuracy": accuracies[-1],
        "task_accuracies": list(accuracies),
        "mean_accuracy_after_switch": mean_after_switch(accuracies),
        "train_seconds": 2.0,
    }


def run(seed: int, *accuracies: float, epochs: tuple[int | None, ...] = ()) -> RunRecord:
    """A finished run; ``epochs`` are the tasks that its epochs trained."""
    lines = [{"epoch": number, "task": task} for number, task in enumerate(epochs, start=1)]
    return RunRecord(Path("run"), {"seed": seed}, {}, lines, [], result(*accuracies))


def test_the_first_task_does_not_count() -> None:
    assert mean_after_switch([0.1, 0.5, 0.75]) == 0.625
    assert mean_after_switch([0.9]) is None
    assert mean_after_switch([]) is None


def test_what_is_compared() -> None:
    assert compared_accuracy(result(0.1, 0.5, 0.75)) == 0.625
    assert compared_accuracy(result(0.9)) == 0.9
    assert compared_accuracy({"test_accuracy": 0.8}) == 0.8  # of an earlier version
    assert [tasks_of(each) for each in (result(0.1, 0.2, 0.3), result(0.9), {})] == [3, 1, 1]


def test_it_is_called_by_what_it_is() -> None:
    assert [measure(tasks) for tasks in (1, 2, 5)] == [
        "test accuracy",
        "test accuracy in task 2",
        "mean test accuracy in tasks 2 to 5",
    ]
    assert outcome(result(0.1, 0.5, 0.75)) == "mean test accuracy in tasks 2 to 3 62.50%, trained in 2.0 s"
    assert outcome(result(0.5)) == "test accuracy 50.00%, trained in 2.0 s"


def test_points_by_hand() -> None:
    baseline = {0: run(0, 0.8, 0.7), 1: run(1, 0.9, 0.8), 5: run(5, 0.1, 0.1)}
    mine = {0: run(0, 0.81, 0.73), 1: run(1, 0.91, 0.81), 2: run(2, 0.86, 0.77)}
    first, second = task_points(mine, baseline)
    assert (first.n, first.accuracy.mean) == (3, pytest.approx(0.86))
    assert first.accuracy.deviation == pytest.approx(0.05)
    assert first.interval == pytest.approx((0.86 - 4.30265 * 0.05 / 3**0.5, 0.86 + 4.30265 * 0.05 / 3**0.5))
    assert first.difference is not None
    assert first.difference.differences == {0: pytest.approx(1), 1: pytest.approx(1)}
    assert second.difference is not None
    assert second.difference.differences == {0: pytest.approx(3), 1: pytest.approx(1)}
    assert second.difference.low == pytest.approx(2 - 12.7062, abs=1e-3)


def test_the_baseline_has_points_without_differences() -> None:
    points = task_points({0: run(0, 0.8, 0.7)})
    assert [(point.accuracy.mean, point.interval, point.difference) for point in points] == [
        (0.8, None, None),
        (0.7, None, None),
    ]
    assert [point.difference for point in task_points({0: run(0, 0.8, 0.7)}, {1: run(1, 0.8, 0.7)})] == [
        None
    ] * 2


def test_a_single_task_has_no_points() -> None:
    assert task_points({0: run(0, 0.8)}) == ()
    assert task_points({}) == ()
    old = RunRecord(Path("run"), {}, {}, [], [], {"test_accuracy": 0.8, "task_accuracies": None})
    assert task_points({0: old}) == ()


def test_switches_by_hand() -> None:
    assert switches(run(0, 0.5, epochs=(1, 1, 2, 2, 3))) == [2, 4]
    assert switches(run(0, 0.5, epochs=(1, 1))) == []
    assert switches(RunRecord(Path("run"), {}, {}, [{"epoch": 1}, {"epoch": 2}], [], None)) == []
