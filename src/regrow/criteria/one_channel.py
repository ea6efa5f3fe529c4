"""A tensor in which one channel of each picture is another than in the full network, and what reads it.

Most operations between two convolutions act on each channel by itself. They are repeated for the one channel
that is changed; and a convolution that reads it adds the change of its one input channel to what it computed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regrow.criteria.small_maps import pictures_first
from regrow.modules import CONVOLUTION_CLASSES, filter_dim

_EACH_MODULES = {
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Identity,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
}  # fmt: skip
_EACH_FUNCTIONS = {
    F.relu, torch.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.sigmoid,
    torch.sigmoid, F.tanh, torch.tanh, F.hardtanh, F.hardswish, F.hardsigmoid, F.softplus, F.dropout,
    F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
}  # fmt: skip
_EACH_METHODS = {"relu", "sigmoid", "tanh", "clamp", "contiguous"}
PAIRS = {
    operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.div,
}  # fmt: skip
_PAIR_METHODS = {"add", "sub", "mul", "div"}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class Cases:
    """Pairs of a dropped filter and a picture, ordered by filter: two Tensors[cases]."""

    filters: Tensor
    pictures: Tensor

    def __len__(self) -> int:
        return len(self.filters)

    def at(self, index: Any) -> Cases:
        """Some of the cases."""
        return Cases(self.filters[index], self.pictures[index])

    def of_filters(self) -> Iterator[slice]:
        """The cases of each filter."""
        counts = torch.unique_consecutive(self.filters, return_counts=True)[1].tolist()
        start = 0
        for count in counts:
            yield slice(start, start + count)
            start += count


@dataclass
class OneChannel:
    """A tensor [cases, channels, …] that equals that of the full network but for one channel of each case.

    Attributes:
        clean: the full network's, Tensor[pictures, channels, …].
        channels: which channel it is in each case, Tensor[cases].
        maps: the values of that channel, Tensor[cases, …].
    """

    clean: Tensor
    channels: Tensor
    maps: Tensor

    def at(self, index: Any) -> OneChannel:
        """Some of the cases."""
        return OneChannel(self.clean, self.channels[index], self.maps[index])

    def before(self, cases: Cases) -> Tensor:
        """The full network's values of that channel, Tensor[cases, …]."""
        return self.clean[cases.pictures, self.channels]

    def whole(self, cases: Cases) -> Tensor:
        """All channels: a new Tensor[cases, channels, …]."""
        every = self.clean[cases.pictures]
        every[torch.arange(len(cases), device=every.device), self.channels] = self.maps
        return every


def is_relu(module: Any, target: Any) -> bool:
    """Whether an operation, a layer or a function or the name of a method, is a plain ReLU."""
    return type(module) is nn.ReLU or target in (F.relu, torch.relu, "relu")


def on_one_channel(
    module: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], clean: Any, cases: Cases
) -> OneChannel | None:
    """The result of an operation on a ``OneChannel``, if there too no more than one channel is another.

    Args:
        module: the layer, or None.
        target: the function, or the name of the method.
        args: the arguments, among them ``OneChannel``s and tensors [pictures, …] of the full network.
        clean: the result in the full network.

    Returns:
        None where the operation may change other channels.
    """
    if not isinstance(clean, Tensor) or clean.dim() < 2:
        return None
    if target in PAIRS or target in _PAIR_METHODS:
        return _pair(target, args, kwargs, clean, cases)
    if target in (torch.cat, torch.concat):
        return _cat(args, kwargs, clean)
    one = args[0] if args else None
    if not isinstance(one, OneChannel) or any(isinstance(each, Tensor | OneChannel) for each in args[1:]):
        return None
    if any(isinstance(each, Tensor | OneChannel) for each in kwargs.values()):
        return None
    if (
        type(module) in _NORMS
        and module.running_mean is not None
        and module.num_features == one.clean.shape[1]
    ):
        return OneChannel(clean, one.channels, _normalised(module, one))
    if type(module) in CONVOLUTION_CLASSES:
        return _depthwise(module, one, clean, cases) if len(args) == 1 else None
    if type(module) is nn.Flatten or target in (torch.flatten, "flatten"):
        single = one.clean.shape[1] == one.clean.shape[1:].numel() == clean.shape[1] and clean.dim() == 2
        return OneChannel(clean, one.channels, one.maps.flatten()) if single else None
    if target in (torch.mean, "mean"):
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else list(dims or [0])
        if min(dim % one.clean.dim() for dim in dims) < 2:
            return None
    elif type(module) not in _EACH_MODULES and target not in _EACH_FUNCTIONS and target not in _EACH_METHODS:
        return None
    maps = one.maps.unsqueeze(1)
    if module is not None:
        made = module(maps)
    elif isinstance(target, str):
        made = getattr(maps, target)(*args[1:], **kwargs)
    else:
        made = target(maps, *args[1:], **kwargs)
    return OneChannel(clean, one.channels, made.squeeze(1)) if isinstance(made, Tensor) else None


