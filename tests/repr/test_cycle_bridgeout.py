"""RePr with Bridgeout in one run: every phase, a resume, and the removal of the noise at the end."""

import copy

import pytest
import torch
from torch import nn

import regrow
from cycles import OPTIMIZERS, X, batch, build, fit, load, repr_on, run, same_weights, save, sgd
from regrow.criteria.score import score
from regrow.marks import states_of

NOISE = {"p": 0.3, "q": 1.5, "seed": 5}


def start(kind="sgd", seed=0, linear=False, **settings):
    model = build(seed)
    regrow.add_bridgeout(model, linear=linear, **NOISE)
    optimizer = OPTIMIZERS[kind](model)
    return model, optimizer, repr_on(model, optimizer, **settings)


@pytest.mark.devices
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("criterion", ["ortho", "taylor"])
def test_a_narrowed_net_trains_as_a_masked_one(criterion, linear):
    found = []
    pictures, labels = batch(30)
    for compact in (True, False):
        model, optimizer, cycle = start(
            linear=linear, compact=compact, criterion=criterion, batches=[(pictures.double(), labels)],
            full=1, sub=2, cycles=2,
        )  # fmt: skip
        model.double()
        events = []
        for step in range(7):
            x, y = batch(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.double()), y).backward()
            optimizer.step()
            for name, mask in cycle.keep.items():
                assert not model.get_submodule(name).weight[~mask].any()
            events.append(cycle.step())
        found.append((model, events))
    (narrowed, events), (masked, expected) = found
    assert [event and event.filters for event in events] == [event and event.filters for event in expected]
    assert [event.kind for event in events if event] == ["drop", "restore"] * 2
    for name, tensor in masked.state_dict().items():
        torch.testing.assert_close(narrowed.state_dict()[name], tensor, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("sub", [0, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_stopped_anywhere_ends_at_the_same_bits(tmp_path, kind, sub, compact):
    model, optimizer, cycle = start(kind, sub=sub, compact=compact)
    noise = []
    for stop in range(9):
        save(tmp_path / f"{stop}.pt", model, optimizer, cycle)
        noise.append(regrow.bridgeout_state(model))
        run(model, optimizer, cycle, 1, start=stop)
    assert cycle.phase == "done"
    expected = model.state_dict()
    for stop in range(9):
        again, optimizer, cycle = start(kind, seed=99, sub=sub, compact=compact)
        load(tmp_path / f"{stop}.pt", again, optimizer, cycle, "model-optimizer-cycle")
        regrow.load_bridgeout_state(again, noise[stop])
        run(again, optimizer, cycle, 9 - stop, start=stop)
        assert same_weights(again.state_dict(), expected), stop


@pytest.mark.parametrize("order", ["cycle first", "noise first"])
@pytest.mark.parametrize("sub", [0, 2])
def test_a_plain_net_is_left_at_the_end(sub, order):
    model, optimizer, cycle = start(sub=sub)
    run(model, optimizer, cycle, 8)
    weights = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model.eval()(X)
    if order == "cycle first":
        cycle.remove()
    regrow.remove_bridgeout(model)
    cycle.remove()
    assert states_of(model) == {}
    assert {type(module) for module in model.modules()} == {type(module) for module in build().modules()}
    assert same_weights(model.state_dict(), weights)
    with torch.no_grad():
        assert torch.equal(model(X), expected)


@pytest.mark.parametrize("compact", [True, False])
def test_noise_can_be_neither_added_nor_removed_in_a_sub_phase(compact):
    model, optimizer, cycle = start(compact=compact)
    run(model, optimizer, cycle, 3)
    assert cycle.phase == "sub"
    with pytest.raises(ValueError, match=r"remove_bridgeout was refused.*cycle.remove\(\)"):
        regrow.remove_bridgeout(model)
    run(model, optimizer, cycle, 1, start=3)
    regrow.remove_bridgeout(model, [X])
    assert cycle.step() is None


def test_filters_are_scored_and_new_rows_set_without_noise():
    model, optimizer, cycle = start(sub=0, full=1, criterion="taylor", batches=[batch(30)])
    plain = build()
    for step in range(3):
        fit(model, optimizer, step)
    plain.load_state_dict(model.state_dict())
    scores = score(plain, "taylor", exclude=["conv1"], batches=[batch(30)])
    again = score(model, "taylor", exclude=["conv1"], batches=[batch(30)])
    assert all(torch.equal(again[name], values) for name, values in scores.items())
    event = cycle.step()
    record = regrow.restart(
        plain, sgd(plain), example_inputs=X[:1], fraction=0.3, criterion="taylor", batches=[batch(30)]
    )
    assert event.filters == record["filters"]
    for name, filters in event.filters.items():
        kept = torch.ones(8, dtype=torch.bool)
        kept[filters] = False
        rows = model.get_submodule(name).weight.detach().flatten(1)
        torch.testing.assert_close(
            rows[filters].norm(dim=1), rows[kept].norm(dim=1).mean().expand(len(filters))
        )
