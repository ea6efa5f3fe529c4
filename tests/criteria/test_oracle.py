"""The oracle equals a plain loop over the filters, on networks of every kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import nets
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
    before, saved, scores = mean(model), copy.deepcopy(model.state_dict()), {}
    for name, found in readers.items():
        each = []
        for index in range(model.get_submodule(name).out_channels):  # type: ignore[arg-type]
            silence(model, {name: found}, {name: [index]})
            each.append(mean(model) - before)
            model.load_state_dict(saved)
        scores[name] = torch.tensor(each, dtype=torch.float64)
    return scores


def compare(model: nn.Module, batches: list[Any], loss: Any = None, exclude: Any = ()) -> dict[str, Tensor]:
    """The scores, after they were found equal to those of the loop, in which each layer matters."""
    scores = oracle_scores(model, batches, loss, exclude=exclude)
    expected = looped(model, batches, loss or F.cross_entropy)
    double = next(model.parameters()).dtype == torch.float64
    assert scores
    for name, each in scores.items():
        largest = float(expected[name].abs().max())
        assert largest > (1e-6 if double else 1e-4), f"{name} does not matter, so the test shows nothing"
        assert each.shape == expected[name].shape
        assert each.device == model.get_submodule(name).weight.device  # type: ignore[union-attr]
        difference = float((each - expected[name].to(each)).abs().max())
        assert difference < (1e-6 * largest if double else 1e-5), name
    return scores


def labelled(*counts: int, shape: tuple[int, ...] = (3, 8, 8), classes: int = 4) -> list[Any]:
    torch.manual_seed(1)
    pictures = [torch.randn(n, *shape, dtype=torch.float64) for n in counts]
    return [(each, torch.randint(classes, (len(each),))) for each in pictures]


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
    scale = torch.sigmoid(net.up(torch.tanh(net.down(F.adaptive_avg_pool2d(x, 1)))))
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
        nn.Conv2d(3, 6, 5, 2, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2), nn.Conv2d(6, 5, 3),
        nn.Tanh(), nn.Flatten(), nn.Dropout(), nn.Linear(5 * 25, 7),
        nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 4),
    )  # fmt: skip


def wide() -> nn.Module:
    """Layers wide enough for ``SmallMaps``, on pictures of 8×8, 4×4, 2×2 and 1×1 pixels."""
    layers: list[nn.Module] = [nets.conv(3, 4, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 48, 1)]
    for _ in range(3):
        layers += [nets.conv(48, 48, bias=False), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nets.conv(48, 48), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4))


SHAPES = {"classifier": (3, 32, 32)}
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
    compare(nets.unsettled(NETS[name]()).double(), labelled(5, 2, shape=SHAPES.get(name, (3, 8, 8))))


def test_small_maps_equal_the_loop() -> None:
    torch.manual_seed(0)
    net = nets.unsettled(wide())
    batches = [(x.float(), y) for x, y in labelled(5, 2)]
    compare(net, batches, lambda outputs, y: 10 * F.cross_entropy(outputs, y), exclude=("4", "8", "12"))


@pytest.mark.parametrize("dim", [1, 3])
def test_signals_and_volumes(dim: int) -> None:
    torch.manual_seed(0)
    net = nets.unsettled(nets.chain((4, 5), dim=dim)).double()
    compare(net, labelled(3, 2, shape=(3, *[6] * dim)))


@pytest.mark.parametrize("name", ["u-net", "u-net of odd sizes", "autoencoder", "audio", "volume", "grouped"])
def test_transposed_convolutions(name: str) -> None:
    net, x = nets.decoder(name)
    with torch.no_grad():
        target = torch.randn_like(net(x))
    compare(net, [(x, target), (x[:1] + 0.5, target[:1])], lambda outputs, y: (outputs - y).square().mean())


_layer = st.sampled_from(
    ["conv", "norm", "relu", "tanh", "pool", "average", "depthwise", "dilated", "dropout"]
)


@settings(max_examples=8, deadline=None)
@given(kinds=st.lists(_layer, min_size=1, max_size=5), seed=st.integers(0, 99))
def test_any_chain_of_layers_equals_the_loop(kinds: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nets.conv(3, 4)]
    for kind in kinds:
        layers.append(
            {
                "conv": lambda: nets.conv(4, 4), "norm": lambda: nn.BatchNorm2d(4), "relu": nn.ReLU,
                "tanh": nn.Tanh, "pool": lambda: nn.MaxPool2d(2, 1), "average": lambda: nn.AvgPool2d(3, 1, 1),
                "depthwise": lambda: nets.conv(4, 4, groups=4), "dropout": nn.Dropout2d,
                "dilated": lambda: nn.Conv2d(4, 4, 2, dilation=2, padding=2, padding_mode="circular"),
            }[kind]()
        )  # fmt: skip
    net = nets.unsettled(nn.Sequential(*layers, nets.head(4))).double()
    batches = labelled(3, 2, shape=(3, 6, 6))
    expected = looped(net, batches)
    for name, each in oracle_scores(net, batches).items():
        assert torch.allclose(each.cpu().double(), expected[name], rtol=1e-5, atol=1e-7), name


# --- by hand ----------------------------------------------------------------------------------------


def test_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(3, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([2.0, -1.0, 0.0]).view(3, 1, 1, 1))
        net[0].bias.copy_(torch.tensor([0.0, 1.0, 5.0]))
        net[3].weight.copy_(torch.tensor([[1.0, 10.0, -1.0]]))
    # Pixels 1, 3 and −1: the filters make (2, 0, 5), (6, 0, 5) and (0, 2, 5).
    batches = [torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), torch.tensor([-1.0]).view(1, 1, 1, 1)]
    scores = oracle_scores(net, batches, lambda outputs, _: outputs.mean())
    assert torch.allclose(scores["0"], torch.tensor([-8 / 3, -20 / 3, 5.0]))


def test_a_dropped_filter_is_silent_behind_its_norm() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 1)).eval()
    with torch.no_grad():
        net[1].bias.copy_(torch.tensor([7.0, -3.0]))
        net[1].running_mean.copy_(torch.tensor([0.5, 0.5]))
        net[0].weight.zero_()
        net[0].bias.fill_(0.5)
        net[3].weight.fill_(1.0)
    scores = oracle_scores(net, [torch.ones(2, 1, 1, 1)], lambda outputs, _: outputs.sum() / len(outputs))
    assert torch.allclose(scores["0"], torch.tensor([-7.0, 3.0]))


def test_the_model_is_only_read() -> None:
    net = nets.chain().train()
    net.relu1.inplace = True
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    x = torch.randn(4, 3, 8, 8)
    torch.set_rng_state(state)
    pictures = x.clone()
    oracle_scores(net, [(x, torch.tensor([0, 1, 2, 3]))])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, pictures)
    assert net.relu1.inplace
    assert modes == [module.training for module in net.modules()]
    assert all(torch.equal(values, before[name]) for name, values in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_inputs_by_keyword_and_several_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nets.conv(3, 4), nets.head(4), nets.head(4)

        def forward(self, x: Tensor, scale: float = 1.0, offset: Tensor | None = None) -> dict[str, Tensor]:
            x = F.relu(self.conv(x)) * scale
            return {"a": self.a(x), "b": self.b(x if offset is None else x + offset)}

    torch.manual_seed(0)
    net = Two()
    x, offset, y = torch.randn(3, 3, 4, 4), torch.randn(3, 4, 4, 4), torch.tensor([0, 1, 2])
    scores = oracle_scores(
        net,
        [({"x": x, "offset": offset}, y)],
        lambda made, labels: F.cross_entropy(made["a"], labels) + made["b"].square().mean(),
    )["conv"]
    with torch.no_grad():
        made = F.relu(net.conv(x))
        expected = []
        for index in [-1, 0, 1, 2, 3]:
            maps = made.clone()
            if index >= 0:
                maps[:, index] = 0
            expected.append(F.cross_entropy(net.a(maps), y) + net.b(maps + offset).square().mean())
    assert torch.allclose(scores, torch.stack(expected[1:]) - expected[0], atol=1e-5)


def test_layers_that_the_pictures_do_not_reach_score_0() -> None:
    net = nets.Drawn(
        lambda s, x: s.head(s.a(x)), a=nets.conv(3, 4), unused=nets.conv(3, 5), head=nets.head(4)
    )
    scores = oracle_scores(net, [(torch.randn(2, 3, 4, 4), torch.tensor([0, 1]))])
    assert list(scores) == ["a", "unused"]
    assert torch.equal(scores["unused"], torch.zeros(5))


# --- what cannot be taken apart -----------------------------------------------------------------------


def asks(net: Any, x: Tensor) -> Tensor:
    """The way depends on the pictures."""
    x = F.relu(net.a(x))
    return net.head(net.b(x) if x.mean() > -1 else x)


def mixes(net: Any, x: Tensor) -> Tensor:
    """Every picture is compared with the mean of its batch."""
    x = F.relu(net.a(x))
    return net.head(net.b(x - x.mean(0, keepdim=True)))


def writes(net: Any, x: Tensor) -> Tensor:
    """A tensor is written to, and read afterwards."""
    x = net.a(x)
    y = x.relu_()
    return net.head(net.b(x) + y)


@pytest.mark.gives_up
@pytest.mark.parametrize("draw", [asks, mixes, writes], ids=lambda draw: draw.__name__)
def test_other_models_take_the_loop(draw: Any, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net = nets.Drawn(draw, a=nets.conv(3, 5), b=nets.conv(5, 5), head=nets.head(5)).double()
    with caplog.at_level("INFO", "regrow"):
        compare(net, labelled(5, 2))
    assert "takes a pass" in caplog.text


@pytest.mark.gives_up
def test_only_the_layers_concerned_take_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    """The first layer's filters change the mean over pictures; those of the last layer do not."""
    torch.manual_seed(0)
    net = nets.Drawn(mixes, a=nets.conv(3, 5), b=nets.conv(5, 5), head=nets.head(5)).double()
    with caplog.at_level("INFO", "regrow"):
        oracle_scores(net, labelled(5, 2))
    assert "'a'" in caplog.text
    assert "'b'" not in caplog.text


