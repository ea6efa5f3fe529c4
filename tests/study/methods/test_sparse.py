"""When Dense-Sparse-Dense holds weights at 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regrow.study.config import make_config
from regrow.study.data import Splits, load_data
from regrow.study.parts import Parts
from regrow.study.ranks import Ranks


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_data("digits", train_size=100)


def parts(splits: Splits, epochs: int, **settings: Any) -> Parts:
    small = {"data": "digits", "width": 4, "train_size": 100, "batch_size": 50, "device": "cpu", "threads": 1}
    config = make_config({**small, "method": "dsd", "epochs": epochs, **settings})
    return Parts(config, splits, torch.device("cpu"), Ranks())


@pytest.mark.parametrize(
    ("epochs", "sparse"), [(3, [2]), (4, [2, 3]), (5, [3]), (6, [3, 4]), (7, [3, 4, 5]), (9, [4, 5, 6])]
)
def test_the_middle_third_is_sparse(splits: Splits, epochs: int, sparse: list[int]) -> None:
    run = parts(splits, epochs)
    phases, happened = [], []
    for _ in range(epochs):
        phases.append(run.method.phase)
        happened += run.method.after_epoch()
    assert [number for number, phase in enumerate(phases, start=1) if phase == "sparse"] == sparse
    assert run.method.phase == "full"
    assert [each["kind"] for each in happened] == ["sparsify", "densify"]


def test_the_smallest_weights_stay_at_0_in_the_sparse_third(splits: Splits) -> None:
    run = parts(splits, 3, fraction=0.5)
    conv: Any = run.model.get_submodule("features.1.conv")
    smallest = conv.weight.detach().abs().flatten().argsort()[: conv.weight.numel() // 2]
    run.method.after_epoch()
    for images, labels in run.train.epoch(1):
        run.step(images, labels, 1.0)
    assert sorted((conv.weight == 0).flatten().nonzero().flatten().tolist()) == sorted(smallest.tolist())
    run.method.after_epoch()
    for images, labels in run.train.epoch(2):
        run.step(images, labels, 1.0)
    assert int((conv.weight == 0).sum()) < len(smallest)


def test_each_task_has_its_own_thirds(splits: Splits) -> None:
    run = parts(splits, 6, tasks=2)
    happened = []
    for epoch in range(1, 7):
        happened += [(epoch, each["kind"], each["cycle"]) for each in run.method.after_epoch()]
        if run.rounds.ends(epoch):
            run.switch()
    assert happened == [(1, "sparsify", 1), (2, "densify", 1), (4, "sparsify", 2), (5, "densify", 2)]


def test_states_that_do_not_fit_the_phase(splits: Splits) -> None:
    run = parts(splits, 3)
    dense = run.method.state_dict()
    run.method.check_state_dict(dense, 0)
    run.method.after_epoch()
    sparse = run.method.state_dict()
    run.method.check_state_dict(sparse, 1)
    for state, epochs in ((dense, 1), (sparse, 2)):
        with pytest.raises(ValueError, match="counted other epochs"):
            run.method.check_state_dict(state, epochs)
    mixed = {"dsd": {"epochs": 1, "training": dense["dsd"]["training"]}}
    with pytest.raises(ValueError, match="wrong phase"):
        run.method.check_state_dict(mixed, 1)
    for bad in (None, {}, {"epochs": 1}, {"epochs": 1, "training": 3}):
        with pytest.raises(ValueError, match=r"."):
            run.method.check_state_dict({"dsd": bad}, 1)
