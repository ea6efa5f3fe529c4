"""Take some channels of a tensor, or place them among zeros: each is the other's derivative.

PyTorch's ``index_select`` and ``index_copy`` compute the same. These functions keep the memory format and
choose the quicker kernel where channels are innermost; their derivatives write once instead of adding row by
row. A compiler makes its own kernels, and the transforms of torch.func have rules for PyTorch's operations:
they get these. So does whoever writes them down (``torch.jit.trace``, ``torch.fx``, the exporters built on
them) or computes with quantized numbers.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from regrow.torch_private import is_transformed

Where = Tensor | tuple[slice | Tensor, Tensor]  # an index into a tensor; one that is a Tensor counts in dim 0


def index_tensor(indices: Sequence[int] | Tensor, device: torch.device | None = None) -> Tensor:
    """``indices`` as int64 on ``device``."""
    if isinstance(indices, range):
        return torch.arange(indices.start, indices.stop, indices.step, device=device)
    if isinstance(indices, Tensor):
        return indices.to(indices.device if device is None else device, torch.int64)
    return torch.as_tensor(indices, dtype=torch.int64, device=device)


def index_tensors(
    indices: Sequence[Sequence[int] | Tensor], device: torch.device | None = None
) -> list[Tensor]:
    """``index_tensor`` of each of ``indices``, in one memory: a GPU is waited for once, not for each."""
    lengths = list(map(len, indices))
    if not sum(lengths):
        return [index_tensor([], device) for _ in indices]
    flat = array("q")
    for each in indices:
        flat.extend(each.tolist() if isinstance(each, Tensor) else each)
    return list(torch.frombuffer(flat, dtype=torch.int64).to(device or "cpu").split(lengths))


def plain_operations(tensor: Tensor) -> bool:
    """Whether PyTorch's own operations alone will do: for a compiler, a transform, or forward-mode
    derivatives."""
    return torch.compiler.is_compiling() or is_transformed(tensor)


def take(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """``tensor.index_select(dim, index)``, in the tensor's own memory format.

    Args:
        index: [kept] int64, no entry twice.
    """
    if not is_quick(tensor) or plain_operations(tensor):
        return tensor.index_select(dim, index)
    if not torch.is_grad_enabled():
        return _taken(tensor, index, dim)
    return cast(Tensor, _Take.apply(tensor, index, dim))


def place(tensor: Tensor, index: Tensor, dim: int, width: int) -> Tensor:
    """A tensor of zeros that is ``width`` long in ``dim``, with ``tensor`` at the positions ``index``.

    Args:
        index: [tensor.shape[dim]] int64, no entry twice.
    """
    if isinstance(tensor, Tensor) and (torch.jit.is_tracing() or plain_operations(tensor)):
        return place_plainly(tensor, index, dim, width)
    if not is_quick(tensor):
        source = index_tensor(sources(index.tolist(), width), index.device)
        return pad_and_select(tensor, source, dim)
    if not torch.is_grad_enabled():
        return _placed(tensor, index, dim, width)
    return cast(Tensor, _Place.apply(tensor, index, dim, width))


def clear(tensor: Tensor, where: Where) -> None:
    """Set ``tensor[where]`` to 0, in place. An index of one tensor is the quicker case."""
    if isinstance(where, Tensor):
        tensor.index_fill_(0, where, 0)
    else:
        tensor[where] = 0


def on(where: Where, device: torch.device) -> Where:
    """``where`` on ``device``."""
    if isinstance(where, Tensor):
        return where.to(device)
    first, second = where
    return first.to(device) if isinstance(first, Tensor) else first, second.to(device)


def place_plainly(tensor: Tensor, index: Tensor, dim: int, width: int) -> Tensor:
    """``place`` in PyTorch's operations; ``torch.jit.script`` compiles it."""
    shape = list(tensor.shape)
    shape[dim] = width
    return tensor.new_zeros(shape).index_copy(dim, index, tensor)


