import copy
import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nets import Drawn
from regrow.restarts.redo import redo
from relatives import OPTIMIZERS, X, net, tensors, train

pytestmark = pytest.mark.devices


def two_layers():
    """Four hidden units that are 4, 0, 1 and 3 for the input 1, and a reader."""
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0], [-5], [1], [3]]))
        model[0].bias.zero_()
    return model


ONE = torch.ones(3, 1)


def test_the_scores_by_hand():
    model = two_layers()
    record = redo(model, batches=[ONE], example_inputs=ONE, threshold=0)
    assert record["scores"] == {"0": [2, 0, 0.5, 1.5]}
    assert record["dormant"] == {"0": [1]}
    assert record["left_out"] == {"2": "no linear layer reads its units one by one"}
    assert record == json.loads(json.dumps(record))
    assert model[0].weight[[0, 2, 3]].flatten().tolist() == [4, 1, 3]
    assert abs(float(model[0].weight[1].detach())) <= 1
    assert not model[2].weight[:, 1].any()
    assert model[2].weight[:, [0, 2, 3]].all()


def test_batches_count_by_their_pictures_and_signs_do_not_cancel():
    model = two_layers()
    with torch.no_grad():
        model[0].weight[1] = -1
    record = redo(model, batches=[ONE, -2 * ONE[:1]], example_inputs=ONE, threshold=0)
    # E|h|: 3·4/4, 2·1/4, 3·1/4, 3·3/4, of which the mean is 1.625
    scores = torch.tensor(record["scores"]["0"]) * 1.625
    torch.testing.assert_close(scores, torch.tensor([3, 0.5, 0.75, 2.25]))
    assert record["dormant"] == {}


def plain_scores(model, x):
    """Hooks on the inputs of the readers, one by one."""
    found = {}
    for layer, reader in (("0", model[3]), ("3", model[7]), ("7", model[10])):
        seen = []
        handle = reader.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            model.eval()(x)
        handle.remove()
        h = seen[0].abs()
        width = len(model.get_submodule(layer).weight)
        each = h.mean((0, 2, 3)) if h.dim() == 4 else h.mean(0).view(width, -1).mean(1)
        found[layer] = each / each.mean()
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_scores_of_a_plain_loop_and_the_memory_of_the_optimizer(name):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 4)
    expected = plain_scores(model, X)
    model.train()
    before = tensors(model)
    memory = copy.deepcopy(optimizer.state_dict()["state"])
    loader = DataLoader(TensorDataset(X, torch.arange(8)), batch_size=4) if X.device.type == "cpu" else [X]
    record = redo(model, optimizer, batches=loader, example_inputs=X[:1], threshold=0.6)
    assert model.training
    for layer, scores in expected.items():
        torch.testing.assert_close(torch.tensor(record["scores"][layer]), scores)
        dormant = (scores <= 0.6).nonzero().flatten().tolist()
        assert record["dormant"].get(layer, []) == dormant
    assert sum(map(len, record["dormant"].values())) >= 3
    slot = "momentum_buffer" if name == "momentum" else "exp_avg"
    for place, (parameter_name, parameter) in enumerate(model.named_parameters()):
        moved = parameter != before[parameter_name]
        now, then = optimizer.state[parameter][slot], memory[place][slot]
        assert not now[moved].any()
        # the others are kept, but for entries that were drawn the same, as 0 for 0
        assert torch.equal(now[~moved], then[~moved]) or not now[~moved].all()
    rows = record["dormant"].get("7", [])
    assert not model[10].weight[:, rows].any()
    train(model, optimizer, 1)


def test_a_layer_that_is_dead_as_a_whole_is_drawn_anew():
    model = two_layers()
    with torch.no_grad():
        model[0].weight.fill_(-1)
    record = redo(model, batches=[ONE], example_inputs=ONE)
    assert record["dormant"] == {"0": [0, 1, 2, 3]}
    assert not model[2].weight.any()


def test_a_layer_that_no_batch_reaches_is_left_alone():
    model = Drawn(lambda s, x: s.b(s.a(x).relu()) if x[0, 0] > 0 else x, a=nn.Linear(1, 4), b=nn.Linear(4, 1))
    before = tensors(model)
    record = redo(model, batches=[-ONE], example_inputs=ONE, threshold=10)
    assert record["left_out"]["a"] == "no batch reaches the layers that read it"
    assert record["dormant"] == record["scores"] == {}
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_statistics_and_the_generator_are_left_as_they_were():
    model = net()
    state, before = torch.get_rng_state(), tensors(model)
    redo(model, batches=[X], example_inputs=X[:1], threshold=0)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(model[1].running_mean, before["1.running_mean"])
    assert model[8].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": -1}, "threshold must be"),
        ({"threshold": float("nan")}, "threshold must be"),
        ({"batches": X}, "batches is an iterable of batches"),
        ({"batches": []}, "no batch"),
        ({"batches": [X[:, :2]]}, "fails on a batch"),
        ({"batches": [X * float("nan")]}, "NaN or infinite values behind '0'"),
        ({"example_inputs": None}, "example_inputs"),
        ({"seed": "x"}, "seed"),
        ({"optimizer": 1}, "takes as optimizer"),
        ({"model": "one layer"}, "no layer is left to work on"),
        ({"fresh": nn.Linear(1, 1)}, "fresh does not fit"),
    ],
)
def test_bad_arguments_change_nothing(change, message):
    model = net()
    before = tensors(model)
    given = {"model": model, "optimizer": None, "batches": [X], "example_inputs": X[:1]} | change
    if given["model"] == "one layer":
        given["model"] = nn.Sequential(nn.Conv2d(3, 2, 1))
    with pytest.raises(ValueError, match=message):
        redo(**given)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
