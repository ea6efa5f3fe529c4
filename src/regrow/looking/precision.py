"""Passes in full precision through models whose own code asks for less."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class FullPrecision(TorchFunctionMode):
    """Autocast that the model's code opens on a device computes in float32 in the ``with`` block.

    In bfloat16 a change of one unit in the last place cannot be told from a channel that is read. Autocast
    stays on, because code inside of it may rely on it where numbers of two types meet. Autocast restores the
    type that was set before when its own block ends.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device = device_type

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.is_autocast_enabled(self._device):
            torch.set_autocast_dtype(self._device, torch.float32)
        return func(*args, **(kwargs or {}))
