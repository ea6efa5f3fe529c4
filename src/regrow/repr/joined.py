"""What stays of many tensors in the sub phase, taken in one operation, and their gradients spread in one.

On a GPU the tensors are joined to one vector, of which one kernel takes all entries that stay, each by its
index. On a CPU only small tensors are: there memory costs more than launches.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regrow.indexing import Where, place, take, take_block

_ALIGNED = 64  # entries: a part begins at a multiple of 256 bytes in float32, as PyTorch's own memory does
_SMALL = 2**15  # entries: larger tensors are not joined on a CPU


@dataclass(frozen=True, eq=False)
class Slice:
    """What stays of one tensor.

    Attributes:
        rows, columns: the indices that stay in dim 0 and dim 1, [kept] int64; None keeps all.
        spread: (width, [kept] int64): the places of what stays among zeros in ``dim``.
        dead: where the tensor, and so its gradient, is held at 0.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    spread: tuple[int, Tensor] | None = None
    dim: int = 0
    dead: Where | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """What stays of ``tensor``."""
        if self.dead is not None:
            tensor = cleared(tensor, self.dead)
        block = take_block(tensor, self.rows, self.columns)
        return block if self.spread is None else place(block, self.spread[1], self.dim, self.spread[0])

    def is_whole(self) -> bool:
        """Whether all of the tensor stays."""
        return self.rows is None and self.columns is None and self.spread is None

    def back(self, gradient: Tensor, whole: Tensor) -> Tensor:
        """The derivative of ``of``: ``gradient`` at its places in zeros of the shape of ``whole``."""
        if self.spread is not None:
            gradient = take(gradient, self.spread[1], self.dim)
        if self.columns is not None:
            gradient = place(gradient, self.columns, 1, whole.shape[1])
        if self.rows is not None:
            gradient = place(gradient, self.rows, 0, whole.shape[0])
        return gradient if self.dead is None else cleared(gradient, self.dead)


def cleared(tensor: Tensor, where: Where) -> Tensor:
    """``tensor`` with zeros at ``where``; it can be differentiated."""
    if isinstance(where, Tensor):
        return tensor.index_fill(0, where, 0)
    mask = torch.zeros(tensor.shape[:2], dtype=torch.bool, device=tensor.device)
    mask[where] = True
    return tensor.masked_fill(mask.view(*mask.shape, *[1] * (tensor.dim() - 2)), 0)


