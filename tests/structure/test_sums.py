import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from nets import Ahead, keep_but
from regrow.looking.noise import unsettle
from regrow.pruning.prune import prune
from regrow.structure.read import read_structure
from regrow.structure.sums import norms_without_writers
from regrow.surgery.cut import cut
from regrow.surgery.removal import plan_removal, remove_filters

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def ahead(shift=0.0):
    torch.manual_seed(0)
    model = Ahead(shift)
    with torch.no_grad():
        unsettle(model, torch.Generator().manual_seed(1))
    return model


KEEP = {"stem": keep_but(4, 1), "conv1": keep_but(4, 1, 2), "conv2": keep_but(4, 1, 3)}


def test_channels_that_only_removed_filters_write_to():
    model = ahead()
    removal = plan_removal(model, KEEP, X)
    # norm1 sees the stem alone and goes silent with it; channel 1 has no writer left further on.
    assert removal.silenced == {"norm2": [1], "norm3": [1]}
    assert removal.record("removed")["silenced"] == removal.silenced
    one = plan_removal(model, {"stem": keep_but(4, 1)}, X)
    assert one.silenced == {}
    assert plan_removal(model, KEEP, X, norms=False).silenced == {}
    assert plan_removal(model, KEEP, X, followers=False).silenced == removal.silenced


def test_a_silenced_channel_is_zero_all_the_way():
    model, seen = ahead(), {}
    remove_filters(model, KEEP, example_inputs=X)
    for name in ("norm2", "norm3"):
        model.get_submodule(name).register_forward_hook(lambda _m, _i, y, name=name: seen.update({name: y}))
    for training in (False, True):
        model.train(training)(X)
        assert not seen["norm2"][:, 1].any()
        assert not seen["norm3"][:, 1].any()
        assert seen["norm2"][:, 2].any()
        assert seen["norm3"][:, 3].any()


def test_the_stream_becomes_narrow_and_computes_the_same():
    masked, small = ahead(), ahead()
    remove_filters(masked, KEEP, example_inputs=X)
    record = cut(small, KEEP, example_inputs=X)
    assert record["plan"]["channels"] == {"norm1": [0, 2, 3], "norm2": [0, 2, 3], "norm3": [0, 2, 3]}
    assert small.head.in_features == 3
    for training in (False, True):
        torch.testing.assert_close(small.train(training)(X), masked.train(training)(X), rtol=1e-4, atol=1e-5)


def test_what_is_added_on_the_way_keeps_the_norms_behind_it():
    # The graph says that removed filters alone write to channel 1; forward passes say otherwise.
    assert plan_removal(ahead(shift=0.5), KEEP, X).silenced == {}
    model = ahead(shift=0.5)
    readers = read_structure(model, X)
    assert norms_without_writers(model, readers, {"stem": [1], "conv1": [1]}, X) == {}


@pytest.mark.parametrize("kind", ["affine", "tied", "mixing"])
def test_norms_that_cannot_be_silenced_stay(kind):
    model = ahead()
    if kind == "affine":
        model.norm2 = nn.BatchNorm2d(4, affine=False)
    elif kind == "tied":
        model.norm2.weight = model.norm3.weight
    else:
        model.norm2 = nn.GroupNorm(2, 4)
    found = plan_removal(model, KEEP, X).silenced
    assert "norm2" not in found
    assert "norm3" not in found  # norm2's bias goes on to it


def test_nothing_is_touched_by_looking():
    model = ahead().train()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    plan_removal(model, KEEP, X)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_gradients_of_a_network_that_normalises_first_stay_in_range():
    # Each norm of a channel without variance multiplied gradients by 316: 3.6e14 where the largest is 4.
    torch.manual_seed(0)
    model = timm.create_model("regnetv_040", num_classes=4)
    x = torch.randn(4, 3, 64, 64)
    prune(model, fraction=0.3, example_inputs=x[:1], compensate=False)
    F.cross_entropy(model.train()(x), torch.arange(4)).backward()
    single = [p.grad.clone() for p in model.parameters()]
    model.double().zero_grad()
    F.cross_entropy(model(x.double()), torch.arange(4)).backward()
    largest = max(p.grad.abs().max() for p in model.parameters())
    worst = max((a - p.grad).abs().max() for a, p in zip(single, model.parameters(), strict=True))
    assert worst < 0.01 * largest


def test_a_second_cut_counts_from_what_is_left():
    masked, small = ahead(), ahead()
    cut(small, KEEP, example_inputs=X)
    cut(small, {"conv1": torch.tensor([True, False])}, example_inputs=X)  # filter 3 of the four there were
    remove_filters(masked, KEEP | {"conv1": keep_but(4, 1, 2, 3)}, example_inputs=X)
    for training in (False, True):
        torch.testing.assert_close(small.train(training)(X), masked.train(training)(X), rtol=1e-4, atol=1e-5)


def test_training_goes_on_as_in_the_masked_network():
    masked, small = ahead().double(), ahead().double()
    x, y = X.double(), torch.tensor([0, 1, 0, 1])
    removal = plan_removal(masked, KEEP, x)
    removal.apply(masked)
    cut(small, KEEP, example_inputs=x)
    for model in (masked, small):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x), y).backward()
            optimizer.step()
            if model is masked:
                removal.apply(masked)
    torch.testing.assert_close(small.eval()(x), masked.eval()(x))
