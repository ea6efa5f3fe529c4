"""The number of the forward pass that a layer runs in, also when a backward pass computes it again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regrow.callers import warn
from regrow.marks import Mark
from regrow.together import Together
from regrow.torch_private import (
    BatchNorm,
    backward_node,
    keeps_its_address,
    made_as,
    nodes_made,
    outside_transforms,
)  # fmt: skip

# The number of forward passes that may wait for their backward pass, for models with checkpointed parts.
_PENDING = 64


class Passes(Mark):
    """Counts the forward passes of ``model`` that draw noise, from 1; all its layers share this object.

    The count lies on the weights' device, and nothing reads it there in a step: reading makes the CPU wait,
    and a captured CUDA graph would draw the same noise in all replays.

    Attributes:
        measuring: whether the running pass only measures the statistics of batch norms, as
            ``torch.optim.swa_utils.update_bn`` does, and draws no noise.
        number: [] int64, how many passes have drawn noise.
        together: serves the running pass; None before the first.

    Args:
        model: the module whose calls are the passes.
        settings: the settings of the noise, as in ``bridgeout_state``.
        device: of the weights.
        group: makes ``together`` for ``model`` or a copy of it.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: dict[str, Any],
        device: torch.device,
        group: Callable[[nn.Module, Passes], Together[Any]],
    ) -> None:
        self.settings, self._group = settings, group
        # torch.compile would compile again for every value of a plain number, and not for a tensor.
        zero = torch.zeros((), dtype=torch.int64, device="cpu" if device.type == "meta" else device)
        self.number = keeps_its_address(zero)
        self.together: Together[Any] | None = None
        # A pass draws with a copy of its number: a later pass may run before its backward pass.
        self._now: Tensor | None = None
        self._stream: Any = None  # on which that copy is made
        self._running = self._whole = self.measuring = False
        self._norms = [norm for norm in model.modules() if isinstance(norm, BatchNorm)]
        self._warned = any(norm.momentum is None for norm in self._norms)
        # (number of autograd nodes at the end of a pass, number of the pass), oldest first.
        self._ends: deque[tuple[int, Tensor]] = deque(maxlen=_PENDING)
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._succeeded),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def state(self) -> str:
        return "bridgeout"

    def undo(self, module: nn.Module) -> None:
        """Take the hooks and this object off the model."""
        for handle in self._handles:
            handle.remove()
        del module._bridgeout_passes

    def current(self, device: torch.device) -> Tensor:
        """The number of the forward pass that is running or is computed again, [] int64 on ``device``.

        Raises:
            ValueError: neither a forward pass nor a backward pass is running.
        """
        if (node := backward_node()) is not None:
            # A checkpointed part is computed again. Later passes may have run since its own pass, but its
            # autograd node was made before its own pass ended.
            made = made_as(node)
            running = self.number if self._now is None else self._now
            number = next((number for end, number in self._ends if made < end), running)
        elif self._running:
            # A pass counts at its first draw, so passes in eval mode do not change the noise of training.
            if self._now is None:
                self._now = self._counted(device)
            number = self._now
            if not torch.compiler.is_compiling() and (stream := stream_on(number.device)) != self._stream:
                stream.wait_stream(self._stream)
        else:
            raise ValueError(
                "a layer with Bridgeout ran in train mode outside a call of the model given to "
                "add_bridgeout, whose calls mark the passes. Call that model, or add Bridgeout to the module "
                "that you call."
            )
        return number if number.device == device else number.to(device)

    def _counted(self, device: torch.device) -> Tensor:
        """A copy of the next number; the count moves to ``device``, where the model has gone."""
        with outside_transforms():
            if self.number.device != device and device.type != "meta":
                with torch.inference_mode(False):
                    self.number = keeps_its_address(self.number.to(device))
            if not torch.compiler.is_compiling():
                self._stream = stream_on(self.number.device)
            self.number.add_(1)
            return self.number.clone()

    def _begin(self, model: nn.Module, *_: Any) -> None:
        if backward_node() is not None:
            return
        self._running, self._now = True, None
        # Norms with momentum None average all batches alike; without gradients nothing is trained.
        averaging = any(norm.momentum is None for norm in self._norms)
        self.measuring = averaging and not torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            return
        if self.together is None:
            self.together = self._group(model, self)
        self.together.begin()
        self._whole = False
        if averaging and not self.measuring and not self._warned:
            self._warned = True
            warn(
                "batch norms with momentum None average what they read under Bridgeout's noise. If these "
                "passes only measure statistics, run them under torch.no_grad(): then there is no noise."
            )

    def _succeeded(self, *_: Any) -> None:
        self._whole = True

    def _end(self, *_: Any) -> None:
        if backward_node() is not None:
            return
        self._running = self.measuring = False
        if torch.compiler.is_compiling():
            return
        if self._now is not None:
            self._ends.append((nodes_made(), self._now))
        if self.together is not None:
            self.together.end(self._whole)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no graphs to compute again, and finds its own layers in its first pass.
        empty = deque[tuple[int, Tensor]](maxlen=_PENDING)
        gone = {"together": None, "_now": None, "_stream": None, "_running": False, "_ends": empty}
        return {**vars(self), **gone}


def stream_on(device: torch.device) -> Any:
    """The stream on which a GPU runs what it is given now; None for other devices."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
