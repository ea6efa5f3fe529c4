"""Searches for a budget, on nets small enough to see that no better cut was there."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

import regrow.pruning.budget
from regrow.criteria.score import score
from regrow.pruning.accuracy import top1
from regrow.pruning.budget import Search, check_target, removed
from regrow.pruning.choosing import Choice, choose
from regrow.pruning.cost import count_macs, count_parameters
from regrow.pruning.trials import Bench
from regrow.shipping.deploy import Form
from regrow.shipping.deployed import Deployed
from regrow.structure.read import read_structure

X = torch.randn(2, 3, 8, 8)


def search(model: nn.Module, floor: float = 0.1, round_to: int = 1) -> Search:
    scores = score(model, "l2")
    readers = read_structure(model, X)
    torch.manual_seed(1)
    inputs = torch.randn(200, 3, 8, 8)
    validation = [(inputs, model(inputs).argmax(1))]  # as accurate as can be: every cut costs something
    choosing = functools.partial(choose, scores, choice=Choice("layer", floor, round_to))
    return Search(
        model, X, Bench(model, X, readers, None), choosing, 22, validation, 1.0, lambda _share, _what: None
    )


@pytest.fixture
def model(make_net):
    model = make_net()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(32, 3, 8, 8))
        # So that every class is the likeliest for some pictures.
        model.head.bias -= model.eval()(torch.randn(200, 3, 8, 8)).mean(0)
    return model


@pytest.mark.devices
@pytest.mark.parametrize(
    ("kind", "cost"), [("params", count_parameters), ("macs", lambda m: count_macs(m, X))]
)
def test_the_smallest_cut_within_a_budget(model, kind, cost):
    looking = search(model)
    met = looking.run(kind, 0.5)
    assert met.reached == cost(met.trial.model) / cost(model) <= 0.5
    for rung in range(1, 22):
        keep = looking.choose(rung / 22)
        if 0 < removed(keep) < removed(met.trial.keep):
            assert cost(looking.bench.cut(keep, compensated=False).model) / cost(model) > 0.5


@pytest.mark.devices
def test_the_largest_cut_within_a_drop(model):
    looking = search(model)
    met = looking.run("max_drop", 60.0)
    assert met.reached == pytest.approx(100 * (1 - top1(met.trial.model, looking.validation)[0]))
    assert met.reached <= 60.0
    assert removed(met.trial.keep)


def test_latency_is_that_of_passes_in_turn(model, monkeypatch):
    # In place of a clock: a pass takes as long as there are parameters.
    def clock(models, _inputs):
        return [{"median": float(count_parameters(each))} for each in models]

    monkeypatch.setattr(regrow.pruning.budget, "measure_latency", clock)
    met = search(model).run("latency", 0.6)
    assert met.reached == count_parameters(met.trial.model) / count_parameters(model) <= 0.6
    assert met.timing == clock([model, met.trial.model], X)


@pytest.mark.parametrize("recovers", [True, False])
def test_a_latency_that_was_met_by_chance_is_looked_at_again(model, monkeypatch, recovers):
    looks = []

    def clock(models, _inputs):
        looks.append(count_parameters(models[1]))
        # Whoever is looked at twice is slow then; and if the machine does not recover, all are from there on.
        slow = looks.count(looks[-1]) > 1 or (not recovers and len(set(looks)) < len(looks))
        return [{"median": 1.0}, {"median": 2.0 if slow else looks[-1] / count_parameters(models[0])}]

    monkeypatch.setattr(regrow.pruning.budget, "measure_latency", clock)
    if recovers:
        met = search(model).run("latency", 0.6)
        assert met.reached <= 0.6
        assert count_parameters(met.trial.model) == looks[-1] < looks[-2]
        assert looks[-2] in looks[:-2]
    else:
        with pytest.raises(ValueError, match="not when measured again"):
            search(model).run("latency", 0.6)


@pytest.mark.parametrize(
    ("kind", "limit", "settings", "message"),
    [
        ("params", 0.1, {"floor": 0.5}, r"the best cut leaves 3\d\.\d% of the parameters"),
        (
            "macs",
            0.1,
            {"floor": 0.5},
            r"best cut leaves 28\.5% of the multiply-accumulates.*ask for macs=0\.29",
        ),
        ("max_drop", 0.0, {}, r"removes \d+ of 22 filters .* costs \d+\.\d\d points"),
        ("macs", 0.5, {"round_to": 16}, "no filter to remove"),
        ("max_drop", 50, {"round_to": 16}, "no filter to remove"),
    ],
)
def test_a_budget_that_cannot_be_met_names_the_best(model, kind, limit, settings, message):
    with pytest.raises(ValueError, match=message):
        search(model, **settings).run(kind, limit)


def flat(models, _inputs):
    """A clock for which filters hardly count: nine tenths of the time are the same for all."""
    sizes = [count_macs(each, X) for each in models]
    return [{"median": 0.9 + 0.1 * size / sizes[0]} for size in sizes]


@pytest.mark.parametrize(
    ("form", "launched", "message"),
    [
        (
            None,
            None,
            r"most of the time is what each operation costs .*write deployed=True, .* macs=0\.0\d\.",
        ),
        (
            Form(),
            None,
            r"what each operation costs whatever its size\. What helps: give a larger batch",
        ),
        (None, 0.95, r"as long as the host needs to launch their operations.*write deployed=True"),
        (None, 0.3, r"most of the time is what each operation costs"),
    ],
)
def test_a_latency_that_hardly_depends_on_filters_says_so(model, monkeypatch, form, launched, message):
    monkeypatch.setattr(regrow.pruning.budget, "measure_latency", flat)
    monkeypatch.setattr(regrow.pruning.budget, "launching", lambda *_: launched)
    looking = dataclasses.replace(search(model), form=form)
    with pytest.raises(
        ValueError, match=r"latency=0\.5 cannot be met: the best cut leaves 9\d\.\d% of .*" + message
    ):
        looking.run("latency", 0.5)


def test_a_latency_that_the_floor_keeps_up_names_the_floor(model, monkeypatch):
    monkeypatch.setattr(regrow.pruning.budget, "measure_latency", flat)
    with pytest.raises(ValueError, match=r"floor, round_to and exclude allow no larger cut"):
        search(model, floor=0.7).run("latency", 0.5)


def test_latency_of_networks_as_deployed(model, monkeypatch):
    seen = []

    def clock(models, _inputs):
        seen.append(models)
        return [{"median": float(count_parameters(each))} for each in models]

    monkeypatch.setattr(regrow.pruning.budget, "measure_latency", clock)
    met = dataclasses.replace(search(model), form=Form(dtype=torch.bfloat16)).run("latency", 0.6)
    assert met.reached <= 0.6
    assert all(isinstance(each, Deployed) for pair in seen for each in pair)
    assert {str(p.dtype) for pair in seen for each in pair for p in each.parameters()} == {"torch.bfloat16"}
    assert len({id(pair[0]) for pair in seen}) == 1  # the dense network is deployed once


NONE = dict.fromkeys(("fraction", "max_drop", "macs", "params", "latency"))


def test_exactly_one_target():
    assert check_target({**NONE, "max_drop": 1}) == ("max_drop", 1.0)
    with pytest.raises(ValueError, match=r"exactly one of .* got none"):
        check_target(NONE)
    with pytest.raises(ValueError, match="got fraction and macs"):
        check_target({**NONE, "fraction": 0.5, "macs": 0.5})


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("fraction", 1.0, "0 <= fraction < 1"),
        ("fraction", 30, "fraction=0.3"),
        ("macs", 0, "0 < macs < 1"),
        ("params", 1, "params=0.5"),
        ("latency", float("nan"), "0 < latency < 1"),
        ("macs", "half", "macs is a number, got 'half'"),
        ("max_drop", -1, "max_drop=1"),
        ("max_drop", True, "is a number"),
    ],
)
def test_a_target_out_of_range(kind, value, message):
    with pytest.raises(ValueError, match=message):
        check_target({**NONE, kind: value})
