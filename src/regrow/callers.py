"""Warnings that name the line of the user's code."""

from __future__ import annotations

import inspect
import warnings


def warn(message: str) -> None:
    """Issue a ``UserWarning`` at the innermost line that is neither regrow's nor PyTorch's."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and _package(frame.f_globals) in ("regrow", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]
