import copy
import types
from contextlib import suppress

import pytest
import torch
from torch import nn

from nets import keep_but
from regrow.surgery.cut import cut
from regrow.surgery.draft import OUT, Drafting
from regrow.surgery.plan import CutPlan
from regrow.surgery.planning import plan_cut
from regrow.surgery.removal import Removal, plan_removal, remove_filters
from regrow.surgery.verify import Probe
from regrow.torch_private import is_unwritten

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class InvertedResidual(nn.Module):
    """A stem, a residual block with a depthwise convolution, a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.wide, self.norm1 = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)
        self.deep, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.back, self.norm3 = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm0(self.stem(x)).relu()
        y = self.norm2(self.deep(self.norm1(self.wide(x)).relu())).relu()
        return self.head((x + self.norm3(self.back(y))).relu().mean((2, 3)))


KEEP = {"stem": keep_but(6, 1, 2), "wide": keep_but(8, 0, 5), "back": keep_but(6, 1, 3)}


def confirmed(quick):
    torch.manual_seed(0)
    model = InvertedResidual()
    removal = plan_removal(model, KEEP, X)
    probe = Probe(model, removal, X, quick=quick)
    drafting = Drafting(model, removal, probe)
    return probe, drafting.draft(dict.fromkeys(drafting.convolutions, OUT))


def with_one_index_changed(plan):
    """Every plan that differs from ``plan`` in one index of one layer: another that is not there yet."""
    widths = {"rows": 0, "columns": 1}
    module = dict(InvertedResidual().named_modules())
    for part in ("rows", "columns", "channels"):
        for layer, indices in getattr(plan, part).items():
            width = module[layer].weight.shape[widths.get(part, 0)]
            for old in indices:
                for new in set(range(width)) - set(indices):
                    changed = copy.deepcopy(plan)
                    getattr(changed, part)[layer] = sorted({*indices, new} - {old})
                    yield changed
    for layer, (width, positions) in plan.placed.items():
        for old in positions:
            for new in set(range(width)) - set(positions):
                changed = copy.deepcopy(plan)
                changed.placed[layer] = (width, sorted({*positions, new} - {old}))
                yield changed


@pytest.mark.devices
@pytest.mark.parametrize("quick", [True, False])
def test_every_plan_with_a_wrong_index_is_refuted(quick):
    probe, draft = confirmed(quick)
    assert probe.refutes(draft.plan, draft.present) is None
    wrong = list(with_one_index_changed(draft.plan))
    assert len(wrong) > 100
    assert all(probe.refutes(plan, draft.present) is not None for plan in wrong)


@pytest.mark.devices
def test_what_a_probe_sees():
    probe, draft = confirmed(quick=True)
    assert probe.confirms_removal
    assert probe.own == {"stem": "norm0", "wide": "norm1", "deep": "norm2", "back": "norm3"}
    assert probe.dead["wide"].tolist() == [False, True, True, False, False, False]
    assert probe.dead["back"].nonzero().flatten().tolist() == [0, 5]
    assert probe.dead["head"].tolist() == [False, True, False, False, False, False]  # 2 and 3 have a writer
    assert draft.plan.rows["deep"] == [1, 2, 3, 4, 6, 7]


def test_a_removal_that_silences_what_others_write_to_is_not_confirmed():
    torch.manual_seed(0)
    model = InvertedResidual()
    removal = plan_removal(model, KEEP, X)
    wide = copy.deepcopy(removal.readers)
    norm = wide["wide"].norms["norm1"]
    norm.indices = [1, 0, *norm.indices[2:]]  # filter 0 is said to be channel 1
    assert not Probe(model, Removal(wide, removal.dropped, removal.followers), X).confirms_removal
    rows = {"deep": [0, 4, 5]}  # row 4 reads a channel that is kept
    assert not Probe(model, Removal(removal.readers, removal.dropped, rows), X).confirms_removal


def test_a_plan_that_does_not_fit_is_refuted():
    probe, draft = confirmed(quick=True)
    assert probe.refutes(CutPlan(rows={"stem": [0, 9]}), draft.present) == []


class Reversing(nn.Module):
    """Its channels change places between the convolutions, in training alone."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.back = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head(self.back(x.flip(1) if self.training else x).relu().mean((2, 3)))


