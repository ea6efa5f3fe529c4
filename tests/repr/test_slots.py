import pytest
import torch
from torch import nn

from regrow.repr.slots import refresh_slots


def stepped(kind, **settings):
    weight = nn.Parameter(torch.ones(3, 2, 1, 1))
    optimizer = kind([weight], lr=0.1, **settings)
    for _ in range(2):
        optimizer.zero_grad()
        (weight * torch.arange(1.0, 7).view(3, 2, 1, 1)).sum().backward()
        optimizer.step()
    return weight, optimizer, optimizer.state[weight]


FRESH = torch.zeros(3, 2, dtype=torch.bool)
FRESH[1] = True  # a whole row
FRESH[2, 0] = True  # one column of another


def test_momentum_is_forgotten_where_asked_and_kept_elsewhere():
    weight, optimizer, state = stepped(torch.optim.SGD, momentum=0.5)
    refresh_slots(optimizer, {weight: FRESH})
    # Gradients 1 … 6, twice: g · (1 + 0.5).
    assert state["momentum_buffer"].flatten().tolist() == [1.5, 3, 0, 0, 0, 9]


def test_adam_by_hand():
    weight, optimizer, state = stepped(torch.optim.Adam, betas=(0.5, 0.5), amsgrad=True)
    refresh_slots(optimizer, {weight: FRESH})
    # First moment g · (0.25 + 0.5); second g² · 0.75, and the mean of 0.75, 3 and 27 is 10.25.
    assert state["exp_avg"].flatten().tolist() == [0.75, 1.5, 0, 0, 0, 4.5]
    for slot in ("exp_avg_sq", "max_exp_avg_sq"):
        assert state[slot].flatten().tolist() == [0.75, 3, 10.25, 10.25, 10.25, 27]
    assert state["step"] == 2


@pytest.mark.parametrize(
    ("kind", "settings", "magnitudes", "signed"),
    [
        (
            torch.optim.RMSprop,
            {"centered": True, "momentum": 0.9},
            ["square_avg"],
            ["grad_avg", "momentum_buffer"],
        ),
        (torch.optim.Adagrad, {}, ["sum"], []),
        (torch.optim.Adadelta, {}, ["square_avg", "acc_delta"], []),
        (torch.optim.Adamax, {}, ["exp_inf"], ["exp_avg"]),
        (torch.optim.NAdam, {}, ["exp_avg_sq"], ["exp_avg"]),
        (torch.optim.Rprop, {}, ["step_size"], ["prev"]),
    ],
)
def test_magnitudes_become_the_mean_of_the_rest_and_signed_slots_zero(kind, settings, magnitudes, signed):
    weight, optimizer, state = stepped(kind, **settings)
    before = {name: slot.clone() for name, slot in state.items() if isinstance(slot, torch.Tensor)}
    refresh_slots(optimizer, {weight: FRESH})
    for name in magnitudes:
        torch.testing.assert_close(state[name][FRESH], before[name][~FRESH].mean().expand(3, 1, 1))
        assert (state[name][FRESH] > 0).all()
    for name in signed:
        assert not state[name][FRESH].any()
    for name in (*magnitudes, *signed):
        assert torch.equal(state[name][~FRESH], before[name][~FRESH])


def test_biases_have_one_dimension():
    bias = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([bias], lr=0.1, momentum=0.5)
    bias.sum().backward()
    optimizer.step()
    refresh_slots(optimizer, {bias: torch.tensor([False, True, False])})
    assert optimizer.state[bias]["momentum_buffer"].tolist() == [1, 0, 1]


def test_where_all_is_fresh_there_is_no_mean_to_take():
    weight, optimizer, state = stepped(torch.optim.Adam)
    refresh_slots(optimizer, {weight: torch.ones(3, 2, dtype=torch.bool)})
    assert not state["exp_avg_sq"].any()


def test_nothing_to_do_is_no_error():
    weight, optimizer, state = stepped(torch.optim.Adam)
    before = state["exp_avg_sq"].clone()
    refresh_slots(optimizer, {weight: torch.zeros(3, 2, dtype=torch.bool)})
    assert torch.equal(state["exp_avg_sq"], before)
    stranger = nn.Parameter(torch.ones(2))
    refresh_slots(optimizer, {stranger: torch.tensor([True, False])})
    assert stranger not in optimizer.state


def test_slots_of_another_shape_are_left_alone():
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.Adafactor([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    before = {name: slot.clone() for name, slot in optimizer.state[weight].items()}
    refresh_slots(optimizer, {weight: torch.tensor([True, False, False, False])})
    assert all(torch.equal(slot, before[name]) for name, slot in optimizer.state[weight].items())