# --- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        (torch.ones(2, 3, 8, 8), r"write batches=\[x\]"),
        ([], "no batch"),
        ([torch.ones(2, 3, 8, 8)], "takes the cross entropy, so a batch is a pair .* got a tensor"),
        ([()], "takes the cross entropy, so a batch is a pair .* got a tuple"),
        ([(torch.ones(0, 3, 8, 8), torch.zeros(0).long())], "no picture"),
        ([(torch.ones(2, 5, 8, 8), torch.zeros(2).long())], "cannot be copied and run"),
        ([(torch.full((2, 3, 8, 8), float("nan")), torch.zeros(2).long())], "is nan"),
    ],
)
def test_bad_batches(batches: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        oracle_scores(nets.chain(), batches)


@pytest.mark.parametrize("loss", [lambda outputs, _: outputs, lambda *_: 0.5])
def test_bad_losses(loss: Any) -> None:
    with pytest.raises(ValueError, match="a tensor of one number"):
        oracle_scores(nets.chain(), [torch.ones(2, 3, 8, 8)], loss)


def test_other_bad_input() -> None:
    batches = [(torch.ones(2, 3, 8, 8), torch.zeros(2).long())]
    with pytest.raises(ValueError, match="conv1"):
        oracle_scores(nets.chain(), batches, exclude="conv11")
    with pytest.raises(ValueError, match="no convolution"):
        oracle_scores(nn.Linear(3, 4), batches)
