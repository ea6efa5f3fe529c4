import pytest
import torch
from torch import nn

from optimizers import ScheduleFreeSGD
from regrow.restarts.memory import Memory
from relatives import OPTIMIZERS, net, train

pytestmark = pytest.mark.devices


def test_a_weight_that_is_new_in_part_by_entries_keeps_its_count_of_steps():
    weight = nn.Parameter(torch.full((2, 2, 1, 1), 100.0))
    optimizer = torch.optim.Adam([weight], betas=(0.5, 0.5))
    (weight * torch.tensor([1.0, 2, 3, 4]).view_as(weight)).sum().backward()
    optimizer.step()
    mask = torch.tensor([True, False, False, False]).view(2, 2, 1, 1)
    assert Memory(optimizer).clear({weight: mask}) == []
    state = optimizer.state[weight]
    assert state["exp_avg"].flatten().tolist() == [0, 1, 1.5, 2]
    assert state["exp_avg_sq"].flatten().tolist() == pytest.approx([(2 + 4.5 + 8) / 3, 2, 4.5, 8])
    assert state["step"] == 1
    assert weight.grad.flatten().tolist() == [0, 2, 3, 4]


def test_sums_over_a_row_are_new_where_the_whole_row_is():
    weight = nn.Parameter(torch.ones(2, 4, 3, 3))
    optimizer = torch.optim.SGD([weight], 0.1)
    optimizer.state[weight]["rows"] = torch.tensor([1.0, 2])
    mask = torch.zeros(2, 4, 3, 3, dtype=torch.bool)
    mask[0] = True
    mask[1, 0] = True
    Memory(optimizer).clear({weight: mask})
    assert optimizer.state[weight]["rows"].tolist() == [0, 2]


def test_no_optimizer():
    memory = Memory(None)
    memory.watch()
    memory.release()
    assert memory.clear({nn.Parameter(torch.ones(2)): torch.ones(2) > 0}) == []
    assert memory.known() == {}


def test_copies_are_judged_behind_the_first_step_where_it_is_watched():
    model = net()
    optimizer = ScheduleFreeSGD(model.parameters(), lr=0.5)
    memory = Memory(optimizer)
    memory.watch()
    train(model, optimizer, 1)
    memory.release()
    assert memory.known() == {"ScheduleFreeSGD.z": True}
    assert Memory(optimizer, {"ScheduleFreeSGD.z": False}).known() == {"ScheduleFreeSGD.z": False}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_wrapper_is_looked_through(name):
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure=None):
            return self.inner.step(closure)

    model = net()
    inner = OPTIMIZERS[name](model.parameters())
    train(model, inner, 2)
    weight = model[3].weight
    Memory(Wrapper(inner)).clear({weight: torch.ones(len(weight)) > 0})
    slot = "momentum_buffer" if name == "momentum" else "exp_avg"
    assert not inner.state[weight][slot].any()
    assert inner.state[model[0].weight][slot].any()
