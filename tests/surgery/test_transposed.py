"""Nets with transposed convolutions, cut: they compute what the masked ones do, and keep on doing it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from nets import DECODERS, Drawn, conv, decoder, keep_but, unsettled
from regrow.filters import convolutions
from regrow.shipping.checkpoint import load, save
from regrow.structure.read import read_structure
from regrow.surgery.cut import cut
from regrow.surgery.removal import remove_filters, unremovable


def keep_of(net, x):
    """About half of the filters that can go, in every layer that is not grouped."""
    readers = read_structure(net, x)
    able = {
        name: layer.out_channels
        for name, layer in convolutions(net).items()
        if layer.groups == 1 and not unremovable(readers, name)
    }
    return {name: keep_but(count, *range(1, count, 2)) for name, count in able.items()}


def same(one, other, x):
    for training in (False, True, False):  # the second time with the statistics that training left
        expected, found = one.train(training)(x), other.train(training)(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.devices
@pytest.mark.parametrize("name", DECODERS)
def test_cut_equals_masked_once_and_twice_and_from_a_file(name, tmp_path):
    net, x = decoder(name)
    keep = keep_of(net, x)
    whole, masked, small = (copy.deepcopy(net) for _ in range(3))
    remove_filters(masked, keep, example_inputs=x)
    record = cut(small, keep, example_inputs=x)
    save(small, tmp_path / "small.safetensors")
    loaded = load(copy.deepcopy(whole), tmp_path / "small.safetensors").eval()
    assert torch.equal(loaded(x), small.eval()(x))
    same(masked, small, x)
    for layer, mask in keep.items():
        assert record["layers"][layer] == {"before": len(mask), "after": int(mask.sum())}
    assert record["masked"] == {}
    # The first filter that is left of each layer goes too, where two are left.
    first = {layer: mask.nonzero().flatten()[0] for layer, mask in keep.items() if mask.sum() > 1}
    cut(loaded, {layer: keep_but(int(keep[layer].sum()), 0) for layer in first}, example_inputs=x)
    both = {layer: mask.clone() for layer, mask in keep.items()}
    for layer, index in first.items():
        both[layer][index] = False
    remove_filters(whole, both, example_inputs=x)
    same(whole, loaded, x)
    save(loaded, tmp_path / "twice.safetensors")
    again = load(decoder(name)[0], tmp_path / "twice.safetensors")
    same(loaded, again, x)


@pytest.mark.devices
def test_a_transposed_convolution_on_paper():
    """conv (2 filters) → transposed (3) → transposed (1), all 1×1: one filter of two layers leaves."""
    net = nn.Sequential(nn.Conv1d(1, 2, 1), nn.ConvTranspose1d(2, 3, 1), nn.ConvTranspose1d(3, 1, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1))
        net[0].bias.zero_()
        net[1].weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]).unsqueeze(2))
        net[1].bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
        net[2].weight.copy_(torch.tensor([1.0, 100.0, 1000.0]).view(3, 1, 1))
        net[2].bias.fill_(5.0)
    x = torch.ones(1, 1, 1)
    record = cut(net, {"0": keep_but(2, 0), "1": keep_but(3, 1)}, example_inputs=x)
    # The second filter makes 2; of it the first makes 20.1 and the third 60.3.
    assert net(x).item() == pytest.approx(20.1 + 60_300 + 5)
    assert net[1].weight.flatten().tolist() == [10, 30]
    assert net[2].weight.flatten().tolist() == [1, 1000]
    assert (net[1].in_channels, net[1].out_channels, net[2].in_channels) == (1, 2, 2)
    assert record["plan"]["rows"] == {"0": [1], "1": [0, 2]}
    assert record["plan"]["columns"] == {"1": [1], "2": [0, 2]}
    assert record["dropped"] == {"0": [0], "1": [1]}


def test_the_last_layer_is_kept():
    net, x = decoder("generator")
    with pytest.raises(ValueError, match="'6' cannot be removed: its filters are the network's output"):
        cut(net, {"6": keep_but(3, 0)}, example_inputs=x)


@pytest.mark.parametrize(
    ("kept", "masked", "left"),
    [
        ([0, 2, 6, 8], {}, (8, 4, 2)),  # the same places in both groups
        ([0, 2, 6, 9], {"3": "its groups lose different filters"}, (8, 12, 2)),
        ([0, 1, 6], {"3": "its groups lose different filters"}, (8, 12, 2)),
        ([7, 10], {}, (4, 2, 1)),  # nothing of the first group
    ],
)
def test_filters_of_a_grouped_transposed_convolution_leave_or_are_named(kept, masked, left):
    net, x = decoder("grouped")
    keep = {"3": torch.tensor([i in kept for i in range(12)])}
    whole = copy.deepcopy(net)
    remove_filters(whole, keep, example_inputs=x)
    record = cut(net, keep, example_inputs=x)
    same(whole, net, x)
    assert record["masked"] == masked
    assert (net[3].in_channels, net[3].out_channels, net[3].groups) == left


def test_depthwise_rows_go_with_the_channels_that_they_read():
    net, x = decoder("depthwise")
    record = cut(net, {"0": keep_but(8, 1, 2), "5": keep_but(6, 0)}, example_inputs=x)
    assert record["dropped"] == {"0": [1, 2], "5": [0], "3": [1, 2], "7": [0, 1]}
    assert (net[3].in_channels, net[3].out_channels, net[3].groups) == (6, 6, 6)
    assert (net[7].in_channels, net[7].out_channels, net[7].groups) == (5, 10, 5)


@pytest.mark.devices
def test_an_optimizer_goes_on_with_the_slots_of_transposed_convolutions():
    net, x = decoder("u-net")
    optimizer = torch.optim.Adam(net.train().parameters())
    net(x).square().sum().backward()
    optimizer.step()
    slots = {name: optimizer.state[p]["exp_avg"].clone() for name, p in net.named_parameters()}
    cut(net, {"up2": keep_but(8, 0, 5), "middle": keep_but(10, 3)}, example_inputs=x, optimizer=optimizer)
    channels, filters = keep_but(10, 3), keep_but(8, 0, 5)
    slot = optimizer.state[net.up2.weight]["exp_avg"]
    assert torch.equal(slot, slots["up2.weight"][channels][:, filters])
    net(x).square().sum().backward()
    optimizer.step()


def tied():
    net = Drawn(
        lambda s, x: s.up(torch.relu(s.mix(torch.relu(s.down(x))))),
        down=nn.Conv2d(3, 6, 4, 2, 1), mix=conv(6, 6), up=nn.ConvTranspose2d(6, 3, 4, 2, 1),
    )  # fmt: skip
    net.up.weight = net.down.weight
    return net


def test_a_decoder_that_shares_the_weight_of_the_encoder():
    net, x = unsettled(tied()).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    whole = copy.deepcopy(net)
    with pytest.raises(ValueError, match="it shares its weight with another layer"):
        cut(net, {"down": keep_but(6, 0)}, example_inputs=x)
    keep = {"mix": keep_but(6, 0, 4)}
    remove_filters(whole, keep, example_inputs=x)
    cut(net, keep, example_inputs=x)
    assert net.mix.out_channels == 4
    assert net.up.weight is net.down.weight
    same(whole, net, x)


class Doubled(nn.ConvTranspose2d):
    """A layer of the user's own."""

    def forward(self, x, output_size=None):
        return 2 * super().forward(x, output_size)


