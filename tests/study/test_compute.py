from pathlib import Path

from regrow.study.compute import best_within, equal_compute, spent
from regrow.study.records import RunRecord


def run(accuracies, seconds=1.0, flops=None, final=None):
    """A finished run with an epoch for each of ``accuracies``; ``flops`` None is a record without them."""
    epochs = [
        {"epoch": number, "validation_accuracy": value, "seconds": seconds}
        | ({} if flops is None else {"flops": flops})
        for number, value in enumerate(accuracies, start=1)
    ]
    result = {"validation_accuracy": accuracies[-1] if final is None else final} if accuracies else {}
    return RunRecord(Path(), {}, {}, epochs, [], result)


def test_spent_adds_up_and_is_none_where_an_epoch_does_not_say():
    assert spent(run([0.1, 0.2, 0.3], 2.0), "seconds") == [2, 4, 6]
    assert spent(run([0.1, 0.2], flops=5), "flops") == [5, 10]
    assert spent(run([0.1]), "flops") is None
    torn = run([0.1, 0.2], flops=5)
    torn.epochs[1]["flops"] = None
    assert spent(torn, "flops") is None
    assert spent(run([]), "seconds") == []


def test_the_best_epoch_within_a_budget():
    one = run([0.3, 0.6, 0.5, None], final=0.9)
    cost = spent(one, "seconds")
    assert best_within(one, cost, 0.9) is None
    assert best_within(one, cost, 1.0) == 0.3
    assert best_within(one, cost, 3.5) == 0.6
    assert best_within(one, cost, 4.0) == 0.9  # the finished run, its batch norms re-estimated


def test_the_cheapest_of_a_seed_sets_its_budget():
    found = equal_compute(
        {
            "a": {0: run([0.5, 0.7], 2.0), 1: run([0.5, 0.7], 2.0), 2: run([0.5])},
            "b": {0: run([0.4, 0.6, 0.8], 1.5), 1: run([0.4, 0.6, 0.8], 1.0)},
        }
    )
    assert found.unit == "seconds"
    assert found.budgets == {0: 4.0, 1: 3.0}  # seed 2 has nothing to be compared with
    assert found.accuracies == {"a": {0: 0.7, 1: 0.5}, "b": {0: 0.6, 1: 0.8}}


def test_a_run_that_had_no_epoch_by_then_is_left_out():
    found = equal_compute({"a": {0: run([0.5], 1.0)}, "b": {0: run([0.9], 5.0)}})
    assert found.accuracies == {"a": {0: 0.5}, "b": {}}


def test_flops_are_the_unit_only_where_all_runs_know_them():
    both = {"a": {0: run([0.5, 0.6], 9.0, flops=10)}, "b": {0: run([0.5, 0.6], 1.0, flops=20)}}
    found = equal_compute(both)
    assert (found.unit, found.budgets) == ("flops", {0: 20})
    assert found.accuracies == {"a": {0: 0.6}, "b": {0: 0.5}}
    assert equal_compute({**both, "c": {0: run([0.5])}}).unit == "seconds"


def test_nothing_to_compare():
    assert equal_compute({"a": {0: run([0.5])}}) is None
    assert equal_compute({"a": {0: run([0.5])}, "b": {1: run([0.5])}}) is None
    assert equal_compute({"a": {0: run([0.5])}, "b": {0: run([])}}) is None
