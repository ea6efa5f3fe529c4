"""RePr on nets with transposed convolutions, whose filters lie across dim 0 of their weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import decoder
from regrow.modules import Transposed, filters_first
from regrow.repr.cycle import RePr

NETS = ("u-net of odd sizes", "u-net, channels last", "generator", "audio", "volume", "sum", "depthwise")
OPTIMIZERS = {
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3),
    "adam": lambda net: torch.optim.Adam(net.parameters(), lr=0.003),
}


def started(name, kind="sgd", **settings):
    net, x = decoder(name)
    optimizer = OPTIMIZERS[kind](net.train())
    asked = {"full": 1, "sub": 1, "cycles": 2, "fraction": 0.4, "skip_first": False, **settings}
    return net, x, optimizer, RePr(net, optimizer, example_inputs=x, **asked)


def fit(net, x, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        made = net(x)
        (made.square().mean() + (made - 1).abs().mean()).backward()
        optimizer.step()


def filters_of(net, name):
    """[filters, all their weights]"""
    layer = net.get_submodule(name)
    return filters_first(layer, layer.weight.detach()).flatten(1)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", NETS)
def test_dropped_filters_stay_at_0_compact_or_masked_and_both_are_one_run(name, kind):
    ends, events = [], []
    for compact in (True, False):
        net, x, optimizer, cycle = started(name, kind, compact=compact)
        fit(net, x, optimizer, 2)
        drop = cycle.step()
        transposed = [layer for layer in drop.filters if isinstance(net.get_submodule(layer), Transposed)]
        assert transposed or name == "depthwise"  # its transposed layers are grouped
        fit(net, x, optimizer, 3)
        for layer, dropped in drop.filters.items():
            assert not filters_of(net, layer)[dropped].any()
            assert filters_of(net, layer)[cycle.keep[layer]].any(1).all()
        restore = cycle.step()
        fit(net, x, optimizer, 2)
        events.append((drop.filters, restore.filters, drop.notes))
        ends.append(dict(net.named_parameters()))
        cycle.remove()
    assert events[0] == events[1]
    for key, parameter in ends[0].items():
        torch.testing.assert_close(parameter, ends[1][key], rtol=1e-6, atol=1e-7, msg=key)


@pytest.mark.parametrize("consumers", ["keep", "zero", "init"])
@pytest.mark.parametrize("name", ["generator", "volume", "u-net"])
def test_new_filters_are_orthogonal_to_the_others_and_as_long(name, consumers):
    net, x, optimizer, cycle = started(name, consumers=consumers)
    fit(net, x, optimizer, 1)
    before = {layer: filters_of(net, layer).clone() for layer in cycle.keep}
    drop = cycle.step()
    fit(net, x, optimizer, 1)
    kept = {layer: filters_of(net, layer)[mask] for layer, mask in cycle.keep.items()}
    restore = cycle.step()
    checked = 0
    for layer, indices in restore.filters.items():
        assert drop.filters[layer] == indices
        new = filters_of(net, layer)[indices]
        rest = [i for i in range(len(filters_of(net, layer))) if i not in indices]
        length = filters_of(net, layer)[rest].norm(dim=1).mean()
        torch.testing.assert_close(new.norm(dim=1), length.expand(len(indices)))
        if layer not in restore.least_covered and isinstance(net.get_submodule(layer), Transposed):
            others = torch.cat([filters_of(net, layer)[rest], before[layer][indices]])
            assert (F.normalize(new, dim=1) @ F.normalize(others, dim=1).T).abs().max() < 1e-10
            checked += 1
        assert kept[layer].shape[0] == len(rest)
    assert checked


def test_what_reads_a_restored_filter_has_its_weights_or_none():
    for consumers in ("keep", "zero"):
        net = nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 5, 2), nn.ReLU(), nn.ConvTranspose2d(5, 2, 2)
        )
        x = torch.randn(2, 3, 4, 4)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        cycle = RePr(
            net, optimizer, example_inputs=x, full=1, sub=1, cycles=1, consumers=consumers, scope="layer",
            fraction=0.4,
        )  # fmt: skip
        weight = net[4].weight.detach().clone()
        dropped = cycle.step().filters["2"]
        with torch.no_grad():
            net[4].weight[dropped] += 1
        cycle.step()
        if consumers == "keep":
            torch.testing.assert_close(net[4].weight[dropped], weight[dropped])
        else:
            assert not net[4].weight[dropped].any()
        rest = [i for i in range(5) if i not in dropped]
        assert torch.equal(net[4].weight[rest], weight[rest])


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("name", ["u-net", "generator", "audio"])
def test_a_run_stopped_in_a_sub_phase_ends_at_the_same_bits(name, compact):
    net, x, optimizer, cycle = started(name, "adam", compact=compact)
    fit(net, x, optimizer, 2)
    cycle.step()
    fit(net, x, optimizer, 2)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), cycle.state_dict()))
    other, _, theirs, again = started(name, "adam", compact=compact)
    for part, state in zip((other, theirs, again), saved, strict=True):
        part.load_state_dict(state)
    for model, stepper, counter in ((net, optimizer, cycle), (other, theirs, again)):
        fit(model, x, stepper, 1)
        counter.step()
        fit(model, x, stepper, 1)
        counter.step()
        fit(model, x, stepper, 1)
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key
    broken = copy.deepcopy(saved[2])
    layer = next(iter(broken["sub_phase"]["old_rows"]))
    broken["sub_phase"]["old_rows"][layer] = broken["sub_phase"]["old_rows"][layer][:, :1]
    with pytest.raises(ValueError, match=f"does not fit '{layer}'"):
        started(name, "adam", compact=compact)[3].load_state_dict(broken)


def test_the_layers_that_are_left_out_are_named():
    _, _, _, cycle = started("depthwise")
    assert set(cycle.keep) == {"0", "5"}
    assert cycle.left_out["3"].startswith("grouped")
    assert cycle.left_out["7"].startswith("grouped")
    _, _, _, cycle = started("generator", skip_first=True)
    assert cycle.left_out == {
        "0": "the first convolution (skip_first=False includes it)",
        "6": "its filters are the network's output, like a classifier's",
    }
    frozen, x = decoder("volume")
    frozen[3].requires_grad_(False)
    cycle = RePr(frozen, OPTIMIZERS["sgd"](frozen), example_inputs=x)
    assert cycle.left_out["3"] == "its weight is frozen (requires_grad is False)"


@pytest.mark.parametrize("consumers", ["keep", "init"])
def test_the_optimizer_forgets_dropped_and_restored_filters_and_nothing_else(consumers):
    net, x, optimizer, cycle = started("generator", "adam", consumers=consumers)
    fit(net, x, optimizer, 2)
    weights = {name: net.get_submodule(name).weight for name in cycle.keep}
    before = {name: optimizer.state[weight]["exp_avg"].clone() for name, weight in weights.items()}
    dropped = cycle.step().filters
    for name, weight in weights.items():
        rest = cycle.keep[name]
        slot = optimizer.state[weight]["exp_avg"]
        assert torch.equal(slot[:, rest], before[name][:, rest])
        assert not slot[:, ~rest].any()
    fit(net, x, optimizer, 1)
    before = {name: optimizer.state[weight]["exp_avg"].clone() for name, weight in weights.items()}
    cycle.step()
    # The second layer reads the first; the last one reads the second.
    read = {"3": dropped.get("0", []), "0": []}
    for name, weight in weights.items():
        slot = optimizer.state[weight]["exp_avg"]
        forgotten = torch.zeros(slot.shape[:2], dtype=torch.bool)
        forgotten[:, dropped.get(name, [])] = True
        forgotten[read[name]] = True
        assert not slot[forgotten].any()
        assert torch.equal(slot[~forgotten], before[name][~forgotten])
