"""What a command that a signal has stopped leaves, and what to do next. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regrow.study import records
from regrow.study.live import progress_of


def what_now(command: str, given: Mapping[str, Any]) -> str:
    """A line that says how far the command came, and how to go on.

    Args:
        command: its name, such as ``train``.
        given: its arguments; ``out`` is the folder of ``train``.
    """
    if command not in ("train", "compare", "study", "curve"):
        return "stopped before it was done; give the same command again to start over."
    far, again = "", "without --rerun" if given.get("rerun") else "again"
    if command == "train":
        out = Path(given["out"])
        if records.is_finished(out):
            return f"stopped before it changed the run in {out}; give the same command again to start over."
        epoch = progress_of(out)[0]
        if not epoch:
            return "stopped in the first epoch; give the same command again to start over."
        far = f" after epoch {epoch}"
    return f"stopped{far}; give the same command {again} to continue."
