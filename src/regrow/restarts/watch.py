"""What arrives at a layer while its model trains."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn

from regrow.criteria.utility import arriving
from regrow.modules import input_first, input_name
from regrow.restarts.units import input_width


class Watch:
    """Keeps the mean absolute values that arrive at a layer in its last pass in train mode.

    The values lie in one tensor for good, so that a pass that is captured in a CUDA graph writes there too.
    Copies and pickles of the layer bear a watch that does nothing.

    Args:
        module: a convolution or linear layer; None for the watch of a copy.

    Attributes:
        seen: whether a pass in train mode has run.
        means: Tensor[channels of the input].
    """

    def __init__(self, module: Any) -> None:
        self.seen = False
        self._of: Any = lambda: None
        if module is not None:
            self._of = weakref.ref(module)
            self._input = input_name(cast(Any, type(module)))
            weight = module.weight
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            self.means = torch.zeros(input_width(module), dtype=wide, device=weight.device)
            self._handle = module.register_forward_pre_hook(self, with_kwargs=True)

    @property
    def module(self) -> Any:
        """The layer; None in a copy."""
        return self._of()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self._of() or not module.training:
            return
        inputs, _ = input_first(self._input, args, kwargs)
        if inputs and isinstance(x := inputs[0], Tensor):
            with torch.no_grad():
                if self.means.device != x.device:  # the model has moved
                    self.means = self.means.to(x.device)
                self.means.copy_(arriving(module, x))
            self.seen = True

    def remove(self) -> None:
        """Take the watch off the layer."""
        self._handle.remove()

    def __deepcopy__(self, memo: Any) -> Watch:
        return Watch(None)

    def __reduce__(self) -> Any:
        return Watch, (None,)
