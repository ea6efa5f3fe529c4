"""The orthogonal loss in a training step, and its FLOPs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from regrow.criteria.score import overlap
from regrow.losses import orthogonal_loss
from regrow.study.config import make_config
from regrow.study.data import Splits, load_data
from regrow.study.flops import epoch_flops, penalty_flops
from regrow.study.parts import Parts
from regrow.study.ranks import Ranks


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_data("digits", train_size=100)


def parts(splits: Splits, **settings: Any) -> Parts:
    small = {"data": "digits", "width": 8, "train_size": 100, "batch_size": 50, "device": "cpu", "threads": 1}
    return Parts(make_config({**small, "epochs": 4, **settings}), splits, torch.device("cpu"), Ranks())


def test_the_overlap_is_added_to_the_loss(splits: Splits) -> None:
    losses = []
    for settings in ({}, {"method": "orthogonal-loss", "orthogonal": 0.5}):
        run = parts(splits, **settings)
        images, labels = next(iter(run.train.epoch(1)))
        added = 0.5 * float(orthogonal_loss(run.model).detach()) if settings else 0.0
        run.model.train()
        losses.append(float(run.step(images, labels, 1.0)[0]) - added)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def summed(run: Parts) -> float:
    return sum(
        float(overlap(module.weight.detach()).sum())
        for module in run.model.modules()
        if isinstance(module, nn.Conv2d)
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_filters_overlap_less_the_more_it_weighs(splits: Splits, precision: str) -> None:
    ends = []
    for weight in (0.0, 0.01, 0.1):
        run = parts(splits, method="orthogonal-loss", orthogonal=weight, precision=precision, lr=0.02)
        run.model.train()
        for epoch in range(12):
            for images, labels in run.train.epoch(epoch):
                run.step(images, labels, 1.0)
        ends.append(summed(run))
    assert ends[0] > ends[1] > ends[2]


def test_with_a_weight_of_0_nothing_is_computed(splits: Splits) -> None:
    run = parts(splits, method="orthogonal-loss", orthogonal=0.0)
    assert run.method.penalty() is None
    assert penalty_flops(run.model, run.method) == 0


def test_flops_of_the_penalty_by_hand(splits: Splits) -> None:
    run = parts(splits, method="orthogonal-loss")
    # Ŵ Ŵᵀ and its two gradients, of 8 filters with 9, 72 and 72 weights; two steps an epoch.
    products = sum(3 * 2 * 8 * 8 * weights for weights in (9, 72, 72))
    assert penalty_flops(run.model, run.method) == products
    standard = epoch_flops(parts(splits))
    assert standard is not None
    assert epoch_flops(run) == standard + 2 * products
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_dropped_filters_get_no_gradient_from_it(splits: Splits) -> None:
    for compact in (True, False):
        own = {"full": 1, "sub": 1, "cycles": 1, "fraction": 0.5, "compact": compact}
        run = parts(splits, method="repr+orthogonal-loss", orthogonal=0.1, **own)
        run.model.train()
        (drop,) = run.method.after_epoch()
        for epoch in range(2):
            for images, labels in run.train.epoch(epoch):
                run.step(images, labels, 1.0)
        for name, indices in drop["filters"].items():
            weight: Any = run.model.get_submodule(name).weight
            assert not weight[indices].any()
            assert torch.isfinite(weight).all()
        (restore,) = run.method.after_epoch()
        assert restore["kind"] == "restore"
