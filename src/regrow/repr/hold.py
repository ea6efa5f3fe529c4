"""Hold dropped filters at 0 while an optimizer trains the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.indexing import Where, clear

Entries = Sequence[tuple[nn.Parameter, Where]]


class Hold:
    """Keeps rows of parameters at exactly 0 until ``release``.

    Masking the gradient is not enough: momentum, weight decay and Adam's running averages still move a row.
    So a hook sets the rows to 0 after every optimizer step. The gradient is masked as well, which keeps dead
    rows out of gradient clipping and of all statistics of the gradients.

    Args:
        entries: (parameter, index of the rows) pairs; the caller has set the rows to 0. In a transposed
            convolution a filter's row of weights lies across dim 0.
        optimizer: the optimizer of the parameters; its ``step`` method is not replaced.
    """

    def __init__(self, entries: Entries, optimizer: torch.optim.Optimizer) -> None:
        self._entries = list(entries)
        # Gradients accumulated before this call would reach gradient clipping and the next step.
        for parameter, rows in entries:
            if parameter.grad is not None:
                clear(parameter.grad, rows)
        self._handles: list[Any] = [optimizer.register_step_post_hook(self._zero)]
        self._handles += [p.register_hook(_without(rows)) for p, rows in entries if p.requires_grad]

    @torch.no_grad()
    def _zero(self, *_: Any) -> None:
        for parameter, rows in self._entries:
            clear(parameter, rows)

    def release(self) -> None:
        """Remove the hooks; the rows stay 0 until something writes to them."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _without(rows: Where) -> Callable[[Tensor], Tensor]:
    def masked(gradient: Tensor) -> Tensor:
        if isinstance(rows, Tensor):
            return gradient.index_fill(0, rows, 0)
        masked = gradient.clone()
        masked[rows] = 0
        return masked

    return masked
