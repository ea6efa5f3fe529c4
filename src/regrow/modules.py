"""Models and layers as PyTorch builds them: which layers make, read and normalise channels, and where."""

from __future__ import annotations

import functools
import inspect
from typing import Any, get_args

import torch
from torch import Tensor, nn

from regrow.indexing import Where
from regrow.torch_private import BatchNorm, ConvNd, compiled_from, own_parameters

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | Transposed
Consumer = Convolution | nn.Linear
Norm = BatchNorm | nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d | nn.GroupNorm | nn.LayerNorm
# isinstance tests tuples faster than unions.
CONVOLUTION_CLASSES, CONSUMER_CLASSES = get_args(Convolution), get_args(Consumer)
_TRANSPOSED_CLASSES = get_args(Transposed)
CHANNEL_LAYERS = (*CONSUMER_CLASSES, *get_args(Norm))
_WIDTHS = ("in_features", "in_channels", "num_features", "num_channels", "num_parameters")


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside ``torch.compile`` and data-parallel wrappers.

    Names taken from it carry no ``module.`` or ``_orig_mod.`` prefix, so files saved under a wrapper load
    without one.
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif (inner := compiled_from(model)) is not None:
            model = inner
        else:
            return model


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter; the CPU for a model without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def channel_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The convolutions, linear layers and norms, as ``named_modules`` orders them."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, CHANNEL_LAYERS)]


def channel_dim(module: nn.Module, tensor: Tensor) -> int:
    """The dimension of ``tensor``, the input or output of ``module``, that holds the channels.

    The tensor may come with or without a batch dimension.
    """
    return channel_dims(module, tensor)[0]


def channel_dims(module: nn.Module, tensor: Tensor) -> list[int]:
    """Where ``module`` may have its channels in ``tensor``: layer norms are used in two layouts."""
    if isinstance(module, nn.LayerNorm):
        return [1, tensor.dim() - 1]
    axis = channel_axis(module)
    return [axis if axis > 0 else tensor.dim() + axis]


def channel_axis(module: nn.Module) -> int:
    """``channel_dim`` without a tensor: below 0, from the end, where a batch dimension may be absent."""
    if isinstance(module, nn.Linear):
        return -1
    if isinstance(module, ConvNd):
        return -1 - len(module.kernel_size)
    for sides, kind in enumerate((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), 1):
        if isinstance(module, kind):
            return -1 - sides
    return 1


@functools.cache
def input_name(kind: Any) -> str:
    """The name of the first argument of a layer's ``forward``; empty if it cannot be given by position.

    Args:
        kind: the layer's class.
    """
    for base in kind.__mro__:
        if "forward" in vars(base):
            parameters = list(inspect.signature(vars(base)["forward"]).parameters.values())[1:]
            # A class that hands all arguments on, as those in front of a layer's own class do, names none.
            if parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
                by_position = parameters[0].kind is not inspect.Parameter.KEYWORD_ONLY
                return parameters[0].name if by_position else ""
    return ""


def input_first(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of a layer with its input as the first positional one.

    A call by keyword (``conv(input=x)``) is turned into ``conv(x)``; all other calls stay as they are.

    Args:
        name: ``input_name`` of the layer.
    """
    if args or name not in kwargs:
        return args, kwargs
    return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}


def channels_read(module: nn.Module) -> int | None:
    """How many input channels ``module`` reads; None for a layer that takes any number."""
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return None
    known = next((vars(module)[count] for count in _WIDTHS if count in vars(module)), None)
    if known is None and isinstance(weight := getattr(module, "weight", None), Tensor):
        known = len(weight)
    return known


def filter_dim(layer: nn.Module) -> int:
    """The dimension of a layer's weight that counts its filters.

    A transposed convolution has its input channels in dim 0, and its filters in dim 1. Every other
    convolution and a linear layer have them the other way round.
    """
    return 1 if isinstance(layer, _TRANSPOSED_CLASSES) else 0


def grouped(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A view [groups, filters of a group, channels of a group, *rest] of a tensor that is shaped as a weight.

    Filter i of n in a group is at ``[i // n, i % n]``, whatever the kind of the convolution is.

    Args:
        layer: a convolution or linear layer.
        tensor: the layer's weight, or any tensor whose first two dimensions are the weight's.
    """
    parts = tensor.unflatten(0, (getattr(layer, "groups", 1), -1))
    return parts.transpose(1, 2) if filter_dim(layer) else parts


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each group of a layer reads a single input channel."""
    groups = getattr(layer, "groups", 1)
    return groups > 1 and groups == channels_read(layer)


def filters_first(layer: nn.Module, tensor: Tensor) -> Tensor:
    """``tensor``, shaped as the layer's weight, as [filters, channels of a group, *rest].

    It is a view, except in a grouped transposed convolution, where it is a copy.
    """
    return grouped(layer, tensor).flatten(0, 1) if filter_dim(layer) else tensor


def as_weight(layer: nn.Module, filters: Tensor) -> Tensor:
    """The way back from ``filters_first``: a tensor that is shaped as the layer's weight."""
    if not filter_dim(layer):
        return filters
    return filters.unflatten(0, (getattr(layer, "groups", 1), -1)).transpose(1, 2).flatten(0, 1)


def filters_at(layer: nn.Module, indices: Tensor) -> Where:
    """An index into the weight of ``layer``, of which it takes the filters ``indices`` alone."""
    if not filter_dim(layer):
        return indices
    conv: Any = layer
    groups, (channels, filters) = conv.groups, conv.weight.shape[:2]
    if groups == 1:
        return slice(None), indices
    first = indices // filters * (channels // groups)
    read = torch.arange(channels // groups, device=indices.device)
    return first[:, None] + read, (indices % filters)[:, None]


def filter_count(layer: nn.Module, weight: Tensor) -> int:
    """How many filters ``weight`` holds, the weight of ``layer``."""
    return weight.shape[1] * int(getattr(layer, "groups", 1)) if filter_dim(layer) else len(weight)


def per_channel(norm: nn.Module) -> bool:
    """Whether a norm's output in one channel depends on that channel alone."""
    return not isinstance(norm, nn.LayerNorm) and (
        not isinstance(norm, nn.GroupNorm) or norm.num_groups == norm.num_channels
    )


def is_stock(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's own convolutions or linear layers, unchanged.

    A subclass, or a layer whose ``forward`` was replaced, may compute something else.
    """
    return type(module) in CONSUMER_CLASSES and "forward" not in vars(module)


def tied_modules(model: nn.Module) -> set[str]:
    """The modules that hold a parameter which another module holds too."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in {id(p) for p in own_parameters(module).values() if p is not None}:
            holders.setdefault(parameter, []).append(name)
    return {name for names in holders.values() if len(names) > 1 for name in names}
