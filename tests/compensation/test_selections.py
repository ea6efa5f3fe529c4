"""Layers behind a selection of rows, such as a detector's proposals: both networks select the same rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regrow.compensation.compensate import compensate
from regrow.compensation.selections import Selections

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
KEEP = {"first": torch.tensor([True, True, False, True, True, True])}


class Selecting(nn.Module):
    """A head on the places of each picture that a convolution scores highest."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.score, self.head = nn.Conv2d(6, 1, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu()).relu()
        scores, rows = self.score(y).flatten(), y.movedim(1, 3).flatten(0, 2)
        above = scores > scores.mean()
        if self.how == "topk":
            rows = rows[scores.topk(len(scores) // 8).indices]
        elif self.how == "sort":
            rows = rows[scores.sort(descending=True).indices[: len(scores) // 8]]
        elif self.how == "where":
            rows = rows[torch.where(above)[0]]
        elif self.how == "mask":
            rows = rows[above]
        elif self.how == "masked_select":
            rows = rows.masked_select(above[:, None]).unflatten(0, (-1, 6))
        elif self.how == "number":
            rows = rows[: int(above.sum())]
        return self.head(rows)


@pytest.mark.parametrize("batches", [[X], [X[:40], X[40:, :, :6]]], ids=["one pass", "a pass for each layer"])
@pytest.mark.parametrize("how", ["topk", "sort", "where", "mask", "masked_select"])
def test_the_head_is_compared_on_the_rows_that_the_uncut_network_selects(
    how: str, batches: list[Tensor]
) -> None:
    # On rows of another order topk leaves 0.48, and the others have another number of rows.
    done = compensate(Selecting(how), KEEP, batches, example_inputs=X[:1])
    assert done["unfolded"] == {}
    assert done["layers"]["head"]["how"] == "least squares"
    assert done["layers"]["head"]["error"] < 0.8
    if how == "topk":
        assert done["layers"]["head"]["error"] < 0.3


def test_a_head_with_another_number_of_rows_is_left_alone() -> None:
    net = Selecting("number")
    before = net.head.weight.detach().clone()
    done = compensate(net, KEEP, [X], example_inputs=X[:1])
    assert done["unfolded"] == {"head": "the smaller network does not call it as the other does"}
    assert torch.equal(net.head.weight, before)
    assert done["layers"]["second"]["how"] == "least squares"


def test_selections_are_repeated_until_the_passes_part() -> None:
    selections, scores = Selections(), torch.tensor([3.0, 1.0, 2.0])
    with selections.noted():
        scores.topk(2)
        with selections.paused():
            torch.nonzero(scores > 1)
        scores.sort()
    with selections.repeated():
        again = (-scores).topk(2)
        assert again.indices.tolist() == [0, 2]  # of the noted pass
        assert again.values.tolist() == [-1, -2]  # of its own
        assert torch.nonzero(scores > 2).tolist() == [[0]]  # the noted pass sorted here
        assert (-scores).sort().indices.tolist() == [0, 2, 1]
    assert (-scores).topk(1).indices.tolist() == [1]


def test_a_mask_that_makes_an_activation_is_the_network_s_own() -> None:
    selections, x = Selections(), torch.tensor([[1.0, -1.0]])
    with selections.noted():
        y = x.clone()
        y[y < 0] = 0
    with selections.repeated():
        z = -x
        z[z < 0] = 0
    assert z.tolist() == [[0, 1]]
