"""Passes in full precision through models whose own code asks for less."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _Inside(threading.local):
    """The types of devices for which this thread is in a block of ``full_precision``."""

    def __init__(self) -> None:
        self.devices: list[str] = []


_inside, _lock = _Inside(), threading.Lock()
_plain: list[Any] = []  # ``torch.autocast.__enter__`` as PyTorch has it, once for each block of any thread
_coarse: list[list[Callable[[], None]]] = []  # what switches TF32 back, likewise


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


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions and matrix products of float32 are computed in float32 in the ``with`` block, in every
    thread: by PyTorch's default a GPU rounds the inputs of convolutions to TF32, and is off by 1e-3."""
    with _lock:
        _coarse.append(_coarse[0] if _coarse else [_convolutions_in_full(), _products_in_full()])
    try:
        yield
    finally:
        with _lock:
            restore = _coarse.pop()
            if not _coarse:
                for each in restore:
                    each()


def rounds_to_tf32() -> bool:
    """Whether a GPU rounds the inputs of convolutions or of matrix products to TF32."""
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "conv"):  # PyTorch before 2.9
        return backends.cudnn.allow_tf32 or backends.cuda.matmul.allow_tf32
    settings = (backends.cudnn.conv, backends.cuda.matmul)
    return any(each.fp32_precision == "tf32" for each in settings)


def _convolutions_in_full() -> Callable[[], None]:
    """Switch TF32 off for cuDNN; return what switches it back."""
    cudnn: Any = torch.backends.cudnn
    try:
        before = cudnn.allow_tf32
    except RuntimeError:  # the user set the newer names, which do not go together with this one
        return _all_ieee(cudnn.conv, cudnn.rnn)
    cudnn.allow_tf32 = False
    return lambda: setattr(cudnn, "allow_tf32", before)


def _products_in_full() -> Callable[[], None]:
    """Switch TF32 off for matrix products; return what switches it back."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        return _all_ieee(torch.backends.cuda.matmul)
    if before == "highest":
        return lambda: None
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(before)


def _all_ieee(*settings: Any) -> Callable[[], None]:
    before = [each.fp32_precision for each in settings]
    for each in settings:
        each.fp32_precision = "ieee"

    def restore() -> None:
        for each, value in zip(settings, before, strict=True):
            each.fp32_precision = value

    return restore


def _watched(enter: Any) -> Any:
    @functools.wraps(enter)
    def entered(opened: Any) -> Any:
        result = enter(opened)
        for device_type in _inside.devices:
            if torch.is_autocast_enabled(device_type):
                torch.set_autocast_dtype(device_type, torch.float32)
        return result

    return entered
