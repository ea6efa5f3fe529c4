"""Norms behind a sum that no filter writes to any more are silent for the sub-phase."""

import pytest
import torch
from torch import nn

from cycles import batch, fit, load, repr_on, save, sgd
from nets import Ahead, unsettled


def ahead(seed=0):
    """The filters 1 of its three convolutions point where filter 0 does: one of each two is dropped."""
    torch.manual_seed(seed)
    model = Ahead()
    with torch.no_grad():
        for conv in (model.stem, model.conv1, model.conv2):
            for i, row in enumerate(torch.eye(conv.weight[0].numel())[:4]):
                conv.weight[i] = row.view_as(conv.weight[i])
            conv.weight[1] = 0.9 * conv.weight[2] + 0.1 * conv.weight[0]
    return unsettled(model, 0.2).train()


def norms_of(model, channel, keys=("weight", "bias", "running_mean", "running_var")):
    return [[getattr(norm, key)[channel].item() for key in keys] for norm in (model.norm2, model.norm3)]


@pytest.mark.devices
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_channel_that_nothing_writes_to_leaves_the_norms_behind_the_sum_for_the_sub_phase(kind, compact):
    model = ahead()
    make = {"sgd": sgd, "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1)}
    optimizer = make[kind](model)
    cycle = repr_on(model, optimizer, fraction=0.25, scope="layer", skip_first=False, compact=compact)
    fit(model, optimizer, 0)
    assert cycle.step() is None
    fit(model, optimizer, 1)
    before = norms_of(model, 1)
    dropped = cycle.step().filters
    assert dropped == {"stem": [1], "conv1": [1], "conv2": [1]}
    assert norms_of(model, 1, ("weight", "bias", "running_mean")) == [[0, 0, 0]] * 2
    others = norms_of(model, 0)
    for step in (2, 3):
        fit(model, optimizer, step)
        assert norms_of(model, 1, ("weight", "bias")) == [[0, 0]] * 2
        model.zero_grad()
        nn.functional.cross_entropy(model(batch(9)[0]), batch(9)[1]).backward()
        assert all(float(p.grad[1]) == 0 for n in (model.norm2, model.norm3) for p in n.parameters())
        event = cycle.step()
    assert event.kind == "restore"
    assert norms_of(model, 1) == before
    assert norms_of(model, 0) != others


def test_a_channel_that_something_still_writes_to_keeps_its_norm():
    model = ahead()
    with torch.no_grad():
        model.conv1.weight[1] = torch.eye(model.conv1.weight[0].numel())[20].view_as(model.conv1.weight[1])
        model.conv1.weight[3] = 0.9 * model.conv1.weight[2]
    cycle = repr_on(model, fraction=0.25, scope="layer", skip_first=False, full=1, sub=1)
    before = norms_of(model, 1)
    dropped = cycle.step().filters
    assert dropped["stem"] == dropped["conv2"] == [1]
    assert dropped["conv1"] != [1]
    assert norms_of(model, 1) == before


def test_the_sub_phase_of_such_a_net_goes_on_from_a_state(tmp_path):
    def begin(seed):
        model = ahead(seed)
        optimizer = sgd(model)
        return model, optimizer, repr_on(model, optimizer, fraction=0.25, scope="layer", skip_first=False)

    model, optimizer, cycle = begin(0)
    for step in range(3):
        fit(model, optimizer, step)
        cycle.step()
    assert cycle.state_dict()["sub_phase"]["silenced"] == {"norm2": [1], "norm3": [1]}
    save(tmp_path / "state.pt", model, optimizer, cycle)
    again, again_optimizer, again_cycle = begin(5)
    load(tmp_path / "state.pt", again, again_optimizer, again_cycle, "cycle-model-optimizer")
    for step in range(3, 6):
        for net, own, repr_ in ((model, optimizer, cycle), (again, again_optimizer, again_cycle)):
            fit(net, own, step)
            repr_.step()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    state = torch.load(tmp_path / "state.pt", weights_only=True)["cycle"]
    state["sub_phase"]["silenced"]["norm2"] = [7]
    with pytest.raises(ValueError, match="'norm2', a norm whose channels it names"):
        again_cycle.load_state_dict(state)


@pytest.mark.devices
def test_such_a_net_trains_alike_compact_and_masked():
    found = []
    for compact in (True, False):
        model = ahead()
        optimizer = sgd(model)
        cycle = repr_on(model, optimizer, fraction=0.25, scope="layer", skip_first=False, compact=compact)
        for step in range(6):
            fit(model, optimizer, step)
            cycle.step()
        found.append(model.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-4, atol=1e-5)
