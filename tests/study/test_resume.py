"""A run that is killed and started again ends bit for bit as one that was not."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from killing import start
from regrow.study import records
from regrow.study.checkpoints import find_checkpoints
from regrow.study.config import make_config
from regrow.study.lock import locked
from regrow.study.train import train

SMALL: dict[str, Any] = {
    "data": "digits", "width": 8, "train_size": 200, "batch_size": 50, "epochs": 6, "threads": 1, "seed": 7,
    "device": "cpu",
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "repr": {"method": "repr", "full": 1, "sub": 2, "cycles": 1},
    "bridgeout": {"method": "bridgeout", "p": 0.2},
    "dropout": {"method": "dropout", "p": 0.2, "optimizer": "adamw"},
    "tasks": {
        "method": "repr",
        "full": 1,
        "sub": 1,
        "cycles": 1,
        "tasks": 2,
        "regime": "permuted-labels",
    },
    "half": {"precision": "float16", "augmentation": "shift-flip"},
}
TIMES = ("seconds", "train_seconds", "resumed")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, settings in METHODS.items():
        folders[name] = tmp_path_factory.mktemp("undisturbed") / name
        train(make_config({**SMALL, **settings}), folders[name])
    return folders


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves but times: every bit of weights and records."""
    run = records.read_run(folder)
    assert run.result is not None
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in run.epochs]
    return {
        "weights": hashlib.sha256(records.weights_path(folder).read_bytes()).hexdigest(),
        "epochs": json.dumps(lines),
        "events": records.events_path(folder).read_text() if records.events_path(folder).exists() else "",
        "config": records.config_path(folder).read_text(),
        "result": {k: v for k, v in run.result.items() if k not in TIMES},
        "files": sorted(path.name for path in folder.iterdir() if path.name != ".lock"),
    }


def finish(settings: dict[str, Any], folder: Path) -> None:
    process = start(settings, folder)
    process.join()
    assert process.exitcode == 0


def test_25_kills_at_random_moments_change_no_bit(tmp_path: Path, undisturbed: dict[str, Path]) -> None:
    dice = random.Random(20)
    kills, runs, resumed, length = 0, 0, 0, 0.5
    while kills < 25:
        name = list(METHODS)[runs % len(METHODS)]
        settings, folder = {**SMALL, **METHODS[name]}, tmp_path / f"{name}-{runs}"
        while not records.is_finished(folder):
            (folder / ".lock").unlink(missing_ok=True)
            process = start(settings, folder)
            while process.is_alive() and not (folder / ".lock").exists():
                time.sleep(0.002)
            begun = time.monotonic()
            process.join(dice.uniform(0, length) if kills < 25 else None)
            if process.is_alive():
                process.kill()
                process.join()
                kills += process.exitcode == -signal.SIGKILL  # it may have ended just before
                length *= 1.1  # until runs get on, on whatever machine
            else:
                assert process.exitcode == 0
                length = 0.8 * (time.monotonic() - begun)
        # Killed after the result was written, it may have left its checkpoints for this call to remove.
        assert not train(make_config(settings), folder)
        assert outcome(folder) == outcome(undisturbed[name])
        result = records.read_run(folder).result
        assert result is not None
        resumed += result["resumed"]
        runs += 1
    assert resumed > 0


def test_what_a_killed_process_left_beside_its_result_is_removed(
    tmp_path: Path, undisturbed: dict[str, Path]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed["repr"], folder)
    left = folder / ".result.json.abc.regrow.tmp"  # killed between the rename and the end of the block
    left.mkdir()
    assert not train(make_config({**SMALL, **METHODS["repr"]}), folder)
    assert not left.exists()
    assert outcome(folder) == outcome(undisturbed["repr"])


@pytest.mark.parametrize(
    ("name", "place", "number"),
    [
        ("repr", "step", 2),  # in the first epoch: there is no checkpoint yet
        ("repr", "step", 7),  # in the sub phase
        ("repr", "append", 2),  # between an epoch's line and that of its event
        ("repr", "checkpoint", 2),  # between records and checkpoint
        ("repr", "write", 2),  # the drop is in the records, and not in a checkpoint
        ("repr", "sync", 5),  # in the middle of writing
        ("repr", "rename", 4),  # whole, and not yet under its name
        ("repr", "rename", 1),  # before there are settings
        ("repr", "prune", 6),  # there are three checkpoints
        ("repr", "prune", 10),  # the result is written, and checkpoints are still there
        ("bridgeout", "finish", 1),  # all epochs are trained
        ("bridgeout", "evaluate", 8),  # Bridgeout is off, and nothing is written
        ("dropout", "step", 18),
        ("half", "step", 18),
    ],
)
def test_a_kill_at_the_worst_moments_changes_no_bit(
    tmp_path: Path, undisturbed: dict[str, Path], name: str, place: str, number: int
) -> None:
    settings, folder = {**SMALL, **METHODS[name]}, tmp_path / "run"
    process = start(settings, folder, kill=(place, number))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    finish(settings, folder)
    assert outcome(folder) == outcome(undisturbed[name])


