"""What ``prune`` makes of calibration batches: several inputs, one class."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import regrow

X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(32) % 3


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3), nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3)
        self.head = nn.Linear(20, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.c(self.a(x).relu()).relu(), self.b(y).relu()
        return self.head(torch.cat([x.mean((2, 3)), y.mean((2, 3))], 1))


def test_a_model_of_two_inputs_takes_pairs_of_them_with_and_without_labels() -> None:
    torch.manual_seed(0)
    net, found = TwoInputs(), []
    y = X.flip(0)
    for batch in ((X, y), ((X, y), LABELS), (X, y, LABELS), [X, y], {"x": X, "y": y}):
        cut = copy.deepcopy(net)
        regrow.prune(cut, fraction=0.3, example_inputs=(X[:1], X[:1]), calibration=[batch])
        found.append(cut.head.bias)
    assert len(found[0]) == 2
    assert not torch.equal(found[0], net.head.bias)
    assert all(torch.equal(found[0], each) for each in found)


def test_images_of_one_class_are_named() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    same = torch.full((32,), 7)
    with pytest.warns(UserWarning, match="all calibration images have the label 7") as caught:
        regrow.prune(copy.deepcopy(net), fraction=0.3, example_inputs=X[:1], calibration=[(X, same)])
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regrow.prune(copy.deepcopy(net), fraction=0.3, example_inputs=X[:1], calibration=[(X, LABELS)])
        regrow.prune(net, fraction=0.3, example_inputs=X[:1], calibration=[(X, same)], compensate=False)


def test_the_second_input_of_a_model_is_no_label() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 12, 3), nn.Linear(12, 2)

        def forward(self, x: Tensor, times: Tensor) -> Tensor:
            return self.head(self.a(x).relu().mean((2, 3)) * times[:, None])

    times = torch.full((32,), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = Scaled()
        keep = {"a": torch.arange(12) > 2}
        regrow.compensate(net, keep, [(X, times)], example_inputs=(X[:1], times[:1]))
