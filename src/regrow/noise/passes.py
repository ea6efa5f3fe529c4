"""The number of the forward pass that a layer runs in, also when a backward pass computes it again."""

from __future__ import annotations

import warnings
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from regrow.marks import Mark
from regrow.torch_private import BatchNorm, backward_node, made_as, nodes_made, outside_transforms

# The number of forward passes that may wait for their backward pass, for models with checkpointed parts.
_PENDING = 64


class Passes(Mark):
    """Counts the forward passes of ``model`` that draw noise, from 1; all its layers share this object.

    Attributes:
        measuring: whether the running pass only measures the statistics of batch norms, as
            ``torch.optim.swa_utils.update_bn`` does, and draws no noise.

    Args:
        model: the module whose calls are the passes.
        settings: the settings of the noise, as in ``bridgeout_state``.
    """

    def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
        self.settings = settings
        # torch.compile would compile again for every value of a plain number, and not for a tensor.
        self.number = torch.zeros((), dtype=torch.int64, device="cpu")
        self._running = self._drawn = self.measuring = False
        self._norms = [norm for norm in model.modules() if isinstance(norm, BatchNorm)]
        self._warned = any(norm.momentum is None for norm in self._norms)
        # (number of autograd nodes at the end of a pass, number of the pass), oldest first.
        self._ends: deque[tuple[int, int]] = deque(maxlen=_PENDING)
        self._handles = [model.register_forward_pre_hook(self._begin), model.register_forward_hook(self._end)]

    def state(self) -> str:
        return "bridgeout"

    def undo(self, module: nn.Module) -> None:
        """Take the hooks and this object off the model."""
        for handle in self._handles:
            handle.remove()
        del module._bridgeout_passes

    def current(self) -> Tensor:
        """The number of the forward pass that is running or is computed again, [] int64.

        Raises:
            ValueError: neither a forward pass nor a backward pass is running.
        """
        if (node := backward_node()) is not None:
            # A checkpointed part is computed again. Later passes may have run since its own pass, but its
            # autograd node was made before its own pass ended.
            made = made_as(node)
            ended = next((number for end, number in self._ends if made < end), None)
            return self.number if ended is None else torch.tensor(ended, device="cpu")
        if not self._running:
            raise ValueError(
                "a layer with Bridgeout ran in train mode outside a call of the model given to "
                "add_bridgeout, whose calls mark the passes. Call that model, or add Bridgeout to the module "
                "that you call."
            )
        # A pass counts at its first draw, so passes in eval mode do not change the noise of training.
        if not self._drawn:
            with outside_transforms():
                self.number.add_(1)
            self._drawn = True
        return self.number

    def _begin(self, *_: Any) -> None:
        if backward_node() is None:
            self._running, self._drawn = True, False
            # Norms with momentum None average all batches alike; without gradients nothing is trained.
            averaging = any(norm.momentum is None for norm in self._norms)
            self.measuring = averaging and not torch.is_grad_enabled()
            if averaging and not self.measuring and not self._warned and not torch.compiler.is_compiling():
                self._warned = True
                warnings.warn(
                    "batch norms with momentum None average what they read under Bridgeout's noise. If these "
                    "passes only measure statistics, run them under torch.no_grad(): then there is no noise.",
                    stacklevel=2,
                )

    def _end(self, *_: Any) -> None:
        if backward_node() is None:
            self._running = self.measuring = False
            if not torch.compiler.is_compiling():
                self._ends.append((nodes_made(), int(self.number)))
