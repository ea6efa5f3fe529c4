"""What stays of many tensors in the sub phase, taken in one operation, and their gradients spread in one.

On a GPU the tensors are joined to one vector, of which one kernel takes all entries that stay, each by its
index. On a CPU only small tensors are: there memory costs more than launches.
"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regrow.indexing import Where, clear, place, take, take_block
from regrow.memory import dense_strides, in_memory
from regrow.torch_private import copy_all

_ALIGNED = 64  # entries: a part begins at a multiple of 256 bytes in float32, as PyTorch's own memory does
_SMALL = 2**15  # entries: larger tensors are not joined on a CPU


@dataclass(frozen=True, eq=False)
class Slice:
    """What stays of one tensor.

    Attributes:
        rows, columns: the indices that stay in dim 0 and dim 1, [kept] int64; None keeps all.
        spread: (width, [kept] int64): the places of what stays among zeros in ``dim``.
        dead: where what stays, and so its gradient, is held at 0, as an index into the whole tensor.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    spread: tuple[int, Tensor] | None = None
    dim: int = 0
    dead: Where | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """What stays of ``tensor``."""
        if self.dead is not None:
            tensor = _cleared(tensor, self.dead)
        block = take_block(tensor, self.rows, self.columns)
        return block if self.spread is None else place(block, self.spread[1], self.dim, self.spread[0])

    def back(self, gradient: Tensor, out: Tensor) -> None:
        """The derivative of ``of``: write ``gradient`` to its places in ``out``, and zeros elsewhere."""
        if self.spread is not None:
            gradient = take(gradient, self.spread[1], self.dim)
        if self.columns is not None:
            gradient = place(gradient, self.columns, 1, out.shape[1])
        if self.rows is None:
            out.copy_(gradient)
        else:
            out.zero_().index_copy_(0, self.rows, gradient)
        if self.dead is not None:
            clear(out, self.dead)

    def is_whole(self) -> bool:
        """Whether all of the tensor stays."""
        return self.rows is None and self.columns is None and self.spread is None


@dataclass(frozen=True, eq=False)
class At:
    """The entries of a tensor at an index, as another kind of slice; they are only read."""

    where: Where

    def of(self, tensor: Tensor) -> Tensor:
        """The entries."""
        return tensor[self.where]


def _cleared(tensor: Tensor, where: Where) -> Tensor:
    """``tensor`` with zeros at ``where``; it can be differentiated."""
    if isinstance(where, Tensor):
        return tensor.index_fill(0, where, 0)
    mask = torch.zeros(tensor.shape[:2], dtype=torch.bool, device=tensor.device)
    mask[where] = True
    return tensor.masked_fill(mask.view(*mask.shape, *[1] * (tensor.dim() - 2)), 0)


class _Vector:
    """How tensors of given shapes and strides lie in one vector, each from a multiple of 256 bytes on.

    Args:
        shapes: (shape, strides) of each tensor.
        joined: which of them lie ahead of the others.
    """

    def __init__(self, shapes: Sequence[tuple[torch.Size, tuple[int, ...]]], joined: Sequence[bool]) -> None:
        self.shapes = list(shapes)
        self.counts = [math.prod(shape) for shape, _ in shapes]
        self.begins = [0] * len(shapes)
        self._order = sorted(range(len(shapes)), key=lambda number: not joined[number])
        # The dimensions as they lie in memory, and where each of them is there.
        self._dims = [sorted(range(len(shape)), key=lambda d: (-strides[d], d)) for shape, strides in shapes]
        self._sizes: list[int] = []
        self.length = self.joined_length = 0
        for number in self._order:
            self.begins[number] = self.length
            gap = -self.counts[number] % _ALIGNED
            self._sizes += [self.counts[number], gap]
            self.length += self.counts[number] + gap
            if joined[number]:
                self.joined_length = self.length

    def parts(self, vector: Tensor) -> list[Tensor]:
        """The tensors, as views of the vector."""
        pieces = vector.split(self._sizes)
        parts: list[Tensor] = [vector] * len(self.shapes)
        for turn, number in enumerate(self._order):
            shape, strides = self.shapes[number]
            flat = len(shape) == 1
            parts[number] = (
                pieces[2 * turn] if flat else vector.as_strided(shape, strides, self.begins[number])
            )
        return parts

    def views(self, vector: Tensor) -> list[Tensor]:
        """``parts`` in operations whose derivatives are joined again: for compilers."""
        pieces = vector.split(self._sizes)
        parts: list[Tensor] = [vector] * len(self.shapes)
        for turn, number in enumerate(self._order):
            shape, dims = self.shapes[number][0], self._dims[number]
            back = [dims.index(dim) for dim in range(len(dims))]
            parts[number] = pieces[2 * turn].view([shape[dim] for dim in dims]).permute(back)
        return parts


