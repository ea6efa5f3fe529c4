"""Plans from strangers: real plans, of which something was changed, on the models that they were made for."""

import copy
import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import regrow
from nets import Ahead, Residual, keep_but, unsettled
from regrow.modules import channel_axis, channels_read
from regrow.surgery.layers import apply_plan, is_cut
from regrow.surgery.plan import CutPlan, PlanUnfit
from regrow.surgery.planning import plan_cut

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Grouped(nn.Module):
    """A grouped and a depthwise convolution, an activation with weights, and a branch that is joined."""

    def __init__(self):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.PReLU(8)
        self.deep, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.mix, self.pair = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.norm(self.deep(self.act(self.stem(x))))
        x = torch.cat([self.mix(x), self.pair(x)], 1).relu()
        return self.head(x.mean((2, 3)))


NETS = {
    "residual": (lambda: Residual(6, 5), {"stem": [1], "a": [0, 2], "b": [0, 3]}),
    "norms ahead": (Ahead, {"stem": [0, 1], "conv1": [0, 2], "conv2": [2]}),
    "grouped": (Grouped, {"stem": [0, 1, 5], "mix": [2], "pair": [0, 1, 2, 3, 4]}),
}


def real(kind):
    build, dropped = NETS[kind]
    torch.manual_seed(0)
    net = unsettled(build())
    keep = {name: keep_but(net.get_submodule(name).out_channels, *those) for name, those in dropped.items()}
    return net, plan_cut(net, keep, X[:1]).to_dict()


WRONG = [
    None, True, False, 0, 1, 2, 3, 7, -1, 1 << 63, 1 << 200, 0.5, float("nan"), "", "a", "[0]", [], {}, [[]],
    [[0]], [None], ["0"], [0], [0, 0], [1, 0], [0, 1], [-1], [0, 1 << 40], [True], [0.0], {"0": 0},
    list(range(5000)), [3, [0]], [4, [0, 1]], [1 << 40, [0]], [8, [0, 0]], [-1, [0]], [6, "0"], "x" * 5000,
]  # fmt: skip


def changed(plan, names, chance):
    """``plan`` with something else in one or two places."""
    plan = copy.deepcopy(plan)
    for _ in range(chance.choice([1, 1, 2])):
        part = chance.choice(list(plan))
        values = plan[part]
        if not isinstance(values, dict):
            continue
        name = chance.choice([*values, *names, "nowhere", ""])
        way = chance.randrange(7)
        if way == 0:
            plan[part] = chance.choice(WRONG)
        elif way == 1:
            values.pop(name, None)
        elif way == 2:
            values[name] = chance.choice(WRONG)
        elif way == 3:  # what another part, or another layer, has
            other = chance.choice([each for each in plan.values() if isinstance(each, dict)])
            if other:
                values[name] = copy.deepcopy(chance.choice(list(other.values())))
        elif isinstance(found := values.get(name), list) and found:
            at = found[1] if part == "placed" and chance.random() < 0.7 else found
            if isinstance(at, list) and at:
                i = chance.randrange(len(at))
                if way == 4:
                    del at[i]
                elif way == 5:
                    at[i] = chance.choice([*WRONG, *range(9)])
                else:
                    at.insert(i, chance.choice([*range(9), -1]))
        elif isinstance(found, int):
            values[name] = chance.choice([found - 1, found + 1, 2 * found, 0])
    return plan


def snapshot(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, [(type(m), m.extra_repr(), sorted(vars(m))) for m in model.modules()]


def assert_layers_run(model, plan):
    """What is left of each layer takes what it reads, and makes as many channels as the plan says."""
    for name in plan.layers():
        layer = model.get_submodule(name)
        reads = channels_read(layer)
        if name in plan.picked:
            reads = max(plan.picked[name]) + 1
        axis = channel_axis(layer)
        shape = [2, 5, 5, 5] if not isinstance(layer, nn.Linear) else [2, 5]
        shape[axis] = reads
        given = torch.randn(shape)
        made = layer.eval()(given).shape[axis]
        computed = getattr(layer, "out_channels", getattr(layer, "out_features", reads))
        assert made == (plan.placed[name][0] if name in plan.placed else computed), name


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", NETS)
def test_a_changed_plan_is_refused_or_applied_right(kind, seed):
    net, plan = real(kind)
    names, chance = [name for name, _ in net.named_modules()], random.Random(seed)
    before, refused, applied, longest = snapshot(net), 0, 0, 0
    for _ in range(60):
        hostile = changed(plan, names, chance)
        trial = copy.deepcopy(net)
        try:
            read = CutPlan.from_dict(hostile)
            apply_plan(trial, read)
        except PlanUnfit as error:
            refused, longest = refused + 1, max(longest, len(str(error)))
            after = snapshot(trial)
            assert after[1] == before[1]
            assert all(torch.equal(tensor, before[0][name]) for name, tensor in after[0].items())
            assert not is_cut(trial)
        else:
            applied += 1
            assert_layers_run(trial, read)
    assert refused > 20
    assert applied
    assert longest < 600  # a message shows the beginning of what is long


@pytest.mark.parametrize("kind", NETS)
def test_a_changed_plan_in_a_file_is_refused_or_loaded(kind, tmp_path):
    net, plan = real(kind)
    build, _ = NETS[kind]
    path, hostile = tmp_path / "net.safetensors", tmp_path / "hostile.safetensors"
    small = copy.deepcopy(net)
    apply_plan(small, CutPlan.from_dict(plan))
    regrow.save(small, path)
    with safe_open(path, framework="pt") as file:
        data = json.loads(file.metadata()["regrow"])
    fresh, names, chance = build(), [name for name, _ in net.named_modules()], random.Random(9)
    before, refused = snapshot(fresh), 0
    for _ in range(40):
        data["cuts"][0]["plan"] = changed(plan, names, chance)
        save_file(load_file(path), hostile, {"regrow": json.dumps(data)})
        try:
            regrow.load(copy.deepcopy(fresh), hostile).eval()
        except ValueError:
            refused += 1
            with pytest.raises(ValueError, match=r"hostile\.safetensors"):
                regrow.load(fresh, hostile)
            after = snapshot(fresh)
            assert after[1] == before[1]
            assert all(torch.equal(tensor, before[0][name]) for name, tensor in after[0].items())
    assert refused > 10


@pytest.mark.parametrize("plan", [None, {}, "rows", [], 3, CutPlan().to_dict()])
def test_what_is_no_plan_is_refused(plan):
    with pytest.raises(PlanUnfit, match="a CutPlan is needed"):
        apply_plan(nn.Sequential(nn.Conv2d(3, 4, 1)), plan)


def test_each_real_plan_is_applied():
    for kind in NETS:
        net, plan = real(kind)
        expected = copy.deepcopy(net)
        read = CutPlan.from_dict(json.loads(json.dumps(plan)))
        apply_plan(net, read)
        assert_layers_run(net, read)
        assert net(X).shape == expected(X).shape
