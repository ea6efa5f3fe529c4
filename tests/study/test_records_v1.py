"""Records of the first version, as that version wrote them (tests/data/records-v1), stay readable."""

import shutil
from pathlib import Path

import pytest

from regrow.study import records
from regrow.study.compare import summarise
from regrow.study.report import write_report

FOLDER = Path(__file__).parent.parent / "data" / "records-v1"


def test_every_run_is_read_and_what_it_lacks_is_none():
    runs = records.find_runs(FOLDER)
    assert [(run.method, run.seed) for run in runs] == [
        ("repr", 0), ("repr", 1), ("standard", 0), ("standard", 1),
    ]  # fmt: skip
    for run in runs:
        assert run.config["version"] == 1
        assert [line["epoch"] for line in run.epochs] == [1, 2, 3, 4]
        assert [line["flops"] for line in run.epochs] == [None] * 4
        assert (run.result["train_flops"], run.result["resumed"]) == (None, None)
        assert [event["kind"] for event in run.events] == ["drop", "restore"] * (run.method == "repr")
        assert len(records.weights_hash(run.folder)) == 64
    assert runs[2].result["test_accuracy"] == pytest.approx(0.2646, abs=1e-4)
    assert records.read_curves(runs[0].folder)[0]["version"] == 1


def test_they_are_summarised():
    runs = records.find_runs(FOLDER)
    standard, regrown = sorted(summarise(runs, "standard"), key=lambda each: each.method != "standard")
    assert (standard.method, regrown.method) == ("standard", "repr")


def test_they_are_reported_on(tmp_path):
    page = write_report(
        records.find_runs(FOLDER), tmp_path / "report.html", baseline="standard", title="First version"
    )
    assert "no gain shown" in page.read_text(encoding="utf-8")


def test_a_finished_run_of_the_first_version_is_not_run_again(tmp_path):
    from regrow.study.config import make_config
    from regrow.study.train import train

    shutil.copytree(FOLDER / "repr-seed0", tmp_path / "run")
    config = records.read_config(tmp_path / "run")
    assert not train(make_config(config), tmp_path / "run")
    with pytest.raises(ValueError, match=r"a finished run with fraction=0\.3 \(asked for: 0\.5\)"):
        train(make_config({**config, "fraction": 0.5}), tmp_path / "run")
