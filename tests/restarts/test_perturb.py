import copy
import json

import pytest
import torch
from torch import nn

import regrow
from optimizers import MADGRAD, ScheduleFreeSGD
from regrow.restarts.perturb import reinitialize, shrink_and_perturb
from regrow.restarts.seeds import drawing
from relatives import OPTIMIZERS, X, net, tensors, train

pytestmark = pytest.mark.devices


def plain(model, seed):
    """A copy of the model as its modules draw it, one after the other, from one seed."""
    twin = copy.deepcopy(model).cpu()
    with drawing(seed):
        for module in twin.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return twin


def test_shrink_and_perturb_equals_a_plain_loop():
    model = net()
    train(model, OPTIMIZERS["momentum"](model.parameters()), 3)
    before, drawn = tensors(model), plain(model, 7).state_dict()
    record = shrink_and_perturb(model, shrink=0.5, perturb=0.25, seed=7)
    trained = [name for name, _ in model.named_parameters()]
    for name, tensor in model.state_dict().items():
        new = drawn[name].to(tensor)
        expected = 0.5 * before[name] + 0.25 * new if name in trained else new
        torch.testing.assert_close(tensor, expected)
    assert record == json.loads(json.dumps(record))
    assert record["parameters"] == trained
    assert record["left_out"] == {}
    # a norm's weight 1 takes part, and its statistics begin anew
    torch.testing.assert_close(model[1].weight, 0.5 * before["1.weight"] + 0.25)
    assert not model[1].running_mean.any()
    assert model[1].num_batches_tracked == 0


def test_by_hand():
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0], [-4.0]]))
    fresh = nn.Linear(1, 2)
    with torch.no_grad():
        fresh.weight.copy_(torch.tensor([[10.0], [20.0]]))
        fresh.bias.copy_(model.bias)
    shrink_and_perturb(model, shrink=0.4, perturb=0.1, fresh=fresh)
    torch.testing.assert_close(model.weight, torch.tensor([[1.8], [0.4]]))
    assert fresh.weight.flatten().tolist() == [10, 20]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_with_a_new_optimizer(name):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 3)
    shrink_and_perturb(model, optimizer, seed=1)
    twin = copy.deepcopy(model)
    train(model, optimizer, 3)
    train(twin, OPTIMIZERS[name](twin.parameters()), 3)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", [torch.optim.Rprop, torch.optim.RMSprop, torch.optim.Adagrad])
def test_other_optimizers_of_pytorch_begin_anew_too(kind):
    model = net()
    optimizer = kind(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    reinitialize(model, optimizer)
    twin = copy.deepcopy(model)
    train(model, optimizer, 2)
    train(twin, kind(twin.parameters(), lr=0.01), 2)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("kind", "slot"), [(ScheduleFreeSGD, "z"), (MADGRAD, "x0")])
def test_slots_that_hold_copies_take_the_new_weights(kind, slot):
    model = net()
    optimizer = kind(model.parameters())
    train(model, optimizer, 1)
    record = reinitialize(model, optimizer, last=1)
    head = model[10]
    assert torch.equal(optimizer.state[head.weight][slot], head.weight)
    assert not torch.equal(optimizer.state[model[7].weight][slot], torch.zeros_like(model[7].weight))
    assert len(record["notes"]) == 1
    assert "copies of the weights" in record["notes"][0]


def test_a_new_head_is_the_last_layer_alone():
    model = net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train(model, optimizer, 2)
    before = tensors(model)
    steps = {id(p): optimizer.state[p]["step"].clone() for p in model.parameters()}
    record = reinitialize(model, optimizer, last=1, seed=3)
    assert record["parameters"] == ["10.weight", "10.bias"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) is not name.startswith("10."), name
    assert optimizer.state[model[10].weight]["step"] == 0
    assert not optimizer.state[model[10].weight]["exp_avg"].any()
    assert optimizer.state[model[7].weight]["step"] == steps[id(model[7].weight)] == 2
    with drawing(3):
        twin = nn.Linear(5, 3, device="cpu")
    assert torch.equal(model[10].weight.cpu(), twin.weight)


