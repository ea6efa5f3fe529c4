"""What a cycle refuses, and that it changes nothing then."""

import copy
import math

import pytest
import torch
from torch import nn

from cycles import X, build, hooks, is_dead, repr_on, same_weights, sgd
from nets import FullyShardedDataParallel


def stranger(_model):
    return {"optimizer": sgd(build())}


def partial(model):
    return {"optimizer": torch.optim.SGD([p for p in model.parameters() if p.dim() == 4], lr=0.1)}


def wrapped(model):
    class Wrapper(torch.optim.Optimizer):  # no hooks of its own, and nobody knows which of the two steps
        def __init__(self, one, other):
            self.one, self.other, self.param_groups = one, other, one.param_groups

    return {"optimizer": Wrapper(sgd(model), sgd(model))}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": -0.1}, r"0 <= fraction < 1, got -0\.1\. For 30 % write fraction=0\.3"),
        ({"fraction": 1.0}, r"0 <= fraction < 1, got 1\.0"),
        ({"fraction": math.nan}, "0 <= fraction < 1, got nan"),
        ({"fraction": "0.3"}, r"0 <= fraction < 1, got '0\.3'"),
        ({"full": 0}, "full must be a whole number of at least 1, got 0"),
        ({"sub": -1}, "sub must be a whole number of at least 0, got -1"),
        ({"sub": False}, "sub must be a whole number of at least 0, got False"),
        ({"cycles": 0}, "cycles must be a whole number of at least 1, got 0"),
        ({"full": True}, "full must be a whole number of at least 1, got True"),
        ({"sub": 1.5}, r"sub must be a whole number of at least 0, got 1\.5"),
        ({"floor": -1}, "0 <= floor <= 1, got -1"),
        ({"scope": "layers"}, "unknown scope 'layers'; did you mean 'layer'"),
        ({"criterion": "orto"}, "unknown criterion 'orto'; did you mean 'ortho'"),
        ({"consumers": "kept"}, "unknown choice consumers='kept'; did you mean 'keep'"),
        ({"rows": "orthogonl"}, "unknown choice rows='orthogonl'; did you mean 'orthogonal'"),
        ({"criterion": 7}, "criterion is a name, such as 'ortho', or a function .* got an int"),
        ({"criterion": "taylor"}, "criterion 'taylor' reads pictures: pass batches="),
        ({"batches": X}, r"batches is an iterable of batches, got a tensor .*batches=\[x\]"),
        ({"loss": "mse"}, "loss is a function of outputs and labels .*got the text 'mse'"),
        ({"batches": iter([X])}, "a list_iterator can be read only once: pass the loader itself"),
        ({"compact": 1}, r"compact must be True, False or None \(what is quicker\), got 1"),
        ({"seed": 0.5}, r"seed must be a whole number, got 0\.5"),
        ({"exclude": ["conv22"]}, "no convolution is named 'conv22'; did you mean 'conv2'"),
        ({"exclude": ["conv2", "conv3"]}, r"no convolution is left.*skip_first=False"),
        ({"exclude": ["conv1", "conv2", "conv3"]}, r"the model has 3, 3 are excluded\. Exclude fewer"),
        ({"example_inputs": None}, r"example_inputs .* got None.* such as x\[:1\]"),
        ({"example_inputs": X[:, :2]}, r"forward pass fails on example_inputs.*x\[:1\]"),
        ({"optimizer": "sgd"}, r"a torch\.optim\.Optimizer, and got the text 'sgd'"),
        (stranger, r"the optimizer does not hold 'conv2\.weight', 'conv2\.bias', 'norm2\.weight' and 5 more"),
        (partial, r"the optimizer does not hold 'conv2\.bias', 'norm2\.weight', 'norm2\.bias' and 3 more"),
        (wrapped, r"Wrapper wraps an optimizer .* such as optimizer\.optimizer"),
    ],
)
def test_bad_arguments_are_refused_before_anything_changes(settings, message):
    model = build()
    optimizer = sgd(model)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    given = settings(model) if callable(settings) else settings
    with pytest.raises(ValueError, match=message):
        repr_on(
            model, given.get("optimizer", optimizer), **{k: v for k, v in given.items() if k != "optimizer"}
        )
    assert same_weights(model.state_dict(), before)
    assert hooks(model, optimizer) == 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), rng)


def test_models_there_is_nothing_to_do_on():
    grouped = nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 6, 3, groups=2), nn.Flatten(), nn.LazyLinear(4)
    )
    grouped(X)
    for model, message in (
        (grouped, "the model has 2, 0 are excluded, and these cannot be used: '0', '1': grouped"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), "the model has 0"),
        (build().requires_grad_(False), "its weight is frozen"),
        (FullyShardedDataParallel(build()), "Use DDP instead of FSDP"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), "its filters are the network's output"),
    ):
        optimizer = sgd(model)
        with pytest.raises(ValueError, match=message):
            repr_on(model, optimizer)
        assert hooks(model, optimizer) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_weights_are_refused_at_construction_drop_and_restore_and_the_step_is_not_counted(bad):
    model = build()
    optimizer = sgd(model)

    def refused(call):
        good = model.conv2.weight.detach().clone()
        model.conv2.weight.data[0, 0, 0, 0] = bad
        before, held = copy.deepcopy(model.state_dict()), hooks(model, optimizer)
        with pytest.raises(ValueError, match=r"'conv2' holds NaN or infinite weights.*last good state"):
            call()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
        assert hooks(model, optimizer) == held
        model.conv2.weight.data.copy_(good)

    refused(lambda: repr_on(model, optimizer))
    cycle = repr_on(model, optimizer, scope="layer")
    assert cycle.step() is None
    refused(cycle.step)
    assert (cycle.state_dict()["step"], cycle.phase) == (1, "full")
    assert cycle.step().step == 2
    assert cycle.step() is None
    refused(cycle.step)
    assert (cycle.state_dict()["step"], cycle.phase) == (3, "sub")
    assert is_dead(model, cycle)
    event = cycle.step()
    assert (event.kind, event.step) == ("restore", 4)