@dataclass
class _Part:
    """A tensor in a vector: where it begins, and its shape and strides there."""

    begin: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, vector: Tensor) -> Tensor:
        return vector.as_strided(self.shape, self.strides, self.begin)

    @property
    def count(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


class Layout:
    """How the parts that stay of ``tensors`` lie in one vector, and how their gradients lie in another.

    Args:
        tensors: of one type and on one device, each dense in memory.
        slices: what stays of each.
    """

    def __init__(self, tensors: Sequence[Tensor], slices: Sequence[Slice]) -> None:
        self.slices = list(slices)
        self.joined = [not tensor.is_cpu or tensor.numel() <= _SMALL for tensor in tensors]
        self.whole_length = self.small_length = self.whole_joined = self.small_joined = 0
        with torch.no_grad():
            positions = [_numbered(tensor) for tensor in tensors]
            kept = [one.of(each) for one, each in zip(slices, positions, strict=True)]
        # Joined tensors lie ahead of the others.
        order = sorted(range(len(tensors)), key=lambda i: not self.joined[i])
        parts: dict[int, tuple[_Part, _Part]] = {}
        for i in order:
            whole = _part(self.whole_length, tensors[i])
            small = _part(self.small_length, kept[i])
            self.whole_length += _aligned(whole.count)
            self.small_length += _aligned(small.count)
            parts[i] = whole, small
            if self.joined[i]:
                self.whole_joined, self.small_joined = self.whole_length, self.small_length
        self.whole = [parts[i][0] for i in range(len(tensors))]
        self.small = [parts[i][1] for i in range(len(tensors))]
        if any(self.joined):
            self._number(tensors, kept)
        self.number = next(_numbers)
        _layouts[self.number] = self

    def parts(self, vector: Tensor) -> list[Tensor]:
        """The parts that stay, as views of the vector in which they lie."""
        return [part.of(vector) for part in self.small]

    def _number(self, tensors: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
        """The indices by which joined tensors are taken and spread; a joined vector ends in a 0."""
        device = tensors[0].device
        among = [i for i, joined in enumerate(self.joined) if joined]
        whole = sum(tensors[i].numel() for i in among)
        small = sum(kept[i].numel() for i in among)
        taken = torch.full((self.small_joined,), whole, device=device)
        spread = torch.full((self.whole_joined,), small, device=device)
        # What is not taken keeps its own value when statistics are written back.
        written = torch.full((self.whole_joined,), self.small_joined + whole, device=device)
        begins = begun = 0
        for i in among:
            part, here = self.small[i], _in_memory(kept[i], self.small[i].strides)
            present = here > 0
            at = here[present] - 1
            places = torch.arange(part.count, device=device)[present]
            taken[part.begin : part.begin + part.count][present] = begins + at
            spread[self.whole[i].begin + at] = begun + places
            mine = self.whole[i].begin + torch.arange(tensors[i].numel(), device=device)
            written[mine] = self.small_joined + begins + mine - self.whole[i].begin
            written[self.whole[i].begin + at] = part.begin + places
            begins += tensors[i].numel()
            begun += part.count
        self.taken, self.spread, self.written = taken.int(), spread.int(), written.int()
        self.zero = torch.zeros(1, dtype=tensors[0].dtype, device=device)


_numbers = itertools.count()
_layouts: weakref.WeakValueDictionary[int, Layout] = weakref.WeakValueDictionary()


def is_dense(tensor: Tensor) -> bool:
    """Whether ``tensor`` fills its memory, each entry once."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _numbered(tensor: Tensor) -> Tensor:
    """The position of each entry in memory, from 1, with the shape and strides of ``tensor``."""
    vector = torch.arange(1, tensor.numel() + 1, device=tensor.device)
    return vector.as_strided(tensor.shape, tensor.stride())


def _part(begin: int, tensor: Tensor) -> _Part:
    strides = torch.empty_like(tensor, device="meta").stride()
    return _Part(begin, tuple(tensor.shape), tuple(strides))


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED


def _in_memory(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """``tensor`` as a vector in the order in which it lies in memory with ``strides``."""
    if tensor.stride() != tuple(strides):
        ordered = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
        tensor = ordered.copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _picked(tensors: Sequence[Tensor], layout: Layout, index: Tensor, out: Tensor) -> None:
    torch.index_select(torch.cat([*tensors, layout.zero]), 0, index, out=out)


# Custom operators: PyTorch sees one operation for all tensors, whatever the device makes of it.
@torch.library.custom_op("regrow::take_parts", mutates_args=())
def _take_parts(whole: Sequence[Tensor], layout: int) -> Tensor:
    """What stays of the tensors ``whole``, one vector."""
    to = _layouts[layout]
    out = whole[0].new_empty(to.small_length)
    if among := [_in_memory(t, p.strides) for t, p, j in zip(whole, to.whole, to.joined, strict=True) if j]:
        _picked(among, to, to.taken, out[: to.small_joined])
    for tensor, part, one, joined in zip(whole, to.small, to.slices, to.joined, strict=True):
        if not joined:
            part.of(out).copy_(one.of(tensor))
    return out


@torch.library.custom_op("regrow::spread_parts", mutates_args=())
def _spread_parts(small: Sequence[Tensor], layout: int) -> Tensor:
    """The tensors ``small`` at their places among zeros, one vector."""
    to = _layouts[layout]
    out = small[0].new_empty(to.whole_length)
    if among := [_in_memory(t, p.strides) for t, p, j in zip(small, to.small, to.joined, strict=True) if j]:
        _picked(among, to, to.spread, out[: to.whole_joined])
    for tensor, part, one, joined in zip(small, to.whole, to.slices, to.joined, strict=True):
        if not joined:
            whole = part.of(out)
            whole.copy_(one.back(tensor, whole))
    return out


@torch.library.custom_op("regrow::write_parts", mutates_args=())
def _write_parts(whole: Sequence[Tensor], small: Tensor, layout: int) -> Tensor:
    """The tensors ``whole`` with the entries of ``small``, from ``take_parts``, in place of theirs."""
    to = _layouts[layout]
    out = small.new_empty(to.whole_length)
    among = [_in_memory(t, p.strides) for t, p, j in zip(whole, to.whole, to.joined, strict=True) if j]
    if among:
        _picked([small[: to.small_joined], *among], to, to.written, out[: to.whole_joined])
    for tensor, part, taken, one, joined in zip(whole, to.whole, to.small, to.slices, to.joined, strict=True):
        if not joined:
            assert one.rows is not None
            part.of(out).copy_(tensor).index_copy_(0, one.rows, taken.of(small))
    return out


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: Layout, *whole: Tensor) -> tuple[Tensor, ...]:
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        if all(one.is_whole() for one in layout.slices):
            parts = tuple(tensor.view_as(tensor) for tensor in whole)
        else:
            small = _take_parts(list(whole), layout.number)
            parts = tuple(layout.parts(small))
        fixed = [part for part, tensor in zip(parts, whole, strict=True) if not tensor.requires_grad]
        ctx.mark_non_differentiable(*fixed)
        return parts

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_Spread.apply(ctx.layout, *gradients)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: Layout, *small: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        some = next((tensor for tensor in small if tensor is not None), None)
        if some is None:
            return (None,) * len(small)
        # A layer that did not take part in the loss has no gradient.
        full = [
            some.new_zeros(part.shape) if tensor is None else tensor
            for tensor, part in zip(small, layout.small, strict=True)
        ]
        whole = _spread_parts(full, layout.number)
        return tuple(
            None if tensor is None else part.of(whole)
            for tensor, part in zip(small, layout.whole, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        some = next(tensor for tensor in gradients if tensor is not None)
        full = [
            some.new_zeros(part.shape) if tensor is None else tensor
            for tensor, part in zip(gradients, ctx.layout.whole, strict=True)
        ]
        return None, *_Take.apply(ctx.layout, *full)


def take_vector(tensors: Sequence[Tensor], layout: Layout) -> Tensor:
    """What stays of all tensors as one vector, without gradients; ``Layout.parts`` has the pieces."""
    return _take_parts([tensor.detach() for tensor in tensors], layout.number)


def written(tensors: Sequence[Tensor], vector: Tensor, layout: Layout) -> list[Tensor]:
    """``tensors`` with the entries of ``vector``, from ``take_vector``, in place of their own."""
    whole = _write_parts([tensor.detach() for tensor in tensors], vector, layout.number)
    return [part.of(whole) for part in layout.whole]


def take_parts(tensors: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """What stays of each tensor, in one operation; gradients flow back in one."""
    return list(_Take.apply(layout, *tensors))
