"""Which rows a network selects by what it computes, such as a detector's proposals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regrow.torch_private import TorchDispatchMode

_ORDERS = {"aten.topk.default", "aten.sort.default", "aten.sort.stable"}  # they return values and indices
_INDICES = {"aten.nonzero.default", "torchvision.nms.default"}
_BY_MASK = {
    "aten.index.Tensor",
    "aten.masked_select.default",
    "aten.index_put.default",
    "aten.index_put_.default",
}


class Selections:
    """The selections of one pass of a network, for a pass of another one that is to select the same.

    Two networks that differ a little rank the same candidates differently, and a layer behind such a choice
    would read other rows, or more of them. Selected are rows by ``topk``, ``sort``, ``nonzero``,
    non-maximum suppression and masks. Values that a network sorts are its own.
    """

    def __init__(self) -> None:
        self._made: list[_Selection] = []
        self._pass: _Pass | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """The selections of the pass in this block count from here on."""
        self._made = []
        with self._passing(_Noting(self._made)):
            yield

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """The pass in this block selects as the noted one did, until it does something else than that one."""
        with self._passing(_Repeating(self._made)):
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is selected in this block is not the network's doing."""
        if self._pass is None:
            yield
            return
        self._pass.paused = True
        try:
            yield
        finally:
            self._pass.paused = False

    @contextmanager
    def _passing(self, mode: _Pass) -> Iterator[None]:
        self._pass = mode
        try:
            with mode:
                yield
        finally:
            self._pass = None


@dataclass(frozen=True)
class _Selection:
    """One selection: the operation, the shape of what it read, and the indices or masks."""

    name: str
    shape: torch.Size
    chosen: Any


class _Pass(TorchDispatchMode):
    paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if self.paused or not (name in _ORDERS or name in _INDICES or _masks(name, args)):
            return func(*args, **(kwargs or {}))
        return self.select(name, func, args, kwargs or {})

    def select(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation that selects returns."""
        raise NotImplementedError


class _Noting(_Pass):
    def __init__(self, made: list[_Selection]) -> None:
        super().__init__()
        self._made = made

    def select(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        masks = [mask.clone() for mask in _masks(name, args)]  # the operation may write to them
        result = func(*args, **kwargs)
        chosen = masks or (result[1] if name in _ORDERS else result).clone()
        self._made.append(_Selection(name, args[0].shape, chosen))
        return result


class _Repeating(_Pass):
    def __init__(self, made: list[_Selection]) -> None:
        super().__init__()
        self._left = list(reversed(made))

    def select(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        noted = self._left.pop() if self._left else None
        if noted is None or (noted.name, noted.shape) != (name, args[0].shape):
            self._left.clear()  # from here on the two passes do different things
            return func(*args, **kwargs)
        if name in _ORDERS:
            return func(*args, **kwargs)[0], noted.chosen.clone()
        if name in _INDICES:
            return noted.chosen.clone()
        return func(*_with_masks(name, args, noted.chosen), **kwargs)


def _masks(name: str, args: Any) -> list[Tensor]:
    """The masks by which an operation selects rows; none for any other.

    A mask of the whole tensor that is written to selects no rows: ``x[x < 0] = 0`` is an activation.
    """
    if name not in _BY_MASK:
        return []
    given = [args[1]] if name == "aten.masked_select.default" else args[1]
    masks = [each for each in given if each is not None and each.dtype == torch.bool]
    if "index_put" in name and any(mask.dim() == args[0].dim() for mask in masks):
        return []
    return masks


def _with_masks(name: str, args: Any, masks: list[Tensor]) -> Any:
    """``args`` with other masks."""
    if name == "aten.masked_select.default":
        return (args[0], masks[0], *args[2:])
    left = iter(masks)
    given = [next(left) if each is not None and each.dtype == torch.bool else each for each in args[1]]
    return (args[0], given, *args[2:])
