"""Drops and restores at a learning rate too low to heal them, and schedulers."""

import copy
import warnings

import pytest
import torch

from cycles import build, fit, hooks, is_dead, repr_on, run, same_weights, sgd


@pytest.mark.parametrize(("rate", "warns"), [(0.1, False), (0.01, False), (0.0099, True), (0.0, True)])
def test_a_restore_at_a_rate_too_low_to_heal_warns(rate, warns):
    model = build()
    optimizer = sgd(model, lr=0.1)
    cycle = repr_on(model, optimizer)
    run(model, optimizer, cycle, 3)
    optimizer.param_groups[0]["lr"] = rate
    if warns:
        with pytest.warns(
            UserWarning, match=r"filters are restored at a learning rate of .*highest so far \(0\.1\)"
        ):
            assert cycle.step().kind == "restore"
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert cycle.step().kind == "restore"


def test_a_warning_turned_into_an_error_changes_nothing():
    model = build()
    optimizer = sgd(model, lr=0.1)
    cycle = repr_on(model, optimizer)
    cycle.step()
    optimizer.param_groups[0]["lr"] = 0.001
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="filters are dropped at a learning rate"):
            cycle.step()
    assert same_weights(model.state_dict(), before)
    assert hooks(model, optimizer) == 0
    optimizer.param_groups[0]["lr"] = 0.1
    assert cycle.step().step == 2


def test_the_highest_rate_is_that_of_any_group_and_outlives_a_resume():
    model = build()
    groups = [{"params": list(model[:6].parameters()), "lr": 0.001}, {"params": list(model[6:].parameters())}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    cycle = repr_on(model, optimizer)
    cycle.step()
    state = cycle.state_dict()
    optimizer.param_groups[1]["lr"] = 0.001
    cycle.remove()
    resumed = repr_on(model, optimizer)
    resumed.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"rate of 0\.001, far below the highest so far \(0\.1\)"):
        resumed.step()


def test_a_warm_up_of_the_biases_alone_does_not_count():
    model = build()
    biases = [each for each in model.parameters() if each.dim() == 1]
    weights = [each for each in model.parameters() if each.dim() > 1]
    optimizer = torch.optim.SGD([{"params": weights}, {"params": biases, "lr": 0.1}], lr=0.005)
    cycle = repr_on(model, optimizer)
    cycle.step()
    optimizer.param_groups[1]["lr"] = 0.005
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cycle.step().kind == "drop"
    cycle.remove()


def test_a_scheduler_on_the_optimizer_is_no_obstacle():
    model = build()
    optimizer = sgd(model, lr=0.1)
    scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.05, 0.1, step_size_up=2)
    cycle = repr_on(model, optimizer)
    for step in range(8):
        fit(model, optimizer, step)
        scheduler.step()
        cycle.step()
        assert is_dead(model, cycle)
