"""Hold dropped filters at 0 while an optimizer trains the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.indexing import Where, clear, on
from regrow.repr.slots import stepping

Entries = Sequence[tuple[nn.Parameter, Where]]


class Hold:
    """Keeps rows of parameters at exactly 0 until ``release``.

    Masking the gradient is not enough: momentum, weight decay and Adam's running averages still move a row.
    So a hook sets the rows to 0 after every optimizer step. The gradient is masked as well, which keeps dead
    rows out of gradient clipping and of all statistics of the gradients.

    Args:
        entries: (parameter, index of the rows) pairs; the caller has set the rows to 0. In a transposed
            convolution a filter's row of weights lies across dim 0.
        optimizer: the optimizer of the parameters; its ``step`` method is not replaced. Where it holds other
            optimizers, the steps of these count too.
    """

    def __init__(self, entries: Entries, optimizer: torch.optim.Optimizer) -> None:
        self._entries = list(entries)
        self._stepped = self._trained = False
        # Gradients accumulated before this call would reach gradient clipping and the next step.
        for parameter, rows in entries:
            if parameter.grad is not None:
                clear(parameter.grad, rows)
        self._handles: list[Any] = [part.register_step_post_hook(self._zero) for part in stepping(optimizer)]
        trained = [(parameter, rows) for parameter, rows in entries if parameter.requires_grad]
        self._handles += [parameter.register_hook(_without(rows)) for parameter, rows in trained]
        self._handles += [parameter.register_hook(self._note_gradient) for parameter, _ in trained[:1]]
        self._sums = self._sum()

    def _zero(self, *_: Any) -> None:
        self._stepped = True
        self.zero()

    @torch.no_grad()
    def zero(self) -> None:
        """Set the rows to 0."""
        for parameter, rows in self._entries:
            clear(parameter, rows)

    @torch.no_grad()
    def moved(self) -> list[nn.Parameter]:
        """The parameters whose rows are not 0. The answer is waited for once per device, not per layer."""
        found: list[nn.Parameter] = []
        for device in {parameter.device for parameter, _ in self._entries}:
            here = [(p, p[on(rows, device)]) for p, rows in self._entries if p.device == device]
            if torch.cat([values.flatten() for _, values in here]).any():
                found += [parameter for parameter, values in here if values.any()]
        return found

    def missed_steps(self) -> bool:
        """Whether the parameters are trained and have moved, and yet no step of the optimizer was seen.

        Without a gradient since the rows are held, training pauses, or somebody loads a state.
        """
        return self._trained and not self._stepped and self._sums != self._sum()

    def _note_gradient(self, _: Tensor) -> None:
        self._trained = True

    @torch.no_grad()
    def _sum(self) -> list[float]:
        sums = [parameter.sum(dtype=torch.float32) for parameter, _ in self._entries]
        return torch.stack([one.to(sums[0].device) for one in sums]).tolist() if sums else []

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
