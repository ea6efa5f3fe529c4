import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from regrow.study import analysed, records
from regrow.study import train as training
from regrow.study.config import make_config
from regrow.study.train import train

SMALL: dict[str, Any] = {"data": "digits", "width": 8, "train_size": 300, "epochs": 6, "threads": 1}
CYCLE: dict[str, Any] = {"method": "repr", "full": 2, "sub": 1, "cycles": 1}


def run(folder: Path, **settings: Any) -> Path:
    train(make_config({**SMALL, **settings}), folder)
    return folder


def test_weights_are_kept_every_few_epochs_and_around_events(tmp_path):
    folder = run(tmp_path / "run", **CYCLE, snapshots=4)
    kept = [(each.epoch, each.moment) for each in analysed.snapshots(folder)]
    assert kept == [(0, ""), (2, ""), (2, "drop"), (3, ""), (3, "restore"), (4, "")]
    before, dropped, narrow, restored = (
        load_file(analysed.snapshot_path(folder, *where)) for where in kept[1:5]
    )
    (drop, _) = records.read_run(folder).events
    for name, filters in drop["filters"].items():
        weight = f"{name}.weight"
        assert before[weight][filters].abs().sum() > 0
        assert dropped[weight][filters].abs().sum() == narrow[weight][filters].abs().sum() == 0
        # The new rows are orthogonal to the old ones.
        cosines = torch.nn.functional.cosine_similarity(
            before[weight][filters].flatten(1)[:, None], restored[weight][filters].flatten(1)[None], dim=2
        )
        torch.testing.assert_close(cosines, torch.zeros_like(cosines), atol=1e-4, rtol=0)


def test_snapshots_and_gradients_change_nothing_of_the_run(tmp_path):
    plain, observed = run(tmp_path / "a", **CYCLE), run(tmp_path / "b", **CYCLE, snapshots=1)
    assert not analysed.snapshots(plain)
    one, two = (load_file(records.weights_path(folder)) for folder in (plain, observed))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_gradients_after_a_restore(tmp_path):
    folder = run(tmp_path / "run", **CYCLE)
    (record,) = analysed.read_gradients(folder)
    assert record["event"]["epoch"] == 3
    assert record["filters"] == records.read_run(folder).events[1]["filters"]
    # 240 of the 300 pictures are trained on, which are 2 batches; 3 epochs follow.
    assert record["steps"] == list(range(1, record["seen"] + 1))
    # Readers are 0 at first, so that no gradient arrives.
    assert record["regrown"][0] == pytest.approx(0, abs=1e-9)
    assert record["regrown"][1] > 0
    steps, ratios = analysed.ratios(record)
    assert len(steps) == len(ratios) == record["seen"]


def test_filters_that_are_dropped_and_restored_at_once(tmp_path):
    folder = run(tmp_path / "run", method="repr", full=2, sub=0, cycles=1, snapshots=4)
    assert [(each.epoch, each.moment) for each in analysed.snapshots(folder)] == [
        (0, ""), (2, ""), (2, "restart"), (4, ""),
    ]  # fmt: skip
    (record,) = analysed.read_gradients(folder)
    assert record["event"]["kind"] == "restart"
    assert record["regrown"][0] == pytest.approx(0, abs=1e-9)


def test_other_methods_leave_no_gradients(tmp_path):
    assert not analysed.gradients_path(run(tmp_path / "run", epochs=1)).exists()


def test_a_resumed_run_keeps_the_same(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", **CYCLE, snapshots=1)
    folder = tmp_path / "stopped"
    real, calls = training._write, []

    def stopped(*arguments: Any, **named: Any) -> None:
        real(*arguments, **named)
        calls.append(1)
        if len(calls) == 4:  # in the middle of the record of the restore
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_write", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(folder, **CYCLE, snapshots=1)
    monkeypatch.setattr(training, "_write", real)
    run(folder, **CYCLE, snapshots=1)
    assert analysed.read_gradients(folder) == analysed.read_gradients(whole)
    names = [each.path.name for each in analysed.snapshots(whole)]
    assert [each.path.name for each in analysed.snapshots(folder)] == names
    for name in names:
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_rerun_removes_what_was_kept(tmp_path):
    folder = run(tmp_path / "run", **CYCLE, snapshots=2)
    analysed.analysis_path(folder).write_text(json.dumps({"version": 1}))
    train(make_config({**SMALL, "epochs": 1}), folder, rerun=True)
    assert not analysed.snapshots(folder)
    assert not analysed.gradients_path(folder).exists()
    assert not analysed.analysis_path(folder).exists()
