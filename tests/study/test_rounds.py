from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.study import records
from regrow.study.config import make_config
from regrow.study.rounds import Rounds
from regrow.study.train import train


def test_three_tasks_of_two_generations_by_hand() -> None:
    rounds = Rounds(epochs=12, tasks=3, generations=2)
    assert (rounds.count, rounds.length) == (6, 2)
    assert [rounds.after(epoch) for epoch in range(13)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5]
    assert [rounds.trained(epoch) for epoch in range(13)] == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 2]
    assert [epoch for epoch in range(1, 13) if rounds.ends(epoch)] == [2, 4, 6, 8, 10]
    assert [epoch for epoch in range(1, 13) if rounds.ends_task(epoch)] == [4, 8]
    assert [rounds.task(number) for number in range(6)] == [0, 0, 1, 1, 2, 2]


@given(st.integers(1, 50), st.integers(1, 6), st.integers(1, 4))
def test_every_epoch_is_in_one_round_and_all_rounds_are_equally_long(
    length: int, tasks: int, generations: int
) -> None:
    rounds = Rounds(length * tasks * generations, tasks, generations)
    rounds.check()
    found = [rounds.after(epoch - 1) for epoch in range(1, rounds.epochs + 1)]
    assert [found.count(number) for number in range(rounds.count)] == [length] * rounds.count
    assert found == sorted(found)
    assert rounds.task(rounds.count - 1) == tasks - 1


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        (Rounds(10, 3), "10 epochs cannot be divided evenly by 3 tasks: train for 9, say"),
        (Rounds(10, 2, 3), "by 2 tasks × 3 generations: train for 12, say"),
        (Rounds(2, 1, 4), "by 4 generations: train for 4, say"),
    ],
)
def test_epochs_that_cannot_be_divided(rounds: Rounds, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rounds.check()


SMALL: dict[str, Any] = {
    "data": "digits", "width": 4, "train_size": 100, "batch_size": 50, "threads": 1, "seed": 3,
    "device": "cpu", "epochs": 8, "tasks": 2,
}  # fmt: skip


def test_the_learning_rate_and_the_cycles_begin_anew_in_every_task(tmp_path: Path) -> None:
    settings = {**SMALL, "full": 1, "sub": 1, "cycles": 1}
    for method in ("standard", "repr"):
        train(make_config({**settings, "method": method}), tmp_path / method)
    standard, regrown = (records.read_run(tmp_path / method) for method in ("standard", "repr"))
    rates = [line["learning_rate"] for line in regrown.epochs]
    assert rates == [line["learning_rate"] for line in standard.epochs]
    assert rates[:4] == rates[4:]
    assert rates[0] == rates[2] == 0.1 > rates[3]
    assert [(event["kind"], event["epoch"]) for event in regrown.events] == [
        ("drop", 1), ("restore", 2), ("drop", 5), ("restore", 6),
    ]  # fmt: skip
    assert [line["phase"] for line in regrown.epochs] == ["full", "sub", "full", "full"] * 2


def test_a_run_of_two_tasks_on_the_same_data_goes_on_with_its_weights(tmp_path: Path) -> None:
    one = {**SMALL, "schedule": "constant"}
    train(make_config(one), tmp_path / "two tasks")
    train(make_config({**one, "tasks": 1}), tmp_path / "one task")
    paths = [records.weights_path(tmp_path / name) for name in ("two tasks", "one task")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
