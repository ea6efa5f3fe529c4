"""Dropout switched off on a probe: which values it drops depends on how wide a tensor is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from regrow.torch_private import DropoutNd

_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout,
}  # fmt: skip


def stop_dropout(probe: nn.Module) -> None:
    """Set the probability of all dropout layers of ``probe`` to 0, for good."""
    for module in probe.modules():
        if isinstance(module, DropoutNd):
            module.p = 0.0


class NoDropout(TorchFunctionMode):
    """While it is entered, the dropout functions return their input.

    Two networks of different widths would otherwise differ by chance. Every call of PyTorch takes a detour
    through Python meanwhile.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _DROPOUTS:
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))
