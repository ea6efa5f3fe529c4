"""The networks that several test files work on, and the masks and values that they give them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


def chain(
    filters: tuple[int, ...] = (6, 8, 8),
    *,
    dim: int = 2,
    norm: Callable[[int], nn.Module] | None = None,
    bias: bool = True,
    kernel: int = 3,
) -> nn.Sequential:
    """conv1, norm1, relu1, conv2, … pool, flatten, head (4 classes), for pictures of 3 channels."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for i, width in enumerate(filters, 1):
        layers[f"conv{i}"] = _CONVS[dim](channels, width, kernel, padding=kernel // 2, bias=bias)
        layers[f"norm{i}"] = (norm or _BATCH_NORMS[dim])(width)
        layers[f"relu{i}"] = nn.ReLU()
        channels = width
    layers["pool"], layers["flatten"] = _POOLS[dim](1), nn.Flatten()
    layers["head"] = nn.Linear(channels, 4)
    return nn.Sequential(layers)


def conv(channels: int, filters: int, kernel: int = 3, **settings: Any) -> nn.Conv2d:
    """A convolution that keeps the size of its pictures."""
    return nn.Conv2d(channels, filters, kernel, padding=kernel // 2, **settings)


def head(channels: int) -> nn.Sequential:
    """A pooling, a flattening and a linear layer for 4 classes."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


class Drawn(nn.Module):
    """A net drawn by hand: a function of (modules, x) and the modules by name."""

    def __init__(self, draw: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self._draw = draw
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self._draw(self, x)


class Residual(nn.Module):
    """A stem of ``width`` filters and one block, a (``inner`` filters) and b, that is added to what it reads.

    The norms stand behind the convolutions, the last one before the sum; ``normed=False`` leaves them out.
    """

    def __init__(self, width: int, inner: int, *, normed: bool = True, stem_bias: bool = True) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if normed else nn.Identity
        self.stem, self.norm = conv(3, width, bias=stem_bias), norm(width)
        self.a, self.norm_a = conv(width, inner), norm(inner)
        self.b, self.norm_b = conv(inner, width), norm(width)
        self.head = head(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.relu(x + self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))))


class Ahead(nn.Module):
    """A stream with norms ahead of the convolutions, the shortcut of the last block behind its norm.

    ``shift`` is added to the stream beside the first block.
    """

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), conv(4, 4)
        self.norm2, self.conv2 = nn.BatchNorm2d(4), conv(4, 4)
        self.norm3, self.head = nn.BatchNorm2d(4), nn.Linear(4, 4)
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv1(F.relu(self.norm1(x))) + self.shift
        y = F.relu(self.norm2(x))
        return self.head(F.relu(self.norm3(y + self.conv2(y))).mean((2, 3)))


class Standardised(nn.Conv2d):
    """Each filter scaled to mean 0 and variance 1, as in networks without norms."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, keepdim=True) + 1e-5).sqrt()
        return self._conv_forward(x, flat.view_as(self.weight), self.bias)


class FullyShardedDataParallel(nn.Sequential):
    """A wrapper that is known by its name alone, as that of PyTorch is."""


def keep_but(filters: int, *dropped: int) -> Tensor:
    """The mask of ``filters`` filters that keeps all but those ``dropped``."""
    keep = torch.ones(filters, dtype=torch.bool)
    keep[list(dropped)] = False
    return keep


def unsettled(net: nn.Module, lowest_bias: float = -0.5) -> nn.Module:
    """``net`` in eval mode with norms as after training: no weight, bias or statistic at 0 or 1."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm):
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, lowest_bias, 0.5)
            if getattr(module, "running_mean", None) is not None:
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


def away_from_zero(net: nn.Module) -> nn.Module:
    """``net`` with every norm and bias at values that a dropped filter must not pass on."""
    with torch.no_grad():
        for module in net.modules():
            for name in ("weight", "bias", "running_mean", "running_var"):
                tensor = getattr(module, name, None)
                if isinstance(tensor, Tensor) and tensor.dim() == 1:
                    tensor.uniform_(0.5, 1.5)
    return net
