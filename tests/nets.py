"""The networks that tests in several folders work on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

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
