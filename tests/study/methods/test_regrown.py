"""RePr as the settings of a run say."""

from typing import Any

import pytest
import torch
from torch import nn

from regrow.study.building import make_optimizer
from regrow.study.config import RunConfig, make_config
from regrow.study.methods.regrown import make_repr
from regrow.study.models import build_model


def config(**settings: Any) -> RunConfig:
    return make_config({"data": "digits", "threads": 1, **settings})


def build(config: RunConfig) -> nn.Module:
    return build_model("convnet", classes=10, channels=1, size=(8, 8), depth=config.depth, width=config.width)


def test_repr_follows_the_settings() -> None:
    settings = config(
        method="repr", depth=4, width=4, epochs=4, full=2, sub=1, cycles=1, fraction=0.5, scope="layer",
        criterion="l2", exclude=["features.3"],
    )  # fmt: skip
    model = build(settings)
    with torch.no_grad():  # a layer of small filters, which would all go if the layers were ranked together
        model.features[1].conv.weight.mul_(torch.tensor([1e-3, 2e-3, 1e-3, 2e-3]).view(4, 1, 1, 1))
        model.features[2].conv.weight[:2] *= 10
    cycle = make_repr(model, make_optimizer(model, settings), settings, torch.zeros(1, 1, 8, 8))
    assert set(cycle.left_out) == {
        "features.0.conv",
        "features.3.conv",
    }  # the first one, and the excluded one
    assert cycle.step() is None
    drop = cycle.step()
    assert (drop.kind, drop.filters) == ("drop", {"features.1.conv": [0, 2], "features.2.conv": [2, 3]})
    assert cycle.step().kind == "restore"
    assert [cycle.step() for _ in range(4)] == [None] * 4  # one cycle


@pytest.mark.parametrize(("consumers", "moved"), [("zero", False), ("init", True)])
def test_what_reads_a_restored_filter_follows_the_settings(consumers: str, moved: bool) -> None:
    settings = config(
        method="repr", width=4, epochs=4, full=1, sub=1, cycles=1, exclude=["features.2"], consumers=consumers
    )
    model = build(settings)
    cycle = make_repr(model, make_optimizer(model, settings), settings, torch.zeros(1, 1, 8, 8))
    dropped = cycle.step().filters["features.1.conv"]
    cycle.step()
    assert bool(model.features[2].conv.weight[:, dropped].any()) == moved


def test_the_choices_of_chance_follow_the_seed() -> None:
    chosen = []
    for seed in (1, 1, 2):
        settings = config(
            method="repr", width=16, epochs=4, full=1, sub=1, cycles=1, criterion="random", seed=seed
        )
        model = build(settings)
        cycle = make_repr(model, make_optimizer(model, settings), settings, torch.zeros(1, 1, 8, 8))
        chosen.append(cycle.step().filters)
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize("compact", [True, False])
def test_the_sub_phase_is_compact_or_masked_as_the_settings_say(compact: bool) -> None:
    settings = config(method="repr", width=4, epochs=4, full=1, sub=1, cycles=1, compact=compact)
    model = build(settings)
    cycle = make_repr(model, make_optimizer(model, settings), settings, torch.zeros(1, 1, 8, 8))
    cycle.step()
    assert (cycle.state_dict()["sub_phase"]["plan"] is not None) == compact


def test_the_first_convolution_takes_part_when_it_is_asked_to() -> None:
    settings = config(
        method="repr", width=4, epochs=4, full=1, sub=1, cycles=1, fraction=0.75, floor=0.5, skip_first=False
    )
    model = build(settings)
    cycle = make_repr(model, make_optimizer(model, settings), settings, torch.zeros(1, 1, 8, 8))
    with pytest.warns(UserWarning, match="floor"):
        drop = cycle.step()
    # Half of each layer stays, where 75 % were to go.
    assert {name: len(filters) for name, filters in drop.filters.items()} == dict.fromkeys(
        (f"features.{place}.conv" for place in range(3)), 2
    )
