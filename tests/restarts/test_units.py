import pytest
import torch
from torch import nn

from nets import Residual, UNet
from regrow.criteria.utility import arriving, outgoing
from regrow.restarts.units import find_units, renew
from relatives import X, net, tensors, train

pytestmark = pytest.mark.devices


def test_the_units_of_a_net():
    units = find_units(net(), X[:1])
    assert list(units.layers) == ["0", "3", "7"]
    assert {name: list(each.consumers) for name, each in units.layers.items()} == {
        "0": ["3"], "3": ["7"], "7": ["10"],
    }  # fmt: skip
    assert list(units.layers["0"].norms) == ["1"]
    assert list(units.layers["7"].norms) == ["8"]
    # filter 1 of conv2 is flattened into four places
    assert units.layers["3"].consumers["7"].of([1]) == [4, 5, 6, 7]
    assert list(units.left_out) == ["10"]


def test_what_is_frozen_is_left_alone():
    for module, kind, name, why in (
        (0, "weight", "0", "frozen"), (0, "bias", "0", "its bias is frozen"),
        (1, "bias", "0", "'1', is frozen"),
        (7, "weight", "3", "'7' reads it and is frozen"), (10, "weight", "7", "'10' reads it and is frozen"),
    ):  # fmt: skip
        model = net()
        getattr(model[module], kind).requires_grad_(False)
        units = find_units(model, X[:1])
        assert name not in units.layers
        assert why in units.left_out[name]


def test_channels_of_a_stream_are_left_alone():
    units = find_units(Residual(6, 5), torch.randn(1, 3, 6, 6))
    assert list(units.layers) == ["a"]
    assert "added to other channels" in units.left_out["stem"]


def test_what_arrives_and_what_goes_out_by_hand():
    x = torch.tensor([[[[1.0, -3]], [[0, 2]]], [[[5, 1]], [[-2, 0]]]])  # [2 pictures, 2 channels, 1, 2]
    assert arriving(nn.Conv2d(2, 1, 1), x).tolist() == [2.5, 1]
    assert arriving(nn.Linear(2, 1), torch.tensor([[1.0, -2], [3, 4]])).tolist() == [2, 3]
    assert arriving(nn.Linear(2, 1), torch.tensor([1.0, -2])).tolist() == [1, 2]
    linear = nn.Linear(2, 2)
    linear.weight.data.copy_(torch.tensor([[1.0, -2], [-3, 4]]))
    assert outgoing(linear).tolist() == [4, 6]
    conv = nn.Conv2d(2, 2, (1, 2))
    conv.weight.data.copy_(torch.tensor([1.0, -1, 2, 2, 3, 0, 0, -4]).view(2, 2, 1, 2))
    assert outgoing(conv).tolist() == [5, 8]
    depthwise = nn.Conv2d(2, 4, 1, groups=2)
    depthwise.weight.data.copy_(torch.tensor([1.0, -2, 3, 4]).view(4, 1, 1, 1))
    assert outgoing(depthwise).tolist() == [3, 7]
    up = nn.ConvTranspose2d(2, 3, 1)
    up.weight.data.copy_(torch.tensor([1.0, -2, 3, 4, 5, 6]).view(2, 3, 1, 1))
    assert outgoing(up).tolist() == [6, 15]


def test_a_renewal_by_hand():
    model = net()
    train(model, torch.optim.SGD(model.parameters(), 0.1), 3)
    readers = find_units(model, X[:1]).layers
    before = tensors(model)
    masks = renew(model, readers, {"0": [1], "3": [0, 1], "7": [4]}, seed=3)
    for name, layer, filters in (("0", model[0], [1]), ("3", model[3], [0, 1]), ("7", model[7], [4])):
        kept = [i for i in range(len(layer.weight)) if i not in filters]
        columns = {"0": [], "3": [1], "7": list(range(8))}[name]
        others = [i for i in range(layer.weight.shape[1]) if i not in columns]
        assert torch.equal(layer.weight[kept][:, others], before[f"{name}.weight"][kept][:, others])
        assert not (layer.weight[filters][:, others] == before[f"{name}.weight"][filters][:, others]).any()
        assert not layer.weight[:, columns].any()
        assert not layer.bias[filters].any()
        assert torch.equal(layer.bias[kept], before[f"{name}.bias"][kept])
        expected = torch.zeros(layer.weight.shape[:2], dtype=torch.bool)
        expected[filters] = True
        expected[:, columns] = True
        assert torch.equal(masks[layer.weight], expected)
        assert masks[layer.bias].nonzero().flatten().tolist() == filters
    assert not model[10].weight[:, 4].any()
    for norm, channel in ((model[1], 1), (model[8], 4)):
        got = [float(tensor[channel].detach()) for tensor in (norm.weight, norm.bias, norm.running_mean)]
        assert got == [1, 0, 0]
        assert norm.running_var[channel] == 1
        assert masks[norm.weight].nonzero().flatten().tolist() == [channel]
    assert set(masks) == {*model.parameters()} - {model[10].bias}


def test_the_other_units_compute_what_they_did():
    model = net().eval()
    readers = find_units(model, X[:1]).layers
    with torch.no_grad():
        model[3].weight[:, 2], model[7].weight[:, 4:8], model[10].weight[:, 3] = 0, 0, 0
    before = model(X)
    renew(model, readers, {"0": [2], "3": [1], "7": [3]}, seed=0)
    torch.testing.assert_close(model(X), before)


def test_new_rows_are_rows_that_the_layer_draws_or_those_of_a_fresh_model():
    model, fresh = net(), net()
    readers = find_units(model, X[:1]).layers
    renew(model, readers, {"3": [0]}, seed=9)
    assert float(model[3].weight[0].detach().abs().max()) <= 36**-0.5
    with torch.no_grad():
        for index, row in enumerate(fresh[3].weight):
            row.fill_(index + 1)
    chosen = set()
    for seed in range(8):
        renew(model, readers, {"3": [0, 2]}, seed=seed, fresh=fresh)
        rows = model[3].weight[[0, 2]].flatten(1)
        assert (rows == rows[:, :1]).all()
        assert rows[0, 0] != rows[1, 0]
        chosen.add(float(rows[0, 0].detach()))
    assert len(chosen) > 1


def test_transposed_convolutions_have_their_filters_in_the_second_dimension():
    model = UNet()
    x = torch.randn(1, 3, 8, 8)
    units = find_units(model, x)
    assert {"up2", "join2", "middle"} <= set(units.layers)
    before = tensors(model)
    renew(model, units.layers, {"up2": [3]}, seed=0)
    moved = (model.up2.weight != before["up2.weight"]).flatten(2).any(2)
    assert moved[:, 3].all()
    assert moved.sum() == 10
    assert not model.join2.weight[:, 3].any()
    assert model.join2.weight[:, 4].any()