def test_the_last_layers_take_their_norms_with_them():
    model = net()
    train(model, OPTIMIZERS["momentum"](model.parameters()), 2)
    assert reinitialize(model, last=2)["parameters"] == [
        f"{name}.{kind}" for name in ("7", "8", "10") for kind in ("weight", "bias")
    ]
    assert model[8].weight.tolist() == [1] * 5
    assert not model[8].running_mean.any()
    assert model[1].running_mean.any()


def test_layers_by_name_take_the_norms_behind_them_with_them():
    model = nn.Sequential()
    model.add_module("body", net())
    model.add_module("head", nn.Linear(3, 2))
    train(model, OPTIMIZERS["momentum"](model.parameters()), 1)
    assert reinitialize(model, layers=["body.0", "head"])["parameters"] == [
        *("body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "head.weight", "head.bias"),
    ]
    assert len(reinitialize(model, layers="body")["parameters"]) == 12


def test_from_scratch_equals_a_plain_loop_and_leaves_the_generator_alone():
    model = net()
    train(model, OPTIMIZERS["momentum"](model.parameters()), 2)
    expected, state = plain(model, 5).state_dict(), torch.get_rng_state()
    reinitialize(model, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), expected[name].cpu()), name


def test_a_model_that_was_built_from_the_same_seed_does_not_begin_as_it_began():
    model = net()
    before = tensors(model)
    reinitialize(model, seed=0)
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_a_fresh_model_gives_its_values():
    model, fresh = net(), net()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.normal_()
    reinitialize(model, fresh=fresh)
    for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one is not other


class Own(nn.Module):
    """Weights that no module can draw, shared weights, and frozen ones."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 3))
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.fixed = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x):
        return self.fixed(self.two(self.one(x + self.token)))


def test_what_cannot_be_drawn_is_named_and_shared_weights_come_once():
    model = Own()
    before = tensors(model)
    record = reinitialize(model)
    assert record["parameters"] == ["one.weight", "one.bias", "two.bias"]
    assert record["left_out"]["token"] == "Own has no reset_parameters: pass fresh=, a newly built model"
    assert "frozen" in record["left_out"]["fixed.weight"]
    assert torch.equal(model.token, before["token"])
    assert torch.equal(model.fixed.weight, before["fixed.weight"])
    assert model.one.weight is model.two.weight
    assert not torch.equal(model.one.weight, before["one.weight"])
    assert "token" in reinitialize(model, fresh=Own())["parameters"]


def test_a_scalar_parameter_is_forgotten_too():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            return self.scale * super().forward(x)

    model = Scaled()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train(model, optimizer, 2, torch.ones(3, 2))
    reinitialize(model, optimizer)
    assert optimizer.state[model.scale]["exp_avg"] == 0


def test_old_gradients_are_gone():
    model = net()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    train(model, optimizer, 1)
    reinitialize(model, optimizer, last=1)
    assert not model[10].weight.grad.any()
    assert model[7].weight.grad.any()


@pytest.mark.parametrize("call", [shrink_and_perturb, reinitialize])
def test_bad_arguments_change_nothing(call):
    model = net()
    before = tensors(model)
    bad = [
        ((None,), {}, "takes a model"),
        ((model, "sgd"), {}, "takes as optimizer"),
        ((model,), {"seed": 0.5}, "seed must be"),
        ((model,), {"fresh": nn.Linear(2, 2)}, "fresh does not fit"),
        ((model,), {"fresh": model}, "of the model itself"),
        ((model,), {"fresh": nn.Sequential(*net(), nn.Linear(2, 2))}, "has no '11.weight'"),
        ((nn.Sequential(nn.ReLU()),), {}, "no parameter is left"),
    ]
    if call is shrink_and_perturb:
        bad += [((model,), {"shrink": -1}, "shrink"), ((model,), {"perturb": float("nan")}, "perturb")]
    else:
        bad += [
            ((model,), {"last": 0}, "last must be a whole number from 1 to 4"),
            ((model,), {"last": True}, "last"),
            ((model,), {"last": 5}, "last"),
            ((model,), {"layers": ["12"]}, "no layer is named '12'"),
            ((model,), {"layers": 3}, "layers"),
            ((model,), {"layers": ["10"], "last": 1}, "not both"),
        ]
    for args, named, message in bad:
        with pytest.raises(ValueError, match=message):
            call(*args, **named)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_they_are_public():
    assert regrow.shrink_and_perturb is shrink_and_perturb
    assert regrow.reinitialize is reinitialize
    assert X.shape[1] == 3
