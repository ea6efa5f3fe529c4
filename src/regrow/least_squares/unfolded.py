"""What the outputs of a convolution or linear layer are made of: a row of inputs for each output."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.modules import Transposed, channel_axis, channel_dim, grouped

_AT_ONCE = 1 << 22  # numbers that are collected at one time


def with_batch(layer: nn.Module, tensor: Tensor) -> Tensor:
    """``tensor``, an input or output of ``layer``, with a batch dimension also where it came without one."""
    alone = tensor.dim() == (1 if isinstance(layer, nn.Linear) else -channel_axis(layer))
    return tensor[None] if alone else tensor


def positions(layer: nn.Module, output: Tensor) -> int:
    """How many outputs a layer makes of one picture, in each channel."""
    output = with_batch(layer, output)
    return output.numel() // max(1, len(output) * output.shape[channel_dim(layer, output)])


def outputs_at(layer: nn.Module, output: Tensor, chosen: Tensor) -> Tensor:
    """A tensor shaped as the layer's output at some positions: [pictures · chosen, channels].

    Args:
        chosen: int64, indices of positions, which count the last dimension first.
    """
    output = with_batch(layer, output)
    if isinstance(layer, nn.Linear):
        each = (output.flatten(1, -2) if output.dim() > 2 else output[:, None])[:, chosen]
    else:  # the channels move behind the positions once these are chosen: all of them would be a copy
        each = output.flatten(2)[:, :, chosen].transpose(1, 2)
    return each.flatten(0, 1)


def inputs_at(layer: Any, x: Tensor, output: Tensor, chosen: Tensor) -> Tensor:
    """The numbers that ``layer`` multiplies by its weights for the outputs at ``chosen``.

    Args:
        x: the input.
        output: what the layer makes of it.
        chosen: as for ``outputs_at``.

    Returns:
        [groups, pictures · chosen, columns]; ``matrix_of`` has the weights in the same order of columns.
    """
    x, output = with_batch(layer, x), with_batch(layer, output)
    if isinstance(layer, nn.Linear):
        return (x.flatten(1, -2)[:, chosen] if x.dim() > 2 else x[:, None]).flatten(0, 1)[None]
    kernel, sides = layer.kernel_size, output.shape[2:]
    if isinstance(layer, Transposed):
        x, step = _spread(layer, x, sides), (1,) * len(kernel)
    else:
        x, step = _padded(layer, x), layer.stride
    places = torch.unravel_index(chosen, sides)
    index: list[Any] = [slice(None), slice(None)]
    for dim, place in enumerate(places):
        taps = torch.arange(kernel[dim], device=x.device) * layer.dilation[dim]
        at = place[:, None] * step[dim] + taps  # [chosen, taps]
        index.append(at.view(len(chosen), *(-1 if other == dim else 1 for other in range(len(kernel)))))
    columns = x.shape[1] // layer.groups * math.prod(kernel)
    rows = x.new_empty(layer.groups, len(x), len(chosen), columns)
    each = max(1, _AT_ONCE // max(1, len(chosen) * layer.groups * columns))
    for some, made in zip(x.split(each), rows.split(each, 1), strict=True):
        patches = some[tuple(index)].unflatten(
            1, (layer.groups, -1)
        )  # [pictures, groups, …, chosen, *kernel]
        made.unflatten(3, (-1, *kernel)).copy_(patches.transpose(0, 1).movedim(3, 2))
    return rows.flatten(1, 2)


def matrix_of(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight of a layer as [groups, columns, filters of a group]."""
    parts = grouped(layer, weight)  # [groups, filters, channels, *kernel]
    if isinstance(layer, Transposed):  # the last tap meets the first input
        parts = parts.flip(tuple(range(3, parts.dim())))
    return parts.flatten(2).transpose(1, 2)


def weight_of(layer: nn.Module, matrix: Tensor) -> Tensor:
    """The way back from ``matrix_of``: a tensor that is shaped as the layer's weight."""
    weight: Any = layer.weight
    parts = matrix.transpose(1, 2).unflatten(2, (-1, *weight.shape[2:]))
    if isinstance(layer, Transposed):
        parts = parts.flip(tuple(range(3, parts.dim()))).transpose(1, 2)
    return parts.flatten(0, 1)


def _padded(layer: Any, x: Tensor) -> Tensor:
    """``x`` with the border that a convolution adds to it."""
    if layer.padding == "valid":
        return x
    around: list[int] = []
    for dim in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            both = layer.dilation[dim] * (layer.kernel_size[dim] - 1)
            around += [both // 2, both - both // 2]
        else:
            around += [layer.padding[dim]] * 2
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, around, mode=mode) if any(around) else x


def _spread(layer: Any, x: Tensor, sides: torch.Size) -> Tensor:
    """``x`` as a convolution with stride 1 has to read it to compute what a transposed convolution does."""
    wide = x.new_zeros(
        *x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], layer.stride, strict=True))
    )
    wide[(slice(None), slice(None), *(slice(None, None, s) for s in layer.stride))] = x
    around: list[int] = []
    settings = zip(wide.shape[2:], sides, layer.kernel_size, layer.dilation, layer.padding, strict=True)
    for have, made, taps, apart, pad in reversed(list(settings)):
        before = apart * (taps - 1) - pad
        around += [before, made + apart * (taps - 1) - have - before]
    return F.pad(wide, around)
