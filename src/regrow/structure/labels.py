"""Where the channels of a layer lie in the tensors that are computed from its output.

A label is a number for each element of a tensor: elements of different channels have different labels. Labels
lie in memory as the elements do, so a view of a tensor has the labels that lie where it looks. Where a tensor
has size 1 in its labels, the channels do not vary; None stands for labels that nothing is known of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regrow.torch_private import operator_arguments

# Operations that take elements to other places: they are done to the labels too.
_MOVES = {"pixel_shuffle", "pixel_unshuffle", "native_channel_shuffle", "channel_shuffle", "repeat", "roll"}
_MOVES |= {"flip", "index", "index_select", "stack", "reshape", "flatten", "contiguous"}
_MOVES |= {"transpose_copy", "permute_copy"}
_JOINS = {"cat", "concat", "concatenate"}
_PRIME = 1_000_003
MOST = 1 << 24  # labels that are written out; a larger tensor may have its channels anywhere
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
    return torch.arange(1, math.prod(sides) + 1, dtype=torch.int32).view(sides)


def both(one: Tensor, other: Tensor) -> Tensor:
    """Labels of an element-wise combination of two tensors, whose shapes broadcast."""
    same = one.shape == other.shape and torch.equal(one, other)
    return one if same else one * _PRIME + other


def compact(labels: Tensor) -> Tensor:
    """``labels`` with size 1 in each dimension along which they are the same."""
    for dim, size in enumerate(labels.shape):
        if size > 1:
            first, second = labels.narrow(dim, 0, 1), labels.narrow(dim, 1, 1)
            # One number tells most of the dimensions along which they are not.
            if labels.stride(dim) == 0 or (
                _corner(first) == _corner(second) and bool((labels == first).all())
            ):
                labels = first
    return labels


def simplest(labels: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """``labels`` of a tensor [shape]; where they all differ along one dimension, it is all that counts."""
    if labels is None:
        return None
    along = [dim for dim, size in enumerate(labels.shape) if size > 1]
    if not along:
        return torch.ones((1,) * len(shape), dtype=torch.int32)
    if len(along) > 1:
        return labels
    # Labels that repeat along a dimension (of pictures and channels in one, say) may come apart again.
    own = labels[labels > 0]
    return numbered(shape, along[0]) if len(own.unique()) == len(own) else labels


def lies_along(labels: Tensor | None, dim: int) -> bool:
    """Whether the channels lie in the dimension ``dim`` alone, so that a weighted sum over it mixes them."""
    if labels is None:
        return False
    sizes = labels.shape
    return not sizes or all(size == 1 for other, size in enumerate(sizes) if other != dim % len(sizes))


def contracted(operation: str, args: Sequence[Any]) -> tuple[tuple[int, int], ...]:
    """(place of an operand, dimension) pairs that an operation multiplies by the other operand and sums over.

    A convolution whose filters read one channel each sums over none of them: it passes channels on.
    """
    found = _CONTRACTIONS.get(operation, ())
    if len(args) <= max((place for place, _ in found), default=0) or len(args) < 2:
        return ()  # called by keyword: nothing is known then
    if operation in _CONVOLUTIONS or operation in _TRANSPOSED:
        transposed = operation in _TRANSPOSED or (len(args) > 6 and args[6] is True)
        whole = [value for value in args[3:] if type(value) is int]
        return () if _hands_on(args[1], whole[-1] if whole else 1, transposed) else found
    return found


def _hands_on(weight: Tensor, groups: int, transposed: bool) -> bool:
    """Whether each filter of a convolution reads one channel: it is depthwise, or has other weights of 0.

    A segmentation net that scales its class scores up by fixed bilinear weights has such a layer.
    """
    by_group = weight.unflatten(0, (groups, -1))  # groups, filters of a group, channels of a group
    by_group = by_group.transpose(1, 2) if transposed else by_group
    if by_group.shape[2] == 1 or not weight.numel():
        return True
    # The first filter tells of most layers that they are none of this kind.
    return all(
        bool((part.ne(0).flatten(3).any(3).sum(2) == 1).all()) for part in (by_group[:1, :1], by_group)
    )


def moved(
    operation: Any, args: Any, kwargs: Any, operand: Tensor, labels: Tensor | None, shape: Sequence[int]
) -> Tensor | None:
    """Labels of what ``operation``, an ATen operator, makes of one of its operands.

    Args:
        operand: the tensor among the arguments.
        labels: its labels.
        shape: of the result.
    """
    shape = tuple(shape)
    if labels is None:
        return None
    if operation.overloadpacket.__name__ in _MOVES:
        if math.prod(shape) > MOST:
            return None
        try:
            made: Tensor = operation(*_on_labels(args, operand, labels.expand(operand.shape)), **kwargs)
        except (RuntimeError, IndexError, NotImplementedError):
            return None
        return compact(made) if made.shape == shape else None
    if operation.overloadpacket.__name__ in _JOINS:
        return _joined(args, operand, labels, args[1] if len(args) > 1 else kwargs.get("dim", 0))
    return _fitted(labels, tuple(operand.shape), shape, _summed(operation, args, kwargs))


def _joined(args: Any, operand: Tensor, labels: Tensor, dim: int) -> Tensor:
    """The labels of what a concatenation along ``dim`` makes of one of its operands."""
    sides = list(labels.shape)

    def part(tensor: Tensor) -> Tensor:
        sides[dim] = tensor.shape[dim] if tensor.dim() == len(sides) else 0
        return labels.expand(sides) if tensor is operand else torch.zeros(sides, dtype=torch.int32)

    return torch.cat([part(tensor) for tensor in args[0]], dim)


def _on_labels(args: Any, operand: Tensor, labels: Tensor) -> list[Any]:
    """The arguments of an operation, with labels in place of the tensors whose elements it moves."""

    def swapped(value: Any) -> Any:
        if isinstance(value, Tensor):
            return labels if value is operand else torch.zeros(1, dtype=torch.int32).expand(value.shape)
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


def _corner(labels: Tensor) -> float:
    return labels[(0,) * labels.dim()].item()
