"""A model taken apart computes what it did, and says what depends on what."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nets
from regrow.criteria.taken_apart import NotTakenApart, Parts


def outputs(parts: Parts, inputs: Any) -> Any:
    return parts.values(inputs)[parts.nodes[-1]]


@torch.no_grad()
def test_values_with_folded_norms() -> None:
    net, x = nets.unsettled(nets.chain()).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = net(x)
    parts = Parts(net, {"conv1": ["norm1"], "conv3": ["norm3"]})
    called = [node.target for node in parts.nodes if node.op == "call_module"]
    assert [name for name in called if "norm" in str(name)] == ["norm2"]
    assert torch.allclose(outputs(parts, x), expected)


@torch.no_grad()
def test_arguments_by_position_and_keyword() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, y: Tensor, factor: float = 2.0) -> Tensor:
            return (x - y) * factor

    parts = Parts(Net(), {})
    x, y = torch.ones(3), torch.zeros(3)
    assert outputs(parts, (x, y)).tolist() == [2.0] * 3
    assert outputs(parts, (x, y, 5.0)).tolist() == [5.0] * 3
    assert outputs(parts, {"y": x, "x": y}).tolist() == [-2.0] * 3


@torch.no_grad()
def test_nothing_is_written_to() -> None:
    def draw(net: Any, x: Tensor) -> Tensor:
        x = net.relu(net.a(x))
        y = net.a(x)
        y += 1
        y = F.relu(y, True)
        return F.leaky_relu(torch.relu_(net.relu(y).mul_(2)), inplace=True)

    net = nets.Drawn(draw, a=nets.conv(3, 3), relu=nn.ReLU(inplace=True))
    x = torch.randn(2, 3, 4, 4)
    expected = net(x)
    parts = Parts(net, {})
    values = parts.values(x)
    before = {node: value.clone() for node, value in values.items()}
    assert torch.equal(values[parts.nodes[-1]], expected)
    parts.values(x)
    assert all(torch.equal(values[node], before[node]) for node in values)
    assert (values[parts.calls_of("a")[0]] < 0).any()


@pytest.mark.parametrize(
    "draw",
    [
        lambda net, x: net.a(x) if x.sum() > 0 else x,
        lambda net, x: F.relu(x, inplace=True) + net.a(x),
        lambda net, x: net.relu(x) + net.a(x),
        lambda _, x: x.zero_().add(1),
        lambda _, x: torch.add(x, 1, out=x),
    ],
)
def test_what_cannot_be_taken_apart(draw: Any) -> None:
    with pytest.raises(NotTakenApart):
        Parts(nets.Drawn(draw, a=nets.conv(3, 3), relu=nn.ReLU(inplace=True)), {})


def test_an_operation_that_fails() -> None:
    parts = Parts(nets.chain(), {})
    with pytest.raises(NotTakenApart, match="conv1"):
        parts.values(torch.ones(1, 5, 8, 8))


def test_what_depends_on_a_layer() -> None:
    parts = Parts(nets.Residual(3, 2, normed=False).eval(), {})
    names = [str(node.target) for node in parts.affected(parts.calls_of("b"))]
    assert names[0] == "b"
    assert names[-1] == "output"
    assert not {"stem", "a"} & set(names)
    assert "a" in [str(node.target) for node in parts.affected(parts.calls_of("stem"))]


@torch.no_grad()
def test_shapes_for_another_number_of_pictures() -> None:
    def draw(net: Any, x: Tensor) -> Tensor:
        x = net.a(x)
        n, channels = x.shape[0], x.size(1)
        return x.view(n * 2, channels // 2, -1)

    parts = Parts(nets.Drawn(draw, a=nets.conv(3, 4)), {})
    clean = parts.values(torch.ones(5, 3, 2, 2))
    doubled = next(node for node in parts.nodes if node.name.startswith("mul"))
    assert parts.is_number(doubled)
    assert not parts.is_number(parts.nodes[-1])
    assert parts.numbers(doubled, clean, 5, 7) == 14
    halved = next(node for node in parts.nodes if node.name.startswith("floordiv"))
    assert parts.numbers(halved, clean, 5, 7) == 2
