"""Batch norm in train mode for activations with channels innermost, on several cores of a CPU.

PyTorch's kernel for them lets its threads add up side by side, each channel in a number of its own. Unless
a thread's numbers fill whole lines of the cache, as 16 or 32 channels do, the threads wait for each other
at every pixel: on two cores 11 channels take seven times as long as 16. A network whose filters have been
left out has such widths. Here several pixels make one long row, and each pass is one operation on rows.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.indexing import channels_last

# Channels in a line of the cache, as float32 numbers.
_LINE = 16
# How many pixels may make a row, best first.
_PIXELS = (16, 8, 4, 2, 1)


def norms_innermost(norm: nn.Module, x: Tensor) -> bool:
    """Whether :func:`batch_norm` can stand for the forward method of ``norm`` on ``x``, and is quicker."""
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
    """What ``norm``, a ``BatchNorm2d`` or ``BatchNorm3d`` in train mode, makes of ``x``; counted by it.

    Args:
        x: [batch, channels, *pixels], channels innermost in memory, more than one value per channel.

    Returns:
        Like ``x``, equal to PyTorch's result up to rounding.
    """
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    output, mean, variance = cast(
        tuple[Tensor, Tensor, Tensor], _BatchNorm.apply(x, norm.weight, norm.bias, norm.eps)
    )
    if norm.running_mean is not None:
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            # Through .data, as PyTorch's kernel writes them: a graph that holds a buffer stays valid.
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
        if torch.is_grad_enabled():  # a second derivative is asked for
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
        return (
            output,
            None if weight is None else along * inverse,
            total if ctx.has_bias else None,
            None,
        )


def _differentiable(
    gradient: Tensor, x: Tensor, weight: Tensor | None, has_bias: bool, eps: float
) -> tuple[Tensor | None, ...]:
    """The derivatives as PyTorch's own kernel gives them, which can be derived again."""
    bias = torch.zeros_like(x[0, :, 0].flatten()[: x.shape[1]]).requires_grad_() if has_bias else None
    normed = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    wanted = [tensor for tensor in (x, weight, bias) if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(normed, wanted, gradient, create_graph=True))
    return tuple(
        next(found) if tensor is not None and tensor.requires_grad else None for tensor in (x, weight, bias)
    )


def _rows(x: Tensor) -> Tensor:
    """``x`` as [rows, pixels of a row · channels], a view."""
    pixels = x.movedim(1, -1)
    count = x.numel() // x.shape[1]
    together = next(number for number in _PIXELS if count % number == 0)
    return pixels.view(count // together, together * x.shape[1])


def _sum(rows: Tensor, channels: int) -> Tensor:
    """[channels] the sum over all pixels."""
    return rows.sum(0).view(-1, channels).sum(0)


def _repeated(values: Tensor, rows: Tensor) -> Tensor:
    """[channels] once for every pixel of a row."""
    return values.repeat(rows.shape[1] // len(values))
