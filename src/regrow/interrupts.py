"""Ctrl-C and SIGTERM: where they wait, and how the command ends by them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_came: list[int] = []
_first = 0.0
_TWICE = 0.5  # seconds: what starts a command may pass on a signal that the terminal has sent to both


class Interrupted(KeyboardInterrupt):
    """The command was sent the signal ``number``."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def exit_status() -> int | None:
    """The status that the command ends with after a signal, 130 or 143; None when none has come."""
    return 128 + _came[0] if _came else None


def leave() -> None:
    """From now on signals are ignored: the process is about to end, with a status that is settled."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def take_over() -> None:
    """From now on SIGINT and SIGTERM raise ``Interrupted``, and a second one ends the process at once.

    A signal that the process was started to ignore, as ``nohup`` and ``&`` in a script do, stays ignored.
    """
    for number, usual in zip(_SIGNALS, (signal.default_int_handler, signal.SIG_DFL), strict=True):
        if signal.getsignal(number) == usual:
            signal.signal(number, _raise)


def _raise(number: int, _frame: Any) -> None:
    global _first
    if not _came:
        _came.append(number)
        _first = time.monotonic()
        raise Interrupted(number)
    if time.monotonic() - _first > _TWICE:  # something hangs, or has caught the exception
        os._exit(128 + number)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that raise an exception wait until the block has ended, which must not be left half done.

    Raises:
        Interrupted: on entry, if one was raised before and code that catches everything swallowed it.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread sees signals
        yield
        return
    if _came:
        raise Interrupted(_came[0])
    waiting: list[int] = []
    before = {number: handler for number in _SIGNALS if callable(handler := signal.getsignal(number))}
    try:
        for number in before:
            signal.signal(number, lambda number, _frame: waiting.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if waiting:
            before[signal.Signals(waiting[0])](waiting[0], None)
