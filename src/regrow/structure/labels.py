"""Where the channels of a layer lie in the tensors that are computed from its output.

A label is a number for each element of a tensor: elements of different channels have different labels. Labels
lie in memory as the elements do, so a view of a tensor has the labels that lie where it looks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regrow.torch_private import operator_arguments

# Operations that take elements to other places: they are done to the labels too.
_MOVES = {"pixel_shuffle", "pixel_unshuffle", "native_channel_shuffle", "channel_shuffle", "repeat", "roll"}
_MOVES |= {"flip", "index", "index_select", "cat", "concat", "stack", "reshape", "flatten", "contiguous"}
_MOVES |= {"transpose_copy", "permute_copy"}
_PRIME = 1_000_003
_CONVOLUTIONS = ("convolution", "_convolution", "convolution_overrideable", "conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
# operation → (place of an operand, its dimension that is multiplied by weights and summed), for each operand
# that may carry the channels; the other operand is the weights then.
_CONTRACTIONS: dict[str, tuple[tuple[int, int], ...]] = {
    **dict.fromkeys(("mm", "mv", "dot"), ((0, -1), (1, 0))),
    **dict.fromkeys(("addmm", "addmv", "_addmm_activation"), ((1, 1), (2, 0))),
    "matmul": ((0, -1), (1, -2)),
    "bmm": ((0, 2), (1, 1)),
    "baddbmm": ((1, 2), (2, 1)),
    **dict.fromkeys(("linear", "lstm", "gru", "rnn_tanh", "rnn_relu", "mkldnn_rnn_layer"), ((0, -1),)),
    "deform_conv2d": ((0, 1),),
    **dict.fromkeys((*_CONVOLUTIONS, *_TRANSPOSED), ((0, 1),)),
}


def numbered(shape: Sequence[int], dim: int) -> Tensor:
    """Labels of a layer's output [shape] with its channels in ``dim``."""
    sides = [1] * len(shape)
    if sides:
        sides[dim] = shape[dim]
    return torch.arange(1, math.prod(sides) + 1).view(sides)


def scattered(shape: Sequence[int]) -> Tensor:
    """Labels of a tensor [shape] in which the channels may lie anywhere."""
    return torch.arange(1, math.prod(shape) + 1).view(tuple(shape))


def both(one: Tensor, other: Tensor) -> Tensor:
    """Labels of an element-wise combination of two tensors, whose shapes broadcast."""
    same = one.shape == other.shape and torch.equal(one, other)
    return one if same else one * _PRIME + other


def compact(labels: Tensor) -> Tensor:
    """``labels`` with size 1 in each dimension along which they are the same."""
    for dim, size in enumerate(labels.shape):
        if size > 1:
            first = labels.narrow(dim, 0, 1)
            if labels.stride(dim) == 0 or bool((labels == first).all()):
                labels = first
    return labels


def lies_along(labels: Tensor, dim: int) -> bool:
    """Whether the channels lie in the dimension ``dim`` alone, so that a weighted sum over it mixes them."""
    sizes = labels.shape
    return not sizes or all(size == 1 for other, size in enumerate(sizes) if other != dim % len(sizes))


def contracted(operation: str, args: Sequence[Any]) -> tuple[tuple[int, int], ...]:
    """(place of an operand, dimension) pairs that an operation multiplies by the other operand and sums over.

    A convolution with one input channel a group sums over none of them: it passes channels on.
    """
    found = _CONTRACTIONS.get(operation, ())
    if len(args) <= max((place for place, _ in found), default=0) or len(args) < 2:
        return ()  # called by keyword: nothing is known then
    if operation in _CONVOLUTIONS or operation in _TRANSPOSED:
        transposed = operation in _TRANSPOSED or (len(args) > 6 and args[6] is True)
        whole = [value for value in args[3:] if type(value) is int]
        groups = whole[-1] if whole else 1
        read = len(args[1]) // groups if transposed else args[1].shape[1]
        return found if read > 1 else ()
    return found


def moved(
    operation: Any, args: Any, kwargs: Any, mine: Sequence[tuple[Tensor, Tensor]], shape: Sequence[int]
) -> Tensor:
    """Labels of what ``operation``, an ATen operator, makes of its arguments.

    Args:
        mine: the operands that carry channels, each with its labels.
        shape: of the result.
    """
    shape, name = tuple(shape), operation.overloadpacket.__name__
    if name in _MOVES:
        labels = {id(operand): own.expand(operand.shape) for operand, own in mine}
        try:
            made: Tensor = operation(*_on_labels(args, labels), **kwargs)
        except (RuntimeError, IndexError, NotImplementedError):
            return scattered(shape)
        return compact(made) if made.shape == shape else scattered(shape)
    summed = _summed(operation, args, kwargs)
    # An index, or the boxes that regions are cut by, say where to look: the channels lie where the other
    # operands have them.
    numbers = [(operand, own) for operand, own in mine if operand.is_floating_point()] or mine
    parts = [_fitted(own, tuple(operand.shape), shape, summed) for operand, own in numbers]
    fitting = [part for part in parts if part is not None]
    return functools.reduce(both, fitting) if fitting else scattered(shape)


def _on_labels(args: Any, labels: dict[int, Tensor]) -> list[Any]:
    """The arguments of an operation, with labels in place of the tensors whose elements it moves."""

    def swapped(value: Any) -> Any:
        if isinstance(value, Tensor):
            return labels.get(id(value), torch.zeros(1, dtype=torch.int64).expand(value.shape))
        return [swapped(part) for part in value] if isinstance(value, list | tuple) else value

    def here(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.cpu()
        return [here(part) for part in value] if isinstance(value, list | tuple) else value

    return [swapped(args[0]), *map(here, args[1:])]


def _summed(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[int] | None:
    """The dimensions that an operation works along, its argument ``dim``; None if it has no such argument."""
    names = [name for name, _ in operator_arguments(operation)]
    given = dict(zip(names, args, strict=False)) | kwargs
    dims = given.get("dim")
    if type(dims) is int:
        return [dims]
    return list(dims) if isinstance(dims, list | tuple) and all(type(dim) is int for dim in dims) else None


def _fitted(
    labels: Tensor, sizes: tuple[int, ...], shape: tuple[int, ...], summed: Sequence[int] | None
) -> Tensor | None:
    """The labels of one operand [sizes] in the result [shape] of an operation; None where unknown."""
    added = len(shape) - len(sizes)
    if added >= 0 and all(mine in (1, theirs) for mine, theirs in zip(sizes, shape[added:], strict=True)):
        return labels.view((1,) * added + tuple(labels.shape))
    if not added:
        # Pools, pads, resizing, gates: the channels stay in their dimension.
        for dim, size in enumerate(shape):
            if size != sizes[dim] and labels.shape[dim] != 1:
                kept = labels.sum(dim, keepdim=True) if not labels.numel() else labels.amax(dim, keepdim=True)
                labels = both(kept, numbered(shape, dim)) if size > 1 else kept
        return labels
    gone = {dim % len(sizes) for dim in summed or ()} if sizes and labels.numel() else set()
    if tuple(size for dim, size in enumerate(sizes) if dim not in gone) == shape:
        return labels.amax(list(gone)) if gone else labels
    return None
