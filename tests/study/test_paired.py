import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.study.paired import (
    Spread,
    bootstrap_interval,
    holm,
    paired,
    power,
    seeds_needed,
    sign_test,
    spread,
    t_interval,
)


def test_paired_by_hand():
    found = paired({0: 10, 1: 10, 2: 10, 7: 99}, {2: 13, 1: 12, 0: 11, 5: 99})
    assert dict(found.differences) == {0: 1, 1: 2, 2: 3}
    assert (found.n, found.gains, found.mean) == (3, 3, 2)
    half = 4.302653 / math.sqrt(3)  # t(0.975, 2 degrees of freedom) · sd 1 / √3
    assert found.low == pytest.approx(2 - half, abs=1e-5)
    assert found.high == pytest.approx(2 + half, abs=1e-5)
    assert found.verdict == "no gain shown"


def test_verdict_gain_loss_and_neither():
    assert paired({0: 0, 1: 0, 2: 0}, {0: 2.0, 1: 2.1, 2: 1.9}).verdict == "gain"
    assert paired({0: 0, 1: 0, 2: 0}, {0: -2.0, 1: -2.1, 2: -1.9}).verdict == "loss"
    assert paired({0: 0, 1: 0}, {0: 1, 1: -1}).verdict == "no gain shown"
    assert paired({0: 5, 1: 5}, {0: 5, 1: 5}).verdict == "no gain shown"


def test_one_shared_seed_has_no_interval_and_shows_nothing():
    found = paired({0: 1, 1: 2}, {1: 9})
    assert (found.n, found.mean, found.low, found.high) == (1, 7, None, None)
    assert found.verdict == "no gain shown"


def test_equal_differences_have_no_interval_and_go_by_their_signs():
    # 0.83 − 0.82 and 0.82 − 0.81 differ in their last digits.
    found = paired({0: 81, 1: 100 * 0.82, 2: 4}, {0: 82, 1: 100 * 0.83, 2: 5})
    assert (found.low, found.high, found.p, found.verdict) == (None, None, 0.25, "no gain shown")
    six = paired(dict.fromkeys(range(6), 1.0), dict.fromkeys(range(6), 2.0))
    assert (six.p, six.verdict) == (2 / 64, "gain")
    assert paired({0: 5, 1: 5}, {0: 5, 1: 5}).p == 1


def test_two_seeds_have_an_interval_of_12_7_errors():
    found = paired({0: 0, 1: 0}, {0: 1, 1: 2})
    assert found.high == pytest.approx(1.5 + 12.7062 * 0.5, abs=1e-3)
    assert found.p == pytest.approx(1 - 2 * math.atan(3) / math.pi)  # one degree of freedom: Cauchy


# Student (1908): hours of sleep gained with two drugs by ten patients. R: t.test(b, a, paired = TRUE).
SLEEP = (
    (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0),
    (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4),
)


def test_students_sleep_data_as_published():
    found = paired(*(dict(enumerate(drug)) for drug in SLEEP))
    assert found.mean == pytest.approx(1.58)
    assert (found.low, found.high) == (pytest.approx(0.7001142), pytest.approx(2.4598858))
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert (found.gains, found.losses, found.ties) == (9, 0, 1)
    assert sign_test(9, 0) == 2 / 512
    low, high = bootstrap_interval(list(found.differences.values()))
    # Skewed by the patient with 4.6 hours, so further to the right than the t interval.
    assert 0.9 < low < 1.2
    assert 2.4 < high < 2.9


@pytest.mark.parametrize(
    ("gains", "losses", "p"),
    [(0, 0, 1), (1, 0, 1), (3, 3, 1), (5, 0, 2 / 32), (0, 6, 2 / 64), (8, 2, 2 * 56 / 1024), (1, 2, 1)],
)
def test_sign_test_by_hand(gains, losses, p):
    assert sign_test(gains, losses) == pytest.approx(p)


