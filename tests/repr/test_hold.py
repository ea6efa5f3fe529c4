import pytest
import torch
from torch import nn

from regrow.repr.hold import Hold

DEAD = torch.tensor([0, 2])
ALIVE = torch.tensor([1, 3])


def parameter():
    weight = nn.Parameter(torch.randn(4, 3))
    weight.data[DEAD] = 0
    return weight


def push(weight, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        (weight * torch.arange(12.0).view(4, 3).add(1)).sum().backward()
        optimizer.step()


@pytest.mark.devices
def test_rows_stay_zero_where_memory_from_before_would_revive_them():
    def run(hold):
        weight = nn.Parameter(torch.ones(4, 3))
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        push(weight, optimizer)
        weight.data[DEAD] = 0
        if hold:
            Hold([(weight, DEAD)], optimizer)
        push(weight, optimizer)
        return weight.detach()

    assert run(hold=False)[DEAD].any()
    assert not run(hold=True)[DEAD].any()
    assert torch.equal(run(hold=False)[ALIVE], run(hold=True)[ALIVE])


@pytest.mark.devices
def test_dead_rows_have_no_gradient_and_the_others_keep_theirs():
    weight = parameter()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    Hold([(weight, DEAD)], optimizer)
    (weight * 2).sum().backward()
    assert weight.grad.tolist() == [[0] * 3, [2] * 3, [0] * 3, [2] * 3]
    (weight * 2).sum().backward()  # accumulated
    assert weight.grad.tolist() == [[0] * 3, [4] * 3, [0] * 3, [4] * 3]


@pytest.mark.devices
def test_gradients_accumulated_before_are_cleared_too():
    weight = parameter()
    weight.sum().backward()
    Hold([(weight, DEAD)], torch.optim.SGD([weight], lr=0.1))
    assert weight.grad.tolist() == [[0] * 3, [1] * 3, [0] * 3, [1] * 3]


@pytest.mark.devices
def test_gradient_clipping_sees_the_living_rows_alone():
    weight = parameter()
    Hold([(weight, DEAD)], torch.optim.SGD([weight], lr=0.1))
    weight.sum().backward()
    assert nn.utils.clip_grad_norm_([weight], 1.0).item() == pytest.approx(6**0.5)


@pytest.mark.devices
def test_an_infinite_gradient_of_a_dead_row_does_no_harm():
    weight = parameter()
    optimizer = torch.optim.Adam([weight], lr=0.1)
    Hold([(weight, DEAD)], optimizer)
    factor = torch.ones(4, 3)
    factor[DEAD] = torch.inf
    (weight.where(weight != 0, weight + 1) * factor).sum().backward()
    optimizer.step()
    assert not weight[DEAD].any()
    assert weight.isfinite().all()


def test_step_is_not_replaced_and_release_leaves_nothing_behind():
    weight = parameter()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    hold = Hold([(weight, DEAD)], optimizer)
    assert "step" not in vars(optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    hold.release()
    assert not optimizer._optimizer_step_post_hooks
    assert not weight._backward_hooks
    push(weight, optimizer)
    assert weight[DEAD].all()
    hold.release()  # a second time does nothing


def test_a_frozen_parameter_needs_no_gradient_hook():
    weight = parameter().requires_grad_(False)
    optimizer = torch.optim.SGD([weight, nn.Parameter(torch.ones(1))], lr=0.1)
    Hold([(weight, DEAD)], optimizer).release()
    assert not weight[DEAD].any()


class Masked(torch.autograd.Function):
    """A pass that makes gradients of 0 for dead rows, as narrowed layers do."""

    @staticmethod
    def forward(_, weight):
        return weight.clone()

    @staticmethod
    def backward(_, gradient):
        return gradient.index_fill(0, DEAD, 0)


def train(weight, optimizer, penalty=0.0):
    optimizer.zero_grad()
    (Masked.apply(weight).square().sum() + penalty * (weight - 1).square().sum()).backward()
    optimizer.step()


@pytest.fixture
def cleared(monkeypatch):
    """How often rows were set to 0."""
    calls = []
    zero = Hold.zero
    monkeypatch.setattr(Hold, "zero", lambda self: (calls.append(1), zero(self)))
    return calls


def test_two_still_steps_are_watched_and_the_others_believed(cleared):
    weight = parameter()
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1)
    Hold([(weight, DEAD)], optimizer, {weight})
    for _ in range(5):
        train(weight, optimizer)
        assert not weight[DEAD].any()
    assert cleared == []


@pytest.mark.parametrize("first", [0, 1])
def test_a_loss_that_reads_whole_rows_is_seen_in_the_watched_steps(first, cleared):
    weight = parameter()
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    Hold([(weight, DEAD)], optimizer, {weight})
    for step in range(6):
        train(weight, optimizer, penalty=float(step >= first))
        assert not weight[DEAD].any()
        assert step <= first or not weight.grad[DEAD].any()  # masked from then on
    assert len(cleared) == 6 - first


class Own(torch.optim.SGD):
    """An optimizer that nobody has tried."""


def test_other_optimizers_and_gradients_that_no_pass_masks_are_never_believed(cleared):
    weight = parameter()
    optimizer = Own([weight], lr=0.1)
    Hold([(weight, DEAD)], optimizer, {weight})
    for _ in range(4):
        train(weight, optimizer)
    assert len(cleared) == 4
    weight = parameter()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    Hold([(weight, DEAD)], optimizer)
    push(weight, optimizer, 4)
    assert len(cleared) == 8


def test_firmly_sets_rows_to_0_at_once_and_masks_gradients():
    weight = parameter()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    hold = Hold([(weight, DEAD)], optimizer, {weight})
    weight.data[DEAD] = 1
    assert [id(each) for each in hold.moved()] == [id(weight)]
    hold.firmly()
    assert not hold.moved()
    push(weight, optimizer)
    assert not weight[DEAD].any()
    assert not weight.grad[DEAD].any()


def test_a_step_that_nobody_can_read_clears_in_it(monkeypatch, cleared):
    weight = parameter()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    Hold([(weight, DEAD)], optimizer, {weight})
    monkeypatch.setattr("regrow.repr.hold.readable", lambda: False)  # as while a CUDA graph is captured
    train(weight, optimizer)
    assert len(cleared) == 1
    monkeypatch.undo()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01, amsgrad=True),
        lambda p: torch.optim.AdamW(p, 0.01),
        lambda p: torch.optim.Adamax(p, 0.01),
        lambda p: torch.optim.NAdam(p, 0.01, decoupled_weight_decay=True),
        lambda p: torch.optim.RAdam(p, 0.01),
        lambda p: torch.optim.Adagrad(p, 0.01),
        lambda p: torch.optim.Adadelta(p),
        lambda p: torch.optim.RMSprop(p, 0.001, momentum=0.9, centered=True),
        lambda p: torch.optim.Rprop(p, 0.001),
        lambda p: torch.optim.ASGD(p, 0.01),
        lambda p: torch.optim.Adafactor(p, 0.01),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, dampening=0.1, maximize=True),
    ],
)
def test_pytorch_s_optimizers_deserve_belief(make):
    found = []
    for held in (True, False):
        torch.manual_seed(0)
        weight = parameter()
        optimizer = make([weight])
        Hold([(weight, DEAD)], optimizer, {weight} if held else ())
        for _ in range(20):
            train(weight, optimizer)
            assert not weight[DEAD].any()
        found.append(weight.detach())
    assert torch.equal(*found)
