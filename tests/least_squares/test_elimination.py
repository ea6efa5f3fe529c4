"""Channels leave in the order of what they cost, and the cost is that of the ridge system solved anew."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from regrow.least_squares.elimination import Reading, eliminate


def reading(x: Tensor, weights: Tensor, channels: list[int]) -> Reading:
    return Reading(x.T @ x / len(x), weights, torch.tensor(channels))


def cost(one: Reading, gone: set[int], penalty: float) -> float:
    """The error without the channels ``gone``: the ridge system of the columns that are left, solved anew."""
    system = one.xx + penalty * one.xx.diagonal().mean() * torch.eye(len(one.xx), dtype=torch.float64)
    out = torch.tensor([int(channel) in gone for channel in one.channels])
    change = torch.zeros_like(one.weights)
    change[out] = -one.weights[out]
    if not out.all():
        change[~out] = torch.linalg.solve(system[~out][:, ~out], -system[~out][:, out] @ change[out])
    return float((change * (system @ change)).sum())


def plainly(readings: list[Reading], channels: int, penalty: float) -> tuple[list[int], list[float]]:
    order: list[int] = []
    errors, before = [], 0.0
    while len(order) < channels:
        after = {
            channel: sum(cost(one, {*order, channel}, penalty) for one in readings)
            for channel in range(channels)
            if channel not in order
        }
        best = min(after, key=after.__getitem__)
        order.append(best)
        errors.append(after[best] - before)
        before = after[best]
    return order, errors


# Which channel each column of each reading reads: several columns each, in any order, some that stay.
READS = {
    "one column each": [[0, 1, 2, 3]],
    "kernels of two": [[0, 0, 1, 1, 2, 2, 3, 3]],
    "two readers": [[0, 1, 2, 3], [3, 3, 2, 2, 0, 0, 1, 1]],
    "groups": [[0, 0, 1, 1], [2, 2, 3, 3]],
    "beside other layers' channels": [[-1, 0, 1, -1, 2, 3]],
    "one is read twice": [[0, 1, 0, 2, 3]],
    "one is not read": [[0, 1, 3]],
}


@given(st.sampled_from(sorted(READS)), st.sampled_from([1e-4, 1e-2, 1.0]), st.integers(0, 10_000))
def test_as_if_every_system_was_solved_anew(name: str, penalty: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    readings = []
    for channels in READS[name]:
        mixing = draw(len(channels), len(channels))
        readings.append(reading(draw(30, len(channels)) @ mixing, draw(len(channels), 3), channels))
    before = [(one.xx.clone(), one.weights.clone()) for one in readings]
    order, errors = eliminate(readings, 4, penalty)
    expected, theirs = plainly(readings, 4, penalty)
    assert order.tolist() == expected
    assert errors.tolist() == pytest.approx(theirs, rel=1e-8, abs=1e-8)
    for one, (xx, weights) in zip(readings, before, strict=True):
        assert torch.equal(one.xx, xx)
        assert torch.equal(one.weights, weights)


def test_the_copy_of_a_channel_goes_first_and_costs_nothing() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x[:, [0, 1, 1, 2]]
    weights = torch.tensor([[1.0], [1.0], [2.0], [1.5]], dtype=torch.float64)
    order, errors = eliminate([reading(x, weights, [0, 1, 2, 3])], 4, 1e-9)
    assert order[0] == 1  # its weight is smaller, so less is moved to its copy
    assert errors[0] < 1e-8
    assert errors[1] > 0.1


def test_a_channel_that_is_always_0_goes_before_all_others() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 2] = 0
    order, errors = eliminate([reading(x, torch.ones(3, 2, dtype=torch.float64) * 5, [0, 1, 2])], 3)
    assert order[0] == 2
    assert errors[0] == 0
    order, errors = eliminate([reading(x * 0, torch.ones(3, 2, dtype=torch.float64), [0, 1, 2])], 3)
    assert errors.tolist() == [0, 0, 0]


def test_uncorrelated_columns_by_hand() -> None:
    xx = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    weights = torch.tensor([[2.0], [1.0], [0.5]], dtype=torch.float64)
    # (square of the column + 0.5 · mean square 2) · squared weight: 2 · 4, 3 · 1, 4 · 0.25.
    order, errors = eliminate([Reading(xx, weights, torch.arange(3))], 3, 0.5)
    assert order.tolist() == [2, 1, 0]
    assert errors.tolist() == pytest.approx([1, 3, 8])


def test_channels_that_nothing_reads_cost_nothing() -> None:
    order, errors = eliminate([], 3)
    assert (order.tolist(), errors.tolist()) == ([0, 1, 2], [0, 0, 0])
