"""A channel of a residual stream whose summands are all restored at once."""

import pytest
import torch
from torch import nn

import regrow

X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(32) % 3


class Stream(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.side, self.norm_s = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm0(self.stem(x)).relu()
        return self.head((self.norm(self.conv(x)) + self.norm_s(self.side(x))).relu().mean((2, 3)))


def train(net, optimizer):
    net.train()
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(X), LABELS).backward()
        optimizer.step()


@pytest.mark.parametrize("sub", [1, 0])
def test_it_is_trained_again_and_the_output_does_not_move_at_the_restore(sub):
    torch.manual_seed(0)
    net = Stream()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    lowest = {"conv": torch.arange(8.0), "side": torch.arange(8.0)}
    cycle = regrow.RePr(
        net, optimizer, example_inputs=X[:1], full=1, sub=sub, cycles=1, scope="layer", floor=0.1,
        criterion=lambda _: dict(lowest),
    )  # fmt: skip
    train(net, optimizer)
    if sub:
        assert cycle.step().filters == {"conv": [0, 1], "side": [0, 1]}
        train(net, optimizer)
        silent = net.eval()(X)
        assert cycle.step().notes == []
        torch.testing.assert_close(net(X), silent)
    else:
        assert cycle.step().filters == {"conv": [0, 1], "side": [0, 1]}
    train(net, optimizer)
    for norm in (net.norm, net.norm_s):
        assert norm.weight[:2].abs().min() > 1e-4, "a ReLU behind a sum of 0 has no gradient"
