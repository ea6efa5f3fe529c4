"""The noise of Bridgeout and dropout as the settings of a run say."""

from typing import Any

import pytest
import torch
from torch import nn

from regrow.noise.layers import bridgeout_state
from regrow.study.config import RunConfig, make_config
from regrow.study.methods.noisy import add_noise


def config(**settings: Any) -> RunConfig:
    return make_config({"data": "digits", "threads": 1, **settings})


@pytest.mark.parametrize(("method", "targeted"), [("bridgeout", 1.0), ("targeted-bridgeout", 0.6)])
def test_the_noise_of_bridgeout(method: str, targeted: float) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    add_noise(model, config(method=method, p=0.2, q=1.2, target_fraction=0.6, seed=5))
    settings = bridgeout_state(model)["settings"]
    assert {key: settings[key] for key in ("p", "q", "target_fraction", "seed", "linear")} == {
        "p": 0.2, "q": 1.2, "target_fraction": targeted, "seed": 5, "linear": False,
    }  # fmt: skip


@pytest.mark.parametrize(("method", "noisy"), [("dropout", [0, 1, 2, 3]), ("targeted-dropout", [0, 1])])
def test_the_noise_of_dropout(method: str, noisy: list[int]) -> None:
    model = nn.Sequential(nn.ReLU())
    add_noise(model, config(method=method, p=0.5, target_fraction=0.5))
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).expand(200, 4)
    dropped = model.train()(x)
    # Dropped to 0, or divided by 1 − p; among the smaller half only, when targeted.
    for place in range(4):
        value = float(x[0, place])
        expected = {0.0, 2 * value} if place in noisy else {value}
        assert set(dropped[:, place].tolist()) == expected
    assert torch.equal(model.eval()(x), x)


@pytest.mark.parametrize("method", ["standard", "repr"])
def test_methods_without_noise(method: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    add_noise(model, config(method=method, p=0.9))
    x = torch.rand(4, 1, 3, 3)
    assert torch.equal(model.train()(x), model.eval()(x))