def pad_and_select(tensor: Tensor, source: Tensor, dim: int) -> Tensor:
    """``place`` in operations that do not ask for the shape, and work on quantized numbers.

    A channel of zeros is appended, and then selected for all places without a channel. ``torch.jit.script``
    compiles this function.

    Args:
        source: from ``sources``.
        dim: below 0 it takes two operations, else four and a result in another memory format.
    """
    if dim < 0:
        return torch.nn.functional.pad(tensor, [0, 0] * (-dim - 1) + [0, 1]).index_select(dim, source)
    wide = torch.nn.functional.pad(tensor.transpose(dim, -1), [0, 1])
    return wide.index_select(-1, source).transpose(dim, -1)


def sources(positions: Sequence[int], width: int) -> list[int]:
    """For each of ``width`` places: which channel stands there, or ``len(positions)`` where none does."""
    found = [len(positions)] * width
    for channel, position in enumerate(positions):
        found[position] = channel
    return found


def is_quick(tensor: Tensor) -> bool:
    """Whether the kernels of this file can work on ``tensor``: it has numbers, and nobody traces it."""
    # Whatever torch.fx notes operations with is no tensor.
    return isinstance(tensor, Tensor) and not tensor.is_quantized and not torch.jit.is_tracing()


def take_block(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """``weight[rows][:, columns]``, in the weight's own memory format.

    Args:
        weight: [rows, columns, *kernel], or [rows] where ``columns`` is None.
        rows, columns: [kept] int64 each, no entry twice; None keeps all.
    """
    if rows is not None:
        weight = weight.index_select(0, rows) if weight.dim() == 1 else take(weight, rows, 0)
    return weight if columns is None else take(weight, columns, 1)


def channels_last(tensor: Tensor) -> bool:
    """Whether the channels (dim 1) are innermost in memory."""
    return tensor.dim() > 2 and not tensor.is_contiguous() and tensor.movedim(1, -1).is_contiguous()


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, index: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.dim, ctx.width = dim, tensor.shape[dim]
        return _taken(tensor, index, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return place(gradient, index, ctx.dim, ctx.width), None, None


class _Place(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, index: Tensor, dim: int, width: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.dim = dim
        return _placed(tensor, index, dim, width)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (index,) = ctx.saved_tensors
        return take(gradient, index, ctx.dim), None, None, None


def _taken(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    out = _empty(tensor, dim, index.shape[0])
    source, into, dim = _inner(tensor, out, dim)
    if source.dim() > 1 and dim == source.dim() - 1:
        # Several times faster than index_select there.
        torch.gather(source, -1, index.expand(*source.shape[:-1], index.shape[0]), out=into)
    else:
        torch.index_select(source, dim, index, out=into)
    return out


def _placed(tensor: Tensor, index: Tensor, dim: int, width: int) -> Tensor:
    out = _empty(tensor, dim, width).zero_()
    source, into, dim = _inner(tensor, out, dim)
    if dim == source.dim() - 1:
        into.scatter_(-1, index.expand(source.shape), source)
    else:
        into.index_copy_(dim, index, source)
    return out


def _empty(tensor: Tensor, dim: int, length: int) -> Tensor:
    """Like ``tensor``, in its memory format too, but ``length`` long in ``dim``."""
    shape = list(tensor.shape)
    shape[dim] = length
    if not channels_last(tensor):
        return tensor.new_empty(shape)
    strides, step = [0] * len(shape), 1
    for each in (1, *range(len(shape) - 1, 1, -1), 0):
        strides[each], step = step, step * shape[each]
    return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)


def _inner(tensor: Tensor, out: Tensor, dim: int) -> tuple[Tensor, Tensor, int]:
    """Views of both with the dimensions in the order in which ``tensor`` lies in memory, and ``dim`` there.

    An autograd function must not return a view, or the activation behind it could not work in place: so
    results are written through a view of a whole tensor.
    """
    if channels_last(tensor):
        return tensor.movedim(1, -1), out.movedim(1, -1), _moved(dim, tensor)
    return tensor, out, dim % tensor.dim()


def _moved(dim: int, tensor: Tensor) -> int:
    """The position of ``dim`` after dim 1 was moved to the end."""
    dim %= tensor.dim()
    return tensor.dim() - 1 if dim == 1 else max(dim - 1, 0)
