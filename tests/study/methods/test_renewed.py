"""What the methods that draw weights anew do where a round begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regrow.study.config import make_config
from regrow.study.data import Splits, load_data
from regrow.study.methods.continual import Continual
from regrow.study.parts import Parts
from regrow.study.ranks import Ranks

SMALL: dict[str, Any] = {
    "data": "digits", "width": 8, "train_size": 100, "batch_size": 50, "epochs": 4, "threads": 1, "tasks": 2,
    "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_data("digits", train_size=100)


def trained(splits: Splits, **settings: Any) -> Parts:
    run = Parts(make_config({**SMALL, **settings}), splits, torch.device("cpu"), Ranks())
    run.model.train()
    for images, labels in run.train.epoch(1):
        run.step(images, labels, 1.0)
        run.method.after_step()
    return run


def weights(run: Parts) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def switched(splits: Splits, **settings: Any) -> tuple[Parts, dict[str, Tensor], dict[str, Tensor], Any]:
    """The run after a switch, its weights before and after it, and the events."""
    run = trained(splits, **settings)
    before = weights(run)
    happened = run.switch()
    return run, before, weights(run), happened


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name for name in one if torch.equal(one[name], other[name])}


def test_standard_training_goes_on(splits: Splits) -> None:
    run, before, after, happened = switched(splits, method="standard")
    assert same(before, after) == {*before}
    assert happened == []
    assert any(state["momentum_buffer"].any() for state in run.optimizer.state.values())


def test_from_scratch_is_a_new_network(splits: Splits) -> None:
    run, _, after, (event,) = switched(splits, method="from-scratch")
    fresh = run._fresh(1).state_dict()
    assert same(fresh, after) == {*after}
    assert event["kind"] == "fresh"
    assert not any(state["momentum_buffer"].any() for state in run.optimizer.state.values())


@pytest.mark.parametrize(
    ("settings", "new"),
    [
        ({"method": "new-head"}, {"classifier"}),
        ({"method": "last-layers", "last": 2}, {"classifier", "features.2"}),
        ({"method": "later-layer-forgetting", "last": 3}, {"classifier", "features.2", "features.1"}),
    ],
)
def test_the_last_layers_are_new(splits: Splits, settings: dict[str, Any], new: set[str]) -> None:
    run, before, after, (event,) = switched(splits, **settings)
    fresh = run._fresh(1).state_dict()
    inside = {name for name in after if any(name.startswith(f"{each}.") for each in new)}
    assert {name for name in after if torch.equal(after[name], fresh[name])} >= inside
    assert same(before, after) == {*after} - inside
    assert event["kind"] == "reset"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "last-layers", "last": 5}, "last must be a whole number from 1 to 4, got 5"),
        ({"method": "restart", "exclude": ["features.9"]}, "did you mean 'features"),
        ({"method": "restart", "depth": 1}, "no convolution is left"),
    ],
)
def test_what_cannot_be_drawn_anew_is_refused_before_training(
    splits: Splits, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Parts(make_config({**SMALL, **settings}), splits, torch.device("cpu"), Ranks())


def test_shrink_and_perturb_by_its_formula(splits: Splits) -> None:
    run, before, after, (event,) = switched(splits, method="shrink-and-perturb", shrink=0.5, perturb=0.25)
    fresh = run._fresh(1).state_dict()
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), 0.5 * before[name] + 0.25 * fresh[name])
    assert event["kind"] == "shrink"
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("criterion", ["l2", "mean-activation", "hessian"])
def test_the_weakest_filters_start_anew(splits: Splits, criterion: str, head: bool) -> None:
    own = {"criterion": criterion, "fraction": 0.5, "scope": "layer"}
    method = "restart+new-head" if head else "restart"
    run, before, after, happened = switched(splits, method=method, **own)
    assert [each["kind"] for each in happened] == ["restart", "reset"][: 1 + head]
    filters = happened[0]["filters"]
    assert {name: len(indices) for name, indices in filters.items()} == {
        "features.1.conv": 4, "features.2.conv": 4,
    }  # fmt: skip
    for name, indices in filters.items():
        # Beside the columns that were set to 0, exactly these rows are new.
        alive = [unit for unit in range(8) if unit not in filters.get("features.1.conv", [])]
        columns = alive if name == "features.2.conv" else range(8)
        moved = (before[f"{name}.weight"] - after[f"{name}.weight"])[:, columns].abs().sum((1, 2, 3)) > 0
        assert moved.nonzero().flatten().tolist() == indices
    fresh = run._fresh(1).state_dict()
    assert torch.equal(after["classifier.weight"], fresh["classifier.weight"]) == head


def test_the_rows_of_a_restart_follow_the_settings(splits: Splits) -> None:
    found = {}
    for rows in ("orthogonal", "init"):
        _, _, after, (event,) = switched(splits, method="restart", rows=rows, criterion="l2")
        found[rows] = after["features.1.conv.weight"][event["filters"]["features.1.conv"]]
    assert not torch.equal(found["orthogonal"], found["init"])


def test_redo_replaces_dormant_filters(splits: Splits) -> None:
    run = trained(splits, method="redo", dormant=0.0)
    with torch.no_grad():
        run.model.get_submodule("features.1.norm").weight[[2, 5]] = 0
        run.model.get_submodule("features.1.norm").bias[[2, 5]] = -1  # behind the ReLU they are 0
    before = weights(run)
    (event,) = run.switch()
    assert (event["kind"], event["filters"]) == ("replace", {"features.1.conv": [2, 5]})
    moved = (before["features.1.conv.weight"] - weights(run)["features.1.conv.weight"]).abs().sum((1, 2, 3))
    assert (moved > 0).nonzero().flatten().tolist() == [2, 5]


def test_knowledge_evolution_keeps_the_fixed_part(splits: Splits) -> None:
    _, before, after, (event,) = switched(splits, method="knowledge-evolution", fixed=0.75)
    kept = torch.cat(
        [(before[name] == after[name]).flatten() for name in before if name.endswith("conv.weight")]
    )
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.01)
    assert event["kind"] == "evolve"


def test_continual_backprop_tells_what_an_epoch_replaced(splits: Splits) -> None:
    run = trained(splits, method="continual-backprop", replacement_rate=0.5, maturity=0, tasks=1)
    (event,) = run.method.after_epoch()
    assert event["kind"] == "replace"
    assert set(event["filters"]) <= {f"features.{place}.conv" for place in range(3)}
    assert sum(map(len, event["filters"].values())) > 0
    assert run.method.after_epoch() == []  # nothing since
    assert not run.method.finish()
    assert isinstance(run.method.parts["continual-backprop"], Continual)


@pytest.mark.parametrize("bad", [None, 3, {}, {"times": 1}, {"times": -1, "replacing": {}}, {"times": True}])
def test_hostile_states_of_continual_backprop(splits: Splits, bad: Any) -> None:
    run = trained(splits, method="continual-backprop", tasks=1)
    run.method.check_state_dict(run.method.state_dict(), 1)
    with pytest.raises(ValueError, match=r"."):
        run.method.check_state_dict({"continual-backprop": bad}, 1)
