"""A sub-phase that computes the kept filters alone, beside one that masks the dropped ones."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cycles import OPTIMIZERS, X, batch, build, fit, is_dead, load, repr_on, run, save, sgd, start, widths
from nets import Residual
from regrow.surgery.plan import CutPlan
from regrow.surgery.planning import Planned
from regrow.surgery.removal import Removal


def residual():
    return Residual(8, 8)


def separable():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8),
        nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


def start_on(net, kind, **settings):
    torch.manual_seed(0)
    model = net()
    optimizer = OPTIMIZERS[kind](model)
    return model, optimizer, repr_on(model, optimizer, full=2, sub=4, skip_first=False, **settings)


def losses(model, optimizer, cycle, steps):
    seen, events = [], []
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
        events.append(cycle.step())
    return seen, [event for event in events if event]


@pytest.mark.devices
@pytest.mark.parametrize("net", [build, residual, separable])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_compact_and_masked_are_the_same_run(kind, net):
    ours, events = losses(*start_on(net, kind), steps=12)
    theirs, expected = losses(*start_on(net, kind, compact=False), steps=12)
    assert [event.filters for event in events] == [event.filters for event in expected]
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.devices
def test_compact_computes_the_kept_filters_alone():
    model, optimizer, cycle = start_on(build, "sgd")
    whole = widths(model)
    assert whole == {"conv1": 6, "conv2": 8, "conv3": 8}
    _, (drop,) = losses(model, optimizer, cycle, 2)
    assert widths(model) == {name: whole[name] - len(drop.filters.get(name, ())) for name in whole}
    assert sum(widths(model).values()) == 22 - 7
    losses(model, optimizer, cycle, 4)
    assert cycle.phase == "full"
    assert widths(model) == whole

    masked, *rest = start_on(build, "sgd", compact=False)
    losses(masked, *rest, steps=3)
    assert widths(masked) == whole

    model, *rest = start_on(residual, "sgd")
    _, (drop,) = losses(model, *rest, steps=3)
    assert drop.filters.keys() & {"stem", "b"}  # into the residual stream
    assert widths(model) == {name: 8 - len(drop.filters.get(name, ())) for name in ("stem", "a", "b")}


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.Identity])
def test_data_parallel_is_masked_and_the_event_says_so(wrap):
    model = build()
    optimizer = sgd(model)
    wrapped = nn.DataParallel(model) if wrap is nn.DataParallel else model
    cycle = repr_on(wrapped, optimizer)
    notes = [note for event in run(model, optimizer, cycle, 3) if event for note in event.notes]
    assert any("use DistributedDataParallel" in note for note in notes) == (wrap is nn.DataParallel)
    assert (widths(model) == {"conv1": 6, "conv2": 8, "conv3": 8}) == (wrap is nn.DataParallel)
    assert is_dead(model, cycle)


def test_what_cannot_be_planned_is_masked_and_the_event_says_so():
    class Remembers(nn.Sequential):
        def forward(self, x):
            self.seen = super().forward(x)  # a tensor with a graph cannot be copied
            return self.seen

    model = Remembers(OrderedDict(build().named_children()))
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer)
    fit(model, optimizer)
    cycle.step()
    fit(model, optimizer)
    (note,) = cycle.step().notes
    assert note.startswith(
        "all dropped filters are computed and held at 0, because no plan could be made: the model cannot be "
        "copied: O"
    )
    fit(model, optimizer)
    assert is_dead(model, cycle)
    assert widths(model) == {"conv1": 6, "conv2": 8, "conv3": 8}


@pytest.mark.devices
def test_depthwise_rows_go_on_behind_a_dropped_channel():
    model, *rest = start_on(separable, "sgd", scope="layer")
    _, (drop,) = losses(model, *rest, steps=2)
    assert drop.notes == []
    assert widths(model) == {"0": 6, "3": 8, "6": 6}  # the norm behind 0 places six among eight


def test_a_layer_that_goes_on_computing_its_dropped_filters_is_named(monkeypatch):
    def plan_nothing(*_arguments, **_settings):
        return Planned(Removal({}, {}, {}), CutPlan(masked={"conv2": "it is a test"}))

    monkeypatch.setattr("regrow.repr.cycle.plan_removal_and_cut", plan_nothing)
    model, *rest = start_on(build, "sgd")
    _, (drop,) = losses(model, *rest, steps=2)
    assert drop.notes == ["conv2: its dropped filters are computed and held at 0, because it is a test."]


@pytest.mark.devices
@pytest.mark.parametrize(("saved", "loaded"), [(True, False), (False, True), (True, True), (None, True)])
def test_a_state_goes_on_compact_or_masked_as_the_one_that_loads_it(tmp_path, saved, loaded):
    model, optimizer, cycle = start("sgd", compact=saved is not False)
    run(model, optimizer, cycle, 3)
    save(tmp_path / "state.pt", model, optimizer, cycle)
    if saved is None:  # a state from before there were plans, and silent norms
        states = torch.load(tmp_path / "state.pt", weights_only=True)
        for key in ("plan", "silenced", "old_norms"):
            del states["cycle"]["sub_phase"][key]
        torch.save(states, tmp_path / "state.pt")
    again, again_optimizer, again_cycle = start("sgd", seed=99, compact=loaded)
    load(tmp_path / "state.pt", again, again_optimizer, again_cycle, "cycle-model-optimizer")
    torch.testing.assert_close(again.eval()(X), model.eval()(X))
    assert (widths(again) == {"conv1": 6, "conv2": 8, "conv3": 8}) == (not loaded)
    for each in (model, again):
        each.train()
    run(model, optimizer, cycle, 5, start=3)
    run(again, again_optimizer, again_cycle, 5, start=3)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_plan_that_does_not_fit_is_refused_and_the_running_phase_goes_on():
    model, optimizer, cycle = start("sgd")
    run(model, optimizer, cycle, 3)
    state, before = copy.deepcopy(cycle.state_dict()), widths(model)
    state["sub_phase"]["plan"]["rows"]["conv2"] = [0, 99]
    with pytest.raises(ValueError, match="does not fit 'conv2'"):
        cycle.load_state_dict(state)
    assert widths(model) == before
    run(model, optimizer, cycle, 1, start=3)
    assert cycle.phase == "full"


@pytest.mark.devices
def test_the_user_may_hold_the_last_loss_and_averages_across_every_change():
    model, optimizer, cycle = start_on(build, "sgd", cycles=2)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    held, late = [], None
    for step in range(12):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        optimizer.step()
        averaged.update_parameters(model)
        if step == 3:
            late = copy.deepcopy(model)
        held.append(loss)
        cycle.step()
    assert cycle.phase == "done"
    assert averaged.eval()(X).shape == late(X).shape == (8, 4)
    assert widths(averaged.module) == widths(late) == widths(model) == {"conv1": 6, "conv2": 8, "conv3": 8}
    assert all(loss.grad_fn is not None for loss in held)


@pytest.mark.devices
def test_a_restore_leaves_what_was_kept_bit_for_bit_as_training_made_it():
    model, optimizer, cycle = start_on(build, "adam", cycles=1)
    losses(model, optimizer, cycle, 5)
    keep, made = cycle.keep, copy.deepcopy(model.state_dict())
    event = cycle.step()
    assert event.kind == "restore"
    for i in (1, 2, 3):
        rows, read = keep[f"conv{i}"], keep.get(f"conv{i - 1}", torch.ones(3, dtype=torch.bool))
        weight, old = model.get_submodule(f"conv{i}").weight, made[f"conv{i}.weight"]
        assert torch.equal(weight[rows][:, read], old[rows][:, read])
        for key in ("weight", "bias", "running_mean", "running_var"):
            assert torch.equal(
                getattr(model.get_submodule(f"norm{i}"), key)[rows], made[f"norm{i}.{key}"][rows]
            )
    assert torch.equal(model.head.weight[:, keep["conv3"]], made["head.weight"][:, keep["conv3"]])
