import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from regrow.noise.layers import add_bridgeout, bridgeout_state

DRAWS = torch.Generator().manual_seed(0)
X, Y = torch.randn(2, 3, 6, 6, generator=DRAWS), torch.randn(2, 3, 6, 6, generator=DRAWS)
MODES = {"reentrant": True, "not reentrant": False}


class RunsTwice(nn.Module):
    """A layer that runs twice, in a part that is computed again in the backward pass."""

    def __init__(self, mode=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.mode = mode

    def part(self, x):
        return self.twice(torch.tanh(self.twice(x)))

    def forward(self, x):
        x = self.first(x)
        if self.mode is None:
            return self.part(x)
        return checkpoint(self.part, x, use_reentrant=MODES[self.mode])


def gradients(net, call):
    """Of two passes that wait for one backward pass, one in eval mode in between, and of one more."""
    inputs = [X.clone().requires_grad_(), Y.clone().requires_grad_()]
    first = call(inputs[0])
    net.eval()(X)
    net.train()
    second = call(inputs[1])
    (first.square().sum() + 2 * second.square().sum()).backward()
    call(inputs[0]).square().sum().backward()
    assert bridgeout_state(net)["passes"] == 3
    return [first, second, *(tensor.grad for tensor in [*inputs, *net.parameters()])]


def plain():
    net = RunsTwice()
    add_bridgeout(net)
    return gradients(net, net)


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpointed_part_is_computed_again_with_the_noise_of_its_own_pass(mode):
    net = RunsTwice(mode)
    add_bridgeout(net)
    torch.testing.assert_close(gradients(net, net), plain(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_around_the_whole_model(mode):
    net = RunsTwice()
    add_bridgeout(net)
    ours = gradients(net, lambda x: checkpoint(net, x, use_reentrant=MODES[mode]))
    torch.testing.assert_close(ours, plain(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="Call that model"):
        net.first(X)  # the recomputation has not opened a pass


def test_without_checkpoints_the_passes_differ():
    first, *_ = plain()
    net = RunsTwice()
    add_bridgeout(net)
    assert torch.equal(net(X), first)
    assert not torch.equal(net(X), first)


def test_a_part_that_is_called_by_itself_is_refused_in_train_mode_only():
    net = RunsTwice()
    add_bridgeout(net)
    with pytest.raises(ValueError, match="Call that model"):
        net.first(X)
    net.eval()
    assert net.first(X).shape == (2, 4, 6, 6)
    net.train()(X)
    with pytest.raises(ValueError, match="Call that model"):
        net.first(X)
    assert bridgeout_state(net)["passes"] == 1


def test_a_pass_that_fails_does_not_stop_the_next():
    net = RunsTwice()
    add_bridgeout(net)
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 5, 6, 6))
    assert isinstance(net.first.weight, nn.Parameter)
    assert net(X).isfinite().all()
