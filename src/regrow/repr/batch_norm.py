"""Batch norm in train mode for activations with channels innermost, on several cores of a CPU.

PyTorch's kernel for this layout keeps the sums of all threads side by side in memory. Unless a thread's
sums fill whole cache lines, as with 16 or 32 channels, the threads wait for each other at every pixel: on two
cores, 11 channels take seven times as long as 16. A network without its dropped filters has such widths.
The code below joins several pixels into one long row, and each pass is one operation on all rows.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.indexing import channels_last

_LINE = 16  # float32 numbers in a cache line
_PIXELS = (16, 8, 4, 2, 1)  # numbers of pixels that may form a row, the best first


def norms_innermost(norm: nn.Module, x: Tensor) -> bool:
    """Whether :func:`batch_norm` gives the same output as ``norm`` on ``x`` and takes less time."""
    return (
        isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d)
        and norm.training
        and x.is_cpu
        and x.dim() == (4 if isinstance(norm, nn.BatchNorm2d) else 5)
        and x.shape[1] % _LINE > 0
        and torch.get_num_threads() > 1
        and x.dtype in (torch.float32, torch.float64)
        and all(p is None or p.dtype == x.dtype for p in (norm.weight, norm.bias, norm.running_mean))
        and channels_last(x)
        and x.numel() > x.shape[1]
    )


def batch_norm(norm: Any, x: Tensor) -> Tensor:
    """The output of ``norm``, a ``BatchNorm2d`` or ``BatchNorm3d`` in train mode, equal up to rounding.

    The running statistics and the batch counter of ``norm`` are updated as its own forward method does.

    Args:
        x: [batch, channels, *pixels], channels innermost in memory, more than one value per channel.
    """
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    output, mean, variance = cast(Any, _BatchNorm.apply(x, norm.weight, norm.bias, norm.eps))
    if norm.running_mean is not None:
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            # PyTorch's kernel too writes through .data: a graph that holds a buffer stays valid.
            norm.running_mean.data.lerp_(mean, momentum)
            norm.running_var.data.lerp_(variance * (count / (count - 1)), momentum)
    return output


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = x.numel() // x.shape[1]
        mean = _sum(_rows(x), x.shape[1]) / count
        output = torch.empty_like(x)
        rows = _rows(output)
        torch.sub(_rows(x), _repeated(mean, rows), out=rows)
        variance = _sum(rows.square(), x.shape[1]) / count
        inverse = (variance + eps).rsqrt()
        scale = inverse if weight is None else inverse * weight
        if bias is None:
            rows.mul_(_repeated(scale, rows))
        else:
            torch.addcmul(_repeated(bias, rows), rows, _repeated(scale, rows), out=rows)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps, ctx.has_bias = eps, bias is not None
        ctx.mark_non_differentiable(mean, variance)
        return output, mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # the caller wants a second derivative
            return (*_differentiable(gradient, x, weight, ctx.has_bias, ctx.eps), None)
        count, channels = x.numel() // x.shape[1], x.shape[1]
        if not channels_last(gradient):
            gradient = torch.empty_like(x).copy_(gradient)
        given = _rows(gradient)
        output = torch.empty_like(x)
        rows = _rows(output)
        torch.sub(_rows(x), _repeated(mean, rows), out=rows)
        total, along = _sum(given, channels), _sum(given * rows, channels)
        scale = inverse if weight is None else inverse * weight
        slope, shift = -scale * inverse.square() * along / count, -scale * total / count
        torch.addcmul(_repeated(shift, rows), rows, _repeated(slope, rows), out=rows)
        rows.addcmul_(given, _repeated(scale, rows))
        return output, None if weight is None else along * inverse, total if ctx.has_bias else None, None


def _differentiable(
    gradient: Tensor, x: Tensor, weight: Tensor | None, has_bias: bool, eps: float
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias from PyTorch's own kernel, which can be differentiated again."""
    bias = torch.zeros_like(x[0, :, 0].flatten()[: x.shape[1]]).requires_grad_() if has_bias else None
    normed = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    wanted = [tensor for tensor in (x, weight, bias) if tensor is not None and tensor.requires_grad]
    gradients = torch.autograd.grad(normed, wanted, gradient, create_graph=True)
    found = dict(zip(map(id, wanted), gradients, strict=True))
    return tuple(found.get(id(tensor)) for tensor in (x, weight, bias))


def _rows(x: Tensor) -> Tensor:
    """A view of ``x`` of shape [rows, pixels of a row · channels]."""
    count = x.numel() // x.shape[1]
    together = next(number for number in _PIXELS if count % number == 0)
    return x.movedim(1, -1).view(count // together, together * x.shape[1])


def _sum(rows: Tensor, channels: int) -> Tensor:
    """The sum over all pixels, [channels]."""
    return rows.sum(0).view(-1, channels).sum(0)


def _repeated(values: Tensor, rows: Tensor) -> Tensor:
    """``values`` [channels], repeated for every pixel of a row."""
    return values.repeat(rows.shape[1] // len(values))
