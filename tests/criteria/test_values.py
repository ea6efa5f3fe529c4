"""Which tensor is the value of a filter, as its mean and the Taylor expansion show it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nets import Drawn, conv, unsettled
from regrow.criteria.score import score

pytestmark = pytest.mark.devices


class FrozenNorm(nn.Module):
    """A norm of buffers, written out as torchvision does it."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("scale", torch.rand(channels) + 0.5)
        self.register_buffer("shift", torch.rand(channels))

    def forward(self, x):
        return x * self.scale.view(1, -1, 1, 1) + self.shift.view(1, -1, 1, 1)


def hidden(x):
    """A squeeze and excitation: each channel times a number that depends on all."""
    return x * torch.sigmoid(x.mean((2, 3), keepdim=True).flip(1))


# name → (what a net s makes of what its convolution s.a makes, which tensor of that is the value)
WAYS = {
    "nothing": (lambda _, a: a, lambda _, a: a),
    "activation": (lambda s, a: s.b(F.relu(a)), lambda _, a: F.relu(a)),
    "activation in place": (lambda s, a: s.b(F.relu_(a)), lambda _, a: F.relu(a)),
    "swish by hand": (lambda s, a: s.b(a * torch.sigmoid(a)), lambda _, a: F.silu(a)),
    "hardswish": (lambda s, a: s.b(F.hardswish(a, inplace=True)), lambda _, a: F.hardswish(a)),
    "prelu": (lambda s, a: s.b(F.prelu(a, s.slope)), lambda s, a: F.prelu(a, s.slope)),
    "clamp and scale": (lambda s, a: s.b(2 * a.clamp(-1, 1) + 1), lambda _, a: 2 * a.clamp(-1, 1) + 1),
    "masked": (lambda s, a: s.b(a.masked_fill(a < 0, 0.0)), lambda _, a: F.relu(a)),
    "norm": (lambda s, a: s.b(F.relu(s.norm(a))), lambda s, a: F.relu(s.norm(a))),
    "functional norm": (
        lambda s, a: s.b(F.batch_norm(a, s.norm.running_mean, s.norm.running_var).relu()),
        lambda s, a: F.batch_norm(a, s.norm.running_mean, s.norm.running_var).relu(),
    ),
    "instance norm": (lambda s, a: s.b(s.instance(a).relu()), lambda s, a: s.instance(a).relu()),
    "group norm": (lambda s, a: s.b(s.group(a).relu_()), lambda s, a: s.group(a).relu()),
    "norm of buffers": (lambda s, a: s.b(s.frozen(a).relu()), lambda s, a: s.frozen(a).relu()),
    "dropout": (lambda s, a: s.b(F.dropout(a.relu(), 0.5, s.training)), lambda _, a: a.relu()),
    "cast": (lambda s, a: s.b(a.double().relu().float()), lambda _, a: a.relu()),
    "pooling": (lambda s, a: s.b(F.max_pool2d(a.relu(), 2)), lambda _, a: a.relu()),
    "flatten": (lambda _, a: a.relu().flatten(1).sum(1), lambda _, a: a.relu()),
    "view in place": (lambda s, a: s.b(a.view(a.shape).mul_(0)), lambda _, a: a),
    "sum": (lambda s, a: s.b(F.relu(s.norm(a) + s.c(s.x))), lambda s, a: s.norm(a)),
    "sum in place": (lambda s, a: s.b(s.norm(a).add_(s.c(s.x)).relu_()), lambda s, a: s.norm(a)),
    "sum with the input": (lambda s, a: s.b(F.relu(a + s.x.mean(1, keepdim=True))), lambda _, a: a),
    "concatenation": (lambda s, a: s.d(torch.cat([a.relu(), s.c(s.x)], 1)), lambda _, a: a.relu()),
    "two activations": (lambda s, a: s.d(torch.cat([a.relu(), (-a).relu()], 1)), lambda _, a: a),
    "norm ahead of a block": (lambda s, a: a + s.b(F.relu(s.norm(a))), lambda _, a: a),
    "gate": (lambda s, a: s.b(hidden(a.relu())), lambda _, a: a.relu()),
    "softmax": (lambda s, a: s.b(a.softmax(1)), lambda _, a: a),
}


