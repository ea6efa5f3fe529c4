"""Passes of a fit in which Lightning only measures the statistics of batch norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from regrow.torch_private import BatchNorm


class WithoutGradients:
    """Takes the gradients from the passes of ``net`` in which its norms average all batches alike.

    At its end ``StochasticWeightAveraging`` sets the momentum of all batch norms to None, and runs the training
    step through an epoch without a backward pass. It leaves gradients on, and by these Bridgeout tells
    whether a pass trains: without them it draws no noise. Norms that had no momentum before are left out.
    """

    def __init__(self, net: nn.Module) -> None:
        self._norms = [
            module
            for module in net.modules()
            if isinstance(module, BatchNorm) and module.momentum is not None
        ]
        self._before: list[bool] = []
        self._handles = [
            net.register_forward_pre_hook(self._begin, prepend=True),  # ahead of Bridgeout's own
            net.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, *_: Any) -> None:
        self._before.append(torch.is_grad_enabled())
        if any(norm.momentum is None for norm in self._norms):
            torch.set_grad_enabled(False)

    def _end(self, *_: Any) -> None:
        torch.set_grad_enabled(self._before.pop())

    def undo(self) -> None:
        for handle in self._handles:
            handle.remove()
