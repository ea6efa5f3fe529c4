import io
from pathlib import Path

import pytest
from rich.console import Console

from regrow.study import records
from regrow.study.config import make_config
from regrow.study.live import LiveTable, clock_time, progress_of
from regrow.study.plan import Job


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def jobs(folder: Path, count: int, epochs: int = 10) -> list[Job]:
    settings = {"epochs": epochs, "method": "standard"}
    return [
        Job(make_config({**settings, "seed": seed}), folder / f"run{seed}", "new") for seed in range(count)
    ]


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, height=20, color_system=None)


def epoch(job: Job, number: int, accuracy: float | None = 0.5) -> None:
    records.append_line(
        records.epochs_path(job.folder), {"epoch": number, "validation_accuracy": accuracy, "version": 1}
    )


def printed(shown: Console) -> str:
    return shown.file.getvalue()


def finish(job: Job) -> None:
    records.write_yaml(records.config_path(job.folder), {"version": 1, "method": "standard", "seed": 0})
    records.write_json(records.environment_path(job.folder), records.environment("cpu", 1))
    result = {
        "version": 1, "test_accuracy": 0.5, "test_loss": 1.0, "validation_accuracy": 0.5,
        "train_seconds": 1.25, "seconds": 2.0, "parameters": 1, "filters": {},
    }  # fmt: skip
    records.write_json(records.result_path(job.folder), result)


def test_outside_a_terminal_one_line_a_finished_run(tmp_path: Path) -> None:
    one, two, three = jobs(tmp_path, 3)
    where = console(terminal=False)
    with LiveTable([one, two, three], tmp_path, console=where) as shown:
        shown.started(one)
        shown.tick()
        finish(one)
        shown.finished(one, None)
        shown.started(two)
        shown.finished(two, "the loss became [nan]")
        records.write_text(tmp_path / "logs" / "run2.log", "warning: look")
        finish(three)
        shown.finished(three, None)
    done = "test accuracy 50.00%, trained in 1.2 s"
    assert printed(where).splitlines() == [
        f"[1/3] run0: {done}",
        "[2/3] run1: the loss became [nan]",
        f"[3/3] run2: {done}; warnings in {tmp_path / 'logs' / 'run2.log'}",
    ]


def test_in_a_terminal_a_table_of_what_runs(tmp_path: Path) -> None:
    all_jobs = one, two, three = jobs(tmp_path, 3)
    where, clock = console(terminal=True), Clock()
    with LiveTable(all_jobs, tmp_path, console=where, clock=clock) as shown:
        shown.started(one)
        shown.started(two)
        clock.now = 4.0
        epoch(one, 1)
        epoch(one, 2, 0.625)
        shown.tick()  # 2 of 10 epochs in 4 seconds: 16 more
        clock.now = 6.0
        where.file.truncate(0)
        shown.tick()
        text = printed(where)
        (line,) = [line for line in text.splitlines() if "run0" in line]
        assert line.split() == ["run0", "running", "2/10", "62.5%", "0:14"]
        (line,) = [line for line in text.splitlines() if "run2" in line]
        assert line.split() == ["run2", "waiting"]
        # run0 takes 20 seconds: 14 are left of it, and 20 for each of the two others, two at a time.
        assert "0 of 3 ended; 2 running, 1 waiting; about 0:27 left" in text
        where.file.truncate(0)
        shown.finished(two, "broken")
        assert "1 of 3 ended; 1 failed; 1 running, 1 waiting" in printed(where)
        assert "run1   failed" in printed(where)
    assert three.folder.name in text


def test_time_left_counts_from_where_a_resumed_run_was(tmp_path: Path) -> None:
    (one,) = jobs(tmp_path, 1)
    where, clock = console(terminal=True), Clock()
    for number in range(1, 9):
        epoch(one, number)
    with LiveTable([one], tmp_path, console=where, clock=clock) as shown:
        shown.started(one)
        records.write_bytes(records.epochs_path(one.folder), b"")  # cut back to the last checkpoint
        epoch(one, 6)
        shown.tick()
        clock.now = 3.0
        epoch(one, 7)
        where.file.truncate(0)
        shown.tick()
        (line,) = [line for line in printed(where).splitlines() if "run0" in line]
        assert line.split() == ["run0", "running", "7/10", "50.0%", "0:09"]


def test_no_more_rows_than_the_terminal_has(tmp_path: Path) -> None:
    many = jobs(tmp_path, 300)
    where = console(terminal=True)
    with LiveTable(many, tmp_path, console=where) as shown:
        where.file.truncate(0)
        shown.tick()
        assert len(printed(where).splitlines()) <= where.height
        assert "300 waiting" in printed(where)


@pytest.mark.parametrize("text", ["", "{", '{"epoch": 3', "[]\n", '{"epoch": "x"}\n', "\xff\n"])
def test_records_that_are_being_written_are_no_progress_yet(tmp_path: Path, text: str) -> None:
    assert progress_of(tmp_path) == (0, None)
    records.epochs_path(tmp_path).write_text(text, encoding="latin-1")
    assert progress_of(tmp_path) == (0, None)


def test_progress_is_the_last_whole_line(tmp_path: Path) -> None:
    with records.epochs_path(tmp_path).open("w") as file:
        for number in range(1, 200):
            file.write(f'{{"epoch": {number}, "validation_accuracy": null, "filler": "{"x" * 100}"}}\n')
        file.write('{"epoch": 200, "validation')
    assert progress_of(tmp_path) == (199, None)


def test_times() -> None:
    assert [clock_time(seconds) for seconds in (None, 0.4, 61, 3599.6, 36061)] == [
        "", "0:00", "1:01", "1:00:00", "10:01:01",
    ]  # fmt: skip
