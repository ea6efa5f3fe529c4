"""Hold dropped filters dead, whatever the optimizer does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Entries = Sequence[tuple[nn.Parameter, Tensor]]


class Hold:
    """Keeps rows of parameters at exactly 0 from now until ``release``.

    After every optimizer step the rows are set to 0 again: momentum, weight decay and Adam's running
    averages revive a row whose gradient alone is masked. The gradient is masked too, so that a dead
    row has no part in gradient clipping or in any statistic of the gradients.

    Args:
        entries: (parameter, Tensor of row indices) pairs; the rows are expected to be 0 already.
        optimizer: the one that steps the parameters; its ``step`` method is not replaced.
    """

    def __init__(self, entries: Entries, optimizer: torch.optim.Optimizer) -> None:
        self._entries = list(entries)
        # What accumulated before the hooks were there would reach the next step, and gradient clipping.
        for parameter, rows in entries:
            if parameter.grad is not None:
                parameter.grad.index_fill_(0, rows, 0)
        self._handles: list[Any] = [optimizer.register_step_post_hook(self._zero)]
        self._handles += [p.register_hook(_without(rows)) for p, rows in entries if p.requires_grad]

    @torch.no_grad()
    def _zero(self, *_: Any) -> None:
        for parameter, rows in self._entries:
            parameter.index_fill_(0, rows, 0)

    def release(self) -> None:
        """Let the rows move again; they are 0 until something writes them."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _without(rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.index_fill(0, rows, 0)