@pytest.mark.parametrize("quick", [True, False])
def test_what_only_training_contradicts_is_refuted(quick):
    torch.manual_seed(0)
    model = Reversing()
    removal = plan_removal(model, {"stem": keep_but(6, 0)}, X)
    probe = Probe(model, removal, X, quick=quick)
    alive = [1, 2, 3, 4, 5]
    stem = {"rows": {"stem": alive}, "channels": {"norm": alive}}
    out = CutPlan(**stem, columns={"back": alive})
    assert probe.refutes(out, {"norm": keep_but(6, 0), "back": keep_but(6, 0)}) is not None
    placed = {"placed": {"norm": (6, alive)}}
    picked = CutPlan(**stem, **placed, columns={"back": alive}, picked={"back": alive})
    assert probe.refutes(picked, {}) is not None
    assert probe.refutes(CutPlan(**stem, **placed), {}) is None


def test_a_quick_probe_takes_no_memory_for_weights_and_leaves_the_model_alone():
    torch.manual_seed(0)
    model = InvertedResidual().requires_grad_(True).train()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    removal = plan_removal(model, KEEP, X)
    probe = Probe(model, removal, X, quick=True)
    for name in ("stem", "wide", "deep", "back", "head"):
        assert is_unwritten(probe._modules[name].weight)
    drafting = Drafting(model, removal, probe)
    draft = drafting.draft(dict.fromkeys(drafting.convolutions, OUT))
    assert probe.refutes(draft.plan, draft.present) is None
    for name, (tensor, values) in before.items():
        assert model.state_dict(keep_vars=True)[name] is tensor
        assert torch.equal(tensor, values)
    assert all(module.training and "forward" not in vars(module) for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_noise_stands_for_layers_that_do_the_same_in_training():
    torch.manual_seed(0)
    model = InvertedResidual()
    removal = plan_removal(model, KEEP, X)
    noisy = Probe(model, removal, X, quick=True)
    model.deep.__class__ = type("Mine", (nn.Conv2d,), {})
    real = Probe(model, removal, X, quick=True)
    assert noisy._expected[True].noise
    assert not real._expected[True].noise
    assert noisy.dead.keys() == real.dead.keys()
    assert all(torch.equal(noisy.dead[name], real.dead[name]) for name in real.dead)


class Chancy(InvertedResidual):
    """Leaves its block out, or channels, by chance in training."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        x = self.norm0(self.stem(x)).relu()
        y = self.norm3(self.back(self.norm2(self.deep(self.norm1(self.wide(x)).relu())).relu()))
        if self.kind == "block":
            y = y * (torch.rand(()) > 0.5) if self.training else y
        else:
            y = nn.functional.dropout2d(y, 0.5, self.training)
        return self.head((x + y).relu().mean((2, 3)))


class Glued(nn.Module):
    """Three convolutions with something between the last two, in training alone or in eval mode alone."""

    def __init__(self, glue, training):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 4, 3)
        self.glue, self.when = glue, training

    def forward(self, x):
        x = self.b(self.a(x).relu())
        return self.c(self.glue(x) if self.training == self.when else x).mean((2, 3))


GLUE = {
    "flip of what is negative": lambda x: x + (-x).relu().flip(1),
    "gate by what is negative": lambda x: x * (x < 0).float().mean(1, keepdim=True),
    "sort": lambda x: x.sort(1).values,
    "large values": lambda x: x + (x - 1.5).relu().flip(1),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("glue", GLUE)
def test_what_only_some_numbers_show_in_one_mode_is_not_cut_away(glue, training):
    torch.manual_seed(0)
    model = Glued(GLUE[glue], training)
    for gain, layer in zip((2, 3, 1), (model.a, model.b, model.c), strict=True):
        layer.weight.data.mul_(gain)
    keep = {"a": keep_but(6, 0), "b": keep_but(6, 1, 3)}
    small, masked = copy.deepcopy(model), copy.deepcopy(model)
    cut(small, keep, example_inputs=X)
    remove_filters(masked, keep, example_inputs=X)
    other = torch.randn(4, 3, 8, 8)
    for mode in (True, False):
        torch.testing.assert_close(small.train(mode)(other), masked.train(mode)(other), rtol=1e-4, atol=1e-5)


def test_a_channel_that_only_eval_mode_lets_through_is_not_dead():
    class Threshold(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 4, 3)

        def forward(self, x):
            y = self.a(x)
            y = y * 0 if self.training else (y - 0.45).relu()
            return self.c(self.b(y).relu()).mean((2, 3))

    torch.manual_seed(0)
    model, keep = Threshold(), {"a": keep_but(6, 0)}
    small, masked = copy.deepcopy(model), copy.deepcopy(model)
    cut(small, keep, example_inputs=0.1 * X)  # none of it passes the threshold
    remove_filters(masked, keep, example_inputs=0.1 * X)
    other = 3 * torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(small.eval()(other), masked.eval()(other), rtol=1e-4, atol=1e-5)
    assert masked(other).std() > 0.01


class Plus(nn.Conv2d):
    """Makes a constant of a row of zeros."""

    def _conv_forward(self, *arguments):
        return super()._conv_forward(*arguments) + 1


@pytest.mark.parametrize("how", ["class", "instance"])
def test_a_convolution_that_adds_to_what_pytorchs_own_makes(how):
    torch.manual_seed(0)
    model = nn.Sequential(
        Plus(3, 6, 3) if how == "class" else nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)
    )
    if how == "instance":
        model[0].forward = types.MethodType(lambda conv, x: nn.Conv2d.forward(conv, x) + 1, model[0])
    small, masked = copy.deepcopy(model), copy.deepcopy(model)
    record = cut(small, {"0": keep_but(6, 0, 2)}, example_inputs=X)
    remove_filters(masked, {"0": keep_but(6, 0, 2)}, example_inputs=X)
    for mode in (True, False):
        torch.testing.assert_close(small.train(mode)(X), masked.train(mode)(X), rtol=1e-4, atol=1e-5)
    assert record["layers"]["2"] == {"before": 4, "after": 4}


WRITES = {
    "data": lambda weight: weight.data.mul_(0.5),
    "renorm": lambda weight: weight.data.copy_(weight.data.renorm(2, 0, 0.1)),
    "clamp": lambda weight: weight.data.clamp_(-0.05, 0.05),
}


@pytest.mark.parametrize("when", ["training", "always"])
@pytest.mark.parametrize("write", WRITES)
def test_a_model_that_writes_its_weights_is_left_alone(write, when):
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            if self.training or when == "always":
                WRITES[write](self.b.weight)
            return self.b(self.a(x).relu()).mean((2, 3))

    torch.manual_seed(0)
    model = Writing()
    before = copy.deepcopy(model.state_dict())
    for size in (8, 128):
        with suppress(ValueError):
            plan_cut(model, {"a": keep_but(8, 0, 1)}, torch.randn(1, 3, size, size))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_planning_does_not_stand_in_the_way_of_a_backward_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    for size in (16, 128):
        x = torch.randn(1, 3, size, size)
        loss = model(x).sum()
        plan_cut(model, {"0": keep_but(8, 0, 1)}, x)
        loss.backward()
        assert model[0].weight.grad is not None


@pytest.mark.parametrize("kind", ["block", "channels"])
def test_chance_in_training_neither_refutes_nor_hides(kind):
    torch.manual_seed(0)
    model = Chancy(kind)
    removal = plan_removal(model, KEEP, X)
    probe = Probe(model, removal, X, quick=True)
    assert probe._expected[True].drew == (kind == "block")  # a dropout that is held still draws nothing
    drafting = Drafting(model, removal, probe)
    draft = drafting.draft(dict.fromkeys(drafting.convolutions, OUT))
    assert probe.dead["head"].tolist() == [False, True, False, False, False, False]
    assert probe.refutes(draft.plan, draft.present) is None
    assert all(probe.refutes(plan, draft.present) is not None for plan in with_one_index_changed(draft.plan))
