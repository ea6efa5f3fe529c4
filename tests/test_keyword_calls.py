"""Nets that call their layers by keyword are treated as those that call them by position."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regrow
from nets import conv, keep_but, unsettled
from regrow.structure.read import read_structure
from regrow.surgery.removal import remove_filters

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Scaled(nn.Conv2d):
    """A convolution whose argument has a name of its own, and a second one."""

    def forward(self, x, scale=1.0):
        return scale * super().forward(x)


class Handed(nn.BatchNorm2d):
    """A norm that hands on whatever it is called with."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Named(nn.Conv2d):
    """A convolution that takes its input by keyword alone."""

    def forward(self, *, input):
        return super().forward(input)


class Net(nn.Module):
    """A residual net with layers of many kinds; ``named`` is how its layers are called."""

    def __init__(self, named):
        super().__init__()
        torch.manual_seed(0)
        self.named = named
        self.stem, self.norm = conv(3, 8), nn.BatchNorm2d(8)
        self.a, self.norm_a, self.act = conv(8, 6), Handed(6), nn.PReLU(6)
        self.b, self.norm_b = Scaled(6, 8, 3, padding=1), nn.GroupNorm(8, 8)
        self.deep, self.norm_d = conv(8, 8, groups=8), nn.InstanceNorm2d(8, affine=True)
        self.last, self.pool, self.head = conv(8, 6), nn.AdaptiveAvgPool2d(1), nn.Linear(6, 4)

    def call(self, layer, x):
        return layer(input=x) if self.named else layer(x)

    def forward(self, x):
        call = self.call
        x = F.relu(call(self.norm, call(self.stem, x)))
        y = call(self.act, call(self.norm_a, call(self.a, x)))
        y = self.b(scale=0.5, x=y) if self.named else self.b(y, scale=0.5)
        x = F.relu(input=x + call(self.norm_b, y))
        x = F.relu(call(self.last, call(self.norm_d, call(self.deep, x))))
        return call(self.head, call(self.pool, x).flatten(1))


KEEP = {"stem": keep_but(8, 1), "a": keep_but(6, 0, 2), "b": keep_but(8, 0, 3), "last": keep_but(6, 5)}


def both():
    nets = [unsettled(Net(named)) for named in (False, True)]
    return [net.requires_grad_() for net in nets]


def test_the_structure():
    one, other = (read_structure(net, X[:1]) for net in both())
    assert one == other
    assert len(one) == 5
    assert not any(found.mixed for name, found in one.items() if name in ("a", "last"))


def prune(net, _):
    return regrow.prune(net, fraction=0.3, example_inputs=X[:1], calibration=[X])["dropped"]


def compensate(net, _):
    return regrow.compensate(net, KEEP, [X[:3], X[3:]], example_inputs=X[:1])


def cut(net, _):
    return regrow.cut(net, KEEP, example_inputs=X[:1])


def cut_twice(net, _):
    regrow.cut(net, {"stem": keep_but(8, 1), "a": keep_but(6, 0, 2)}, example_inputs=X[:1])
    return regrow.cut(net, {"b": keep_but(8, 0, 3), "a": keep_but(4, 0)}, example_inputs=X[:1])["dropped"]


def reestimate(net, _):
    return regrow.reestimate_norms(net, [X[:3], X[3:]])


def save_and_load(net, path):
    regrow.cut(net, KEEP, example_inputs=X[:1])
    regrow.save(net, path / "net.safetensors")
    net.load_state_dict(regrow.load(Net(net.named), path / "net.safetensors").state_dict())


def export(net, path):
    record = regrow.export_onnx(net, path / "net.onnx", example_inputs=X[:1])
    return record["outputs"]


def bridgeout(net, _):
    return regrow.add_bridgeout(net.train(), linear=True, seed=3)


def train(net, compact):
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    cycle = regrow.RePr(
        net, optimizer, example_inputs=X[:1], full=1, sub=2, cycles=1, fraction=0.3, compact=compact
    )
    events = []
    for _ in range(4):
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()
        events.append(str(cycle.step()))
    cycle.remove()
    return events


def compact(net, _):
    return train(net, True)


def masked(net, _):
    return train(net, False)


OPERATIONS = [
    prune, compensate, cut, cut_twice, reestimate, save_and_load, bridgeout, compact, masked,
    pytest.param(export, marks=pytest.mark.needs_torch("2.13", "export_onnx")),
]  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation(operation, tmp_path):
    found = []
    for net in both():
        record = operation(net, tmp_path)
        with torch.no_grad():
            found.append((record, net(X), {n: t.clone() for n, t in net.state_dict().items()}))
    (record, output, state), (record_too, output_too, state_too) = found
    assert record == record_too
    assert torch.equal(output, output_too)
    assert state.keys() == state_too.keys()
    assert all(torch.equal(tensor, state_too[name]) for name, tensor in state.items())


def test_the_net_that_a_cut_leaves_computes_what_masks_give():
    _, net = both()
    masks = copy.deepcopy(net)
    remove_filters(masks, KEEP, example_inputs=X[:1])
    record = regrow.cut(net, KEEP, example_inputs=X[:1])
    assert record["layers"]["a"] == {"before": 6, "after": 4}
    assert record["plan"]["placed"]
    torch.testing.assert_close(net(X), masks(X))


def test_norms_are_folded():
    one, other = both()
    (folded, record), (folded_too, record_too) = (
        regrow.fold_norms(net, example_inputs=X[:1]) for net in (one, other)
    )
    assert record["folded"] == record_too["folded"] == {"norm": "stem", "norm_a": "a"}
    torch.testing.assert_close(folded(X), one(X))
    torch.testing.assert_close(folded_too(X), other(X))


@pytest.mark.filterwarnings("ignore")
def test_a_cut_net_and_its_plain_copy():
    _, net = both()
    regrow.cut(net, KEEP, example_inputs=X[:1])
    expected, plain = net(X), regrow.plain_layers(net)
    assert isinstance(plain.norm_b, nn.Sequential)
    for tool in (lambda net: torch.jit.trace(net, X), lambda net: torch.compile(net, backend="eager")):
        torch.testing.assert_close(tool(net)(X), expected)
        torch.testing.assert_close(tool(plain)(X), expected)


@pytest.mark.gives_up
def test_a_layer_that_takes_no_positional_input_is_never_cut_wrong():
    net = unsettled(Net(True))
    net.last = Named(8, 6, 3, padding=1)
    keep = {"stem": keep_but(8, 1), "a": keep_but(6, 0, 2)}
    masks = copy.deepcopy(net)
    remove_filters(masks, keep, example_inputs=X[:1])
    regrow.cut(net, keep, example_inputs=X[:1])
    torch.testing.assert_close(net(X), masks(X))
