"""What an optimizer remembers of entries that got new values: forget it, without a first step too long."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Running averages of squares (Adam and its kin, RMSprop, Adagrad, Adadelta, Adamax): at 0 they would
# make the first step after a restart many times too long. Rprop's step size: at 0 there is no step.
_MAGNITUDES = {"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum", "acc_delta", "step_size"}


@torch.no_grad()
def refresh_slots(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, fresh: Tensor) -> None:
    """Clear every slot of ``parameter``'s entries marked in ``fresh``.

    Signed slots (momentum, Adam's first moment) become 0. Running averages of squares and
    step sizes become the mean over the parameter's other entries. Slots of another shape than the
    parameter are left alone.

    Args:
        optimizer: may not know the parameter, or have no state for it yet: then nothing is done.
        parameter: [rows, *rest].
        fresh: BoolTensor over the leading dimensions of ``parameter``.
    """
    if not fresh.any():
        return
    for name, slot in optimizer.state.get(parameter, {}).items():
        if isinstance(slot, Tensor) and slot.shape == parameter.shape and slot.dim():
            settled = slot[~fresh]
            slot[fresh] = settled.mean() if name in _MAGNITUDES and settled.numel() else 0
