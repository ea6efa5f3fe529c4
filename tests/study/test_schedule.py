import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow.study.schedule import Cycle, place_cycle, rate_factor


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (3, Cycle(1, 1, 1)),
        (14, Cycle(2, 1, 3)),  # 5 epochs stay for annealing, 9 make three cycles of 2 + 1
        (30, Cycle(5, 2, 3)),
        (130, Cycle(20, 10, 3)),  # the paper's lengths
    ],
)
def test_the_cycle_places_itself(epochs: int, expected: Cycle) -> None:
    assert place_cycle(epochs) == expected


def test_lengths_that_are_given_stay_and_the_others_fill_the_room() -> None:
    assert place_cycle(130, full=10, sub=5) == Cycle(10, 5, 3)
    assert place_cycle(30, cycles=1) == Cycle(14, 7, 1)
    assert place_cycle(30, sub=1, cycles=3) == Cycle(6, 1, 3)
    assert place_cycle(30, full=6) == Cycle(6, 1, 3)


@given(st.integers(3, 400))
def test_a_placed_cycle_leaves_time_to_heal(epochs: int) -> None:
    cycle = place_cycle(epochs)
    cycle.check(epochs)
    assert epochs - cycle.last_restore >= 0.3 * epochs - 1e-9
    assert cycle.sub <= cycle.full


def test_a_cycle_that_does_not_fit_says_how_many_epochs_it_needs() -> None:
    with pytest.raises(ValueError, match="train for 91 epochs or more, not 90"):
        Cycle(20, 10, 3).check(90)
    Cycle(20, 10, 3).check(91)
    with pytest.raises(ValueError, match="3 epochs"):
        place_cycle(2).check(2)


def test_the_rate_is_held_until_the_last_restore_and_then_annealed_to_zero() -> None:
    assert [rate_factor("hold-cosine", step, 100, 60) for step in (0, 30, 59)] == [1, 1, 1]
    assert rate_factor("hold-cosine", 80, 100, 60) == pytest.approx(0.5)
    assert rate_factor("hold-cosine", 100, 100, 60) == pytest.approx(0)


def test_other_schedules() -> None:
    assert rate_factor("constant", 99, 100, 60) == 1
    halved = [rate_factor("halving", s, 100, 60, halve_every=20) for s in (0, 19, 20, 39, 99)]
    assert halved == [1, 1, 0.5, 0.5, 1 / 16]
    assert rate_factor("cosine", 50, 100, 60) == pytest.approx(0.5)
    assert [rate_factor("step", s, 100, 60) for s in (49, 50, 75)] == pytest.approx([1, 0.1, 0.01])
