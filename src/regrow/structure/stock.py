"""What PyTorch's own layers compute, so that a pass can be followed without a look at each operation in them.

Convolutions, batch norms and activations are most of a pass, and each is one operation of the table below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regrow.modules import is_stock

Operation = Callable[[Any, Tensor], tuple[Any, tuple[Any, ...]]]
_OTHER = None, ()
_PLAIN = (Tensor, nn.Parameter)
_ACTIVATIONS = {
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid),
    *(nn.GELU, nn.Sigmoid, nn.Tanh),
}
_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}
_CONVOLUTIONS = {nn.Conv1d, nn.Conv2d, nn.Conv3d}


def single_operation(module: Any) -> Operation | None:
    """A function (module, input) → (ATen operator, its arguments), for a layer that computes one operation.

    The function gives None in place of the operator for an input of which the layer makes several operations,
    and for parameters of another class than PyTorch's. An element-wise operation stands for all the others.

    Returns:
        None for any other layer.
    """
    kind = type(module)
    if kind in _CONVOLUTIONS:
        return _convolution if is_stock(module) and module.padding_mode == "zeros" else None
    if "forward" in vars(module):
        return None
    if kind in _NORMS:
        return _batch_norm
    return _activation if kind in _ACTIVATIONS else None


def is_plain(tensor: Any) -> bool:
    """Whether a tensor is of PyTorch's own class, with plain memory."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided


def _convolution(conv: Any, x: Tensor) -> tuple[Any, tuple[Any, ...]]:
    if x.dim() != len(conv.kernel_size) + 2 or type(conv.padding) is not tuple:
        return _OTHER
    settings = conv.stride, conv.padding, conv.dilation, False, conv.output_padding, conv.groups
    return _of(torch.ops.aten.convolution.default, (x, conv.weight, conv.bias), settings)


def _batch_norm(norm: Any, x: Tensor) -> tuple[Any, tuple[Any, ...]]:
    tensors = x, norm.weight, norm.bias, norm.running_mean, norm.running_var
    return _of(torch.ops.aten.native_batch_norm.default, tensors, (norm.training, norm.momentum, norm.eps))


def _of(operator: Any, tensors: tuple[Any, ...], settings: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    own = all(tensor is None or is_plain(tensor) for tensor in tensors)
    return (operator, (*tensors, *settings)) if own else _OTHER


def _activation(module: Any, x: Tensor) -> tuple[Any, tuple[Any, ...]]:
    relu = torch.ops.aten.relu_ if getattr(module, "inplace", False) else torch.ops.aten.relu
    return relu.default, (x,)
