"""Show runs in a live table on a terminal, and print a line for each that ends. Imports no PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from regrow.reading import from_json
from regrow.study import records
from regrow.study.plan import Job
from regrow.study.sequences import outcome
from regrow.study.watching import log_path

# Lines of the terminal that rows leave free: for the header, the line below, and the lines printed last.
_MARGIN = 7


@dataclass
class _Run:
    """A run in progress: when it began, its epoch then, and its epoch now."""

    job: Job
    begun: float
    first: int = 0
    epoch: int = 0
    accuracy: float | None = None
    reached: float = 0.0

    def left(self, now: float) -> float | None:
        """Estimated seconds until the run ends; None before its first epoch has ended."""
        done = self.epoch - self.first
        if done < 1:
            return None
        return max(
            0.0,
            (self.job.config.epochs - self.epoch) * (self.reached - self.begun) / done - now + self.reached,
        )


class LiveTable:
    """A context that shows the progress of ``jobs``; it is a ``Watch``, which a launcher informs.

    It reads the records in the run folders, so the runs may be on any machine.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        root: Path,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._shows = self._console.is_terminal
        self._waiting = {job.folder: job for job in jobs}
        self._running: dict[Path, _Run] = {}
        self._failed: dict[Path, str] = {}
        self._took: list[float] = []
        self._count = len(jobs)
        self._root, self._clock = root, clock

    def __enter__(self) -> LiveTable:
        if self._shows:
            self._live.start()
            self.tick()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shows:
            self._live.stop()

    def started(self, job: Job) -> None:
        """``job`` runs from now on."""
        self._waiting.pop(job.folder, None)
        epoch, accuracy = progress_of(job.folder)
        now = self._clock()
        self._running[job.folder] = _Run(job, now, epoch, epoch, accuracy, now)
        self.tick()

    def finished(self, job: Job, error: str | None) -> None:
        """``job`` has ended; ``error`` says why, if it failed."""
        self._waiting.pop(job.folder, None)
        run = self._running.pop(job.folder, None)
        if run is not None and error is None:
            self._took.append(self._clock() - run.begun)
        if error is not None:
            self._failed[job.folder] = error
        number = self._count - len(self._waiting) - len(self._running)
        log = log_path(job.folder)
        warned = f"; warnings in {log}" if error is None and log.exists() else ""
        ended = error or outcome(records.read_run(job.folder).result or {})
        self._console.print(
            f"[{number}/{self._count}] {self._name(job.folder)}: {ended}{warned}",
            markup=False,
            highlight=False,
            style="red" if error else None,
            soft_wrap=True,
        )
        self.tick()

    def tick(self) -> None:
        """Read how far the runs are, and show it."""
        if not self._shows:
            return
        now = self._clock()
        for run in self._running.values():
            epoch, accuracy = progress_of(run.job.folder)
            if epoch != run.epoch:
                if epoch < run.first:  # the run has gone back to its last checkpoint
                    run.first, run.begun = epoch, now
                run.epoch, run.accuracy, run.reached = epoch, accuracy, now
        self._live.update(Group(self._table(now), Text(self._below(now))), refresh=True)

    def _table(self, now: float) -> Table:
        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        shown.add_column("run", overflow="ellipsis", no_wrap=True)
        shown.add_column("state", no_wrap=True)
        for column in ("epoch", "accuracy", "time left"):
            shown.add_column(column, justify="right", no_wrap=True)
        room = max(3, self._console.height - _MARGIN)
        rows = [
            (
                self._name(run.job.folder),
                "running",
                f"{run.epoch}/{run.job.config.epochs}",
                "" if run.accuracy is None else f"{run.accuracy:.1%}",
                clock_time(run.left(now)),
            )
            for run in self._running.values()
        ]
        rows += [(self._name(folder), "failed", "", "", "") for folder in self._failed]
        rows += [(self._name(folder), "waiting", "", "", "") for folder in islice(self._waiting, room)]
        for row in rows[:room]:
            shown.add_row(*map(Text, row))
        return shown

    def _below(self, now: float) -> str:
        parts = [f"{self._count - len(self._waiting) - len(self._running)} of {self._count} ended"]
        if self._failed:
            parts.append(f"{len(self._failed)} failed")
        parts.append(f"{len(self._running)} running, {len(self._waiting)} waiting")
        left = self._left(now)
        if left is not None:
            parts.append(f"about {clock_time(left)} left")
        return "; ".join(parts)

    def _left(self, now: float) -> float | None:
        """Seconds until all are done, if the waiting runs take as long as the runs so far."""
        lefts = [run.left(now) for run in self._running.values()]
        known = [left for left in lefts if left is not None]
        whole = self._took or [
            now - run.begun + left
            for run, left in zip(self._running.values(), lefts, strict=True)
            if left is not None
        ]
        if not whole or not (self._running or self._waiting):
            return None
        each = sum(whole) / len(whole)
        unknown = len(lefts) - len(known) + len(self._waiting)
        work = sum(known) + unknown * each
        return max([work / max(1, len(self._running)), *known])

    def _name(self, folder: Path) -> str:
        return folder.relative_to(self._root).as_posix()


def progress_of(folder: Path) -> tuple[int, float | None]:
    """The epochs that the run in ``folder`` has recorded, and the validation accuracy after the last."""
    try:
        with records.epochs_path(folder).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4000))
            lines = file.read().split(b"\n")[:-1]
        last = from_json(lines[-1])
        accuracy = last["validation_accuracy"]
        return int(last["epoch"]), None if accuracy is None else float(accuracy)
    except (OSError, IndexError, ValueError, KeyError, TypeError, OverflowError):
        return 0, None


def clock_time(seconds: float | None) -> str:
    """Seconds as ``"0:42"`` or ``"1:02:03"``; nothing for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
