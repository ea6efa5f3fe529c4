"""Clear the optimizer state of entries that got new values, so that their next step has a usual length."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# At 0, a running average of squares (Adam and its variants, RMSprop, Adagrad, Adadelta, Adamax) makes the
# next step many times too long, and with a step size of 0 Rprop hardly moves the entry.
_MAGNITUDES = {"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum", "acc_delta", "step_size"}


@torch.no_grad()
def refresh_slots(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, fresh: Tensor) -> None:
    """Clear the optimizer state of those entries of ``parameter`` that ``fresh`` marks.

    Momentum and Adam's first moment become 0. Running averages of squares and step sizes become their mean
    over the parameter's other entries. State of another shape than the parameter does not change.

    Args:
        optimizer: if it has no state for the parameter, nothing is done.
        parameter: [rows, *rest].
        fresh: BoolTensor over the leading dimensions of ``parameter``.
    """
    if not fresh.any():
        return
    for name, slot in optimizer.state.get(parameter, {}).items():
        if isinstance(slot, Tensor) and slot.shape == parameter.shape and slot.dim():
            settled = slot[~fresh]
            slot[fresh] = settled.mean() if name in _MAGNITUDES and settled.numel() else 0