def killed_in_epoch_4(folder: Path, name: str = "repr") -> dict[str, Any]:
    settings = {**SMALL, **METHODS[name]}
    start(settings, folder, kill=("step", 14)).join()
    assert [path.name[:16] for path in find_checkpoints(folder)] == ["checkpoint-00003", "checkpoint-00002"]
    return settings


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip, truncate])
@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(
    tmp_path: Path, undisturbed: dict[str, Path], damage: Any, damaged: int
) -> None:
    settings = killed_in_epoch_4(tmp_path / "run")
    for path in find_checkpoints(tmp_path / "run")[:damaged]:
        damage(path)
    said = "starting from the beginning" if damaged == 2 else "trying the one before it"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(make_config(settings), tmp_path / "run")
    assert len(caught) == damaged
    assert re.search(rf"checkpoint-.* is damaged .*: {said}", str(caught[-1].message))
    assert outcome(tmp_path / "run") == outcome(undisturbed["repr"])


def test_records_are_cut_back_to_the_checkpoint_whatever_is_in_them(
    tmp_path: Path, undisturbed: dict[str, Path]
) -> None:
    settings = killed_in_epoch_4(tmp_path / "run")
    with records.epochs_path(tmp_path / "run").open("ab") as file:
        file.write(b'{"version": 2, "epoch": 4, "pha')
    records.events_path(tmp_path / "run").write_bytes(b"\0" * 50 + b"\n")
    train(make_config(settings), tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(undisturbed["repr"])


def test_an_unfinished_run_of_other_settings_is_refused_and_rerun_replaces_it(tmp_path: Path) -> None:
    settings = killed_in_epoch_4(tmp_path / "run")
    files = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    other = make_config({**settings, "fraction": 0.5, "threads": 1, "lr": 0.2})
    with pytest.raises(
        ValueError, match=r"an unfinished run with fraction=0\.3 \(asked for: 0\.5\), lr=0\.1 .*--rerun"
    ):
        train(other, tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == files
    assert train(other, tmp_path / "run", rerun=True)
    run = records.read_run(tmp_path / "run")
    assert run.config["fraction"] == 0.5
    assert run.result is not None
    assert run.result["resumed"] == 0
    assert len(run.epochs) == 6
    assert find_checkpoints(tmp_path / "run") == []


def test_going_on_under_other_conditions_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = killed_in_epoch_4(tmp_path / "run", "dropout")
    here = records.environment("cpu", 1)
    monkeypatch.setattr(records, "environment", lambda *_: {**here, "torch": "9.9", "cores": 99})
    with pytest.warns(UserWarning, match=rf"other conditions \(torch {re.escape(here['torch'])} → 9\.9\)"):
        train(make_config(settings), tmp_path / "run")


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "a temporary name")


def test_a_full_disk_is_one_line_and_damages_nothing(
    tmp_path: Path, undisturbed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = killed_in_epoch_4(tmp_path / "run")
    before = [path.read_bytes() for path in find_checkpoints(tmp_path / "run")]
    real, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 6:  # the settings are written, and the first checkpoint is not
            full_disk()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(
        OSError, match=r"run cannot be written to: No space left on device\. Nothing"
    ) as caught:
        train(make_config(settings), tmp_path / "run")
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert [path.read_bytes() for path in find_checkpoints(tmp_path / "run")] == before
    assert not [path for path in (tmp_path / "run").iterdir() if path.suffix == ".tmp"]
    train(make_config(settings), tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(undisturbed["repr"])


def test_a_folder_that_cannot_be_written_to_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: Any) -> int:
        raise OSError(errno.EROFS, "Read-only file system", "a name")

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError, match=r"run cannot be written to: Read-only file system\."):
        train(make_config(SMALL), tmp_path / "run")


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "run"),
        pytest.raises(BlockingIOError, match=rf"is being trained by process {os.getpid()} on "),
    ):
        train(make_config(SMALL), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    assert train(make_config({**SMALL, "epochs": 1}), tmp_path / "run")


def test_a_run_that_was_resumed_says_how_often_and_adds_its_time(tmp_path: Path) -> None:
    settings, folder = {**SMALL, **METHODS["repr"]}, tmp_path / "run"
    # Four steps an epoch: in epoch 2, then in epoch 2 + 2, then in epoch 4 before a new checkpoint.
    for number in (6, 10, 2):
        start(settings, folder, kill=("step", number)).join()
    assert len(records.read_run(folder).epochs) == 3
    finish(settings, folder)
    run = records.read_run(folder)
    assert run.result is not None
    assert run.result["resumed"] == run.environment["resumed"] == 3
    assert run.result["train_seconds"] == pytest.approx(sum(line["seconds"] for line in run.epochs))
    assert run.result["seconds"] > run.result["train_seconds"]