def _normalised(norm: Any, one: OneChannel) -> Tensor:
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    shift = shift if norm.bias is None else shift + norm.bias
    shape = (-1, *[1] * (one.maps.dim() - 1))
    return one.maps * scale[one.channels].view(shape) + shift[one.channels].view(shape)


def _pair(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], clean: Tensor, cases: Cases
) -> OneChannel | None:
    """A sum, a product, … of two tensors."""
    found = [each for each in args if isinstance(each, OneChannel)]
    one = found[0]
    if len(args) != 2 or kwargs or clean.shape != one.clean.shape:
        return None
    sides: list[Any] = []
    for each in args:
        if isinstance(each, OneChannel):
            if not torch.equal(each.channels, one.channels) or each.clean.shape != clean.shape:
                return None
            sides.append(each.maps)
        elif isinstance(each, Tensor) and each.dim():
            if each.dim() != clean.dim() or each.shape[:2] != clean.shape[:2]:
                return None
            sides.append(each[cases.pictures, one.channels])
        else:
            sides.append(each)
    maps = getattr(sides[0], target)(sides[1]) if isinstance(target, str) else target(*sides)
    return OneChannel(clean, one.channels, maps)


def _cat(args: tuple[Any, ...], kwargs: dict[str, Any], clean: Tensor) -> OneChannel | None:
    """Channels of several tensors beside each other."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    parts = args[0]
    places = [place for place, part in enumerate(parts) if isinstance(part, OneChannel)]
    if dim not in (1, 1 - clean.dim()) or len(places) != 1:
        return None
    ahead = sum(part.shape[1] for part in parts[: places[0]])
    one = parts[places[0]]
    return OneChannel(clean, one.channels + ahead if ahead else one.channels, one.maps)


def _depthwise(conv: Any, one: OneChannel, clean: Tensor, cases: Cases) -> OneChannel | None:
    """A convolution of each channel by itself: a group for each case."""
    if not conv.groups == conv.in_channels == conv.out_channels > 1 or filter_dim(conv):
        return None
    if conv.padding_mode != "zeros":
        return None
    bias = None if conv.bias is None else conv.bias[one.channels]
    maps = _CONVOLVE[one.maps.dim() - 1](
        one.maps.unsqueeze(0), conv.weight[one.channels], bias, conv.stride, conv.padding, conv.dilation,
        len(cases),
    )  # fmt: skip
    return OneChannel(clean, one.channels, maps.squeeze(0))


_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def read_one(layer: Any, args: tuple[Any, ...], clean: Tensor, cases: Cases) -> Tensor | None:
    """What a convolution or linear layer makes of a ``OneChannel``: Tensor[cases, filters, …].

    It is what the layer makes in the full network, and the change of its one input channel by its weights.

    Args:
        args: the arguments of the layer.
        clean: what it makes in the full network, Tensor[pictures, filters, …].

    Returns:
        None where the layer is of another kind.
    """
    one = args[0]
    if len(args) > 1 or not isinstance(one, OneChannel) or clean.dim() != one.clean.dim():
        return None
    if type(layer) is nn.Linear and clean.dim() == 2:
        change = (one.maps - one.before(cases))[:, None]
        return torch.addcmul(clean[cases.pictures], change, layer.weight.T[one.channels])
    if type(layer) not in CONVOLUTION_CLASSES or layer.groups > 1 or layer.padding_mode != "zeros":
        return None
    change = (one.maps - one.before(cases)).unsqueeze(1)
    if type(layer) is nn.Conv2d and not isinstance(layer.padding, str):
        return _by_patches(layer, change, one.channels, clean, cases)
    made = clean[cases.pictures]
    sides = change.dim() - 2
    for some in cases.of_filters():
        channel = one.channels[some][:1]
        if filter_dim(layer):
            made[some] += _TRANSPOSED[sides](
                change[some], layer.weight[channel], None, layer.stride, layer.padding, layer.output_padding,
                1, layer.dilation,
            )  # fmt: skip
        else:
            made[some] += _CONVOLVE[sides](
                change[some], layer.weight[:, channel], None, layer.stride, layer.padding, layer.dilation
            )
    return made


def _by_patches(conv: Any, change: Tensor, channels: Tensor, clean: Tensor, cases: Cases) -> Tensor:
    """``read_one`` of a convolution of pictures, as products of patches with the taps of the one channel."""
    patches = F.unfold(change, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    weight = conv.weight.flatten(2)  # [filters, channels, taps]
    filters, (height, width) = len(weight), clean.shape[2:]
    if change.device.type != "cpu":
        taps = weight.transpose(0, 1)[channels]
        return torch.baddbmm(clean[cases.pictures].flatten(2), taps, patches).unflatten(2, (height, width))
    patches = patches.permute(2, 0, 1).contiguous()
    before = clean.permute(2, 3, 0, 1).flatten(0, 1)  # [positions, pictures, filters]
    made = before.new_empty(height * width, len(cases), filters)
    for some in cases.of_filters():
        taps = weight[:, channels[some][0]].T.expand(height * width, -1, -1)
        torch.baddbmm(before[:, cases.pictures[some]], patches[:, some], taps, out=made[:, some])
    return pictures_first(made.view(height, width, len(cases), filters))
