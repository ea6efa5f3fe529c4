"""Hooks on the layers that make or read channels, for the passes of a probe."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from regrow.readers import Consumer, Norm


@contextmanager
def hooked(
    model: nn.Module, after: Callable[..., Any], before: Callable[..., Any] | None = None
) -> Iterator[None]:
    """``after(name, module, inputs, output)`` behind every convolution, linear layer and norm that makes a
    tensor, and ``before(name, module, inputs)`` ahead of convolutions and linear layers."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, Consumer | Norm):

                def hook(module: nn.Module, inputs: Any, output: Any, name: str = name) -> Any:
                    return after(name, module, inputs, output) if isinstance(output, Tensor) else None

                # In front of the user's own hooks, which may change the output.
                stack.callback(module.register_forward_hook(hook, prepend=True).remove)
            if before is not None and isinstance(module, Consumer):
                ahead = functools.partial(before, name)
                stack.callback(module.register_forward_pre_hook(ahead).remove)
        yield
