"""The first rung at or below a limit."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.pruning.ladder import first_within


@given(
    values=st.lists(st.integers(0, 50), min_size=1, max_size=60).map(lambda v: sorted(v, reverse=True)),
    limit=st.integers(0, 49),
    start=st.sampled_from([51.0, math.inf]),
    guess=st.none() | st.integers(1, 60),
)
def test_it_finds_the_first_and_asks_once_for_each(values, limit, start, guess):
    asked = []

    def value(rung):
        asked.append(rung)
        return values[rung - 1]

    guess = guess and min(guess, len(values))
    found, reached = first_within(value, len(values), limit, start=start, guess=guess)
    fitting = [rung for rung, each in enumerate(values, 1) if each <= limit]
    assert found == (fitting[0] if fitting else len(values))
    assert reached == values[found - 1]
    assert len(asked) == len(set(asked)) <= (2 if guess is None else 4) * math.log2(len(values) + 1) + 2


def test_a_straight_line_takes_a_few_looks():
    asked = []

    def value(rung):
        asked.append(rung)
        return 1 - rung / 1001

    found, _ = first_within(value, 1000, 0.5, start=1.0, close=0.005)
    assert 501 <= found <= 506
    assert len(asked) <= 3


@pytest.mark.parametrize(("close", "looks"), [(0.0, 2), (0.5, 1)])
def test_close_enough_is_where_it_stops(close, looks):
    asked = []
    found, reached = first_within(
        lambda rung: asked.append(rung) or {1: 0.9, 2: 0.3}[rung], 2, 0.5, start=1, close=close
    )
    assert (found, reached, len(asked)) == (2, 0.3, looks)


def test_a_good_guess_takes_a_look_or_two():
    asked = []

    def value(rung):
        asked.append(rung)
        return 1 - rung / 1001

    assert first_within(value, 1000, 0.5, start=1.0, close=0.005, guess=502)[0] == 502
    assert asked == [502]
    assert first_within(value, 1000, 0.5, start=1.0, guess=503)[0] == 501
    assert asked[1:] == [503, 502, 500, 501]
