"""Cycles with ``sub=0``: filters are dropped and restored in one call."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cycles import OPTIMIZERS, X, build, fit, hooks, load, repr_on, run, same_weights, save, sgd
from regrow.marks import states_of

pytestmark = pytest.mark.devices
AT_ONCE = {"full": 2, "sub": 0, "cycles": 3}


def start(kind="sgd", seed=0, **settings):
    model = build(seed)
    optimizer = OPTIMIZERS[kind](model)
    return model, optimizer, repr_on(model, optimizer, **AT_ONCE, **settings)


def test_every_cycle_is_one_restart_and_the_phase_is_full_until_the_last():
    model, optimizer, cycle = start()
    phases, events = [], []
    for step in range(8):
        phases.append(cycle.phase)
        fit(model, optimizer, step)
        events.append(cycle.step())
        assert all(mask.all() for mask in cycle.keep.values())
        assert hooks(model, optimizer) == 0
        assert set(states_of(model)) <= {"in a cycle"}
    assert phases == ["full"] * 6 + ["done"] * 2
    found = [(event.kind, event.step, event.cycle) for event in events if event]
    assert found == [("restart", 2, 1), ("restart", 4, 2), ("restart", 6, 3)]
    assert all(sum(map(len, event.filters.values())) == 5 for event in events if event)  # 30 % of 16
    assert states_of(model) == {}


@pytest.mark.parametrize("rows", ["orthogonal", "init"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_stopped_anywhere_ends_at_the_same_bits(tmp_path, kind, rows):
    model, optimizer, cycle = start(kind, rows=rows)
    for stop in range(8):
        save(tmp_path / f"{stop}.pt", model, optimizer, cycle)
        run(model, optimizer, cycle, 1, start=stop)
    expected = model.state_dict()
    for stop in range(8):
        again, optimizer, cycle = start(kind, seed=99, rows=rows)
        load(tmp_path / f"{stop}.pt", again, optimizer, cycle, "cycle-model-optimizer")
        run(again, optimizer, cycle, 8 - stop, start=stop)
        assert same_weights(again.state_dict(), expected), stop


def test_states_of_other_rows_or_sub_are_refused_and_older_states_have_orthogonal_rows():
    _, _, cycle = start()
    state = cycle.state_dict()
    assert state["sub_phase"] is None
    with pytest.raises(ValueError, match=r"rows='orthogonal' \(here 'init'\)"):
        start(rows="init")[2].load_state_dict(state)
    with pytest.raises(ValueError, match=r"sub=0 \(here 2\)"):
        repr_on(build(), full=2, sub=2, cycles=3).load_state_dict(state)
    older = copy.deepcopy(state)
    del older["settings"]["rows"]
    older["step"] = 3
    cycle.load_state_dict(older)
    assert cycle.state_dict()["step"] == 3
    with pytest.raises(ValueError, match=r"rows='orthogonal' \(here 'init'\)"):
        start(rows="init")[2].load_state_dict(older)


@pytest.mark.parametrize("compact", [True, False, None])
def test_compact_makes_no_difference(compact):
    model, optimizer, cycle = start(compact=compact)
    events = run(model, optimizer, cycle, 6)
    other, other_optimizer, other_cycle = start()
    assert events == run(other, other_optimizer, other_cycle, 6)
    assert same_weights(model.state_dict(), other.state_dict())


def test_an_averaged_copy_takes_what_is_new():
    model, optimizer, cycle = start(criterion="l2")
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    cycle.follow(averaged)
    run(model, optimizer, cycle, 1)
    averaged.update_parameters(model)
    fit(model, optimizer, 1)
    averaged.update_parameters(model)
    event = cycle.step()
    for name, filters in event.filters.items():
        norm = name.replace("conv", "norm")
        for key in (f"{name}.weight", f"{name}.bias", f"{norm}.weight", f"{norm}.bias"):
            theirs = averaged.module.get_parameter(key)
            assert torch.equal(theirs[filters], model.get_parameter(key)[filters]), key
            others = [i for i in range(8) if i not in filters]
            if name != "conv3":
                assert not torch.equal(theirs[others], model.get_parameter(key)[others])
    assert not averaged.module.head.weight[:, event.filters["conv3"]].any()


def test_a_restart_at_a_rate_too_low_to_heal_warns():
    model = build()
    optimizer = sgd(model, lr=0.1)
    cycle = repr_on(model, optimizer, **AT_ONCE)
    cycle.step()
    optimizer.param_groups[0]["lr"] = 0.001
    with pytest.warns(UserWarning, match="filters are restarted at a learning rate of 0.001, far below"):
        assert cycle.step().kind == "restart"


def test_nan_weights_are_refused_and_nothing_is_counted():
    model, _, cycle = start()
    cycle.step()
    good = model.conv3.weight.detach().clone()
    with torch.no_grad():
        model.conv3.weight[0] = torch.nan
    with pytest.raises(ValueError, match="'conv3' holds NaN"):
        cycle.step()
    assert cycle.state_dict()["step"] == 1
    with torch.no_grad():
        model.conv3.weight.copy_(good)
    assert cycle.step().kind == "restart"


def test_the_floor_is_said_in_a_note_and_a_warning():
    _, _, cycle = start(floor=0.9)
    cycle.step()
    with pytest.warns(UserWarning, match=r"floor=0\.9 leaves 0 of the 5 filters"):
        event = cycle.step()
    assert event.filters == {}
    assert "floor=0.9 leaves" in event.notes[0]


def test_a_step_of_one_call_per_cycle():
    model = build()
    cycle = repr_on(model, full=1, sub=0, cycles=2)
    assert [event and event.kind for event in (cycle.step() for _ in range(3))] == [
        "restart",
        "restart",
        None,
    ]
    assert X.isfinite().all()
