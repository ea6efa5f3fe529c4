"""One run trained by two processes over gloo, forked from one that has imported PyTorch already."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from killing import start_two
from regrow.study import records
from regrow.study.config import make_config
from regrow.study.ranks import Ranks, device_here
from regrow.study.train import train

# 203 pictures: the last batch of three is too small for two processes.
SMALL: dict[str, Any] = {
    "data": "digits", "width": 8, "train_size": 203, "batch_size": 50, "epochs": 6, "threads": 1, "seed": 7,
    "device": "cpu",
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "repr": {"method": "repr", "full": 1, "sub": 2, "cycles": 1},
    "bridgeout": {"method": "bridgeout", "p": 0.2, "epochs": 3},
    "dropout": {"method": "dropout", "p": 0.2, "epochs": 3},
    "restart": {"method": "restart+new-head", "tasks": 3, "epochs": 3, "criterion": "utility"},
    "continual-backprop": {
        "method": "continual-backprop",
        "epochs": 3,
        "replacement_rate": 0.2,
        "maturity": 1,
    },
}
EVENTS = {
    "repr": ["drop", "restore"],
    "restart": ["restart", "reset"] * 2,
    "continual-backprop": ["replace"] * 3,
}


def both(settings: dict[str, Any], folder: Path, kill: tuple[str, int] | None = None) -> list[int | None]:
    processes = start_two(settings, folder, kill)
    if kill is not None:
        processes[1].join()
        # As torchrun does with those that are left.
        processes[0].kill()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(records.weights_path(folder)) for folder in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", list(METHODS))
def test_two_processes_go_on_where_one_of_them_was_killed(tmp_path: Path, method: str) -> None:
    settings = {**SMALL, **METHODS[method]}
    assert both(settings, tmp_path / "undisturbed") == [0, 0]
    codes = both(settings, tmp_path / "killed", kill=("step", 10))
    assert codes[1] == -signal.SIGKILL
    assert not records.is_finished(tmp_path / "killed")
    assert both(settings, tmp_path / "killed") == [0, 0]
    assert same_weights(tmp_path / "undisturbed", tmp_path / "killed")
    runs = [records.read_run(tmp_path / name) for name in ("undisturbed", "killed")]
    lines = [[{**line, "seconds": 0} for line in run.epochs] for run in runs]
    assert lines[0] == lines[1]
    assert [event["kind"] for event in runs[1].events] == EVENTS.get(method, [])
    assert runs[1].environment["processes"] == 2
    # Parameters and running statistics are the same in both processes, and those that were written.
    written = load_file(records.weights_path(tmp_path / "killed"))
    for rank in (0, 1):
        measured = load_file(tmp_path / f"rank{rank}.safetensors")
        assert all(torch.equal(measured[name], written[name]) for name in written)


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"method": "orthogonal-loss"},
        {"method": "ban", "generations": 2},
        {"method": "from-scratch", "tasks": 2},
    ],
)
def test_two_processes_compute_what_one_does(tmp_path: Path, own: dict[str, Any]) -> None:
    # The last of five batches has five pictures: two for one process, three for the other.
    settings = {**SMALL, "train_size": 205, "batch_norm": False, "epochs": 2, "lr": 0.05, **own}
    assert both(settings, tmp_path / "two") == [0, 0]
    train(make_config(settings), tmp_path / "one")
    one, two = (load_file(records.weights_path(tmp_path / name)) for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    runs = [records.read_run(tmp_path / name) for name in ("one", "two")]
    assert runs[0].result is not None
    assert runs[1].result is not None
    assert runs[1].result["train_flops"] == runs[0].result["train_flops"]
    assert runs[1].result["test_loss"] == pytest.approx(runs[0].result["test_loss"], rel=1e-4)
    for first, second in zip(runs[0].epochs, runs[1].epochs, strict=True):
        assert second["train_loss"] == pytest.approx(first["train_loss"], rel=1e-4)
        assert second["train_accuracy"] == pytest.approx(first["train_accuracy"], abs=0.02)


def test_an_error_of_the_first_process_ends_both(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert both(SMALL, tmp_path / "run") == [1, 1]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_loss_of_nan_in_one_process_ends_both(tmp_path: Path) -> None:
    assert both({**SMALL, "lr": 1e30, "batch_norm": False}, tmp_path / "run") == [1, 1]
    assert (tmp_path / "run" / "last-good.safetensors").exists()


def test_torchrun_goes_on_with_what_was_killed(tmp_path: Path) -> None:
    settings = {**SMALL, "epochs": 3}
    assert both(settings, tmp_path / "undisturbed") == [0, 0]
    both(settings, tmp_path / "run", kill=("step", 6))
    flags = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "regrow",
        "train",
    ]
    done = subprocess.run(
        [sys.executable, *command, *flags, "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1
    assert "terminate" not in done.stderr
    assert same_weights(tmp_path / "undisturbed", tmp_path / "run")


def test_a_process_alone_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Ranks()
    assert (alone.rank, alone.count) == (0, 1)
    assert alone.first(lambda: {"a": 1}) == {"a": 1}
    assert alone.share(None) is None
    assert alone.gather(b"abc") == [b"abc"]
    assert alone.add(torch.ones(2)).tolist() == [1, 1]
    model = torch.nn.Linear(2, 2)
    assert alone.wrapped(model) is model
    with pytest.raises(ValueError, match="no such"):
        alone.first(lambda: (_ for _ in ()).throw(ValueError("no such")))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_here("cpu") == "cpu"
    assert device_here("auto") == ("cuda:1" if torch.cuda.is_available() else "auto")
