from pathlib import Path

import pytest
import torch
from torch import nn

import regrow
from regrow.study import train as training
from regrow.study.best import better, measured_best
from regrow.study.config import make_config
from regrow.study.data import load_data
from regrow.study.feeding import Batches
from regrow.study.models import build_model
from regrow.study.ranks import Ranks
from regrow.study.records import read_run
from regrow.study.steps import evaluate, state_of_weights

pytestmark = pytest.mark.devices


def test_the_highest_accuracy_wins_and_the_earliest_of_equal_ones() -> None:
    best: dict | None = {}
    for epoch, accuracy in enumerate((0.2, 0.5, 0.5, 0.4), start=1):
        best = better(best, epoch, accuracy, {"w": torch.tensor(float(epoch))})
    assert best is not None
    assert (best["epoch"], best["accuracy"], best["weights"]["w"].item()) == (2, 0.5, 2)


def test_an_accuracy_of_zero_is_better_than_none() -> None:
    assert better({}, 1, 0.0, {}) == {"epoch": 1, "accuracy": 0.0, "weights": {}}


def test_what_was_not_kept_from_the_start_is_not_known() -> None:
    assert better(None, 3, 0.9, {}) is None
    for unknown in (None, {}):
        result = measured_best(nn.Linear(1, 1), unknown, None, Ranks())  # type: ignore[arg-type]
        assert set(result.values()) == {None}


def test_the_weights_of_a_sub_phase_compute_what_was_validated() -> None:
    """The best epoch may be one without the dropped filters; RePr has restored them when it is tested."""
    splits = load_data("digits", train_size=200)
    torch.manual_seed(0)
    model = build_model("convnet", classes=10, channels=1, size=(8, 8), width=8)
    images = torch.randn(32, 1, 8, 8)
    model.to(images.device)
    test = Batches(
        splits.test, batch_size=200, mean=splits.mean, std=splits.std, shuffle=False, device=images.device
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cycle = regrow.RePr(
        model, optimizer, example_inputs=torch.zeros(1, 1, 8, 8), full=1, sub=1, cycles=1, seed=0
    )
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(32) % 10).backward()
        optimizer.step()
        if cycle.phase == "full":
            cycle.step()
    assert cycle.phase == "sub"
    validated = evaluate(model, test)
    best = better({}, 2, validated["accuracy"], state_of_weights(model))
    cycle.step()
    last = state_of_weights(model)
    result = measured_best(model, best, test, Ranks())
    assert result["best_epoch"] == 2
    assert result["best_test_accuracy"] == pytest.approx(validated["accuracy"])
    after = state_of_weights(model)
    assert all(torch.equal(after[key], last[key]) for key in last)


def test_a_run_begun_by_an_earlier_version_goes_on_without_a_best_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({"data": "digits", "width": 4, "train_size": 100, "epochs": 3, "threads": 1})
    written = training.write_checkpoint

    def old(folder: Path, number: int, state: dict) -> None:
        written(folder, number, {key: value for key, value in state.items() if key != "best"})
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "write_checkpoint", old)
        with pytest.raises(KeyboardInterrupt):
            training.train(config, tmp_path / "run")
    assert training.train(config, tmp_path / "run")
    result = read_run(tmp_path / "run").result
    assert result is not None
    assert result["resumed"] == 1
    assert (result["best_epoch"], result["best_test_accuracy"]) == (None, None)
    assert result["test_accuracy"] > 0