def test_bootstrap_interval_where_it_is_defined():
    assert bootstrap_interval([1.0, 2.0]) is None
    assert bootstrap_interval([1.0, 1.0, 1.0]) is None
    assert bootstrap_interval([0.1 + 0.2, 0.3, 0.3]) is None  # equal but for the last digit
    assert bootstrap_interval([0.0, 0.0, 0.0, 1.0]) is not None
    values = [0.3, 1.2, -0.4, 0.9, 2.0]
    assert bootstrap_interval(values) == bootstrap_interval(values)


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=8))
@settings(max_examples=30, deadline=None)
def test_a_bootstrap_interval_lies_within_the_values(values):
    found = bootstrap_interval(values)
    if found is not None:
        assert min(values) - 1e-9 <= found[0] <= found[1] <= max(values) + 1e-9


def test_holm_by_hand():
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03 0.06 0.06 0.02.
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([0.02]) == [0.02]
    assert holm([None]) == [None]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_the_order_and_never_makes_smaller(ps):
    corrected = holm(ps)
    assert all(p <= after <= 1 for p, after in zip(ps, corrected, strict=True))
    order = sorted(range(len(ps)), key=lambda place: (ps[place], place))
    assert [corrected[place] for place in order] == sorted(corrected)


def of_size(size):
    """Three differences whose mean is ``size`` standard deviations."""
    return [size + 1, size, size - 1]


@pytest.mark.parametrize(
    # Cohen (1988) and G*Power, paired t test, two-sided 5 %, power 80 %.
    ("size", "n"),
    [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)],
)
def test_seeds_needed_as_published(size, n):
    assert seeds_needed(of_size(size)) == n
    assert seeds_needed(of_size(-size)) == n
    assert power(size, n - 1) < 0.8 <= power(size, n)


def test_seeds_needed_at_the_ends():
    assert seeds_needed([1.0]) is None
    assert seeds_needed([1.0, -1.0]) is None
    assert seeds_needed([0.1, 1.0]) is None  # two differences have a spread by chance
    assert seeds_needed([0.0, 0.0]) is None
    assert seeds_needed([2.0, 2.0, 2.0]) is None
    assert seeds_needed(of_size(1000)) == 2
    # (1.95996 + 0.84162)² / 0.001²
    assert seeds_needed(of_size(0.001)) == pytest.approx(7_848_880, rel=1e-5)


def test_paired_refuses_no_shared_seed_and_nan():
    with pytest.raises(ValueError, match=r"no seed is in both: \[0\] and \[1\]"):
        paired({0: 1.0}, {1: 1.0})
    with pytest.raises(ValueError, match="must be finite"):
        paired({0: 1.0}, {0: math.nan})


values = st.dictionaries(st.integers(0, 20), st.floats(-1e6, 1e6), min_size=1, max_size=8)


@given(values, values)
def test_swapping_the_sides_negates_the_result(one, other):
    if not one.keys() & other.keys():
        return
    there, back = paired(one, other), paired(other, one)
    assert back.mean == -there.mean
    assert back.p == pytest.approx(there.p)
    assert (back.low is None) == (there.low is None)
    if there.low is not None:
        assert back.low == pytest.approx(-there.high, rel=1e-9, abs=1e-9)
        assert back.high == pytest.approx(-there.low, rel=1e-9, abs=1e-9)
        assert there.low <= there.mean <= there.high
    swapped = {"gain": "loss", "loss": "gain"}
    assert back.verdict == swapped.get(there.verdict, there.verdict)


@given(values, st.floats(-1000, 1000))
def test_a_constant_shift_is_the_mean_difference(one, shift):
    found = paired(one, {seed: value + shift for seed, value in one.items()})
    assert found.mean == pytest.approx(shift, abs=1e-6)
    assert set(found.differences) == set(one)


def test_spread_by_hand():
    assert spread([1.0, 2.0, 3.0]) == Spread(2.0, 1.0)
    assert spread([4.0]) == Spread(4.0, None)


def test_t_interval_by_hand():
    # Mean 2, standard deviation 1, t of 2 degrees of freedom 4.3027: 2 ± 4.3027 / √3.
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-4)


@pytest.mark.parametrize("values", [[0.5], [0.25, 0.25, 0.25]])
def test_there_is_no_t_interval_without_a_spread(values):
    assert t_interval(values) is None
