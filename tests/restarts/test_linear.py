import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nets import Drawn
from regrow.restarts.linear import linear_readers

pytestmark = pytest.mark.devices
X = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))


def found(model, x=X):
    readers, left_out = linear_readers(model, x)
    shown = {name: (sorted(each.norms), sorted(each.consumers)) for name, each in readers.items()}
    assert not readers.keys() & left_out.keys()
    return shown, left_out


def mlp(act=None, norm=None):
    return nn.Sequential(
        nn.Linear(6, 5), norm or nn.Identity(), act or nn.ReLU(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)
    )


@pytest.mark.parametrize("act", [nn.ReLU, nn.Sigmoid, nn.GELU, lambda: nn.PReLU(5), nn.Hardtanh, nn.Dropout])
def test_a_perceptron(act):
    shown, left_out = found(mlp(act()))
    assert shown == {"0": ([], ["3"]), "3": ([], ["5"])}
    assert left_out == {"5": "no linear layer reads its units one by one"}


def test_a_norm_behind_a_layer_and_behind_its_activation():
    shown, _ = found(mlp(norm=nn.BatchNorm1d(5)))
    assert shown["0"] == (["1"], ["3"])
    shown, _ = found(mlp(act=nn.Sequential(nn.ReLU(), nn.BatchNorm1d(5))))
    assert shown["0"] == (["2.1"], ["3"])


def test_two_readers_and_functions_between():
    model = Drawn(
        lambda s, x: s.one(h := F.relu(s.a(x)) * 2) + s.two(h), a=nn.Linear(6, 4), one=nn.Linear(4, 3),
        two=nn.Linear(4, 3),
    )  # fmt: skip
    assert found(model)[0] == {"a": ([], ["one", "two"])}


def test_a_perceptron_of_tokens():
    assert found(mlp(), torch.randn(2, 4, 6))[0].keys() == {"0", "3"}


@pytest.mark.parametrize(
    ("draw", "why"),
    [
        (lambda s, x: s.b(s.a(x).softmax(-1)), "'b' does not read its units one by one"),
        (lambda s, x: s.b(F.layer_norm(s.a(x), (6,))), "'b' does not read its units one by one"),
        (lambda s, x: s.b(s.a(x).flip(-1)), "'b' does not read its units one by one"),
        (lambda s, x: s.b(torch.roll(s.a(x), 1, -1)), "'b' does not read its units one by one"),
        (lambda s, x: s.b(x + s.a(x)), "mixed with other numbers"),
        (lambda s, x: s.b(s.a(x) * s.c(x).sigmoid()), "mixed with other numbers"),
        (lambda s, x: (s.b(h := s.a(x)), h), "something reads it beside the linear layers"),
        (lambda s, x: s.b(h := s.a(x)) + h.mean(), "something reads it beside the linear layers"),
        (lambda s, x: s.b(torch.cat([s.a(x)[..., :3], x[..., :3]], -1)), "no linear layer reads all"),
        (lambda s, x: s.b(x), "example_inputs do not reach it"),
        (lambda s, x: s.b(s.a(s.a(x))), "it runs more than once"),
    ],
)
def test_what_is_left_alone(draw, why):
    model = Drawn(draw, a=nn.Linear(6, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 6))
    shown, left_out = found(model)
    assert "a" not in shown
    assert why in left_out["a"]


def test_frozen_shared_and_computed_weights():
    model = mlp()
    model[0].requires_grad_(False)
    assert found(model)[1]["0"] == "its weight is frozen (requires_grad is False)"
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[4].weight = model[2].weight
    _, left_out = found(model)
    assert left_out["2"] == left_out["4"] == "it shares its weight with another layer"
    assert left_out["0"] == "'2', which reads it, shares or computes its weight"
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[3])
    _, left_out = found(model)
    assert "which reads it, shares or computes its weight" in left_out["0"]
    assert "is computed from other parameters" in left_out["3"]


def test_weights_of_0_hide_no_reader():
    model = mlp()
    nn.init.zeros_(model[3].weight)
    nn.init.zeros_(model[5].weight)
    assert found(model)[0] == {"0": ([], ["3"]), "3": ([], ["5"])}


def test_layers_of_equal_width_follow_each_other():
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.ReLU())])
    assert found(model)[0] == {"0": ([], ["2"]), "2": ([], ["4"]), "4": ([], ["6"])}


@pytest.mark.gives_up
def test_a_model_that_bears_no_noise():
    def draw(s, x):
        h = s.a(x)
        if h.abs().max() > 0.5:
            raise RuntimeError("too large")
        return s.b(h)

    model = Drawn(draw, a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    nn.init.zeros_(model.a.weight)
    assert "noise" in found(model)[1]["a"]


def test_the_model_and_the_generator_are_left_as_they_were():
    model, state = mlp(norm=nn.BatchNorm1d(5)), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found(model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert model.training
