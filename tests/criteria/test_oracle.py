"""The oracle equals a plain loop over the filters, on networks of every kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from regrow.criteria.oracle import oracle_scores
from regrow.structure.read import read_structure
from regrow.structure.readers import silence

pytestmark = pytest.mark.devices


def looped(model: nn.Module, batches: list[Any], loss: Any = F.cross_entropy) -> dict[str, Tensor]:
    """One filter after another is silenced on a copy of the model, which then sees all pictures."""

    @torch.no_grad()
    def mean(net: nn.Module) -> float:
        sums = [float(loss(net(x), y)) * len(x) for x, y in batches]
        return sum(sums) / sum(len(x) for x, _ in batches)

    model = copy.deepcopy(model).eval()
    readers = read_structure(model, batches[0][0][:1])
    scores = {}
    for name, found in readers.items():
        each = []
        for index in range(model.get_submodule(name).out_channels):  # type: ignore[arg-type]
            without = copy.deepcopy(model)
            silence(without, {name: found}, {name: [index]})
            each.append(mean(without) - mean(model))
        scores[name] = torch.tensor(each)
    return scores


def compare(model: nn.Module, batches: list[Any], loss: Any = None, exclude: Any = ()) -> dict[str, Tensor]:
    """The scores, after they were found equal to those of the loop; each layer matters."""
    scores = oracle_scores(model, batches, loss, exclude=exclude)
    expected = looped(model, batches, loss or F.cross_entropy)
    assert scores
    for name, each in scores.items():
        assert each.shape == expected[name].shape
        assert (each.cpu() - expected[name]).abs().max() < 1e-5 * (1 + expected[name].abs().max()), name
        assert each.abs().max() > 1e-4, f"{name} does not matter, so the test shows nothing"
    return scores


def labelled(*counts: int, shape: tuple[int, ...] = (3, 8, 8), classes: int = 4) -> list[Any]:
    torch.manual_seed(1)
    return [(torch.randn(n, *shape), torch.randint(classes, (n,))) for n in counts]


class Dense(nn.Module):
    """Three layers, each of which reads all tensors before it, behind norms of the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nets.conv(3, 4, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4 + 3 * i) for i in range(3)])
        self.convs = nn.ModuleList([nets.conv(4 + 3 * i, 3, bias=False) for i in range(3)])
        self.norm, self.head = nn.BatchNorm2d(13), nets.head(13)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, layer(F.relu(norm(x)))], 1)
        return self.head(F.relu(self.norm(x)))


def squeezed(net: Any, x: Tensor) -> Tensor:
    """A layer whose channels are scaled by what is computed from their means."""
    x = F.relu(net.a(x))
    scale = torch.sigmoid(net.up(F.relu(net.down(F.adaptive_avg_pool2d(x, 1)))))
    return net.head(net.b(x * scale))


