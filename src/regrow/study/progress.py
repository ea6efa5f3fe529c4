"""One progress bar for a run: loss and accuracy in the terminal, nothing at all elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A context that shows a bar while it is open, if standard error is a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
        )
        self._state = ""

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, name: str, steps: int) -> None:
        """A run of ``steps`` steps begins."""
        self._task = self._bar.add_task(name, total=steps, state="")

    def advance(self, steps: int, loss: float) -> None:
        """``steps`` more steps are done, at a mean training loss of ``loss``."""
        self._bar.update(self._task, advance=steps, state=f"loss {loss:.3f} {self._state}")

    def epoch(self, epoch: int, epochs: int, loss: float, accuracy: float) -> None:
        """An epoch is done: its mean training loss, and the validation accuracy (0 to 1) after it."""
        self._state = f"validation {accuracy:6.1%} after epoch {epoch}/{epochs}"
        self._bar.update(self._task, state=f"loss {loss:.3f} {self._state}")
