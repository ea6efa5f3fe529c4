"""A training step with Bridgeout launches little more than a plain one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from counting import Counted
from regrow.noise.layers import add_bridgeout
from regrow.study.models import build_model

NETS = {
    "convnet": lambda: build_model("convnet", classes=10, channels=3, size=(16, 16)),
    "resnet": lambda: build_model("resnet", classes=10, channels=3, size=(16, 16)),
    "vgg": lambda: build_model("vgg", classes=10, channels=3, size=(32, 32)),
    "resnet50": lambda: build_model("torchvision:resnet50", classes=10, channels=3, size=(32, 32)),
}


def operations(net, settings):
    """The counts of a first step, and of one after it."""
    if settings is not None:
        add_bridgeout(net, **settings)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, foreach=True)
    size = 32 if sum(p.numel() for p in net.parameters()) > 10**6 else 16
    counts = []
    for _ in range(2):
        with Counted() as counted:
            F.cross_entropy(net(torch.ones(2, 3, size, size)), torch.tensor([0, 1])).backward()
            optimizer.step()
        counts.append(len(counted.names))
        optimizer.zero_grad()
    return counts


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, {}) for name in NETS), ("resnet", {"linear": True, "target_fraction": 0.5, "q": 1.0})],
)
def test_a_step_launches_no_more_than_a_tenth_above_the_plain_step(name, settings):
    torch.manual_seed(0)
    plain, noisy = (operations(NETS[name](), each) for each in (None, settings))
    assert all(one < other <= 1.1 * one for one, other in zip(plain, noisy, strict=True))


def test_a_step_takes_four_operations_more_however_many_layers_there_are():
    counts = []
    for layers in (3, 9):
        convolutions = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(layers))
        net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        counts.append([operations(net, each)[1] for each in (None, {})])
    # The number of the pass goes up and is copied; the noise, and its gradients.
    assert [noisy - plain for plain, noisy in counts] == [4, 4]