def shuffled(net: Any, x: Tensor) -> Tensor:
    """Channels shuffled by shapes that are asked for, and a flattening by a view."""
    x = F.relu(net.a(x))
    n, channels, height, width = x.size()
    x = x.view(n, 2, channels // 2, height, width).transpose(1, 2).reshape(n, channels, height, width)
    x = F.max_pool2d(F.relu_(net.b(x)), 2)
    return net.out(x.view(x.shape[0], -1))


def in_place(net: Any, x: Tensor) -> Tensor:
    x = F.relu(net.norm(net.a(x)), inplace=True)
    y = net.b(x)
    y += x
    return net.head(F.leaky_relu_(net.c(y.relu_()), 0.2))


def branches(net: Any, x: Tensor) -> Tensor:
    x = F.relu(net.stem(x))
    return net.head(torch.cat([net.one(x), F.relu(net.three(x)), F.max_pool2d(x, 3, 1, 1)], dim=1))


def twice(net: Any, x: Tensor) -> Tensor:
    """One layer is used twice, the second time on what it made."""
    x = F.relu(net.stem(x))
    return net.head(F.relu(net.shared(F.relu(net.shared(x)))) + x)


def depthwise() -> nn.Module:
    return nn.Sequential(
        nets.conv(3, 6, bias=False), nn.BatchNorm2d(6), nn.ReLU6(inplace=True),
        nets.conv(6, 6, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6(inplace=True),
        nn.Conv2d(6, 5, 1, bias=False), nn.BatchNorm2d(5), nn.Hardswish(), nets.conv(5, 10, groups=5),
        nn.Conv2d(10, 4, 3, stride=2, padding="valid", bias=False), nn.SiLU(), nets.head(4),
    )  # fmt: skip


def classifier() -> nn.Module:
    """As AlexNet: several linear layers behind a picture of more than one pixel, dropout between them."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, 2, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2), nn.Conv2d(6, 5, 3, dilation=1),
        nn.Tanh(), nn.Flatten(), nn.Dropout(), nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 4),
    )  # fmt: skip


def wide() -> nn.Module:
    """Layers wide enough for ``SmallMaps``, on pictures of 8×8, 4×4, 2×2 and 1×1 pixels."""
    layers: list[nn.Module] = [nets.conv(3, 48, bias=False), nn.BatchNorm2d(48), nn.ReLU()]
    for _ in range(3):
        layers += [nets.conv(48, 48, bias=False), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nets.conv(48, 48), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4))


NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": nets.chain,
    "no norms": lambda: nets.chain(norm=nn.Identity),
    "group norms": lambda: nets.chain(norm=lambda width: nn.GroupNorm(2, width)),
    "residual": lambda: nets.Residual(5, 4),
    "residual without norms": lambda: nets.Residual(5, 4, normed=False),
    "norms ahead": lambda: nets.Ahead(0.3),
    "dense": Dense,
    "depthwise": depthwise,
    "classifier": classifier,
    "wide": wide,
    "squeezed": lambda: nets.Drawn(
        squeezed, a=nets.conv(3, 6), down=nn.Conv2d(6, 3, 1), up=nn.Conv2d(3, 6, 1), b=nets.conv(6, 5),
        head=nets.head(5),
    ),
    "shuffled": lambda: nets.Drawn(
        shuffled, a=nets.conv(3, 6), b=nets.conv(6, 5), out=nn.Linear(5 * 16, 4)
    ),
    "in place": lambda: nets.Drawn(
        in_place, a=nets.conv(3, 5), norm=nn.BatchNorm2d(5), b=nets.conv(5, 5), c=nets.conv(5, 4),
        head=nets.head(4),
    ),
    "branches": lambda: nets.Drawn(
        branches, stem=nets.conv(3, 4), one=nn.Conv2d(4, 3, 1), three=nets.conv(4, 5), head=nets.head(12)
    ),
    "twice": lambda: nets.Drawn(twice, stem=nets.conv(3, 5), shared=nets.conv(5, 5), head=nets.head(5)),
    "own kind of convolution": lambda: nn.Sequential(
        nets.Standardised(3, 6, 3), nn.ReLU(), nets.Standardised(6, 5, 3), nn.ReLU(), nets.head(5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_it_equals_the_loop(name: str) -> None:
    torch.manual_seed(0)
    net = nets.unsettled(NETS[name]())
    compare(net, labelled(5, 2))


@pytest.mark.parametrize("dim", [1, 3])
def test_signals_and_volumes(dim: int) -> None:
    torch.manual_seed(0)
    compare(nets.unsettled(nets.chain((4, 5), dim=dim)), labelled(3, 2, shape=(3, *[6] * dim)))


@pytest.mark.parametrize("name", ["u-net", "u-net of odd sizes", "autoencoder", "audio", "volume", "grouped"])
def test_transposed_convolutions(name: str) -> None:
    net, x = nets.decoder(name)
    with torch.no_grad():
        target = torch.randn_like(net(x))
    compare(net, [(x, target), (x[:1] + 0.5, target[:1])], lambda outputs, y: (outputs - y).square().mean())
