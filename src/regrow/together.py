"""One computation for many layers at once, in place of one for each layer.

On a GPU every operation costs the time of its launch, however small its tensors are. What each layer needs
in a pass, such as its weight with noise or without dropped rows, is therefore computed for a group of layers
when the first of them runs. A group holds about ``GROUP_BYTES``: autograd delivers the gradients of a group
together, and DDP sends what has been delivered while the backward pass goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from regrow.torch_private import backward_node, is_noted, saved_tensors_go_elsewhere, transforms_run

GROUP_BYTES = 25 * 2**20  # the size of DDP's buckets
T = TypeVar("T")


class Together(Generic[T]):
    """Makes something for groups of layers, in the order in which the layers run.

    The first pass shows which layers run, and in which order. A layer that is left out in a later pass leaves
    its group: an operation on it would tell DDP that it takes part. ``get`` answers None where a layer must
    compute by itself: outside ``begin`` and ``end``; in compiled code; where a part of the pass may be
    computed again for the backward pass (activation checkpointing), because such a part must not read what
    another part has made; while transforms of torch.func or forward-mode derivatives run; and while torch.jit
    or torch.fx write the operations down.

    Args:
        make: returns one value for each of the layers given, which are of one kind; None for a layer that
            computes by itself after all.
        kind: what the layers of a group have in common, such as device and type; None for a layer that
            computes by itself now. It is asked in every pass.
        size: bytes of a layer's part.
        stamp: changes if what ``make`` has read of a layer changes before the layer runs.
        order: the layers that run in each pass, in order, if that is known before the first.
    """

    def __init__(
        self,
        make: Callable[[Sequence[nn.Module]], Sequence[T | None]],
        kind: Callable[[nn.Module], Hashable],
        size: Callable[[nn.Module], int],
        stamp: Callable[[nn.Module], Any],
        order: Sequence[nn.Module] = (),
    ) -> None:
        self._make, self._kind, self._size, self._stamp = make, kind, size, stamp
        self._steady = list(order) or None  # None: no pass has shown it
        self._groups = self._grouped(order)
        self._ran: dict[nn.Module, None] = {}
        self._made: dict[nn.Module, tuple[T | None, Any]] = {}
        self._running = self._with_grad = False
        self._thread = 0  # the one whose pass runs; passes of other threads compute layer by layer

    @torch.no_grad()
    def prepare(self) -> None:
        """Make everything once, and let it go: what ``make`` keeps for later passes is there then."""
        for group in {id(group): group for group in self._groups.values()}.values():
            self._make(group)

    def begin(self) -> None:
        """A pass begins."""
        self._thread = threading.get_ident()
        self._ran, self._made = {}, {}
        self._running, self._with_grad = True, torch.is_grad_enabled()

    def end(self, whole: bool) -> None:
        """A pass ends; what was made for it is let go.

        Args:
            whole: whether all layers of the pass have run; no error broke it off.
        """
        if self._running and whole and self._ran:
            known = self._ran if self._steady is None else self._steady
            steady = [layer for layer in known if layer in self._ran]
            if steady != self._steady:
                self._steady, self._groups = steady, self._grouped(steady)
        self._ran, self._made, self._running = {}, {}, False

    def get(self, layer: nn.Module) -> T | None:
        """What was made for ``layer`` in this pass; None if it has to compute by itself."""
        if not self._running or not self._in_one_go() or self._thread != threading.get_ident():
            return None
        self._ran[layer] = None
        if layer not in self._made:
            if layer not in self._groups or (kind := self._kind(layer)) is None:
                return None
            group = [
                each
                for each in self._groups[layer]
                if each is layer or (each not in self._made and self._kind(each) == kind)
            ]
            for each, value in zip(group, self._make(group), strict=True):
                self._made[each] = value, self._stamp(each)
        made, stamp = self._made[layer]
        return made if stamp == self._stamp(layer) else None

    def leave(self, layer: nn.Module) -> None:
        """Have ``layer`` compute by itself in the rest of this pass."""
        self._made[layer] = None, None

    def _in_one_go(self) -> bool:
        """Whether what runs now belongs to the pass itself, and will not be computed again."""
        return (
            torch.is_grad_enabled() is self._with_grad
            and not torch.compiler.is_compiling()
            and not is_noted()
            and not transforms_run()
            and backward_node() is None
            and not saved_tensors_go_elsewhere()
        )

    def _grouped(self, layers: Sequence[nn.Module]) -> dict[nn.Module, list[nn.Module]]:
        groups: dict[nn.Module, list[nn.Module]] = {}
        open_groups: dict[Hashable, tuple[list[nn.Module], int]] = {}
        for layer in layers:
            if (kind := self._kind(layer)) is None:
                continue
            group, held = open_groups.get(kind, ([], 0))
            if group and held + self._size(layer) > GROUP_BYTES:
                group, held = [], 0
            group.append(layer)
            open_groups[kind] = group, held + self._size(layer)
            groups[layer] = group
        return groups

    def __getstate__(self) -> dict[str, Any]:
        # What a pass has made belongs to that pass, and cannot be copied.
        return {**vars(self), "_ran": {}, "_made": {}, "_running": False}
