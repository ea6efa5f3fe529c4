"""Which channels carry something in passes where noise replaces the outputs of all weighted layers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from regrow.modules import channel_dim
from regrow.numbers import together


class Aliveness:
    """The largest absolute values in the channels that convolutions and linear layers read."""

    def __init__(self) -> None:
        self._largest: dict[str, list[Tensor]] = {}
        self._unclear: set[str] = set()

    def note(self, name: str, module: nn.Module, inputs: Any) -> None:
        """Note one call; to be called behind every convolution and linear layer."""
        if inputs and isinstance(inputs[0], Tensor):
            self._see(name, inputs[0], channel_dim(module, inputs[0]))
        else:
            self._unclear.add(name)

    def dead(self) -> dict[str, Tensor]:
        """Layer → BoolTensor[channels] that were 0 in every call. Layers that never ran are not listed."""
        seen = {
            name: largest
            for name, largest in self._largest.items()
            if name not in self._unclear and len({len(each) for each in largest}) == 1
        }
        silent = [functools.reduce(torch.maximum, largest) == 0 for largest in seen.values()]
        return dict(zip(seen, together(silent), strict=True))

    def _see(self, name: str, tensor: Tensor, dim: int) -> None:
        if not tensor.numel() or dim >= tensor.dim():
            self._unclear.add(name)
            return
        others = [each for each in range(tensor.dim()) if each != dim % tensor.dim()]
        # amax takes a third of the time of any(). A NaN makes it NaN, which is not 0 either.
        absolute = tensor.abs()
        self._largest.setdefault(name, []).append(absolute.amax(others) if others else absolute)
