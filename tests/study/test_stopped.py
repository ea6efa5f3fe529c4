"""Commands that get a signal in the middle: what they say, how they end, and what they leave."""

import json
import signal
from pathlib import Path

import pytest

import forking
from regrow.study import records
from regrow.study.stopped import what_now

SMALL = ["--width", 4, "--train-size", 60, "--threads", 1]
INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    done = forking.regrow("train", *SMALL, "--epochs", 2, "--out", folder / "run", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


@pytest.mark.parametrize(
    ("place", "number", "epoch"),
    [
        (("step", 2), INT, 0),
        (("step", 4), TERM, 1),
        (("evaluate", 2), INT, 1),
        (("append", 2), TERM, 2),
        (("checkpoint", 2), INT, 2),
        (("rename", 4), TERM, 2),
        (("finish", 1), INT, 4),
    ],
)
def test_train_says_after_which_epoch_it_stopped_and_goes_on(
    tmp_path: Path, place: tuple[str, int], number: int, epoch: int
) -> None:
    command = ["train", *SMALL, "--batch-size", 30, "--epochs", 4, "--out", tmp_path / "run"]
    stopped = forking.regrow(*command, folder=tmp_path, stop=(*place, number))
    assert stopped.returncode == 128 + number
    assert stopped.stdout == ""
    far = f"after epoch {epoch}" if epoch else "in the first epoch"
    end = "continue" if epoch else "start over"
    assert stopped.stderr == f"regrow: stopped {far}; give the same command again to {end}.\n"
    assert hidden(tmp_path) == []
    assert len(records.read_run(tmp_path / "run").epochs) == epoch
    again = forking.regrow(*command, folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stderr == ""
    assert records.read_run(tmp_path / "run").result["resumed"] == (1 if epoch else 0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("place", "number"),
    [(("evaluated", 1), INT), (("evaluated", 2), TERM), (("saved", 1), INT), (("rename", 1), TERM)],
)
def test_prune_leaves_what_was_there(
    trained: Path, tmp_path: Path, place: tuple[str, int], number: int
) -> None:
    out = tmp_path / "small"
    out.mkdir()
    (out / "prune.json").write_text("an earlier one")
    command = ["prune", trained, "--fraction", 0.5, "--no-compensate", "--out", out]
    stopped = forking.regrow(*command, folder=tmp_path, stop=(*place, number))
    assert stopped.returncode == 128 + number
    assert (
        stopped.stderr == "regrow: stopped before it was done; give the same command again to start over.\n"
    )
    assert contents(out) == {"prune.json": b"an earlier one"}
    assert hidden(tmp_path) == []


def test_prune_writes_all_once_it_has_begun_to(trained: Path, tmp_path: Path) -> None:
    command = ["prune", trained, "--fraction", 0.5, "--no-compensate", "--out", tmp_path / "small"]
    stopped = forking.regrow(*command, folder=tmp_path, stop=("moved", 1, INT))
    assert stopped.returncode == 130
    assert sorted(contents(tmp_path / "small")) == ["prune.json", "pruned.safetensors", "report.html"]
    json.loads((tmp_path / "small" / "prune.json").read_text())


@pytest.mark.parametrize("place", ["saved", "moved", "rename", "sync"])
def test_what_a_killed_prune_leaves_is_swept_by_the_next(trained: Path, tmp_path: Path, place: str) -> None:
    command = ["prune", trained, "--fraction", 0.5, "--no-compensate", "--out", tmp_path / "small"]
    killed = forking.regrow(*command, folder=tmp_path, stop=(place, 1, signal.SIGKILL))
    assert killed.returncode == -signal.SIGKILL
    assert len(hidden(tmp_path / "small")) > 0
    assert forking.regrow(*command, folder=tmp_path).returncode == 0
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == [
        "prune.json",
        "pruned.safetensors",
        "report.html",
    ]


def test_curve_and_report_go_on_and_sweep(trained: Path, tmp_path: Path) -> None:
    curve = ["curve", trained, "--fractions", "0,50", "--readings", "zeroed", "--out", tmp_path / "out"]
    stopped = forking.regrow(*curve, folder=tmp_path, stop=("measured", 1, TERM))
    assert stopped.returncode == 143
    assert stopped.stderr == "regrow: stopped; give the same command again to continue.\n"
    killed = forking.regrow(*curve, folder=tmp_path, stop=("rename", 1, signal.SIGKILL))
    assert killed.returncode == -signal.SIGKILL
    assert len(hidden(trained)) == 1
    assert forking.regrow(*curve, folder=tmp_path).returncode == 0
    assert hidden(trained) == []
    report = ["report", trained, "--out", tmp_path / "out" / "a.html"]
    stopped = forking.regrow(*report, folder=tmp_path, stop=("reported", 1, INT))
    assert stopped.returncode == 130
    assert sorted(contents(tmp_path / "out")) == [
        "a.html", "curve.json", "curve.png", "curve.svg", "results.csv", "results.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "given", "said"),
    [
        ("compare", {"rerun": False}, "stopped; give the same command again to continue."),
        ("compare", {"rerun": True}, "stopped; give the same command without --rerun to continue."),
        ("study", {}, "stopped; give the same command again to continue."),
        ("curve", {"rerun": True}, "stopped; give the same command without --rerun to continue."),
        ("prune", {}, "stopped before it was done; give the same command again to start over."),
        ("report", {}, "stopped before it was done; give the same command again to start over."),
    ],
)
def test_what_now(command: str, given: dict[str, object], said: str) -> None:
    assert what_now(command, given) == said


def test_a_finished_run_that_was_to_be_trained_again_is_as_it_was(trained: Path) -> None:
    said = what_now("train", {"out": trained, "rerun": True})
    assert (
        said == f"stopped before it changed the run in {trained}; give the same command again to start over."
    )
