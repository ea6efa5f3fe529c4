"""Small copies, and the model that becomes one."""

import copy

import torch

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
