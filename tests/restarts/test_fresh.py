import pytest
import torch
from torch import nn

from regrow.restarts.fresh import drawn_rows, fresh_values
from regrow.restarts.seeds import drawing, seed_of
from relatives import X, net, train

pytestmark = pytest.mark.devices


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(3, 5, 2), nn.ConvTranspose2d(3, 5, 2)])
def test_rows_are_drawn_as_the_layer_draws_them(layer):
    bound = (5 * 4 if isinstance(layer, nn.ConvTranspose2d) else layer.weight[0].numel()) ** -0.5
    rows = torch.cat([drawn_rows(layer, 3, seed) for seed in range(40)])
    assert rows.shape[0] == 120
    assert rows[0].shape == (layer.weight[0] if layer.weight.shape[0] == 5 else layer.weight[:, 0]).shape
    assert 0.95 * bound < float(rows.abs().max()) <= bound
    assert abs(float(rows.mean())) < 0.1 * bound
    assert torch.equal(drawn_rows(layer, 3, 1), drawn_rows(layer, 3, 1))
    assert not torch.equal(drawn_rows(layer, 3, 1), drawn_rows(layer, 3, 2))


class Own(nn.Linear):
    def reset_parameters(self):
        nn.init.constant_(self.weight, 7)


def test_a_layer_of_ones_own_draws_as_it_says():
    assert (drawn_rows(Own(3, 4), 2, 0) == 7).all()


def test_values_are_drawn_once_and_leave_model_and_generator_alone():
    model = net()
    train(model, torch.optim.SGD(model.parameters(), 0.1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    one, two = fresh_values(model, 3), fresh_values(model, 3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a[2], b[2]) for a, b in zip(one.parameters, two.parameters, strict=True))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert [name for name, *_ in one.buffers] == [
        f"{norm}.{kind}"
        for norm in ("1", "8")
        for kind in ("running_mean", "running_var", "num_batches_tracked")
    ]
    assert X.dtype == torch.float32


def test_a_norm_without_weights_has_fresh_statistics():
    norm = nn.BatchNorm2d(3, affine=False)
    norm(X)
    found = fresh_values(nn.Sequential(nn.Conv2d(3, 3, 1), norm), 0)
    assert next(name for name, *_ in found.buffers) == "1.running_mean"
    assert not found.buffers[0][2].any()


def test_seeds():
    assert len({seed_of(seed, number) for seed in range(5) for number in range(5)}) == 25
    with drawing(0):
        one = torch.rand(1)
    torch.manual_seed(0)
    assert not torch.equal(one, torch.rand(1))
