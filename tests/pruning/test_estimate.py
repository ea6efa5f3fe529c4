"""Sizes that are guessed, beside those of networks that were cut."""

import copy

import pytest
import torch
from torch import Tensor, nn

from nets import decoder
from regrow.filters import convolutions
from regrow.pruning.cost import count_macs, count_parameters
from regrow.pruning.estimate import Estimate
from regrow.structure.read import read_structure
from regrow.surgery.cut import cut
from regrow.surgery.removal import plan_removal, unremovable

X = torch.randn(2, 3, 8, 8)


class Mixed(nn.Module):
    """A residual sum, a depthwise layer, a concatenation and a linear layer that reads pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.first, self.second = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last = nn.Conv2d(16, 4, 1)
        self.head = nn.Linear(4 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.second(self.first(x).relu())
        x = torch.cat([x, self.depthwise(x)], 1).relu()
        return self.head(self.last(x).flatten(1))


def keep_of(model: nn.Module, fraction: float) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {
        name: torch.rand(len(model.get_submodule(name).weight)) >= fraction
        for name in ("stem", "first", "second", "last")
    }


def test_by_hand(make_net):
    model = make_net((4, 6))
    estimate = Estimate(model, X, read_structure(model, X))
    assert estimate.of({}) == {"macs": count_macs(model, X), "params": count_parameters(model)}
    # Three of conv1's four filters, two of conv2's six; a filter has 9 weights a channel and a bias.
    found = estimate.of({"conv1": [2], "conv2": [0, 1, 3, 5]})
    assert found["macs"] == pytest.approx(2 * (64 * 9 * (3 * 3 + 3 * 2) + 2 * 4))
    assert found["params"] == pytest.approx(3 * (27 + 1 + 2) + 2 * (27 + 1 + 2) + (2 * 4 + 4))


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.7])
def test_near_what_a_cut_leaves(fraction):
    model = Mixed().eval()
    readers = read_structure(model, X)
    keep = keep_of(model, fraction)
    gone = plan_removal(model, keep, X, readers).gone
    found = Estimate(model, X, readers).of(gone)
    small = copy.deepcopy(model)
    cut(small, keep, example_inputs=X)
    assert found["macs"] == pytest.approx(count_macs(small, X), rel=0.02)
    assert found["params"] == pytest.approx(count_parameters(small), rel=0.02)


def test_channels_that_are_not_followed_stay():
    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.fft.fft(self.conv(x)).real.mean((2, 3)).cumsum(1))

    model = Fourier()
    found = Estimate(model, X, {}).of({})
    assert found == {"macs": count_macs(model, X), "params": count_parameters(model)}


@pytest.mark.parametrize("name", ["u-net of odd sizes", "generator", "from a vector", "audio", "volume"])
def test_what_a_cut_leaves_of_transposed_convolutions(name):
    net, x = decoder(name)
    readers = read_structure(net, x)
    estimate = Estimate(net, x, readers)
    assert estimate.of({}) == {"macs": count_macs(net, x), "params": count_parameters(net)}
    keep = {
        conv: torch.arange(layer.out_channels) % 3 > 0
        for conv, layer in convolutions(net).items()
        if not unremovable(readers, conv)
    }
    found = estimate.of(plan_removal(net, keep, x, readers).gone)
    cut(net, keep, example_inputs=x)
    assert found["macs"] == pytest.approx(count_macs(net, x))
    assert found["params"] == pytest.approx(count_parameters(net), rel=0.03)


def test_a_transposed_convolution_multiplies_every_position_of_its_input():
    # 3·3 positions, 2 channels, 5 filters of 4·4 weights; the last layer reads 6·6 positions of 5 channels.
    net = nn.Sequential(nn.ConvTranspose2d(2, 5, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(5, 3, 1))
    x = torch.randn(2, 2, 3, 3)
    estimate = Estimate(net, x, read_structure(net, x))
    assert estimate.of({})["macs"] == 2 * (9 * 2 * 5 * 16 + 36 * 5 * 3)
    assert estimate.of({"0": [0, 4]})["macs"] == pytest.approx(2 * (9 * 2 * 3 * 16 + 36 * 3 * 3))
