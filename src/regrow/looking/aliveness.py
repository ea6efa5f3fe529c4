"""Which channels carry something when all that convolutions and linear layers compute is noise."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from regrow.modules import channel_dim


class Aliveness:
    """What passes with noise show of the channels that convolutions and linear layers read."""

    def __init__(self) -> None:
        self._largest: dict[str, list[Tensor]] = {}
        self._unclear: set[str] = set()

    def note(self, name: str, module: nn.Module, inputs: Any) -> None:
        """To be called behind every convolution and linear layer."""
        if inputs and isinstance(inputs[0], Tensor):
            self._see(name, inputs[0], channel_dim(module, inputs[0]))
        else:
            self._unclear.add(name)

    def dead(self) -> dict[str, Tensor]:
        """Layer → BoolTensor[channels]: what was 0 each time. Layers that no pass reached are not listed."""
        seen = {
            name: largest
            for name, largest in self._largest.items()
            if name not in self._unclear and len({len(each) for each in largest}) == 1
        }
        return {name: (functools.reduce(torch.maximum, largest) == 0).cpu() for name, largest in seen.items()}

    def _see(self, name: str, tensor: Tensor, dim: int) -> None:
        if not tensor.numel() or dim >= tensor.dim():
            self._unclear.add(name)
            return
        others = [each for each in range(tensor.dim()) if each != dim % tensor.dim()]
        # A third of the time that any() takes; what is no number is not 0.
        absolute = tensor.abs()
        self._largest.setdefault(name, []).append(absolute.amax(others) if others else absolute)
