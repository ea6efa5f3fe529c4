import copy
import json

import pytest
import torch
from torch import nn

from regrow.restarts.evolution import KnowledgeEvolution
from relatives import OPTIMIZERS, net, tensors, train

pytestmark = pytest.mark.devices
WEIGHTS = ["0.weight", "3.weight", "7.weight", "10.weight"]


def test_the_fixed_part_stays_and_the_rest_is_drawn_anew():
    model = net()
    evolution = KnowledgeEvolution(model, split=0.75, seed=1)
    fixed = evolution.fixed()
    assert list(fixed) == WEIGHTS
    train(model, OPTIMIZERS["momentum"](model.parameters()), 2)
    before = tensors(model)
    record = evolution.evolve()
    drawn = {"0.weight": 27, "3.weight": 54, "7.weight": 30, "10.weight": 4}
    assert record == json.loads(json.dumps(record))
    assert record == {"version": 1, "generation": 1, "drawn": drawn, "notes": []}
    for name, tensor in model.state_dict().items():
        if name not in fixed:
            assert torch.equal(tensor, before[name]), name
            continue
        same = (tensor == before[name]).cpu()
        assert same[fixed[name]].all()
        assert not same[~fixed[name]].any()
    # the next generation has the same fixed part, and other new weights
    second = tensors(model)
    evolution.evolve()
    for name, mask in fixed.items():
        same = (model.get_parameter(name) == second[name]).cpu()
        assert torch.equal(same, mask)


def test_new_weights_are_those_that_the_layer_draws():
    model, fresh = net(), net()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(9)
    evolution = KnowledgeEvolution(model)
    evolution.evolve(fresh=fresh)
    for name, mask in evolution.fixed().items():
        assert torch.equal((model.get_parameter(name) == 9).cpu(), ~mask)
    bound = 27**-0.5
    evolution.evolve()
    assert float(model[0].weight.detach().abs().max()) <= bound


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_forgets_what_is_drawn_anew(name):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 3)
    evolution = KnowledgeEvolution(model, split=0.5)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    evolution.evolve(optimizer)
    slot = "momentum_buffer" if name == "momentum" else "exp_avg"
    for place, (parameter_name, parameter) in enumerate(model.named_parameters()):
        now, then = optimizer.state[parameter][slot], before[place][slot]
        mask = evolution.fixed().get(parameter_name, torch.ones(parameter.shape, device="cpu") > 0)
        mask = mask.to(now.device)
        assert torch.equal(now[mask], then[mask])
        assert not now[~mask].any()
        if name != "momentum" and not mask.all():
            squares = optimizer.state[parameter]["exp_avg_sq"]
            torch.testing.assert_close(squares[~mask], squares[mask].mean().expand(int((~mask).sum())))
    train(model, optimizer, 1)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_resumed_evolution_draws_the_same():
    one, other = net(), net()
    evolution = KnowledgeEvolution(one, seed=4)
    evolution.evolve()
    state = json.loads(json.dumps(evolution.state_dict()))
    other.load_state_dict(one.state_dict())
    again = KnowledgeEvolution(other, seed=4)
    again.load_state_dict(state)
    assert again.generation == 1
    evolution.evolve()
    again.evolve()
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    evolution.remove()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "reads KnowledgeEvolution states of version 1, got 2"),
        ({"generation": -1}, "is a count, got -1"),
        ({"generation": True}, "is a count"),
        ({"settings": {"split": 0.5, "seed": 0}}, r"split=0.5 \(here 0.8\)"),
        ({"settings": None}, "its settings are None"),
    ],
)
def test_bad_states_change_nothing(change, message):
    evolution = KnowledgeEvolution(net())
    state = evolution.state_dict() | {"generation": 3}
    with pytest.raises(ValueError, match=message):
        evolution.load_state_dict(state | change)
    assert evolution.generation == 0
    with pytest.raises(ValueError, match="generation missing"):
        evolution.load_state_dict({"version": 1, "settings": {}})
    with pytest.raises(ValueError, match="not a state of KnowledgeEvolution"):
        evolution.load_state_dict(None)


def test_bad_arguments():
    for split in (0, 1, 1.5, True, "half"):
        with pytest.raises(ValueError, match="split must lie between 0 and 1"):
            KnowledgeEvolution(net(), split=split)
    with pytest.raises(ValueError, match="found no weight"):
        KnowledgeEvolution(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="seed"):
        KnowledgeEvolution(net(), seed=None)
    model = net()
    evolution = KnowledgeEvolution(model)
    with pytest.raises(ValueError, match="takes as optimizer"):
        evolution.evolve(3)
    model[10] = nn.Linear(5, 4)
    before = tensors(model)
    with pytest.raises(ValueError, match=r"'10\.weight' is no longer of shape"):
        evolution.evolve()
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_frozen_and_shared_weights():
    model = net()
    model[0].requires_grad_(False)
    twin = nn.Linear(5, 3)
    twin.weight = model[10].weight
    evolution = KnowledgeEvolution(nn.Sequential(model, twin))
    assert list(evolution.fixed()) == ["0.3.weight", "0.7.weight", "0.10.weight"]
    assert evolution.left_out == {"0.0.weight": "it is frozen (requires_grad is False)"}
    evolution.evolve()
