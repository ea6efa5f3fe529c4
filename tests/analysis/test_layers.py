import copy

import pytest
import torch
from torch import nn

import nets
import regrow
from regrow.analysis.layers import layer_correlations

pytestmark = pytest.mark.devices


def pictures(count=64, side=8, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def net(seed=0, filters=(4, 5)):
    torch.manual_seed(seed)
    return nets.chain(filters)


def test_identical_nets_correlate_fully():
    model = net()
    found = layer_correlations(model, copy.deepcopy(model), [pictures()])
    assert found["layers_a"] == found["layers_b"] == ["conv1", "conv2"]
    assert found["samples"] == 64 * 16
    for key in ("mean", "weighted"):
        assert [found[key][0][0], found[key][1][1]] == pytest.approx([1, 1])
        assert found[key][0][1] < 0.99


def test_one_net_with_itself_is_as_with_its_copy():
    model = net()
    assert layer_correlations(model, model, [pictures()]) == layer_correlations(
        model, copy.deepcopy(model), [pictures()]
    )


def test_a_permutation_of_the_filters_changes_nothing():
    model = net()
    other = copy.deepcopy(model)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        other.conv1.weight.copy_(model.conv1.weight[order] * -3)
        other.conv1.bias.copy_(model.conv1.bias[order])
    found = layer_correlations(model, other, [pictures()])
    assert found["mean"][0][0] == pytest.approx(1)


def test_against_a_plain_computation():
    model, other = net(0, (3, 3)), net(1, (3, 3))
    batch = pictures(40, 4)
    found = layer_correlations(model, other, [batch[:16], (batch[16:], torch.zeros(24))], variance=1)
    with torch.no_grad():
        a = model.conv1(batch).movedim(1, -1).flatten(0, -2)
        b = other.conv1(batch).movedim(1, -1).flatten(0, -2)
    expected = regrow.canonical_correlation(a, b, variance=1)
    assert found["mean"][0][0] == pytest.approx(expected.mean, abs=1e-5)
    assert found["weighted"][0][0] == pytest.approx(expected.weighted, abs=1e-5)


def test_layers_of_other_sizes_are_compared_on_the_same_cells():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.MaxPool2d(3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 2)
    )
    found = regrow.layer_correlations(model, model, [pictures()])
    assert found["samples"] == 64 * 4
    assert found["mean"][0][1] is not None


def test_nothing_of_the_models_changes():
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    other, batch = net(1), pictures()
    random = torch.get_rng_state()
    layer_correlations(model, other, [batch])
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_layer_that_is_silent_has_no_correlation():
    model = net()
    with torch.no_grad():
        model.conv2.weight.zero_()
    found = layer_correlations(model, model, [pictures()])
    assert found["mean"][1] == [None, None]
    assert found["mean"][0][0] == pytest.approx(1)


def test_too_few_pictures_give_none():
    model = net(0, (16, 16))
    found = layer_correlations(model, model, [pictures(4)], grid=1)
    assert found["mean"] == [[None, None], [None, None]]


@pytest.mark.parametrize("dim", [1, 3])
def test_other_dimensions(dim):
    torch.manual_seed(0)
    model = nets.chain((3, 3), dim=dim)
    found = layer_correlations(model, model, [torch.randn(16, 3, *[4] * dim)])
    assert found["samples"] == 16 * 4**dim
    assert found["mean"][0][0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("batches", "settings", "message"),
    [
        ([], {}, "yields no batch"),
        (pictures(), {}, "batches is an iterable of batches"),
        ([pictures()], {"grid": 0}, "grid is a number of cells"),
        ([pictures()], {"variance": 2}, "variance is the share"),
        ([torch.randn(4, 7, 8, 8)], {}, "forward pass fails"),
    ],
)
def test_what_is_refused(batches, settings, message):
    with pytest.raises(ValueError, match=message):
        layer_correlations(net(), net(), batches, **settings)


def test_a_net_without_convolutions_is_refused():
    with pytest.raises(ValueError, match="the model has none"):
        layer_correlations(nn.Linear(3, 3), net(), [pictures()])
