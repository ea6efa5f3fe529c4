"""Which forward pass of a model a layer runs in, while it is computed again in a backward pass too."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from regrow.marks import Mark
from regrow.torch_private import backward_node, made_as, nodes_made

# How many forward passes may wait for their backward pass while checkpointed parts are computed again.
_PENDING = 64


class Passes(Mark):
    """Numbers the forward passes of ``model`` that draw noise, from 1; all its layers share this object.

    Args:
        model: its calls are the passes.
        settings: of the noise, as ``bridgeout_state`` gives them.
    """

    def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
        self.settings = settings
        # A tensor: torch.compile would compile again for every value of a plain number.
        self.number = torch.zeros((), dtype=torch.int64, device="cpu")
        self._running = self._drawn = False
        # (number of autograd nodes made when a pass ended, number of the pass), oldest first.
        self._ends: deque[tuple[int, int]] = deque(maxlen=_PENDING)
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end),
        ]

    def state(self) -> str:
        """See ``Mark``."""
        return "bridgeout"

    def undo(self, module: nn.Module) -> None:
        """Take the hooks off the model, and this object."""
        for handle in self._handles:
            handle.remove()
        del module._bridgeout_passes

    def current(self) -> Tensor:
        """The number of the pass that what runs now belongs to, [] int64.

        Raises:
            ValueError: no pass is running, nor the backward pass of one.
        """
        if (node := backward_node()) is not None:
            # A checkpointed part is computed again. The node that asked for it was made in its own pass,
            # and later passes may have run since.
            made = made_as(node)
            ended = next((number for end, number in self._ends if made < end), None)
            return self.number if ended is None else torch.tensor(ended, device="cpu")
        if not self._running:
            raise ValueError(
                "a layer with Bridgeout ran in train mode outside a call of the model given to "
                "add_bridgeout, whose calls mark the passes. Call that model, or add Bridgeout to the part "
                "that is called."
            )
        # Counted at the first draw, so that evaluating in between leaves the noise of training as it is.
        if not self._drawn:
            self.number.add_(1)
            self._drawn = True
        return self.number

    def _begin(self, *_: Any) -> None:
        if backward_node() is None:
            self._running, self._drawn = True, False

    def _end(self, *_: Any) -> None:
        if backward_node() is None:
            self._running = False
            if not torch.compiler.is_compiling():
                self._ends.append((nodes_made(), int(self.number)))
