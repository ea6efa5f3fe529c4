"""Models with Bridgeout in torch.compile, whole or in part: new noise in each pass, compiled once."""

import copy

import pytest
import torch
from torch import nn

from nets import chain
from regrow.noise.layers import add_bridgeout, bridgeout_state

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def start():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("targeted", [1.0, 0.5])
def test_the_whole_model_draws_what_it_draws_uncompiled(targeted):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2)
    )
    add_bridgeout(net, target_fraction=targeted, seed=1)
    eager = copy.deepcopy(net)
    start()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(4):
        for each in (compiled, eager):
            each(X).square().sum().backward()
    assert graphs() == 1
    for one, two in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
    assert bridgeout_state(net) == bridgeout_state(eager)
    assert bridgeout_state(net)["passes"] == 4


def test_a_compiled_part_of_a_model_draws_what_it_draws_uncompiled():
    net = chain((4, 5, 6)).train()
    add_bridgeout(net, linear=True, seed=1)
    eager = copy.deepcopy(net)
    start()
    net.conv2.compile(backend="aot_eager")
    for _ in range(4):
        outputs = [each(X) for each in (net, eager)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().sum().backward()
    assert graphs() == 1
    for one, two in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_from_compiled_to_not_and_back_the_count_goes_on():
    net = chain((4,)).train()
    add_bridgeout(net, seed=1)
    eager = copy.deepcopy(net)
    start()
    compiled = torch.compile(net, backend="aot_eager")
    for call in (compiled, net, compiled, net):
        torch.testing.assert_close(call(X), eager(X))
    assert bridgeout_state(net) == bridgeout_state(eager)


def test_the_count_is_marked_as_staying_where_it_is():
    net = chain((4,)).train()
    add_bridgeout(net)
    number = net._bridgeout_passes.number
    assert vars(number)
    net(X)
    assert net._bridgeout_passes.number is number  # counted in place
    assert vars(copy.deepcopy(net)._bridgeout_passes.number) == vars(number)


def test_a_backward_pass_that_is_compiled():
    from torch._dynamo.compiled_autograd import _enable

    net = chain((4, 5)).train()
    add_bridgeout(net, seed=1)
    eager = copy.deepcopy(net)
    start()
    for _ in range(2):
        eager(X).square().sum().backward()
        with _enable(torch.compile(backend="aot_eager")):
            net(X).square().sum().backward()
    for one, two in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-4)
