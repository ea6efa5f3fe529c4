import collections

import pytest
import torch
from torch import nn

from regrow.repr.slots import Copies, likeness, memory_of, parts, refresh_slots, stepping


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


@pytest.mark.devices
def test_momentum_is_forgotten_where_asked_and_kept_elsewhere():
    weight, optimizer, state = stepped(torch.optim.SGD, momentum=0.5)
    refresh_slots(optimizer, {weight: FRESH})
    # Gradients 1 … 6, twice: g · (1 + 0.5).
    assert state["momentum_buffer"].flatten().tolist() == [1.5, 3, 0, 0, 0, 9]


@pytest.mark.devices
def test_adam_by_hand():
    weight, optimizer, state = stepped(torch.optim.Adam, betas=(0.5, 0.5), amsgrad=True)
    refresh_slots(optimizer, {weight: FRESH})
    # First moment g · (0.25 + 0.5); second g² · 0.75, and the mean of 0.75, 3 and 27 is 10.25.
    assert state["exp_avg"].flatten().tolist() == [0.75, 1.5, 0, 0, 0, 4.5]
    for slot in ("exp_avg_sq", "max_exp_avg_sq"):
        assert state[slot].flatten().tolist() == [0.75, 3, 10.25, 10.25, 10.25, 27]
    assert state["step"] == 2


@pytest.mark.devices
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


def test_factors_of_rows_become_the_mean_of_the_other_rows_and_those_of_columns_stay():
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.Adafactor([weight], lr=0.1)
    (weight * torch.tensor([[1.0], [2], [3], [4]])).sum().backward()
    optimizer.step()
    state = optimizer.state[weight]
    columns = state["col_var"].clone()
    state["row_var"] = torch.tensor([[9.0], [1], [2], [6]])
    fresh = torch.tensor([[True] * 3, [False] * 3, [True, False, True], [False] * 3])
    refresh_slots(optimizer, {weight: fresh})
    torch.testing.assert_close(state["row_var"], torch.tensor([[0.0], [1], [2], [6]]))
    assert torch.equal(state["col_var"], columns)


