import pytest
import torch
from torch import nn

from regrow.criteria.score import score

pytestmark = pytest.mark.devices

# Two filters of one weight, 1 and −2, behind which a ReLU stands, and two pictures of two positions.
PICTURES = torch.tensor([[[1.0, -3.0]], [[2.0, 4.0]]])


def toy(dim=1, **settings):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[
        dim - 1
    ]
    model = nn.Sequential(kind(1, 2, 1, bias=False, **settings), nn.ReLU())
    with torch.no_grad():
        model[0].weight.view(-1).copy_(torch.tensor([1.0, -2.0]))
    return model


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 6])
def test_both_by_hand(dim):
    # Filter 0 makes 1, −3 and 2, 4: behind the ReLU 1, 0, 2, 4. Filter 1 makes −2, 6, −4, −8: 0, 6, 0, 0.
    shape = (2, 1, *([1] * ((dim - 1) % 3)), 2)
    model, pictures = toy(dim), PICTURES.view(shape)
    assert score(model, "mean-activation", batches=[pictures])["0"].tolist() == [1.75, 1.5]
    assert score(model, "apoz", batches=[pictures])["0"].tolist() == [0.75, 0.25]


def test_a_norm_in_front_of_the_activation_by_hand():
    # (a − 1) / 2 · 4 + 1 for filter 0: 1, −7, 3, 7; for filter 1, (a − 0) / 1 · 1 − 1: −3, 5, −5, −9.
    norm = nn.BatchNorm1d(2, eps=1e-12)  # on a GPU PyTorch takes no 0
    norm.running_mean[:] = torch.tensor([1.0, 0.0])
    norm.running_var[:] = torch.tensor([4.0, 1.0])
    with torch.no_grad():
        norm.weight[:] = torch.tensor([4.0, 1.0])
        norm.bias[:] = torch.tensor([1.0, -1.0])
    model = nn.Sequential(toy()[0], norm, nn.ReLU())
    assert score(model, "mean-activation", batches=[PICTURES])["0"].tolist() == pytest.approx([2.75, 1.25])
    assert score(model, "apoz", batches=[PICTURES])["0"].tolist() == [0.75, 0.25]


@pytest.mark.parametrize("criterion", ["mean-activation", "apoz"])
def test_how_pictures_are_divided_and_labelled_plays_no_part(criterion):
    model = toy()
    whole = score(model, criterion, batches=[PICTURES])["0"].tolist()
    data = torch.utils.data.TensorDataset(PICTURES.cpu(), torch.tensor([0, 1]).cpu())
    for batches in (
        [(PICTURES, torch.tensor([0, 1]))],
        PICTURES.split(1),
        ([part] for part in PICTURES.split(1)),
        [{"input": PICTURES}],
        torch.utils.data.DataLoader(data, batch_size=1, shuffle=True),
    ):
        assert score(model, criterion, batches=batches)["0"].tolist() == whole


def test_one_picture_without_a_batch_dimension():
    assert score(toy(), "mean-activation", batches=[PICTURES[0]])["0"].tolist() == [0.5, 3]


def test_every_call_of_a_shared_layer_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = toy()

        def forward(self, x):
            return self.layer(x), self.layer(2 * x)

    assert score(Twice(), "mean-activation", batches=[PICTURES])["layer.0"].tolist() == [2.625, 2.25]


def test_a_layer_that_no_picture_reaches_has_scores_of_0():
    model = toy()
    model.register_module("aside", None)
    model.aside = nn.Conv1d(1, 3, 1)
    model.forward = lambda x: model[1](model[0](x))
    for criterion in ("mean-activation", "apoz", "taylor", "gradient", "hessian"):
        found = score(model, criterion, batches=[PICTURES], loss=lambda out, _: out.sum())
        assert found["aside"].tolist() == [0, 0, 0]
        assert found["aside"].dtype == found["0"].dtype == torch.float64


def test_pictures_that_give_nan_are_refused():
    with pytest.raises(ValueError, match=r"pictures give NaN .* 'mean-activation' in '0'"):
        score(toy(), "mean-activation", batches=[PICTURES * float("nan")])
