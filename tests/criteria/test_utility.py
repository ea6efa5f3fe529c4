"""The contribution utility of filters, by hand and against the numbers of a pass."""

import pytest
import torch
from torch import Tensor, nn

from regrow import score

pytestmark = pytest.mark.devices


class Two(nn.Module):
    """A linear layer reads two filters: one hands the picture on, one makes its negative, doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        self.head = nn.Linear(2, 3, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, -2.0]).view(2, 1, 1, 1))
            self.head.weight.copy_(torch.tensor([[1.0, 1.0], [-2.0, 0.0], [0.0, 0.5]]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.conv(x)).mean((2, 3)))
        return out


def test_by_hand() -> None:
    model = Two()
    # Means behind the ReLU: 3 and 0 for the first picture, 0 and 4 for the second.
    batches = [torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), -2.0)]
    # Outgoing weights: 1 + 2 = 3 and 1 + 0.5 = 1.5; utilities 1.5 · 3 = 4.5 and 2 · 1.5 = 3, of mean 3.75.
    expected = [4.5 / 3.75, 3 / 3.75]
    found = score(model, "utility", batches=batches)["conv"]
    assert found.tolist() == pytest.approx(expected)
    together = score(model, "utility", batches=[torch.cat(batches)])["conv"]
    assert together.tolist() == pytest.approx(expected)


def test_a_flattened_channel_counts_at_all_its_places() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    x = torch.randn(5, 1, 4, 4)
    with torch.no_grad():
        arriving = model[:3](x).abs().mean(0).view(3, 4)
        weights = model[3].weight.abs().sum(0).view(3, 4)
    utility = (arriving * weights).sum(1)
    found = score(model, "utility", batches=[x])["0"]
    assert torch.allclose(found.to(utility), utility / utility.mean(), rtol=1e-5)


def test_a_silent_filter_and_one_that_nothing_reads_have_utility_0() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = -1
        model[2].weight[:, 2] = 0
    found = score(model, "utility", batches=[torch.randn(4, 1, 8, 8)])
    assert found["0"][1] == found["0"][2] == 0
    assert (found["0"][[0, 3]] > 0).all()
    assert found["0"].mean().item() == pytest.approx(1)
    # No layer reads the last convolution, so nothing is known of its filters.
    assert found["2"].tolist() == [0, 0]


def test_every_filter_of_a_sum_gets_all_of_it() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1)
            self.head = nn.Conv2d(2, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(torch.relu(self.left(x) + self.right(x)))
            return out

    torch.manual_seed(1)
    found = score(Sum(), "utility", batches=[torch.randn(3, 1, 4, 4)])
    assert torch.equal(found["left"], found["right"])
    assert found["left"].mean().item() == pytest.approx(1)
