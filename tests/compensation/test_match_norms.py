"""Norms matched to those of another network: by hand, and exactly nothing where nothing is gone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import regrow
from nets import keep_but, unsettled
from regrow.surgery.removal import remove_filters

X = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    return unsettled(layers, lowest_bias=0.2).eval()


def moments(model: nn.Sequential, behind: int) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        values = model[: behind + 1](X).transpose(0, 1).flatten(1)
    return values.mean(1), values.var(1, unbiased=False)


@pytest.mark.devices
def test_by_hand() -> None:
    like = nn.Sequential(nn.BatchNorm1d(1, eps=1e-12)).eval()  # on a GPU PyTorch takes no 0
    model = copy.deepcopy(like)
    x = torch.tensor([[1.0], [3.0]])  # mean 2, deviation 1; the other network's norm reads 4 · x + 10
    like.register_forward_pre_hook(lambda _module, inputs: (4 * inputs[0] + 10,))
    like[0].running_mean.fill_(14.0)
    like[0].running_var.fill_(9.0)  # it makes means of 4/3 and deviations of 4/3
    record = regrow.match_norms(model, like, [x])
    assert model[0].running_mean.item() == pytest.approx(1.0)  # 2 - 4/3 deviations of 3/4
    assert model[0].running_var.item() == pytest.approx((3 / 4) ** 2)
    with torch.no_grad():
        made = model(x)
    assert made.mean().item() == pytest.approx(4 / 3, abs=1e-6)
    assert made.std(unbiased=False).item() == pytest.approx(4 / 3, abs=1e-6)
    assert record == {"version": 1, "norms": ["0"], "images": 2}


@pytest.mark.devices
def test_the_moments_behind_every_norm_are_those_of_the_other_network() -> None:
    like = net()
    model = copy.deepcopy(like)
    remove_filters(model, {"0": keep_but(8, 1, 4)}, example_inputs=X[:1])
    assert not torch.allclose(moments(model, 4)[1], moments(like, 4)[1], rtol=0.02)
    regrow.match_norms(model, like, [X])
    for found, expected in zip(moments(model, 4), moments(like, 4), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_two_equal_networks_stay_equal_to_the_bit() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    regrow.match_norms(model, copy.deepcopy(model), [X[:10], X[10:]])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("like", "batches", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3)), [X], "same batch norms"),
        (None, [], "yields no batch"),
        (None, [X * float("nan")], "NaN or infinite"),
        (None, [X[:, :2]], "fails on a calibration batch"),
    ],
)
def test_bad_input_changes_nothing(like: nn.Module | None, batches: list[torch.Tensor], message: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        regrow.match_norms(model, like or copy.deepcopy(model), batches)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
