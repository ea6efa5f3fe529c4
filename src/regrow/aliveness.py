"""Which channels carry something when all that convolutions and linear layers compute is noise."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from regrow.placing import channel_dim
from regrow.readers import Norm


class Aliveness:
    """What passes with noise show of the channels that convolutions and linear layers read and norms make."""

    def __init__(self) -> None:
        self._alive: dict[str, Tensor] = {}
        self._unclear: set[str] = set()

    def note(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """To be called behind every convolution, linear layer and norm."""
        if isinstance(module, Norm):
            self._see(name, output, 1)
        elif inputs and isinstance(inputs[0], Tensor):
            self._see(name, inputs[0], channel_dim(module, inputs[0]))
        else:
            self._unclear.add(name)

    def dead(self) -> dict[str, Tensor]:
        """Layer → BoolTensor[channels]: what was 0 each time. Layers that no pass reached are not listed."""
        return {name: ~alive for name, alive in self._alive.items() if name not in self._unclear}

    def _see(self, name: str, tensor: Tensor, dim: int) -> None:
        if not tensor.numel() or dim >= tensor.dim():
            self._unclear.add(name)
            return
        others = [each for each in range(tensor.dim()) if each != dim % tensor.dim()]
        # A third of the time that any() takes; what is no number is not 0.
        moved = ((tensor.abs().amax(others) if others else tensor) != 0).cpu()
        if name in self._alive and self._alive[name].shape != moved.shape:
            self._unclear.add(name)
        else:
            self._alive[name] = self._alive[name] | moved if name in self._alive else moved
