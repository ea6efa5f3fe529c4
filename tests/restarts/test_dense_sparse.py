import copy
import gc
import io

import pytest
import torch
from torch import nn

from optimizers import MADGRAD, ScheduleFreeSGD
from regrow.marks import states_of
from regrow.restarts.dense_sparse import DenseSparseDense
from relatives import OPTIMIZERS, net, tensors, train

pytestmark = pytest.mark.devices


def test_the_smallest_weights_of_each_layer_by_hand():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.5, -0.1], [0.3, -0.9]]))
        model[1].weight.copy_(torch.tensor([[0.02, 0.01]]))
    method = DenseSparseDense(model, torch.optim.SGD(model.parameters(), 0.1), fraction=0.5)
    record = method.sparsify()
    assert record == {
        "version": 1, "kind": "sparsify", "held": {"0.weight": 2, "1.weight": 1}, "notes": [],
    }  # fmt: skip
    torch.testing.assert_close(model[0].weight.detach(), torch.tensor([[0.5, 0], [0, -0.9]]))
    torch.testing.assert_close(model[1].weight.detach(), torch.tensor([[0.02, 0]]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_held_weights_stay_at_0_and_train_again_afterwards(name):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    method = DenseSparseDense(model, optimizer)
    train(model, optimizer, 3)
    record = method.sparsify()
    assert record["held"] == {"0.weight": 32, "3.weight": 64, "7.weight": 36, "10.weight": 4}
    assert method.sparse
    masks = {name: model.get_parameter(name) == 0 for name in record["held"]}
    for _ in range(3):
        train(model, optimizer, 1)
        for layer, mask in masks.items():
            parameter = model.get_parameter(layer)
            assert torch.equal(parameter == 0, mask)
            assert not parameter.grad[mask].any()
    assert method.densify()["held"] == record["held"]
    assert not method.sparse
    slot = "momentum_buffer" if name == "momentum" else "exp_avg"
    for layer, mask in masks.items():
        assert not optimizer.state[model.get_parameter(layer)][slot][mask].any()
    train(model, optimizer, 2)
    for layer, mask in masks.items():
        moved = model.get_parameter(layer)[mask] != 0
        assert moved.float().mean() > 0.5
    method.sparsify()  # another round
    method.densify()


@pytest.mark.parametrize("kind", [ScheduleFreeSGD, MADGRAD])
def test_slots_with_copies_do_not_pull_the_weights_back(kind):
    model = net()
    optimizer = kind(model.parameters())
    method = DenseSparseDense(model, optimizer)
    train(model, optimizer, 4)
    notes = method.sparsify()["notes"]
    assert any("copies of the weights" in note for note in notes)
    mask = model[3].weight == 0
    slot = "z" if kind is ScheduleFreeSGD else "x0"
    assert not optimizer.state[model[3].weight][slot][mask].any()
    train(model, optimizer, 2)
    assert torch.equal(model[3].weight == 0, mask)


def test_a_plain_loop_with_masks_gives_the_same():
    model = net()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    method = DenseSparseDense(model, optimizer)
    method.sparsify()
    train(model, optimizer, 3)
    masks = {}
    for name, parameter in twin.named_parameters():
        if name in ("0.weight", "3.weight", "7.weight", "10.weight"):
            count = int(0.3 * parameter.numel())
            smallest = parameter.detach().abs().flatten().sort(stable=True).indices[:count]
            masks[name] = torch.ones(parameter.numel())
            masks[name][smallest] = 0
            parameter.data.mul_(masks[name].view_as(parameter))
    other = torch.optim.SGD(twin.parameters(), 0.05)
    for _ in range(3):
        train(twin, other, 1)
        for name, mask in masks.items():
            twin.get_parameter(name).data.mul_(mask.view_as(twin.get_parameter(name)))
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_the_state_is_marked_and_ends():
    model = net()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    method = DenseSparseDense(model, optimizer)
    assert states_of(model) == {}
    method.sparsify()
    assert states_of(model) == {"sparse": "0"}
    for twin in (copy.deepcopy(model), torch.load(saved(model), weights_only=False)):
        assert states_of(twin) == {}
    with pytest.raises(ValueError, match="refused, because the model has its smallest weights held at 0"):
        DenseSparseDense(model, optimizer)
    with pytest.raises(ValueError, match="called twice"):
        method.sparsify()
    method.remove()
    assert states_of(model) == {}
    train(model, optimizer, 1)
    assert model[3].weight.all()
    for call in (method.sparsify, lambda: method.load_state_dict(method.state_dict())):
        with pytest.raises(ValueError, match="has been removed"):
            call()
    with pytest.raises(ValueError, match="no weights are held"):
        method.densify()
    gc.collect()


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_same_bit_for_bit(name):
    one, other = net(), net()
    optimizer, again = (OPTIMIZERS[name](model.parameters()) for model in (one, other))
    method, resumed = DenseSparseDense(one, optimizer), DenseSparseDense(other, again)
    train(one, optimizer, 2)
    method.sparsify()
    train(one, optimizer, 1)
    file = io.BytesIO()
    torch.save([one.state_dict(), optimizer.state_dict(), method.state_dict()], file)
    file.seek(0)
    model_state, optimizer_state, state = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    other.load_state_dict(model_state)
    again.load_state_dict(optimizer_state)
    for model, opt, each in ((one, optimizer, method), (other, again, resumed)):
        train(model, opt, 2)
        each.densify()
        train(model, opt, 2)
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_bad_states_change_nothing():
    model = net()
    method = DenseSparseDense(model, OPTIMIZERS["momentum"](model.parameters()))
    method.sparsify()
    state, before = method.state_dict(), tensors(model)
    method.densify()
    bad = [
        ({"version": 3}, "of version 1, got 3"),
        ({"settings": {"fraction": 0.5}}, r"fraction=0.5 \(here 0.3\)"),
        ({"held": {"0.weight": state["held"]["0.weight"]}}, "weights of other layers"),
        ({"held": state["held"] | {"0.weight": torch.ones(3) > 0}}, "does not fit '0.weight'"),
        ({"held": state["held"] | {"0.weight": None}}, "does not fit '0.weight'"),
        ({"held": 3}, "weights of other layers"),
        ({"copies": {"SGD.momentum_buffer": 1}}, "copies in a state"),
    ]
    for change, message in bad:
        with pytest.raises(ValueError, match=message):
            method.load_state_dict(state | change)
        assert not method.sparse
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_bad_arguments():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for fraction in (-0.1, 1, True, "x"):
        with pytest.raises(ValueError, match="fraction must be at least 0 and below 1"):
            DenseSparseDense(model, optimizer, fraction=fraction)
    with pytest.raises(ValueError, match="takes as optimizer"):
        DenseSparseDense(model, None)
    with pytest.raises(ValueError, match="found no weight"):
        DenseSparseDense(nn.BatchNorm2d(2), optimizer)
    method = DenseSparseDense(model, optimizer)
    model[3].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"'3\.weight' holds NaN"):
        method.sparsify()
    assert not method.sparse
    assert model[0].weight.all()
