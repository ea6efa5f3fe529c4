"""A progress bar on standard error for what takes more than two seconds; nothing where that is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

_AFTER = 2.0  # seconds


class Advance(Protocol):
    """Tells the bar how many more steps are done."""

    def __call__(self, steps: int = 1) -> None: ...


@contextmanager
def progress_bar(title: str, steps: int, *, shown: bool = True) -> Iterator[Advance]:
    """A bar over ``steps`` steps, which appears after two seconds; without rich there is none."""
    begun, done, bar, task = time.monotonic(), 0, None, 0
    bar_class: Any = None
    if shown and sys.stderr.isatty():
        with suppress(ImportError):
            from rich.progress import Progress as bar_class

    def advance(steps_done: int = 1) -> None:
        nonlocal done, bar, task
        done += steps_done
        if bar is None and bar_class is not None and time.monotonic() - begun > _AFTER:
            from rich.console import Console

            bar = bar_class(console=Console(stderr=True), transient=True)
            bar.start()
            task = bar.add_task(title, total=steps)
        if bar is not None:
            bar.update(task, completed=done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()
