import errno
import os
from pathlib import Path

import pytest

from regrow.study import records
from regrow.study.gather import gather, read_each


def make(folder, method="standard", seed=0, **config):
    records.write_yaml(records.config_path(folder), {"version": 1, "method": method, "seed": seed} | config)
    return folder


def test_runs_are_found_once_and_in_order(tmp_path):
    for method, seed in (("standard", 1), ("standard", 0), ("repr", 0)):
        make(tmp_path / f"{method}{seed}", method, seed)
    runs, left_out = gather(tmp_path, tmp_path / "standard0")
    assert [(run.method, run.seed) for run in runs] == [("repr", 0), ("standard", 0), ("standard", 1)]
    assert left_out == {}


def test_runs_that_cannot_be_read_are_left_out_and_say_why(tmp_path):
    make(tmp_path / "good")
    make(tmp_path / "newer", version=99)
    records.epochs_path(make(tmp_path / "torn")).write_text("not JSON\n")
    runs, left_out = gather(tmp_path)
    assert [run.folder for run in runs] == [tmp_path / "good"]
    assert list(left_out) == [tmp_path / "newer", tmp_path / "torn"]
    assert "newer regrow" in left_out[tmp_path / "newer"]
    assert "epochs.jsonl, line 1" in left_out[tmp_path / "torn"]


def test_a_folder_that_the_system_does_not_open_is_named(tmp_path, monkeypatch):
    make(tmp_path / "good")
    closed = make(tmp_path / "closed")
    scan = os.scandir

    def refuse(path):
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    runs, left_out = gather(tmp_path)
    assert [run.folder for run in runs] == [tmp_path / "good"]
    assert left_out == {closed: f"{closed} cannot be read: Permission denied."}
    with pytest.raises(ValueError, match="closed cannot be read: Permission denied"):
        records.find_runs(tmp_path)


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        gather(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no run found in"):
        gather(tmp_path)
    make(tmp_path / "newer", version=99)
    with pytest.raises(ValueError, match=r"no run can be read: .*newer regrow"):
        gather(tmp_path)


def finished(folder, *, epoch=1, filters=1, **changes):
    """A finished run with one epoch."""
    make(folder)
    records.write_json(records.environment_path(folder), records.environment("cpu", 1))
    line = dict.fromkeys(("learning_rate", "train_loss", "train_accuracy", "validation_loss"))
    line |= {"version": 1, "epoch": epoch, "phase": "full", "validation_accuracy": None, "overlap": None}
    records.append_line(
        records.epochs_path(folder), line | {"alive": 1, "filters": 1, "seconds": 1} | changes
    )
    result = {"version": 1, "test_accuracy": 0.5, "test_loss": 1, "validation_accuracy": 0.5}
    result |= {"train_seconds": 1, "seconds": 1, "parameters": 1, "filters": {"conv": filters}}
    records.write_json(records.result_path(folder), result)
    return folder


def test_runs_with_impossible_numbers_are_left_out(tmp_path):
    good = finished(tmp_path / "good", train_loss=1e38)
    huge = finished(tmp_path / "huge", epoch=10**6, filters=10**6)
    long = finished(tmp_path / "long", seconds=10**400)
    runs, left_out = gather(tmp_path)
    assert [run.folder for run in runs] == [good]
    assert "1,000,000 filters over 1,000,000 epochs cannot be right" in left_out[huge]
    assert "'seconds' cannot be beyond 1e+100, got (a number of 401 digits)." in left_out[long]


def test_read_each_keeps_the_order_given(tmp_path):
    folders = [make(tmp_path / name) for name in "cab"]
    runs, left_out = read_each([*folders, tmp_path / "nowhere"])
    assert [run.folder for run in runs] == folders
    assert "is not a run folder" in left_out[tmp_path / "nowhere"]
