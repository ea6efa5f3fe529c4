"""The bar of the commands that work through run folders."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def counting_bar() -> Progress:
    """A bar on standard error with a description, a count and the time left; quiet if that is no terminal."""
    errors = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),  # a folder's name
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=errors,
        disable=not errors.is_terminal,
        transient=True,
    )
