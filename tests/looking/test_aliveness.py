import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from regrow.looking.aliveness import Aliveness


def seen(*calls):
    """What is dead after ``calls``: (name, layer, input)."""
    aliveness = Aliveness()
    for name, layer, x in calls:
        aliveness.note(name, layer, () if x is None else (x,))
    return {name: dead.tolist() for name, dead in aliveness.dead().items()}


CONV, LINEAR = nn.Conv2d(3, 4, 1), nn.Linear(3, 4)


def picture(*channels):
    """[2, channels, 2, 2] with each channel's number in one of its pixels, and 0 in the others."""
    x = torch.zeros(2, len(channels), 2, 2)
    x[1, :, 0, 1] = torch.tensor(channels)
    return x


def test_a_channel_is_dead_that_is_0_everywhere():
    assert seen(("conv", CONV, picture(0.0, 1e-30, -2.0))) == {"conv": [True, False, False]}
    assert seen(("conv", CONV, picture(0.0, 1.0, -0.0)[1])) == {
        "conv": [True, False, True]
    }  # without a batch


def test_the_channels_of_a_linear_layer_come_last():
    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
    assert seen(("linear", LINEAR, x)) == {"linear": [False, True, False]}
    assert seen(("linear", LINEAR, x[:, None])) == {"linear": [False, True, False]}
    assert seen(("linear", LINEAR, x[0])) == {"linear": [False, True, True]}


def test_a_channel_is_dead_that_is_0_each_time():
    one, other = picture(0.0, 0.0, 1.0), picture(0.0, -1.0, 0.0)
    assert seen(("conv", CONV, one), ("conv", CONV, other)) == {"conv": [True, False, False]}
    assert seen(("conv", CONV, one), ("other", CONV, other)) == {
        "conv": [True, True, False], "other": [True, False, True],
    }  # fmt: skip


def test_what_is_no_number_is_not_0():
    assert seen(("conv", CONV, picture(torch.nan, torch.inf, 0.0))) == {"conv": [False, False, True]}
    twice = ("conv", CONV, picture(torch.nan, 0.0, 0.0)), ("conv", CONV, picture(0.0, 0.0, 0.0))
    assert seen(*twice) == seen(*reversed(twice)) == {"conv": [False, True, True]}


@pytest.mark.parametrize("x", [None, "no tensor", torch.zeros(0, 3, 2, 2), torch.zeros(2, 3, 0, 2)])
def test_a_layer_that_was_not_seen_clearly_once_is_not_listed(x):
    clear = ("conv", CONV, picture(0.0, 0.0, 1.0))
    other = ("other", CONV, picture(0.0, 1.0, 1.0))
    for calls in ((clear, ("conv", CONV, x), other), (("conv", CONV, x), other, clear)):
        assert seen(*calls) == {"other": [True, False, False]}


def test_a_layer_that_reads_other_widths_is_not_listed():
    calls = ("conv", CONV, picture(0.0, 0.0, 1.0)), ("conv", CONV, picture(0.0, 0.0))
    assert seen(*calls) == {}


def test_layers_that_no_pass_reached_are_not_listed():
    assert seen() == {}


def test_what_was_asked_for_once_may_change_later():
    aliveness = Aliveness()
    aliveness.note("conv", CONV, (picture(0.0, 0.0, 1.0),))
    assert aliveness.dead()["conv"].tolist() == [True, True, False]
    aliveness.note("conv", CONV, (picture(1.0, 0.0, 0.0),))
    dead = aliveness.dead()["conv"]
    assert dead.tolist() == [False, True, False]
    assert dead.dtype == torch.bool


def test_what_is_read_is_not_changed():
    x = picture(-1.0, 0.0, 2.0)
    before = x.clone()
    seen(("conv", CONV, x))
    assert torch.equal(x, before)


@given(data=st.data())
def test_it_is_what_a_plain_look_at_each_channel_says(data):
    dim = data.draw(st.integers(1, 3))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1](4, 2, 1)
    shape = [
        *data.draw(st.sampled_from([[], [1], [2]])),
        4,
        *[data.draw(st.integers(1, 2)) for _ in range(dim)],
    ]
    passes = [
        torch.randn(shape) * (torch.rand(shape) < data.draw(st.sampled_from([0, 0.2, 1])))
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    at = len(shape) - 1 - dim
    expected = [all(not (x.select(at, i) != 0).any() for x in passes) for i in range(4)]
    assert seen(*(("conv", layer, x) for x in passes)) == {"conv": expected}
