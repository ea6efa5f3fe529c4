"""Passes in full precision through models whose own code asks for less."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _Inside(threading.local):
    """The types of devices for which this thread is in a block of ``full_precision``."""

    def __init__(self) -> None:
        self.devices: list[str] = []


_inside, _lock = _Inside(), threading.Lock()
_plain: list[Any] = []  # ``torch.autocast.__enter__`` as PyTorch has it, once for each block of any thread


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Autocast that the model's code opens on a device computes in float32 in the ``with`` block.

    In bfloat16 a change of one unit in the last place cannot be told from a channel that is read. Autocast
    stays on, because code inside of it may rely on it where numbers of two types meet. Autocast restores the
    type that was set before when its own block ends.
    """
    # A mode of PyTorch's that watches each function would take a fifth of a pass.
    with _lock:
        _plain.append(_plain[0] if _plain else torch.autocast.__enter__)
        torch.autocast.__enter__ = _watched(_plain[0])  # type: ignore[method-assign]
    _inside.devices.append(device_type)
    try:
        yield
    finally:
        _inside.devices.pop()
        with _lock:
            plain = _plain.pop()
            if not _plain:
                torch.autocast.__enter__ = plain  # type: ignore[method-assign]


def _watched(enter: Any) -> Any:
    @functools.wraps(enter)
    def entered(opened: Any) -> Any:
        result = enter(opened)
        for device_type in _inside.devices:
            if torch.is_autocast_enabled(device_type):
                torch.set_autocast_dtype(device_type, torch.float32)
        return result

    return entered