@pytest.mark.parametrize("shape", [(9, 8, 3), (9, 8, 3, 1), (9, 8, 1, 3), (9,), (9, 1, 1, 1)])
def test_sums_over_some_dimensions_know_their_rows(shape):
    weight = nn.Parameter(torch.randn(9, 8, 3, 3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight]["factor"] = slot = torch.rand(shape)
    fresh = torch.zeros(9, 8, dtype=torch.bool)
    fresh[2] = True
    before = slot.clone()
    refresh_slots(optimizer, {weight: fresh})
    others = [i for i in range(9) if i != 2]
    assert torch.equal(slot[others], before[others])
    expected = before[others].mean() if slot.numel() >= 64 else torch.zeros(())  # few numbers may have a sign
    torch.testing.assert_close(slot[2], expected.expand(shape[1:]))


@pytest.mark.parametrize("shape", [(8,), (3, 3), (), (9, 8), (8, 8, 3, 3, 1)])
def test_slots_of_another_shape_are_left_alone(shape):
    weight = nn.Parameter(torch.randn(8, 8, 3, 3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight]["other"] = slot = torch.randn(shape)
    before = slot.clone()
    refresh_slots(optimizer, {weight: torch.ones(8, 8, dtype=torch.bool)})
    assert torch.equal(slot, before)


def test_codes_and_counts_are_left_alone():
    weight = nn.Parameter(torch.randn(8, 8))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight].update(
        code=torch.full((8, 8), 7, dtype=torch.uint8), count=torch.tensor(3), name="x", nothing=None
    )
    refresh_slots(optimizer, {weight: torch.ones(8, 8, dtype=torch.bool)})
    assert (optimizer.state[weight]["code"] == 7).all()
    assert optimizer.state[weight]["count"] == 3


# --- copies are told by what they hold -------------------------------------------------------------------


class Bare(torch.optim.Optimizer):
    """An optimizer that does nothing; the tests lay its memory out."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        pass


def weights(*shapes):
    return [nn.Parameter(torch.randn(shape) / 3) for shape in shapes]


def bare():
    """Two weights, a norm's weight and a bias: drawn, drawn, at 1 and at 0."""
    parameters = [
        *weights((6, 3, 3, 3), (6, 6, 3, 3)),
        nn.Parameter(torch.ones(6)),
        nn.Parameter(torch.zeros(6)),
    ]
    return parameters, Bare(parameters)


def near(parameter):
    return parameter.detach() + 0.1 * torch.randn(parameter.shape)


def in_states(name):
    def lay(optimizer, parameters, slots):
        for parameter, slot in zip(parameters, slots, strict=True):
            optimizer.state[parameter][name] = slot

    return lay


def in_states_of_their_own(optimizer, parameters, slots):
    optimizer.backup = {parameter: {"w": slot} for parameter, slot in zip(parameters, slots, strict=True)}


def under_ids(optimizer, parameters, slots):
    optimizer.state["old"] = {id(p): slot for p, slot in zip(parameters, slots, strict=True)}


def in_a_list(optimizer, _parameters, slots):
    optimizer.old = slots


def in_lists_by_group(optimizer, _parameters, slots):
    optimizer.old = [slots]


def in_a_group(optimizer, _parameters, slots):
    optimizer.param_groups[0]["old"] = slots


def in_a_history(optimizer, parameters, slots):
    for parameter, slot in zip(parameters, slots, strict=True):
        optimizer.state[parameter]["last"] = collections.deque([slot, slot.clone()], maxlen=2)


def in_one_vector(optimizer, _parameters, slots):
    optimizer.state["flat"] = {"old": torch.cat([slot.flatten() for slot in slots])}


LAYOUTS = {
    "z": in_states("z"),
    "any name": in_states("θ_0"),
    "a name of Adam's": in_states("exp_avg_sq"),
    "states of their own": in_states_of_their_own,
    "ids": under_ids,
    "a list": in_a_list,
    "lists by group": in_lists_by_group,
    "a group": in_a_group,
    "a history": in_a_history,
    "one vector": in_one_vector,
}


@pytest.mark.devices
@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_are_found_in_every_layout_and_take_the_new_values(layout):
    parameters, optimizer = bare()
    LAYOUTS[layout](optimizer, parameters, [near(parameter) for parameter in parameters])
    judged = Copies(optimizer)
    judged.look()
    (name,) = judged.known
    assert judged.known == {name: True}
    before = [(p, slot.clone()) for p, slot in memory_of(optimizer).families[name]]
    assert len(before) == (8 if layout == "a history" else 4)
    fresh = {parameter: torch.arange(6) % 3 == 1 for parameter in parameters}
    notes = refresh_slots(optimizer, fresh, judged.known)
    assert notes == [f"{name} holds copies of the weights, which took the values of these filters."]
    for (parameter, slot), (_, old) in zip(memory_of(optimizer).families[name], before, strict=True):
        assert torch.equal(slot[[1, 4]], parameter[[1, 4]])
        assert torch.equal(slot[[0, 2, 3, 5]], old[[0, 2, 3, 5]])


@pytest.mark.devices
@pytest.mark.parametrize("layout", LAYOUTS)
def test_momenta_in_every_layout_are_cleared(layout):
    parameters, optimizer = bare()
    LAYOUTS[layout](optimizer, parameters, [torch.randn(parameter.shape) for parameter in parameters])
    judged = Copies(optimizer)
    judged.look()
    (name,) = judged.known
    assert judged.known == {name: False}
    assert refresh_slots(optimizer, {p: torch.arange(6) == 2 for p in parameters}, judged.known) == []
    for _, slot in memory_of(optimizer).families[name]:
        assert not slot[2].any() or name.endswith("exp_avg_sq")
        assert slot[[0, 1, 3, 4, 5]].any()


def test_chance_does_not_make_a_copy():
    (one, two, norm, bias), optimizer = bare()
    for parameter in (one, two, norm, bias):
        optimizer.state[parameter].update(
            momentum=1e-3 * torch.randn(parameter.shape),
            step_size=torch.ones(parameter.shape),  # as large as a norm's weights
            scaled=0.1 * parameter.detach(),  # what weight decay leaves in a momentum
            opposite=-parameter.detach(),
            shuffled=parameter.detach().flatten().roll(1).view_as(parameter),
        )
    optimizer.state[one]["momentum"].copy_(one)  # in one layer of two
    judged = Copies(optimizer)
    judged.look()
    assert set(judged.known.values()) == {False}
    assert len(judged.known) == 5


def test_weights_at_zero_tell_nothing_and_a_slot_at_zero_is_judged_when_it_holds_something():
    one, two = weights((6, 3, 3, 3), (6, 6, 3, 3))
    optimizer = Bare([one, two])
    with torch.no_grad():
        two.zero_()
    for parameter in (one, two):
        optimizer.state[parameter].update(late=torch.zeros(parameter.shape), z=parameter.detach().clone())
    judged = Copies(optimizer)
    judged.look()
    assert judged.known == {"Bare.z": True}
    optimizer.state[one]["late"].copy_(one)
    judged.look()
    assert judged.known == {"Bare.z": True, "Bare.late": True}


def test_a_family_is_judged_once():
    (one, two, *_), optimizer = bare()
    for parameter in (one, two):
        optimizer.state[parameter]["m"] = torch.randn(parameter.shape)
    judged = Copies(optimizer, {"Bare.x0": True})
    judged.look()
    for parameter in (one, two):  # a strong weight decay makes a momentum like the weights
        optimizer.state[parameter].update(m=parameter.detach().clone(), x0=torch.randn(parameter.shape))
    judged.look()
    assert judged.known == {"Bare.x0": True, "Bare.m": False}


def test_a_momentum_under_a_strong_weight_decay_is_no_copy_when_its_birth_was_watched():
    parameters = weights((6, 3, 3, 3), (6, 6, 3, 3))
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=0.1)
    judged = Copies(optimizer)
    judged.watch()
    for _ in range(40):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert likeness(parameters[0], optimizer.state[parameters[0]]["momentum_buffer"]) > 0.9
    assert judged.known == {"SGD.momentum_buffer": False}
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("scale", "expected"), [(1.0, 1.0), (0.5, 0.8), (2.0, 0.8), (-1.0, -1.0), (0.0, 0.0)]
)
def test_likeness_by_hand(scale, expected):
    weight = torch.tensor([[3.0, 4.0]])
    assert likeness(weight, scale * weight) == pytest.approx(expected)
    assert likeness(torch.zeros(1, 2), torch.zeros(1, 2)) is None