# What follows the value: the same as a whole makes of the convolution's output.
REST = {
    "nothing": lambda _, v: v,
    "flatten": lambda _, v: v.flatten(1).sum(1),
    "pooling": lambda s, v: s.b(F.max_pool2d(v, 2)),
    "view in place": lambda s, v: s.b(v * 0),
    "sum": lambda s, v: s.b(F.relu(v + s.c(s.x))),
    "sum in place": lambda s, v: s.b(F.relu(v + s.c(s.x))),
    "sum with the input": lambda s, v: s.b(F.relu(v + s.x.mean(1, keepdim=True))),
    "concatenation": lambda s, v: s.d(torch.cat([v, s.c(s.x)], 1)),
    "two activations": lambda s, v: s.d(torch.cat([v.relu(), (-v).relu()], 1)),
    "norm ahead of a block": lambda s, v: v + s.b(F.relu(s.norm(v))),
    "gate": lambda s, v: s.b(hidden(v)),
    "softmax": lambda s, v: s.b(v.softmax(1)),
}


def net(draw):
    def forward(s, x):
        s.x = x
        return draw(s, s.a(x))

    model = Drawn(
        forward, a=conv(3, 4), b=conv(4, 4), c=conv(3, 4), d=conv(8, 4), norm=nn.BatchNorm2d(4),
        instance=nn.InstanceNorm2d(4, affine=True), group=nn.GroupNorm(2, 4), frozen=FrozenNorm(4),
    )  # fmt: skip
    model.slope = nn.Parameter(torch.rand(4))
    return unsettled(model)


@pytest.mark.parametrize("way", WAYS)
def test_the_value_of_a_filter(way):
    draw, value = WAYS[way]
    model = net(draw)
    x = torch.randn(3, 3, 6, 6)
    model.x = x
    with torch.no_grad():
        expected = value(model, model.a(x)).mean((0, 2, 3))
    found = score(model, "mean-activation", batches=[x], exclude=["b", "c", "d"])
    assert list(found) == ["a"]
    torch.testing.assert_close(found["a"].float(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_taylor_takes_the_same_value_and_its_whole_gradient(way):
    draw, value = WAYS[way]
    model = net(draw)
    x, y = torch.randn(3, 3, 6, 6), torch.randn(3)

    def loss(outputs, labels):
        return (outputs.float().flatten().sum() * labels).square().sum() / 100

    found = score(model, "taylor", batches=[(x, y)], loss=loss, exclude=["b", "c", "d"])["a"]
    # A factor of 1 on the value of each filter: the gradient of the factor is the sum of a · dL/da.
    plain = torch.zeros(4, dtype=torch.float64)
    for one, label in zip(x.split(1), y.split(1), strict=True):
        factor = torch.ones(4, requires_grad=True)
        with torch.no_grad():
            model.x = one
            at = value(model, model.a(one))
        spread = at * factor.view(1, -1, 1, 1)
        rest = REST.get(way, lambda s, v: s.b(v))(model, spread)
        (gradient,) = torch.autograd.grad(loss(rest, label), [factor])
        plain += gradient.abs().double() / 3
    torch.testing.assert_close(found, plain.to(found), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("in_place", "apart"),
    [
        (lambda s, a: s.b(F.relu_(a)), lambda s, a: s.b(F.relu(a))),
        (lambda s, a: s.b(F.hardswish(a, inplace=True)), lambda s, a: s.b(F.hardswish(a))),
        (
            lambda s, a: s.b(s.norm(a).add_(s.c(s.x)).relu_()),
            lambda s, a: s.b((s.norm(a) + s.c(s.x)).relu()),
        ),
        (lambda s, a: s.b(a.view(a.shape).mul_(3)), lambda s, a: s.b(a.view(a.shape) * 3)),
    ],
)
@pytest.mark.parametrize("criterion", ["mean-activation", "apoz", "taylor", "gradient", "hessian"])
def test_in_place_is_as_apart(in_place, apart, criterion):
    one = net(in_place)
    other = copy.deepcopy(one)
    other._draw = net(apart)._draw
    batches = [(torch.randn(4, 3, 6, 6), torch.randn(4))]
    found, expected = (
        score(
            model, criterion, batches=batches, loss=lambda o, y: (o.sum() - y.sum()).square(), exclude=["d"]
        )
        for model in (one, other)
    )
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)


def test_a_pass_leaves_no_mark_on_tensors_of_the_model_and_of_the_user():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("last", torch.zeros(2, 4, 6, 6))

        def forward(self, x):
            return self.last.copy_(x)

    model = nn.Sequential(conv(3, 4), Keeps(), conv(4, 4))
    x = torch.randn(2, 3, 6, 6)
    score(model, "mean-activation", batches=[x])
    assert not vars(x)
    assert not any(vars(tensor) for tensor in (*model.parameters(), *model.buffers()))
    assert not model[1].last.any()
