"""Every method trains on digits from end to end, and ends bit for bit as if it had not been stopped."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from regrow.study import records
from regrow.study import train as train_module
from regrow.study.checkpoints import find_checkpoints, from_bytes, write_checkpoint
from regrow.study.compare import METHOD_SETTINGS
from regrow.study.config import RunConfig, make_config
from regrow.study.train import train

SMALL: dict[str, Any] = {
    "data": "digits", "width": 4, "train_size": 100, "batch_size": 50, "epochs": 6, "threads": 1, "seed": 7,
    "device": "cpu",
}  # fmt: skip
CYCLE = {"full": 1, "sub": 1, "cycles": 2}
REPR = [("drop", 1), ("restore", 2), ("drop", 3), ("restore", 4)]
# Settings of a method, and the events of its run.
OWN: dict[str, tuple[dict[str, Any], list[tuple[str, int]]]] = {
    "dsd": ({"fraction": 0.5}, [("sparsify", 2), ("densify", 4)]),
    "ban": ({"temperature": 2.0}, [("fresh", 2), ("fresh", 4)]),
    "shrink-and-perturb": ({"generations": 2}, [("shrink", 3)]),
    "continual-backprop": (
        {"replacement_rate": 0.3, "maturity": 1},
        [("replace", epoch) for epoch in range(1, 7)],
    ),
    "later-layer-forgetting": ({"last": 1}, [("reset", 2), ("reset", 4)]),
    "knowledge-evolution": ({"fixed": 0.5}, [("evolve", 2), ("evolve", 4)]),
    "restart": ({"tasks": 2, "criterion": "taylor"}, [("restart", 3)]),
    "restart+new-head": ({"tasks": 2, "criterion": "utility"}, [("restart", 3), ("reset", 3)]),
    "restart+last-layers": ({"tasks": 2, "last": 2}, [("restart", 3), ("reset", 3)]),
    "restart+shrink-and-perturb+new-head": ({"tasks": 2}, [("restart", 3), ("shrink", 3), ("reset", 3)]),
    "shrink-and-perturb+new-head": ({"generations": 2}, [("shrink", 3), ("reset", 3)]),
    "continual-backprop+new-head": (
        {"replacement_rate": 0.3, "maturity": 1, "tasks": 2},
        [
            *(("replace", epoch) for epoch in range(1, 4)),
            ("reset", 3),
            *(("replace", epoch) for epoch in range(4, 7)),
        ],
    ),
    "redo+new-head": ({"tasks": 2, "dormant": 0.9}, [("replace", 3), ("reset", 3)]),
    "new-head": ({"tasks": 2}, [("reset", 3)]),
    "last-layers": ({"tasks": 3}, [("reset", 2), ("reset", 4)]),
    "from-scratch": ({"tasks": 2}, [("fresh", 3)]),
    "redo": ({"tasks": 2, "dormant": 0.9}, [("replace", 3)]),
    **{method: (CYCLE, REPR) for method in METHOD_SETTINGS if "repr" in method.split("+")},
}
METHODS = [*METHOD_SETTINGS]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, and whatever runs are trained in it."""
    folder = tmp_path_factory.mktemp("runs")
    train(make_config({**SMALL, "epochs": 2, "width": 5}), folder / "teachers" / "standard-seed7")
    return folder


def settings(method: str, home: Path) -> dict[str, Any]:
    teacher = {"teacher": str(home / "teachers")} if "distillation" in method else {}
    return {**SMALL, "method": method, **teacher, **OWN.get(method, ({}, []))[0]}


def whole(method: str, home: Path) -> Path:
    train(make_config(settings(method, home)), home / method)
    return home / method


def outcome(folder: Path) -> dict[str, Any]:
    run = records.read_run(folder)
    assert run.result is not None
    return {
        "weights": hashlib.sha256(records.weights_path(folder).read_bytes()).hexdigest(),
        "epochs": [{**line, "seconds": 0} for line in run.epochs],
        "events": run.events,
        "result": {**run.result, "seconds": 0, "train_seconds": 0, "resumed": 0},
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_every_method_is_recorded(method: str, home: Path) -> None:
    run = records.read_run(whole(method, home))
    assert run.result is not None
    assert [(each["kind"], each["epoch"]) for each in run.events] == OWN.get(method, ({}, []))[1]
    phases = {"dsd": ["full"] * 2 + ["sparse"] * 2 + ["full"] * 2}
    if "repr" in method:
        phases[method] = ["full", "sub", "full", "sub", "full", "full"]
    assert [line["phase"] for line in run.epochs] == phases.get(method, ["full"] * 6)
    assert run.result["train_flops"] == sum(line["flops"] for line in run.epochs) > 0
    assert all(0 < line["alive"] <= line["filters"] for line in run.epochs)
    json.dumps(run.events)


def stopped(config: RunConfig, folder: Path, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and stop before checkpoint number ``stop`` is written."""
    real, writes = train_module.write_checkpoint, itertools.count(1)

    def write(*arguments: Any) -> Any:
        if next(writes) == stop:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(train_module, "write_checkpoint", write)
        with pytest.raises(KeyboardInterrupt):
            train(config, folder)
    assert not records.is_finished(folder)


@pytest.mark.parametrize("stop", [3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_ends_alike(
    method: str, stop: int, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the third checkpoint, or before the fourth, behind which many methods begin a round."""
    config = make_config(settings(method, home))
    stopped(config, tmp_path / "run", stop, monkeypatch)
    train(config, tmp_path / "run")
    assert records.read_run(tmp_path / "run").environment["resumed"] == 1
    assert outcome(tmp_path / "run") == outcome(whole(method, home))


@pytest.mark.parametrize("method", ["repr", "ban", "dsd", "continual-backprop"])
def test_checkpoints_of_a_later_round_that_do_not_fit_leave_no_trace(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong in them is found last, behind all that is checked in their round."""
    cycle = {"full": 1, "sub": 1, "cycles": 1} if method == "repr" else {}
    config = make_config({**SMALL, **cycle, "method": method, "tasks": 2})
    train(config, tmp_path / "whole")
    stopped(config, tmp_path / "run", 6, monkeypatch)
    for path in find_checkpoints(tmp_path / "run"):
        state = from_bytes(path.read_bytes())
        assert state["epoch"] > 3
        path.unlink()
        write_checkpoint(tmp_path / "run", state["epoch"], {**state, "random": []})
    with pytest.warns(UserWarning, match="random must list the state of each process's generators"):
        train(config, tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
