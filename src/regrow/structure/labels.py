"""Where the channels of a layer lie in the tensors that are computed from its output.

Mostly they lie along one dimension, and its number says all. Else a *label* for each element says where:
elements of different channels have different labels. Labels lie in memory as the elements do, so a view of a
tensor has the labels that lie where it looks. So an answer is one of three: a dimension, or ``NOWHERE`` if
each element depends on all channels; labels, of size 1 where they do not vary; and None if nothing is known.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regrow.torch_private import operator_arguments

Where = int | Tensor | None
NOWHERE = -1
MOST = 1 << 24  # labels that are written out; a larger tensor may have its channels anywhere
# Operations that take elements to other places: they are done to the labels too.
_MOVES = {"pixel_shuffle", "pixel_unshuffle", "native_channel_shuffle", "channel_shuffle", "repeat", "roll"}
_MOVES |= {"flip", "index", "index_select", "stack", "reshape", "flatten", "contiguous"}
_MOVES |= {"transpose_copy", "permute_copy"}
_JOINS = {"cat", "concat", "concatenate"}
_PRIME = 1_000_003
_CONVOLUTIONS = ("convolution", "_convolution", "convolution_overrideable", "conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
# operation → (place of an operand, its dimension that is multiplied by weights and summed), for each operand
# that may carry the channels; the other operand is the weights then.
CONTRACTIONS: dict[str, tuple[tuple[int, int], ...]] = {
    **dict.fromkeys(("mm", "mv", "dot"), ((0, -1), (1, 0))),
    **dict.fromkeys(("addmm", "addmv", "_addmm_activation"), ((1, 1), (2, 0))),
    "matmul": ((0, -1), (1, -2)),
    "bmm": ((0, 2), (1, 1)),
    "baddbmm": ((1, 2), (2, 1)),
    **dict.fromkeys(("linear", "lstm", "gru", "rnn_tanh", "rnn_relu", "mkldnn_rnn_layer"), ((0, -1),)),
    "deform_conv2d": ((0, 1),),
    **dict.fromkeys((*_CONVOLUTIONS, *_TRANSPOSED), ((0, 1),)),
}


# Operations that keep channels apart: element by element, or of elements that are only taken elsewhere.
_APART = {"relu", "hardtanh", "hardswish", "hardsigmoid", "sigmoid", "silu", "gelu", "mish", "elu", "tanh"}
_APART |= {"leaky_relu", "softplus", "prelu", "_prelu_kernel", "exp", "log", "sqrt", "rsqrt", "abs", "neg"}
_APART |= {"square", "pow", "clamp", "clamp_min", "clamp_max", "add", "sub", "rsub", "mul", "div", "where"}
_APART |= {"maximum", "minimum", "addcmul", "lerp", "native_dropout", "dropout", "bernoulli", "fill", "zero"}
_APART |= {"native_batch_norm", "batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit"}
_APART |= {"_native_batch_norm_legit_no_training", "cat", "concat", "stack", "clone", "copy", "detach"}
_APART |= {"view", "_unsafe_view", "reshape", "flatten", "permute", "transpose", "t", "squeeze", "unsqueeze"}
_APART |= {"expand", "split", "split_with_sizes", "chunk", "alias"}
_APART |= {"contiguous", "_to_copy", "to", "constant_pad_nd", "pixel_shuffle", "pixel_unshuffle"}
_APART |= {"channel_shuffle", "native_channel_shuffle", *_CONVOLUTIONS, *_TRANSPOSED}
_POOLS = ("avg_pool", "max_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "adaptive_max_pool", "upsample_")
_PADS = ("reflection_pad", "replication_pad")
_PARTS = {"slice", "select", "narrow", "unbind"}
_SUMS = {"mean", "sum", "amax", "amin", "max", "min", "std", "var", "linalg_vector_norm"}


def keeps_apart(operation: Any, args: Any, kwargs: Any, operands: Sequence[tuple[Tensor, Where]]) -> bool:
    """Whether ``operation`` is known to compute nothing of several channels of a layer.

    Where it is not known, a channel may change others, which the graph does not see. It knows sums, and parts
    of a tensor that a split makes.

    Args:
        operands: the tensors among the arguments that carry channels, and where.
    """
    name = operation.overloadpacket.__name__.rstrip("_")
    if name in _APART:
        # Counted from the last dimension, as operands of fewer dimensions are placed.
        places = {where - operand.dim() if isinstance(where, int) else None for operand, where in operands}
        return len(operands) < 2 or (len(places) == 1 and None not in places)
    for operand, where in operands:
        if not isinstance(where, int) or where == NOWHERE:
            return False
        if name.startswith(_POOLS + _PADS):
            sides = next((int(letter) for letter in name if letter in "123"), operand.dim())
            along = set(range(operand.dim() - sides, operand.dim()))
        else:
            dims = _summed(operation, args, kwargs) if name in _SUMS | _PARTS else None
            along = {dim % operand.dim() for dim in dims or range(operand.dim())}
        if where in along:
            return False
    return True


def written_out(where: Where, shape: Sequence[int]) -> Tensor | None:
    """The labels of a tensor [shape] that has its channels at ``where``; they broadcast to its shape."""
    if not isinstance(where, int):
        return where
    sides = [1] * len(shape)
    if where != NOWHERE:
        sides[where] = shape[where]
    return torch.arange(1, math.prod(sides) + 1, dtype=torch.int32).view(sides)


def compact(labels: Tensor) -> Where:
    """``labels`` with size 1 where they do not vary; or the one dimension along which all of them differ.

    None for a tensor without elements, such as the boxes of a detector that found nothing.
    """
    if not labels.numel():
        return None
    for dim, size in enumerate(labels.shape):
        if size > 1:
            first, second = labels.narrow(dim, 0, 1), labels.narrow(dim, 1, 1)
            # One number tells most of the dimensions along which they vary.
            if labels.stride(dim) == 0 or (
                _corner(first) == _corner(second) and bool((labels == first).all())
            ):
                labels = first
    along = [dim for dim, size in enumerate(labels.shape) if size > 1]
    if not along:
        return NOWHERE
    if len(along) > 1:
        return labels.clone()
    # Labels that repeat along a dimension (of pictures and channels in one, say) may come apart again.
    own = labels[labels > 0]
    return along[0] if len(own.unique()) == len(own) else labels.clone()


def both(one: Tensor, other: Tensor) -> Tensor:
    """Labels of an element-wise combination of two tensors, whose shapes broadcast."""
    same = one.shape == other.shape and torch.equal(one, other)
    return one if same else one * _PRIME + other


def lies_along(where: Where, dim: int, dims: int) -> bool:
    """Whether the channels of a tensor of ``dims`` dimensions lie in ``dim`` alone, so that a weighted sum
    over it mixes all of them."""
    if isinstance(where, Tensor):
        return all(size == 1 for other, size in enumerate(where.shape) if other != dim % dims)
    return where is not None and (where == NOWHERE or where == dim % dims)


def contracted(operation: str, args: Sequence[Any]) -> tuple[tuple[int, int], ...]:
    """(place of an operand, dimension) pairs that an operation multiplies by the other operand and sums over.

    A convolution whose filters read one channel each sums over none of them: it passes channels on.
    """
    found = CONTRACTIONS.get(operation, ())
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
    channels = weight.shape[0] // groups if transposed else weight.shape[1]
    if channels == 1 or not weight.numel():
        return True
    # Two numbers of the first filter tell of most layers that they are none of this kind.
    first = weight.select(1 if transposed else 0, 0)[:2].flatten(1)[:, 0]
    if 0 not in first.tolist():
        return False
    by_group = weight.unflatten(0, (groups, -1))  # groups, filters of a group, channels of a group
    by_group = by_group.transpose(1, 2) if transposed else by_group
    return bool((by_group.ne(0).flatten(3).any(3).sum(2) == 1).all())


def moved(
    operation: Any, args: Any, kwargs: Any, operand: Tensor, where: Where, shape: Sequence[int]
) -> Where:
    """Where the channels lie in the result [shape] of ``operation``, an ATen operator.

    Args:
        operand: the tensor among the arguments that carries the channels.
        where: they lie in it.
    """
    shape, name = tuple(shape), operation.overloadpacket.__name__
    if where is None or (isinstance(where, int) and where == NOWHERE):
        return where
    if name in _MOVES:
        labels = written_out(where, operand.shape)
        if labels is None or math.prod(shape) > MOST:
            return None
        try:
            made: Tensor = operation(*_on_labels(args, operand, labels.expand(operand.shape)), **kwargs)
        except (RuntimeError, IndexError, NotImplementedError):
            return None
        return compact(made) if made.shape == shape else None
    if name in _JOINS:
        if isinstance(where, int):
            return where
        return _joined(args, operand, where, args[1] if len(args) > 1 else kwargs.get("dim", 0))
    return _fitted(where, tuple(operand.shape), shape, _summed(operation, args, kwargs))


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


@functools.lru_cache(maxsize=1024)
def _place_of_dim(operation: Any) -> int | None:
    names = [name for name, _ in operator_arguments(operation)]
    return names.index("dim") if "dim" in names else None


def _summed(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[int] | None:
    """The dimensions that an operation works along, its argument ``dim``; None if it has no such argument."""
    place = _place_of_dim(operation)
    if place is None:
        return None
    dims = args[place] if place < len(args) else kwargs.get("dim")
    if type(dims) is int:
        return [dims]
    return list(dims) if isinstance(dims, list | tuple) and all(type(dim) is int for dim in dims) else None


def _fitted(where: int | Tensor, sizes: tuple[int, ...], shape: tuple[int, ...], summed: Any) -> Where:
    """Where channels of an operand [sizes] lie in the result [shape]; None where that is unknown."""
    added = len(shape) - len(sizes)
    if added >= 0 and all(mine in (1, theirs) for mine, theirs in zip(sizes, shape[added:], strict=True)):
        return where + added if isinstance(where, int) else where.view((1,) * added + tuple(where.shape))
    if not added:
        # Pools, pads, resizing, gates: the channels stay in their dimension.
        if isinstance(where, int):
            return where if shape[where] > 1 else NOWHERE
        for dim, size in enumerate(shape):
            if size != sizes[dim] and where.shape[dim] != 1:
                kept = where.amax(dim, keepdim=True) if where.numel() else where.sum(dim, keepdim=True)
                numbers = written_out(dim, shape)
                where = both(kept, numbers) if size > 1 and numbers is not None else kept
        return where
    gone = {dim % len(sizes) for dim in summed or ()} if sizes else set()
    if tuple(size for dim, size in enumerate(sizes) if dim not in gone) != shape:
        return None
    if isinstance(where, int):
        return NOWHERE if where in gone else where - sum(dim < where for dim in gone)
    return where.amax(list(gone)) if gone and where.numel() else None


def _corner(labels: Tensor) -> float:
    return labels[(0,) * labels.dim()].item()
