import io
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from regrow.study.compare import (
    MethodSummary,
    Paired,
    Spread,
    check_comparable,
    duration,
    headline,
    interval,
    label,
    paired,
    percent,
    signed,
    spread,
    summarise,
    table,
)
from regrow.study.records import RunRecord


def run(method, seed, test=0.8, seconds=10.0, *, validation=0.7, finished=True, **settings):
    result = {"test_accuracy": test, "validation_accuracy": validation, "train_seconds": seconds}
    return RunRecord(
        folder=Path(f"{method}-seed{seed}"),
        config={"version": 1, "method": method, "seed": seed, "epochs": 30} | settings,
        environment={},
        epochs=[],
        events=[],
        result=result if finished else None,
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
    assert interval(found) == ""


def test_equal_differences_have_an_interval_of_no_width():
    found = paired({0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.5})
    assert (found.low, found.high, found.verdict) == (0.5, 0.5, "gain")


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
    if there.n > 1:
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


def test_summarise_by_hand():
    runs = [
        run("repr", 1, test=0.84, seconds=12, validation=0.75, fraction=0.3),
        run("repr", 0, test=0.82, seconds=11, fraction=0.3),
        run("standard", 0, test=0.80, seconds=10),
        run("standard", 1, test=0.81, seconds=8),
        run("standard", 2, test=0.85, seconds=12),
        run("repr", 2, finished=False, epochs=99),
    ]
    standard, other = summarise(runs)
    assert (standard.method, standard.n, standard.seeds) == ("standard", 3, (0, 1, 2))
    assert standard.test_accuracy.mean == pytest.approx(0.82)
    assert standard.test_accuracy.deviation == pytest.approx(math.sqrt(0.0014 / 2))
    assert (standard.difference, standard.time_ratio, standard.verdict) == (None, None, "baseline")
    assert (other.method, other.seeds) == ("repr", (0, 1))
    assert other.validation_accuracy.mean == pytest.approx(0.725)
    assert other.difference is not None
    assert other.difference.mean == pytest.approx(2.5)  # percentage points: (2 + 3) / 2
    assert other.difference.high == pytest.approx(2.5 + 12.7062 * 0.5, abs=1e-3)
    assert other.seconds.mean == 11.5
    assert other.time_ratio == pytest.approx((1.1 + 1.5) / 2)
    assert other.verdict == "no gain shown"


def test_summarise_with_another_baseline_puts_it_first():
    summaries = summarise([run("a", 0), run("b", 0, test=0.9), run("c", 0)], baseline="b")
    assert [summary.method for summary in summaries] == ["b", "a", "c"]
    assert summaries[1].difference.mean == pytest.approx(-10)


def test_summarise_without_the_baseline_has_no_differences():
    (only,) = summarise([run("repr", 0)])
    assert (only.difference, only.verdict) == (None, "nothing to pair with")


def test_summarise_refuses_when_nothing_is_finished():
    with pytest.raises(ValueError, match="none of the 1 runs is finished"):
        summarise([run("repr", 0, finished=False)])


def test_runs_with_other_settings_are_not_comparable():
    with pytest.raises(ValueError, match=r"standard-seed0 and repr-seed0 .*: epochs is 30 and 40; data is"):
        check_comparable([run("standard", 0, data="digits"), run("repr", 0, epochs=40, data="cifar10")])
    with pytest.raises(ValueError, match=r"lr is 'not set' and 0\.1"):
        check_comparable([run("standard", 0), run("repr", 0, lr=0.1)])


def test_methods_may_differ_in_their_own_settings_but_seeds_of_one_may_not():
    runs = [
        run("standard", 0),
        run("repr", 0, fraction=0.3),
        run("repr", 1, fraction=0.3),
    ]
    check_comparable(runs)
    with pytest.raises(ValueError, match=r"fraction is 0\.3 and 0\.2.*differ in the seed only"):
        check_comparable([*runs, run("repr", 2, fraction=0.2)])


def test_each_method_may_have_the_weight_decay_that_suits_it():
    runs = [run("standard", 0, weight_decay=5e-3), run("dropout", 0, weight_decay=5e-4, p=0.1)]
    check_comparable(runs)
    with pytest.raises(ValueError, match="weight_decay is"):
        check_comparable([*runs, run("standard", 1, weight_decay=5e-4)])


def test_cycles_of_other_lengths_are_another_learning_rate_for_every_method():
    with pytest.raises(ValueError, match="cycles is 3 and 2"):
        check_comparable([run("standard", 0, cycles=3), run("repr", 0, cycles=2)])


def test_the_same_method_and_seed_twice_is_refused():
    with pytest.raises(ValueError, match="both 'repr' with seed 3: leave one out"):
        check_comparable([run("repr", 3), run("repr", 3)])


def summary(method, difference=None, time_ratio=None, n=3):
    return MethodSummary(
        method=method,
        baseline="standard",
        seeds=tuple(range(n)),
        test_accuracy=Spread(0.88123, 0.0042),
        validation_accuracy=Spread(0.9, None),
        difference=difference,
        seconds=Spread(10.0, 0.5),
        time_ratio=time_ratio,
    )


@pytest.mark.parametrize(
    ("difference", "ratio", "expected"),
    [
        (
            Paired({0: 1.0, 1: 1.2, 2: 1.4}, 1.2, -0.3, 2.7),
            1.02,
            "RePr: +1.2 points test accuracy over standard training (95 % interval −0.3 to +2.7, "
            "n = 3 seeds): no gain shown. It took 1.02 × the training time.",
        ),
        (
            Paired({0: -1.0, 1: -1.0}, -1.0, -1.5, -0.5),
            0.7,
            "RePr: −1.0 points test accuracy against standard training (95 % interval −1.5 to −0.5, "
            "n = 2 seeds): a loss. It took 0.70 × the training time.",
        ),
        (
            Paired({0: 0.5, 1: 0.5}, 0.5, 0.04, 0.96),
            None,
            "RePr: +0.50 points test accuracy over standard training (95 % interval +0.04 to +0.96, "
            "n = 2 seeds): a gain.",
        ),
        (
            Paired({0: 0.0}, 0.0, None, None),
            None,
            "RePr: +0.0 points test accuracy over standard training (n = 1 seed, too few for an interval): "
            "no gain shown.",
        ),
    ],
)
def test_headline_is_a_sentence(difference, ratio, expected):
    assert headline([summary("standard"), summary("repr", difference, ratio)]) == expected


def test_headline_has_a_line_per_method():
    one = Paired({0: 1.0}, 1.0, None, None)
    lines = headline([summary("standard"), summary("repr", one), summary("dsd", one)]).split("\n")
    assert [line.split(":")[0] for line in lines] == ["RePr", "dsd"]


def test_headline_of_one_method_gives_its_accuracy():
    assert headline([summary("standard")]) == (
        "Standard training: 88.12 ± 0.42 % test accuracy (n = 3 seeds), with no run of another method to "
        "compare with."
    )


def test_table_shows_the_numbers_and_no_markup():
    difference = Paired({0: 1.0, 1: 3.0}, 2.0, -10.7, 14.7)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table([summary("standard"), summary("[red]x[/red]", difference, 1.5)]))
    text = console.export_text()
    standard, other = (line for line in text.splitlines() if "88.12 ± 0.42 %" in line)
    assert "Standard training" in standard
    assert "baseline" in standard
    for cell in ("[red]x[/red]", "+2.00 [−10.70, +14.70]", "10.0 ± 0.5 s", "1.50"):
        assert cell in other


def test_table_fits_a_terminal_of_80_columns():
    difference = Paired({0: 1.0, 1: 3.0}, 2.0, -10.7, 14.7)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table([summary("standard", n=10), summary("repr", difference, 1.5, n=10)]))
    text = console.export_text()
    assert (
        len([line for line in text.splitlines() if "88.12 ± 0.42 %" in line and "10.0 ± 0.5 s" in line]) == 2
    )
    assert "…" not in text


def test_numbers_as_people_read_them():
    assert (signed(-0.004), signed(0.0), signed(-1.25, 1), signed(3)) == ("+0.00", "+0.00", "−1.2", "+3.00")
    assert percent(Spread(0.5, None)) == "50.00 %"
    assert duration(Spread(119.0, None)) == "119.0 s"
    assert duration(Spread(120.0, 6.0)) == "2.0 ± 0.1 min"
    assert duration(Spread(7200.0, None)) == "2.0 h"
    assert (label("repr"), label("else")) == ("RePr", "else")
