"""Passes of a fit in which Lightning only measures the statistics of batch norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from regrow.torch_private import BatchNorm


def with_momentum(net: nn.Module) -> list[nn.Module]:
    """The batch norms of ``net`` whose running statistics forget old batches, as they do in training."""
    norms = (module for module in net.modules() if isinstance(module, BatchNorm))
    return [norm for norm in norms if norm.momentum is not None]


def measures(norms: list[nn.Module]) -> bool:
    """Whether one of ``norms``, which had momentum when training began, averages all batches alike now.

    At its end ``StochasticWeightAveraging`` sets the momentum of all batch norms to None, and runs the
    training step through one epoch more, without a backward pass.
    """
    return any(norm.momentum is None for norm in norms)


class WithoutGradients:
    """Takes the gradients from the passes of ``net`` that only measure.

    Lightning leaves gradients on in them, and by these Bridgeout tells whether a pass trains: without them it
    draws no noise.
    """

    def __init__(self, net: nn.Module) -> None:
        self._norms = with_momentum(net)
        self._before: list[bool] = []
        self._handles = [
            net.register_forward_pre_hook(self._begin, prepend=True),  # ahead of Bridgeout's own
            net.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, *_: Any) -> None:
        self._before.append(torch.is_grad_enabled())
        if measures(self._norms):
            torch.set_grad_enabled(False)

    def _end(self, *_: Any) -> None:
        torch.set_grad_enabled(self._before.pop())

    def undo(self) -> None:
        for handle in self._handles:
            handle.remove()
