import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import regrow
from nets import chain, conv, head, keep_but, unsettled
from regrow.criteria.masks import keep_of_masks
from regrow.surgery.removal import remove_filters

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Bare(nn.Module):
    """Two convolutions without norms; the second one has no bias."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = conv(3, 6), conv(6, 6, bias=False), head(6)

    def forward(self, x):
        return self.head(F.relu(self.two(F.relu(self.one(x)))))


def rows(filters, *masked):
    mask = torch.ones_like(filters)
    mask[list(masked)] = 0
    return mask


def mask_filters(layer, *masked):
    """Mask whole filters, with their biases where there are any."""
    for name in ("weight", "bias"):
        if getattr(layer, name) is not None:
            prune.custom_from_mask(layer, name, rows(getattr(layer, name), *masked))


def make_permanent(model):
    for module in model.modules():
        for name in ("weight", "bias"):
            if hasattr(module, f"{name}_mask"):
                prune.remove(module, name)


def dropped(keep):
    return {name: (~mask).nonzero().flatten().tolist() for name, mask in keep.items()}


def test_whole_filters_that_are_masked_by_hand():
    net = Bare()
    mask_filters(net.one, 1, 4)
    mask_filters(net.two, 0)
    keep = keep_of_masks(net)
    assert dropped(keep) == {"one": [1, 4], "two": [0]}
    assert all(mask.dtype == torch.bool for mask in keep.values())
    assert dropped(keep_of_masks(nn.DataParallel(net))) == {"one": [1, 4], "two": [0]}


def test_the_cut_net_computes_what_the_masked_one_did():
    net = Bare()
    mask_filters(net.one, 1, 4)
    prune.ln_structured(net.two, "weight", 0.5, n=2, dim=0)
    expected, keep = net(X), keep_of_masks(net)
    with pytest.raises(ValueError, match=r"regrow.keep_of_masks\(model\) gives the filters that are masked"):
        regrow.cut(net, keep, example_inputs=X)
    make_permanent(net)
    record = regrow.cut(net, keep, example_inputs=X)
    assert {name: counts["after"] for name, counts in record["layers"].items()} == {"one": 4, "two": 3}
    torch.testing.assert_close(net(X), expected)


def test_behind_a_norm_the_channel_goes_as_in_every_cut():
    net = unsettled(chain((6, 8), bias=False))
    prune.ln_structured(net.conv1, "weight", 2, n=1, dim=0)
    keep = keep_of_masks(net)
    assert len(dropped(keep)["conv1"]) == 2
    make_permanent(net)
    masked = copy.deepcopy(net)
    remove_filters(masked, keep, example_inputs=X)
    regrow.cut(net, keep, example_inputs=X)
    torch.testing.assert_close(net(X), masked(X))


def test_masks_that_were_put_one_over_the_other():
    net = Bare()
    weight = net.two.weight
    prune.custom_from_mask(net.two, "weight", rows(weight, 2))
    mask = torch.ones_like(weight)
    mask[3, :3] = 0
    prune.custom_from_mask(net.two, "weight", mask)
    mask = torch.ones_like(weight)
    mask[3, 3:] = 0
    prune.custom_from_mask(net.two, "weight", mask)
    assert dropped(keep_of_masks(net)) == {"two": [2, 3]}


def test_a_filter_that_still_emits_its_bias_is_kept_with_a_warning():
    net = Bare()
    prune.custom_from_mask(net.one, "weight", rows(net.one.weight, 0, 1, 2))
    with torch.no_grad():
        net.one.bias[1] = 0  # emits nothing
    mask_filters(net.two, 5)
    with pytest.warns(UserWarning, match="2 filters of 'one' have all of their weights masked, but not"):
        assert dropped(keep_of_masks(net)) == {"one": [1], "two": [5]}
    # What the warning says.
    prune.custom_from_mask(net.one, "bias", net.one.weight_mask.flatten(1).any(1))
    expected = net(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keep = keep_of_masks(net)
    assert dropped(keep) == {"one": [0, 1, 2], "two": [5]}
    make_permanent(net)
    regrow.cut(net, keep, example_inputs=X)
    torch.testing.assert_close(net(X), expected)


def test_a_bias_whose_mask_leaves_nothing_counts_as_masked():
    net = Bare()
    prune.custom_from_mask(net.one, "weight", rows(net.one.weight, 0, 1))
    prune.custom_from_mask(net.one, "bias", rows(net.one.bias, 1, 3))
    with pytest.warns(UserWarning, match="1 filters of 'one'"):
        assert dropped(keep_of_masks(net)) == {"one": [1]}


@pytest.mark.parametrize(
    "put",
    [
        lambda net: prune.l1_unstructured(net.two, "weight", 0.5),
        lambda net: prune.random_unstructured(net.one, "bias", 3),
        lambda net: prune.ln_structured(net.two, "weight", 0.5, n=2, dim=1),  # what it reads
        lambda net: prune.identity(net.two, "weight"),
        lambda net: prune.global_unstructured(
            [(net.one, "weight"), (net.two, "weight")], prune.L1Unstructured, amount=0.3
        ),
        lambda net: prune.ln_structured(net.head[2], "weight", 0.5, n=2, dim=0),  # no convolution
        lambda _: None,
        lambda net: (mask_filters(net.two, 1), make_permanent(net)),
    ],
    ids=["unstructured", "bias", "columns", "identity", "global", "linear", "none", "removed"],
)
def test_where_no_whole_filter_is_masked_an_error_says_what_to_do(put):
    net = Bare()
    put(net)
    masked = any(hasattr(layer, "weight_mask") for layer in (net.one, net.two))
    reason = "masks whole filters" if masked else "no convolution has a mask .* call keep_of_masks before it"
    with pytest.raises(ValueError, match=reason):
        keep_of_masks(net)


def test_single_weights_masked_over_the_whole_net_may_mask_whole_filters():
    net = Bare()
    with torch.no_grad():
        net.two.weight[3] *= 1e-3
    pairs = [(net.one, "weight"), (net.two, "weight")]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=60)
    assert dropped(keep_of_masks(net)) == {"two": [3]}


def test_a_layer_that_would_lose_all_of_its_filters():
    net = Bare()
    mask_filters(net.two, *range(6))
    with pytest.raises(ValueError, match="all 6 filters of 'two' are masked: leave at least one"):
        keep_of_masks(net)


def test_masks_on_linear_layers_are_no_hindrance():
    net = Bare()
    prune.ln_structured(net.head[2], "weight", 0.5, n=2, dim=0)
    mask_filters(net.two, 1)
    expected, keep = net(X), keep_of_masks(net)
    assert dropped(keep) == {"two": [1]}
    make_permanent(net)
    regrow.cut(net, keep, example_inputs=X)
    torch.testing.assert_close(net(X), expected)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_convolutions_of_other_dimensions(kind):
    net = nn.Sequential(kind(3, 4, 2, bias=False))
    prune.ln_structured(net[0], "weight", 1, n=2, dim=0)
    shortest = int(net[0].weight_orig.flatten(1).norm(dim=1).argmin())
    assert dropped(keep_of_masks(net)) == {"0": [shortest]}


def test_it_reads_and_changes_nothing():
    net = Bare()
    mask_filters(net.one, 2)
    before = copy.deepcopy({name: tensor.detach() for name, tensor in net.state_dict().items()})
    keep = keep_of_masks(net)
    keep["one"][:] = False
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert dropped(keep_of_masks(net)) == {"one": [2]}
    assert keep_but(6, 2).tolist() == keep_of_masks(net)["one"].tolist()
