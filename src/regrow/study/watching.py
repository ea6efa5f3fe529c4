"""The interface by which a launcher reports progress, and a run's log file. Imports no PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from regrow.study.plan import Job

LOGS = "logs"


class Watch(Protocol):
    """An object that a launcher informs of its progress."""

    def started(self, job: Job) -> None:
        """``job`` runs from now on."""

    def finished(self, job: Job, error: str | None) -> None:
        """``job`` has ended; ``error`` says why, if it failed."""

    def tick(self) -> None:
        """Called several times a second, so that the watch can read how far the runs are."""


def log_path(folder: Path) -> Path:
    """Where the process of the run in ``folder`` writes warnings and errors."""
    return folder.parent / LOGS / f"{folder.name}.log"
