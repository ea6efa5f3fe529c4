"""Small copies, and the model that becomes one."""

import copy

import pytest
import torch
from torch import nn

from nets import Residual, conv, head
from regrow.criteria.select import select
from regrow.pruning.trials import Bench, become
from regrow.structure.read import read_structure

X = torch.randn(2, 3, 8, 8)


def settled(make_net):
    model = make_net()
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(32, 3, 8, 8))
    return model


def masks(model):
    return select(
        {f"conv{i}": model.get_submodule(f"conv{i}").weight.flatten(1).norm(dim=1) for i in (1, 2, 3)}, 0.4
    )


def test_the_cut_copy_computes_what_the_masked_one_does(make_net):
    model = settled(make_net).eval()
    keep, readers = masks(model), read_structure(model, X)
    for images in (None, [torch.randn(64, 3, 8, 8)]):
        bench = Bench(model, X, readers, images)
        masked, record = bench.masked(keep)
        trial = bench.cut(keep, compensated=True)
        assert torch.allclose(masked(X), trial.model(X), rtol=1e-4, atol=1e-6)
        assert trial.model.conv1.out_channels == int(keep["conv1"].sum())
        assert trial.compensation == record
        assert (record is None) == (images is None)
    assert model.conv1.out_channels == 6
    sizes = bench.cut(keep, compensated=False)
    shapes = [parameter.shape for parameter in sizes.model.parameters()]
    assert shapes == [parameter.shape for parameter in trial.model.parameters()]


def test_the_model_becomes_the_trial_and_stays_in_its_mode(make_net):
    model = settled(make_net)
    model.conv2.bias.requires_grad_(False)
    keep = masks(model)
    bench = Bench(copy.deepcopy(model).eval(), X, read_structure(model, X), [torch.randn(64, 3, 8, 8)])
    trial = bench.cut(keep, compensated=True)
    become(model, trial)
    assert all(module.training for module in model.modules())
    assert not model.conv2.bias.requires_grad
    assert model.conv1.weight.requires_grad
    for (name, mine), (other, theirs) in zip(
        model.state_dict().items(), trial.model.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(mine, theirs)
    assert torch.equal(model.eval()(X), trial.model(X))


def test_nothing_dropped_changes_nothing(make_net):
    model = settled(make_net).eval()
    before = copy.deepcopy(model.state_dict())
    keep = {name: torch.ones_like(mask) for name, mask in masks(model).items()}
    become(model, Bench(model, X, read_structure(model, X), None).cut(keep, compensated=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "_regrow_cuts")


def test_what_filters_save_by_hand(make_net):
    model = make_net((4, 6))
    bench = Bench(model, X, read_structure(model, X), None)
    counts = {"conv1": 4, "conv2": 6}
    macs = bench.savings("macs", counts, [])
    # Two pictures of 64 places: a row of 27, and 9 columns of six filters; a row of 36, and 4 classes.
    assert macs["conv1"].tolist() == pytest.approx([2 * 64 * (27 + 6 * 9)] * 4)
    assert macs["conv2"].tolist() == pytest.approx([2 * (64 * 4 * 9 + 4)] * 6)
    # With a bias, and a norm of two numbers.
    params = bench.savings("params", counts, [])
    assert params["conv1"].tolist() == pytest.approx([27 + 1 + 2 + 6 * 9] * 4)
    assert params["conv2"].tolist() == pytest.approx([36 + 1 + 2 + 4] * 6)


def test_what_filters_of_a_stream_save_together_and_alone():
    model = Residual(4, 6, normed=False)
    bench = Bench(model, X, read_structure(model, X), None)
    counts, units = {"stem": 4, "a": 6, "b": 4}, [{"stem": [i], "b": [i]} for i in range(4)]
    rows = {"stem": 27, "a": 36, "b": 54}
    alone = bench.savings("macs", counts, [])
    # The stem's channel leaves the tensor that a reads; the head reads the sum, in which b's is too.
    assert alone["stem"].tolist() == pytest.approx([2 * 64 * (rows["stem"] + 6 * 9)] * 4)
    assert alone["b"].tolist() == pytest.approx([2 * 64 * rows["b"]] * 4)
    together = bench.savings("macs", counts, units)
    whole = 2 * (64 * (rows["stem"] + rows["b"] + 6 * 9) + 4)
    for name in ("stem", "b"):
        assert together[name].tolist() == pytest.approx([whole / 2] * 4)
    assert together["a"].tolist() == pytest.approx([2 * 64 * (rows["a"] + 4 * 9)] * 6)


def test_what_a_filter_saves_with_the_depthwise_filter_that_reads_it():
    model = nn.Sequential(conv(3, 4), conv(4, 4, groups=4, bias=False), conv(4, 5, 1), head(5))
    bench = Bench(model, X, read_structure(model, X), None)
    macs = bench.savings("macs", {"0": 4, "2": 5}, [])
    assert macs["0"].tolist() == pytest.approx([2 * 64 * (27 + 9 + 5)] * 4)