class Layout:
    """How the parts that stay of ``tensors`` lie in one vector, and how their gradients lie in another.

    Args:
        tensors: of one type and on one device, each dense in memory.
        slices: what stays of each.
    """

    def __init__(self, tensors: Sequence[Tensor], slices: Sequence[Slice | At]) -> None:
        self.slices = list(slices)
        self.whole_already = all(isinstance(one, Slice) and one.is_whole() for one in slices)
        self.joined = [not tensor.is_cpu or tensor.numel() <= _SMALL for tensor in tensors]
        with torch.no_grad():
            # Of a joined tensor: the position in memory, from 1, of each entry that stays.
            kept = [
                one.of(_numbered(tensor) if joined else tensor)
                for one, tensor, joined in zip(slices, tensors, self.joined, strict=True)
            ]
        self.whole = _Vector([(tensor.shape, tensor.stride()) for tensor in tensors], self.joined)
        self.small = _Vector([(one.shape, dense_strides(one)) for one in kept], self.joined)
        self._among = [number for number, joined in enumerate(self.joined) if joined]
        self._zero_at = sum(self.whole.counts[i] for i in self._among)
        self.zero = tensors[0].new_zeros(1)
        self.taken = torch.full((self.small.joined_length,), self._zero_at, device=self.zero.device)
        begins = 0  # in the joined vector, which has no gaps
        for i in self._among:
            positions = in_memory(kept[i], self.small.shapes[i][1])
            places = positions.nonzero().flatten()
            self.taken[self.small.begins[i] + places] = begins + positions[places] - 1
            begins += self.whole.counts[i]
        self.taken = self.taken.int()
        self.number = next(_numbers)
        _layouts[self.number] = self

    @functools.cached_property
    def spread(self) -> Tensor:
        """For each entry of the joined tensors: where it lies in the joined parts, which end in a 0."""
        last = sum(self.small.counts[i] for i in self._among)
        spread = torch.full((self.whole.joined_length,), last, device=self.zero.device)
        begins = 0
        for i, at, places in self._places():
            spread[at] = begins + places
            begins += self.small.counts[i]
        return spread.int()

    @functools.cached_property
    def written(self) -> Tensor:
        """For each entry of the joined tensors: where its new value lies when statistics are written back.

        It is looked up in the vector of the parts, with the joined tensors behind it: an entry that was not
        taken keeps its value.
        """
        begins = self.small.joined_length
        written = torch.full((self.whole.joined_length,), begins + self._zero_at, device=self.zero.device)
        for i, at, places in self._places():
            count = self.whole.counts[i]
            own = torch.arange(count, device=self.zero.device)
            written[self.whole.begins[i] + own] = begins + own
            written[at] = self.small.begins[i] + places
            begins += count
        return written.int()

    def _places(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each joined tensor: its number, where the entries that stay lie in the vector of the whole
        tensors, and where among its own entries that stay."""
        begins = 0
        for i in self._among:
            taken = self.taken[self.small.begins[i] :][: self.small.counts[i]].long()
            places = (taken != self._zero_at).nonzero().flatten()
            yield i, self.whole.begins[i] + taken[places] - begins, places
            begins += self.whole.counts[i]


_numbers = itertools.count()
# PyTorch 2.6 compiles a second layout with a symbol for its number, which is no key: int() fixes the number.
_layouts: weakref.WeakValueDictionary[int, Layout] = weakref.WeakValueDictionary()


def _layout(number: int) -> Layout:
    if (found := _layouts.get(int(number))) is None:
        raise RuntimeError(
            "a compiled pass of a sub phase of RePr that has ended cannot go on: call backward() before "
            "cycle.step(), and run the model anew after it."
        )
    return found


def _numbered(tensor: Tensor) -> Tensor:
    """The position of each entry in memory, from 1, with the shape and strides of ``tensor``."""
    vector = torch.arange(1, tensor.numel() + 1, device=tensor.device)
    return vector.as_strided(tensor.shape, tensor.stride())


def _joined(tensors: Sequence[Tensor], vector: _Vector, layout: Layout) -> list[Tensor]:
    """The tensors that are joined, each as a vector, and the zero at the end."""
    found = [
        in_memory(tensor, strides)
        for tensor, (_, strides), joined in zip(tensors, vector.shapes, layout.joined, strict=True)
        if joined
    ]
    return [*found, layout.zero] if found else []


def _begun(out: Tensor, joined: Sequence[Tensor], index: Tensor) -> Tensor:
    """``out``, to whose beginning the entries of the vectors ``joined`` at ``index`` are written."""
    if len(index):
        torch.index_select(torch.cat(list(joined)), 0, index, out=out[: len(index)])
    return out


def _alone(layout: Layout) -> Iterator[tuple[int, Any]]:
    """The tensors that are not joined, by number, each with what stays of it."""
    return ((number, layout.slices[number]) for number, joined in enumerate(layout.joined) if not joined)


# Custom operators: PyTorch sees one operation for all tensors, whatever the device makes of it.
@torch.library.custom_op("regrow::take_parts", mutates_args=())
def _take_parts(whole: Sequence[Tensor], layout: int) -> Tensor:
    """What stays of the tensors ``whole``, one vector."""
    to = _layout(layout)
    joined = _joined(whole, to.whole, to)
    if all(to.joined):
        return torch.cat(joined).index_select(0, to.taken)
    out = _begun(whole[0].new_zeros(to.small.length), joined, to.taken)
    parts = to.small.parts(out)
    for number, one in _alone(to):
        parts[number].copy_(one.of(whole[number]))
    return out


@_take_parts.register_fake
def _(whole: Sequence[Tensor], layout: int) -> Tensor:
    return whole[0].new_empty(_layout(layout).small.length)


@torch.library.custom_op("regrow::spread_parts", mutates_args=())
def _spread_parts(small: Sequence[Tensor], layout: int) -> Tensor:
    """The tensors ``small`` at their places among zeros, one vector."""
    to = _layout(layout)
    joined = _joined(small, to.small, to)
    if all(to.joined):
        return torch.cat(joined).index_select(0, to.spread)
    out = _begun(small[0].new_empty(to.whole.length), joined, to.spread)
    parts = to.whole.parts(out)
    for number, one in _alone(to):
        one.back(small[number], parts[number])
    return out


@_spread_parts.register_fake
def _(small: Sequence[Tensor], layout: int) -> Tensor:
    return small[0].new_empty(_layout(layout).whole.length)


def _keep_layout(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.layout = inputs[1]


def _spread_back(ctx: Any, gradient: Tensor) -> tuple[list[Tensor], None]:
    to = _layout(ctx.layout)
    whole = _spread_parts(to.small.parts(gradient), ctx.layout)
    return to.whole.parts(whole), None


# For compilers; ``_Take`` gets the gradients of all parts without joining them once more.
_take_parts.register_autograd(_spread_back, setup_context=_keep_layout)


@torch.library.custom_op("regrow::write_parts", mutates_args=())
def _write_parts(whole: Sequence[Tensor], small: Tensor, layout: int) -> Tensor:
    """The tensors ``whole`` with the entries of ``small``, from ``take_parts``, in place of theirs."""
    to = _layout(layout)
    joined = [small[: to.small.joined_length], *_joined(whole, to.whole, to)]
    if all(to.joined):
        return torch.cat(joined).index_select(0, to.written)
    out = _begun(small.new_empty(to.whole.length), joined, to.written)
    parts, taken = to.whole.parts(out), to.small.parts(small)
    for number, one in _alone(to):
        parts[number].copy_(whole[number]).index_copy_(0, one.rows, taken[number])
    return out


@_write_parts.register_fake
def _(whole: Sequence[Tensor], small: Tensor, layout: int) -> Tensor:  # noqa: ARG001
    return small.new_empty(_layout(layout).whole.length)


@torch.library.custom_op("regrow::store_parts", mutates_args=("whole",))
def _store_parts(whole: Sequence[Tensor], small: Tensor, layout: int) -> None:
    """``write_parts`` in place."""
    copy_all(list(whole), _layout(layout).whole.parts(_write_parts(whole, small, layout)))


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: Layout, *whole: Tensor) -> tuple[Tensor, ...]:
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        if layout.whole_already:
            parts = tuple(tensor.view_as(tensor) for tensor in whole)
        else:
            parts = tuple(layout.small.parts(_take_parts(list(whole), layout.number)))
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
        full = _filled(small, some, layout.small)
        parts = layout.whole.parts(_spread_parts(full, layout.number))
        return tuple(None if given is None else part for given, part in zip(small, parts, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        some = next(tensor for tensor in gradients if tensor is not None)
        return None, *_Take.apply(ctx.layout, *_filled(gradients, some, ctx.layout.whole))


def _filled(tensors: Sequence[Tensor | None], like: Tensor, vector: _Vector) -> list[Tensor]:
    """``tensors`` with zeros in place of None."""
    return [
        like.new_zeros(shape) if tensor is None else tensor
        for tensor, (shape, _) in zip(tensors, vector.shapes, strict=True)
    ]


def take_vector(tensors: Sequence[Tensor], layout: Layout) -> Tensor:
    """What stays of all tensors as one vector, without gradients; ``layout.small.parts`` has the pieces.

    What lies between the pieces is 0.
    """
    with torch.no_grad():
        return _take_parts(list(tensors), layout.number)


def written(tensors: Sequence[Tensor], vector: Tensor, layout: Layout) -> list[Tensor]:
    """``tensors`` with the entries of ``vector``, from ``take_vector``, in place of their own."""
    return layout.whole.parts(_write_parts(list(tensors), vector, layout.number))


def store_parts(tensors: Sequence[Tensor], vector: Tensor, layout: Layout) -> None:
    """Write the entries of ``vector``, from ``take_views``, into ``tensors``."""
    with torch.no_grad():
        _store_parts(list(tensors), vector, layout.number)


def take_views(tensors: Sequence[Tensor], layout: Layout) -> tuple[list[Tensor], Tensor]:
    """``take_parts`` for compilers, and the vector in which the parts lie."""
    vector = _take_parts(list(tensors), layout.number)
    return layout.small.views(vector), vector


def take_parts(tensors: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """What stays of each tensor, in one operation; gradients flow back in one."""
    return list(_Take.apply(layout, *tensors))
