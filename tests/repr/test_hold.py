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