def test_a_magnitude_of_another_name_is_known_where_none_of_many_is_negative():
    parameters = weights((8, 8))
    optimizer = Bare(parameters)
    optimizer.state[parameters[0]].update(variance=torch.full((8, 8), 3.0), mean=torch.randn(8, 8))
    refresh_slots(optimizer, {parameters[0]: torch.arange(8) == 0})
    assert (optimizer.state[parameters[0]]["variance"] == 3).all()
    assert not optimizer.state[parameters[0]]["mean"][0].any()


@pytest.mark.devices
def test_a_history_of_all_weights_in_one_vector_is_forgotten_whole():
    parameters = weights((4, 3), (4,))
    optimizer = torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = sum((p**4).sum() for p in parameters)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.state[parameters[0]]["old_dirs"]
    notes = refresh_slots(optimizer, {parameters[0]: torch.arange(4) == 1})
    assert notes == ["LBFGS starts anew, because it remembers all weights in one vector."]
    assert not optimizer.state[parameters[0]]
    optimizer.step(closure)  # it can go on


def test_optimizers_inside_optimizers():
    class Outer(Bare):
        def __init__(self, params, **inner):
            super().__init__(params)
            vars(self).update(inner)

    parameters = weights((4, 3))
    one, two, three = (torch.optim.SGD(parameters, lr=0.1) for _ in range(3))
    outer = Outer(parameters, one=one, many=[two, one], named={"three": three}, text="x", loop=iter([1]))
    outer.itself = outer
    assert parts(outer) == [outer, one, two, three]
    assert stepping(outer) == [outer, one, two, three]
    assert next(outer.loop) == 1  # nothing was drawn from it
