"""What an optimizer remembers of weights that are drawn anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regrow.repr.slots import Copies, parts, refresh_slots


class Memory:
    """The memory of an optimizer, or of none. Build it before weights change, and call ``clear`` after it:
    slots that hold copies of the weights are recognised by being like the old ones.

    Args:
        known: {family of slots: whether it holds copies}, of an earlier ``known``.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer | None, known: Mapping[str, bool] | None = None
    ) -> None:
        self._optimizer = optimizer
        self._copies = None if optimizer is None else Copies(optimizer, known or {})
        self.look()

    def watch(self) -> None:
        """Judge the slots behind the next step of the optimizer: copies equal the weights best then."""
        if self._copies is not None:
            self._copies.watch()

    def release(self) -> None:
        """End ``watch``."""
        if self._copies is not None:
            self._copies.release()

    def look(self) -> None:
        """Judge the slots that are not known yet."""
        if self._copies is not None:
            self._copies.look()

    def known(self) -> dict[str, bool]:
        """{family of slots: whether it holds copies}, for a state."""
        return {} if self._copies is None else dict(self._copies.known)

    @torch.no_grad()
    def clear(self, fresh: Mapping[nn.Parameter, Tensor]) -> list[str]:
        """Bring the slots of new entries up to date (``refresh_slots``), and set the gradients there to 0; of
        parameters that are new as a whole, the count of steps begins anew too.

        Args:
            fresh: {parameter: BoolTensor over its leading dimensions, True = new value}.

        Returns:
            One sentence for each family of slots that hold copies, and for each optimizer that forgot more.
        """
        for parameter, mask in fresh.items():
            if parameter.grad is not None:
                parameter.grad[mask.to(parameter.grad.device)] = 0
        if self._optimizer is None or self._copies is None:
            return []
        notes = refresh_slots(self._optimizer, fresh, self._copies.known)
        whole = [parameter for parameter, mask in fresh.items() if mask.all()]
        for part in parts(self._optimizer):
            rates = {id(p): group.get("lr", 0) for group in part.param_groups for p in group["params"]}
            for parameter in whole:
                state = getattr(part, "state", {}).get(parameter)
                if isinstance(state, dict):
                    _begin(parameter, state, rates.get(id(parameter), 0))
        return notes


def _begin(parameter: nn.Parameter, state: dict[str, Any], rate: Any) -> None:
    """Set the rest of a parameter's state as PyTorch's optimizers begin, tensors in place."""
    for name, slot in state.items():
        counts = name == "step" or (parameter.dim() == 0 and isinstance(slot, Tensor))
        if counts and isinstance(slot, Tensor):
            slot.zero_()
        elif counts:
            state[name] = 0
        elif name == "step_size" and isinstance(slot, Tensor):  # Rprop would hardly move from 0
            slot.fill_(rate)
