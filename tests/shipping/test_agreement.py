"""Differences of outputs, by hand."""

import math

import pytest
import torch

from regrow.shipping.agreement import difference

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("expected", "found", "by_hand"),
    [
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([], [], 0.0),
        ([0.0], [0.0], 0.0),
        ([0.0], [1e-9], INF),
        ([INF, 2.0], [INF, 1.0], 0.5),
        ([INF, 2.0], [3.0, 2.0], INF),
        ([2.0, 2.0], [2.0, INF], INF),
        ([NAN, 2.0], [NAN, 2.0], NAN),
        ([0.0], [NAN], NAN),
    ],
)
def test_by_hand(expected, found, by_hand):
    off = difference(torch.tensor(expected), torch.tensor(found))
    assert off == by_hand or (math.isnan(off) and math.isnan(by_hand))


def test_whole_and_complex_numbers_and_other_precisions():
    assert difference(torch.tensor([4, 8]), torch.tensor([4, 6])) == 0.25
    assert difference(torch.tensor([4j]), torch.tensor([3j])) == 0.25
    assert difference(torch.tensor([2.0]), torch.tensor([1.0], dtype=torch.bfloat16)) == 0.5
