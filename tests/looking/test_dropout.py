import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import chain
from regrow.looking.dropout import NoDropout, stop_dropout

LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
FUNCTIONS = {
    F.dropout: (4, 5),
    F.dropout1d: (2, 4, 5),
    F.dropout2d: (2, 4, 5, 5),
    F.dropout3d: (2, 4, 5, 5, 5),
    F.alpha_dropout: (4, 5),
    F.feature_alpha_dropout: (2, 4, 5),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_dropout_layer_hands_on_what_it_reads(kind):
    x = torch.randn(8, 6, *[3] * (int(kind.__name__[7]) if kind.__name__[7:8].isdigit() else 0))
    probe = nn.Sequential(nn.Sequential(kind(0.5))).train()
    assert not torch.equal(probe(x), x)
    stop_dropout(probe)
    assert torch.equal(probe(x), x)
    assert probe[0][0].training


def test_layers_that_drop_nothing_are_left_alone():
    model = nn.Sequential(chain((2,)), nn.Dropout(0.3), nn.RReLU())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stop_dropout(model)
    assert model[1].p == 0
    assert (model[2].lower, model[2].upper) == (nn.RReLU().lower, nn.RReLU().upper)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_dropout_function_returns_its_input_while_it_is_entered(function):
    x = torch.randn(FUNCTIONS[function])
    with NoDropout():
        assert function(x, 0.9, training=True) is x
        assert function(input=x, p=0.9, training=True) is x
        assert function(x, 0.9, training=True, inplace=True) is x
    assert not torch.equal(function(x, 0.9, training=True), x)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_are_held_by_their_functions(kind):
    x, layer = torch.randn(2, 6, 3, 3, 3), kind(0.9).train()
    x = x[..., 0, 0] if kind is nn.Dropout1d else x
    with NoDropout():
        assert layer(x) is x
    assert layer.p == 0.9


def test_nothing_is_drawn_and_everything_else_runs():
    x = torch.randn(4, 3)
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.ReLU(), nn.Dropout(), nn.Linear(3, 2))
    before = torch.get_rng_state()
    with NoDropout():
        made = model(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(made, model.eval()(x))
    with NoDropout():
        drawn = torch.rand(3)
    assert not torch.equal(torch.get_rng_state(), before)
    assert len(drawn.unique()) == 3


def test_one_object_is_entered_again_and_again():
    held, x = NoDropout(), torch.ones(100)
    for _ in range(2):
        with held:
            assert F.dropout(x, 0.5).all()
        assert not F.dropout(x, 0.5).all()


def test_gradients_pass():
    x = torch.ones(50, requires_grad=True)
    with NoDropout():
        F.dropout(x * 2, 0.9).sum().backward()
    assert x.grad.tolist() == [2] * 50


@pytest.mark.parametrize("dropout", [torch.dropout, torch.alpha_dropout, torch.feature_dropout])
def test_the_functions_of_torch_itself_are_held_too(dropout):
    x = torch.ones(2, 3, 4)
    with NoDropout():
        assert dropout(x, 0.5, True) is x