class Normed(nn.ConvTranspose2d):
    """Each filter scaled to length 1, over all that it reads."""

    def forward(self, x):
        weight = nn.functional.normalize(self.weight, dim=(0, 2, 3))
        return nn.functional.conv_transpose2d(x, weight, self.bias, self.stride, self.padding)


class Scaled(nn.ConvTranspose2d):
    """All filters divided by the mean weight, which changes with their number: none can be computed alone."""

    def forward(self, x):
        weight = self.weight / self.weight.abs().mean()
        return nn.functional.conv_transpose2d(x, weight, self.bias, self.stride, self.padding)


@pytest.mark.parametrize("name", ["one norm", "a norm of groups"])
def test_filters_that_cannot_be_computed_alone_are_held_at_zero_and_named(name):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5) if name == "one norm" else nn.GroupNorm(1, 5)
    net = nn.Sequential(conv(3, 6), nn.ReLU(), Scaled(6, 5, 4, 2, 1), norm, nn.ReLU(), conv(5, 2))
    net, x = unsettled(net).double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    whole, once, keep = copy.deepcopy(net), copy.deepcopy(net), {"2": keep_but(5, 1)}
    remove_filters(whole, keep, example_inputs=x)
    record = cut(once, keep, example_inputs=x)
    twice = copy.deepcopy(once)
    same(whole, once, x)
    assert record["masked"] == {"2": "computing its kept filters alone was not confirmed"}
    assert record["layers"]["2"] == {"before": 5, "after": 4}
    assert once[2]._parameters["weight"].shape == (6, 4, 4, 4)
    record = cut(twice, {"2": keep_but(5, 0)}, example_inputs=x)  # it still counts its five filters
    remove_filters(net, {"2": keep_but(5, 0, 1)}, example_inputs=x)
    same(net, twice, x)
    assert record["layers"]["2"] == {"before": 4, "after": 3}


@pytest.mark.parametrize("kind", [Doubled, Normed])
def test_transposed_convolutions_of_the_users_own(kind):
    torch.manual_seed(0)
    net = unsettled(
        nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), kind(6, 5, 4, 2, 1), nn.ReLU(), conv(5, 2))
    ).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    whole, keep = copy.deepcopy(net), {"0": keep_but(6, 0, 3), "3": keep_but(5, 1)}
    remove_filters(whole, keep, example_inputs=x)
    cut(net, keep, example_inputs=x)
    same(whole, net, x)
    assert net[3].out_channels == 4


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_transposed_convolution_whose_weight_is_computed_stays_and_is_right(wrap):
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 6), nn.ReLU(), wrap(nn.ConvTranspose2d(6, 5, 4, 2, 1)), nn.ReLU(), conv(5, 2))
    net, x = unsettled(net).double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    whole, keep = copy.deepcopy(net), {"0": keep_but(6, 0, 3)}
    with pytest.raises(ValueError, match="computed from other parameters"):
        cut(net, {"2": keep_but(5, 1)}, example_inputs=x)
    remove_filters(whole, keep, example_inputs=x)
    cut(net, keep, example_inputs=x)
    assert net[0].out_channels == 4
    net.eval(), whole.eval()
    torch.testing.assert_close(net(x), whole(x), rtol=1e-12, atol=1e-12)
