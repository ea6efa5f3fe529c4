"""When filters are dropped and restored, and what the events say."""

import copy
import json

import pytest
import torch
from torch import nn

from cycles import build, fit, repr_on, run, sgd
from regrow.criteria.score import score
from regrow.criteria.select import select
from regrow.repr.events import Event


@pytest.mark.devices
def test_the_schedule_by_hand():
    model = build()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer, full=3, sub=2, cycles=2)
    seen, phases = [], [cycle.phase]
    for event in (run(model, optimizer, cycle, 1)[0] for _ in range(12)):
        seen.append(event and (event.kind, event.step, event.cycle))
        phases.append(cycle.phase)
    assert seen == [
        None, None, ("drop", 3, 1), None, ("restore", 5, 1),
        None, None, ("drop", 8, 2), None, ("restore", 10, 2), None, None,
    ]  # fmt: skip
    assert phases == ["full"] * 3 + ["sub"] * 2 + ["full"] * 3 + ["sub"] * 2 + ["done"] * 3


def test_lengths_of_one_step():
    model = build()
    optimizer = sgd(model)
    events = run(model, optimizer, repr_on(model, optimizer, full=1, sub=1, cycles=1), 3)
    assert [event and event.kind for event in events] == ["drop", "restore", None]


def test_steps_count_alike_without_any_training_between():
    cycle = repr_on(build())
    assert [bool(cycle.step()) for _ in range(9)] == [False, True, False, True] * 2 + [False]


@pytest.mark.devices
def test_events_say_what_was_dropped_and_survive_json():
    model = build()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer)
    fit(model, optimizer)
    cycle.step()
    fit(model, optimizer)
    expected = select(score(model, "ortho", exclude=["conv1"]), 0.3)
    drop = cycle.step()
    assert drop.filters == {n: (~m).nonzero().flatten().tolist() for n, m in expected.items() if not m.all()}
    assert sum(map(len, drop.filters.values())) == 5  # 30 % of the 16 behind the first convolution
    assert all(torch.equal(cycle.keep[name], expected[name]) for name in expected)
    assert set(cycle.keep) == {"conv2", "conv3"}
    cycle.step()
    restore = cycle.step()
    assert restore.filters == drop.filters
    assert all(mask.all() for mask in cycle.keep.values())
    for event in (drop, restore):
        assert Event(**json.loads(json.dumps(event.to_dict()))) == event


def test_restore_says_which_layers_had_no_room():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    cycle = repr_on(model)
    events = [cycle.step() for _ in range(4)]
    assert events[3].least_covered == ["1"]


def test_a_fraction_of_zero_drops_nothing():
    model = build()
    cycle = repr_on(model, fraction=0)
    before = copy.deepcopy(model.state_dict())
    events = [cycle.step() for _ in range(8)]
    assert [event and event.filters for event in events] == [None, {}] * 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.devices
@pytest.mark.parametrize("criterion", ["ortho", "ortho-corrected", "l1", "l2", "random"])
def test_every_criterion_runs_and_its_drops_follow_from_the_seed(criterion):
    def drops(seed):
        model = build()
        optimizer = sgd(model)
        events = run(model, optimizer, repr_on(model, optimizer, criterion=criterion, seed=seed), 8)
        return [event.filters for event in events if event and event.kind == "drop"]

    assert drops(3) == drops(3)
    if criterion == "random":
        assert drops(3) != drops(4)
        assert drops(3)[0] != drops(3)[1]


@pytest.mark.devices
def test_the_same_seed_gives_the_same_weights_whatever_the_global_generator_does():
    def weights(seed, noise):
        model = build()
        cycle = repr_on(model, consumers="init", seed=seed)
        for _ in range(8):
            torch.randn(noise)
            cycle.step()
        return model.state_dict()

    one, same, other = weights(1, 1), weights(1, 5), weights(2, 1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["conv2.weight"], other["conv2.weight"])
