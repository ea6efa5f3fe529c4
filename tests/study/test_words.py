from regrow.study.paired import Spread, paired
from regrow.study.words import (
    bounds,
    duration,
    flops,
    interval,
    label,
    mention,
    p_value,
    percent,
    prefixed,
    signed,
)


def test_numbers_as_people_read_them():
    assert (signed(-0.004), signed(0.0), signed(-1.25, 1), signed(3)) == ("+0.00", "+0.00", "−1.2", "+3.00")
    assert percent(Spread(0.5, None)) == "50.00 %"
    assert percent(Spread(0.88123, 0.0042)) == "88.12 ± 0.42 %"
    assert duration(Spread(119.0, None)) == "119.0 s"
    assert duration(Spread(120.0, 6.0)) == "2.0 ± 0.1 min"
    assert duration(Spread(7200.0, None)) == "2.0 h"


def test_names():
    assert (label("repr"), label("RePr, fraction 0.2")) == ("RePr", "RePr, fraction 0.2")
    assert (mention("standard"), mention("repr")) == ("standard training", "RePr")


def test_intervals():
    assert bounds(-0.3, 2.7) == "[−0.30, +2.70]"
    assert bounds(None, None) == ""
    assert interval(paired({0: 0, 1: 0}, {0: 1, 1: 2}), 1) == "[−4.9, +7.9]"
    assert interval(paired({0: 0}, {0: 1})) == ""


def test_p_values():
    assert [p_value(p) for p in (None, 0.0009, 0.001, 0.0344, 1.0)] == [
        "—",
        "< 0.001",
        "0.001",
        "0.034",
        "1.000",
    ]


def test_flops_have_the_prefix_that_suits_them():
    assert prefixed(999) == (1, "")
    assert prefixed(1000) == (1e3, "k")
    assert prefixed(3.1e12) == (1e12, "T")
    assert prefixed(1e30) == (1e24, "Y")
    assert flops(Spread(3.1e12, 2e10)) == "3.10 ± 0.02 TFLOPs"
    assert flops(Spread(2.5e9, 0.0)) == flops(Spread(2.5e9, None)) == "2.50 GFLOPs"
