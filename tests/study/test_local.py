import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

from regrow.study import records
from regrow.study.config import make_config
from regrow.study.local import _error, run_local, shared_out, work
from regrow.study.plan import Job
from regrow.study.watching import log_path

SMALL = {"width": 4, "train_size": 100, "epochs": 2, "method": "standard"}


class Noted:
    """A watch that notes what it is told, and how many runs were under way."""

    def __init__(self) -> None:
        self.finished_with: dict[str, str | None] = {}
        self.running: set[str] = set()
        self.most = 0

    def started(self, job: Job) -> None:
        self.running.add(job.folder.name)
        self.most = max(self.most, len(self.running))

    def finished(self, job: Job, error: str | None) -> None:
        self.running.remove(job.folder.name)
        self.finished_with[job.folder.name] = error

    def tick(self) -> None:
        pass


def job(folder: Path, **settings: object) -> Job:
    return Job(make_config({**SMALL, **settings}), folder, "new")


def test_one_that_fails_and_one_that_is_killed_take_no_other_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    killed = []

    class Killer(Noted):
        def tick(self) -> None:
            if not killed and records.epochs_path(tmp_path / "killed").exists():
                (process,) = [each for each in multiprocessing.active_children() if each.pid]
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)

    jobs = [
        job(tmp_path / "wrong", model="vgg", depth=12),
        job(tmp_path / "killed", epochs=5000),
        job(tmp_path / "good", seed=1),
    ]
    watch = Killer()
    failed = run_local(jobs, watch, workers=1)
    assert list(failed) == [tmp_path / "wrong", tmp_path / "killed"]
    assert "depth" in failed[tmp_path / "wrong"]
    assert failed[tmp_path / "killed"].startswith("killed by SIGKILL (is there enough memory?)")
    assert watch.finished_with == {"good": None, **{path.name: error for path, error in failed.items()}}
    assert watch.most == 1
    assert records.is_finished(tmp_path / "good")
    assert not records.is_finished(tmp_path / "killed")
    environment = records.read_run(tmp_path / "good").environment
    assert environment["threads"] == min(2, len(os.sched_getaffinity(0)))
    assert environment["command"] == records.environment("cpu", 1)["command"]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["killed.log", "wrong.log"]
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_two_at_a_time_with_threads_as_they_say(tmp_path: Path) -> None:
    jobs = [job(tmp_path / str(seed), seed=seed, threads=1) for seed in range(3)]
    watch = Noted()
    assert run_local(jobs, watch, workers=2) == {}
    assert watch.most == 2
    assert all(records.read_run(each.folder).environment["threads"] == 1 for each in jobs)
    assert run_local(jobs[:1], Noted(), rerun=True) == {}


def test_an_error_while_watching_stops_the_runs(tmp_path: Path) -> None:
    class Broken(Noted):
        def tick(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_local([job(tmp_path / "long", epochs=5000)], Broken())
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("cpus", "workers", "given", "threads"),
    [
        (8, 2, "", 4),
        (8, 3, "", 2),
        (2, 5, "", 1),
        (8, 2, "3", 3),
        (8, 2, "16", 4),
        (8, 2, "0", 4),
        (8, 2, "x", 4),
    ],
)
def test_threads_are_shared_out(
    monkeypatch: pytest.MonkeyPatch, cpus: int, workers: int, given: str, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert shared_out(cpus, workers) == threads


def test_what_is_told_of_a_process_that_ended(tmp_path: Path) -> None:
    one = job(tmp_path / "run")
    log = log_path(one.folder)
    log.parent.mkdir()
    log.write_text("a line\nout of memory  \n\n")
    assert _error(1, one) == "out of memory"
    assert _error(-11, one) == "killed by SIGSEGV; its last words: out of memory"
    assert _error(-99, one) == "killed by signal 99; its last words: out of memory"
    log.write_text("")
    assert _error(0, one) == "ended with exit code 0 and without a result"
    assert _error(-6, one) == "killed by SIGABRT"
    one.folder.mkdir()
    records.result_path(one.folder).write_text("{}")
    log.write_text("warning: look at this\n")
    assert _error(0, one) is None
    assert log.exists(), "a warning is kept"
    log.write_text("")
    assert _error(0, one) is None
    assert not log.exists()


def test_an_error_in_the_program_has_its_traceback_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from regrow.study import train as module

    def broken(*_: object, **__: object) -> bool:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(module, "train", broken)
    with pytest.raises(SystemExit) as ended:
        work(make_config({**SMALL, "threads": 1}), tmp_path / "run", 1)
    assert ended.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "RuntimeError: no such thing"
    assert sys.exc_info() == (None, None, None)
