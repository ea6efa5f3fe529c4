"""Averaged copies follow the drops and restores of the model."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cycles import X, build, fit, is_dead, repr_on, sgd
from nets import Ahead, Residual, away_from_zero


def ema(model, **settings):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), **settings)


class Plain:
    """A deep copy that somebody averages by hand."""

    def __init__(self, model):
        self.copy = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model):
        for mine, theirs in zip(self.copy.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 0.1)


class Shadow:
    """The parameters alone, in a dictionary and in double precision."""

    def __init__(self, model):
        self.copy = {name: p.detach().double() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model):
        for name, theirs in model.named_parameters():
            self.copy[name].lerp_(theirs.double(), 0.1)


# how to make one: (model) -> (what follows, update, {name: tensor} by the model's names)
def of_torch(model):
    averaged = ema(model)
    return averaged, averaged.update_parameters, lambda: averaged.module.state_dict()


def of_torch_with_buffers(model):
    averaged = ema(model, use_buffers=True)
    return averaged, averaged.update_parameters, lambda: averaged.module.state_dict()


def of_torch_compiled(model):
    averaged = ema(torch.compile(model, backend="eager"))
    update = averaged.update_parameters
    return averaged, update, lambda: averaged.module._orig_mod.state_dict()


def of_timm(model):
    averaged = pytest.importorskip("timm.utils").ModelEmaV3(model, decay=0.9)
    return averaged, averaged.update, lambda: averaged.module.state_dict()


def by_hand(model):
    plain = Plain(model)
    return plain.copy, plain.update, plain.copy.state_dict


def as_a_state_dict(model):
    plain = Plain(model)
    return plain.copy.state_dict(), plain.update, plain.copy.state_dict


def in_a_dictionary(model):
    shadow = Shadow(model)
    return shadow.copy, shadow.update, lambda: shadow.copy


KINDS = {
    "torch": of_torch,
    "torch, with buffers": of_torch_with_buffers,
    "torch, compiled": of_torch_compiled,
    "timm": of_timm,
    "deep copy": by_hand,
    "state_dict": as_a_state_dict,
    "dictionary": in_a_dictionary,
}


def dead_entries(tensors, filters):
    for layer, indices in filters.items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            yield name, tensors[name][indices]
        norm = layer.replace("conv", "norm")
        for key in ("weight", "bias", "running_mean"):
            if f"{norm}.{key}" in tensors:
                yield f"{norm}.{key}", tensors[f"{norm}.{key}"][indices]


@pytest.mark.devices
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_dead_where_the_model_is_and_gets_its_new_rows(kind, compact):
    model = away_from_zero(build())
    optimizer = sgd(model)
    averaged, update, tensors = KINDS[kind](model)
    cycle = repr_on(model, optimizer, compact=compact)
    cycle.follow(averaged)
    for step in range(2):
        fit(model, optimizer, step)
        update(model)
        drop = cycle.step()
    alive = {name: tensor.clone() for name, tensor in tensors().items()}
    for step in range(2):
        assert not any(entry.any() for _, entry in dead_entries(tensors(), drop.filters))
        fit(model, optimizer, step)
        update(model)
        assert not any(entry.any() for _, entry in dead_entries(tensors(), drop.filters))
        restore = cycle.step() or drop
    assert restore.kind == "restore"
    ours = dict(dead_entries(model.state_dict(), drop.filters))
    for name, entry in dead_entries(tensors(), drop.filters):
        assert torch.equal(entry, ours[name].to(entry)), name
    kept = cycle.keep["conv2"].clone()
    kept[drop.filters["conv2"]] = False
    for layer, mask in {"conv2": kept}.items():
        weight = tensors()[f"{layer}.weight"]
        assert weight[mask].any()
        assert not torch.equal(weight[mask], model.get_submodule(layer).weight[mask].to(weight))
    assert alive.keys() == tensors().keys()


@pytest.mark.devices
def test_columns_and_norms_behind_sums_get_their_values_too():
    for net, consumers in ((Residual(6, 8), "zero"), (Ahead(), "keep")):
        model = away_from_zero(net)
        averaged = copy.deepcopy(model)
        cycle = repr_on(model, sgd(model), consumers=consumers, scope="layer", fraction=0.5, full=1, sub=1)
        cycle.follow(averaged)
        cycle.step()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        cycle.step()
        after, theirs = model.state_dict(), averaged.state_dict()
        for name, tensor in after.items():
            changed = tensor != before[name]
            assert torch.equal(theirs[name][changed], tensor[changed]), name


def test_what_does_not_follow_is_not_touched_and_what_follows_later_is_dead_at_once():
    model = build()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer, sub=3)
    early, late = ema(model), copy.deepcopy(model)
    before = copy.deepcopy(early.state_dict())
    fit(model, optimizer)
    cycle.step()
    drop = cycle.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in early.state_dict().items())
    cycle.follow(late)
    assert not any(entry.any() for _, entry in dead_entries(late.state_dict(), drop.filters))


@pytest.mark.devices
def test_a_resumed_cycle_drops_in_the_copies_that_follow_it():
    model = build()
    optimizer = sgd(model)
    cycle = repr_on(model, optimizer)
    cycle.step()
    drop = cycle.step()
    other = build(seed=5)
    resumed = repr_on(other, sgd(other))
    averaged = copy.deepcopy(other)
    resumed.follow(averaged)
    resumed.load_state_dict(cycle.state_dict())
    assert not any(entry.any() for _, entry in dead_entries(averaged.state_dict(), drop.filters))


@pytest.mark.devices
def test_averages_that_follow_can_be_swapped_in_and_out():
    model = build()
    optimizer = sgd(model)
    averaged = ema(model, use_buffers=True)
    cycle = repr_on(model, optimizer, sub=3)
    cycle.follow(averaged)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(5):
            fit(model, optimizer, step)
            averaged.update_parameters(model)
            for _ in range(2):  # as Lightning's weight averaging, for an evaluation
                expected = averaged.module.eval()(X)
                for ours, theirs in zip(
                    model.state_dict().values(), averaged.module.state_dict().values(), strict=True
                ):
                    held = ours.clone()
                    ours.data.copy_(theirs.data)
                    theirs.data.copy_(held)
                if expected is not None and _ == 0:
                    torch.testing.assert_close(model.eval()(X), expected)
            model.train()
            cycle.step()
            assert is_dead(model, cycle)


def test_a_part_of_a_larger_module_is_found_among_others_of_its_kind():
    model = build()
    whole = nn.ModuleDict({"a": nn.ModuleDict({"conv1": nn.Conv2d(3, 6, 3)}), "student": model})
    averaged = ema(whole)
    cycle = repr_on(model, sgd(model), full=1)
    cycle.follow(averaged)
    drop = cycle.step()
    tensors = averaged.module["student"].state_dict()
    assert not any(entry.any() for _, entry in dead_entries(tensors, drop.filters))


def test_the_lines_of_the_page_run_as_printed():
    page = (Path(__file__).parents[2] / "docs" / "averaging.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    model = build()
    names = {
        "model": model,
        "optimizer": sgd(model),
        "x": X,
        "epochs": 21,
        "loader": [(X, torch.arange(8) % 4)],
    }
    exec(block, names)
    dropped = {name: (~mask).nonzero().flatten().tolist() for name, mask in names["cycle"].keep.items()}
    assert sum(map(len, dropped.values())) == 5
    tensors = names["ema"].module.state_dict()
    assert not any(entry.any() for _, entry in dead_entries(tensors, dropped))


def test_copies_that_do_not_fit_are_refused_and_nothing_changes():
    model = build()
    cycle = repr_on(model, sgd(model))
    shared = nn.Sequential()
    for name, module in model.named_children():
        shared.add_module(name, module)
    for bad, message in (
        (model, "this is the model that RePr trains"),
        (torch.compile(model, backend="eager"), "this is the model that RePr trains"),
        (shared, "shares the memory of 'conv1.weight' with the model"),
        (model.state_dict(), "shares the memory of 'conv1.weight'"),
        (build(filters=(6, 9, 8)), r"for 'conv2.weight' of shape \[8, 6, 3, 3\] it has shape \[9, 6, 3, 3\]"),
        ({}, r"for 'conv1.weight' of shape \[6, 3, 3, 3\] it has nothing"),
        ([model], "must be a module or a dictionary of tensors, got list"),
        (nn.Linear(2, 2), "for 'conv1.weight' of shape .* it has nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            cycle.follow(bad)
    cycle.remove()
    with pytest.raises(ValueError, match="has been removed"):
        cycle.follow(ema(model))
