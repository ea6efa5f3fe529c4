"""What a cycle leaves of itself on the model and on the optimizer: nothing."""

import copy

import pytest
import torch
from torch import nn

from cycles import X, build, fit, hooks, is_dead, repr_on, run, sgd


def test_state_dict_keys_parameters_and_modes_of_the_model_never_change():
    model = build().eval()
    optimizer = sgd(model)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    cycle = repr_on(model, optimizer)
    for step in range(10):
        fit(model, optimizer, step)
        cycle.step()
        assert list(model.state_dict()) == keys
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert not model.training
    assert hooks(model, optimizer) == 0


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_remove_leaves_a_plain_model_and_optimizer(steps):
    model = build()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer)
    run(model, optimizer, cycle, steps)
    dead = cycle.keep
    cycle.remove()
    assert hooks(model, optimizer) == 0
    assert type(model.conv2) is nn.Conv2d
    assert all(mask.all() for mask in cycle.keep.values())
    with torch.no_grad():
        for name, mask in dead.items():
            model.get_submodule(name).weight[~mask] = 1
    fit(model, optimizer, 9)
    assert all(model.get_submodule(name).weight.flatten(1).any(1).all() for name in dead)
    for call in (cycle.step, lambda: cycle.load_state_dict(cycle.state_dict())):
        with pytest.raises(ValueError, match="has been removed"):
            call()
    assert hooks(model, optimizer) == 0


def test_a_copy_made_in_the_sub_phase_is_a_model_like_any_other():
    model = build()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer)
    run(model, optimizer, cycle, 3)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(X), model(X))
    twin_optimizer = sgd(twin)
    fit(twin, twin_optimizer, 4)
    assert hooks(twin, twin_optimizer) == 0
    assert is_dead(model, cycle)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged.eval()(X), model.eval()(X))
