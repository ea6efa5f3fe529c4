"""Hooks on the layers that make or read channels, for the passes of a probe."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

from torch import Tensor, nn

from regrow.filters import named_parts
from regrow.readers import Consumer, Norm

# Tuples are tested faster than unions.
_CONSUMERS = get_args(Consumer)
_LAYERS = (*_CONSUMERS, *get_args(Norm))


@contextmanager
def hooked(
    model: nn.Module, after: Callable[..., Any], before: Callable[..., Any] | None = None
) -> Iterator[None]:
    """``after(name, module, inputs, output)`` behind every convolution, linear layer and norm that makes a
    tensor, and ``before(name, module, inputs)`` ahead of convolutions and linear layers."""
    handles: list[Any] = []
    try:
        for name, module in channel_layers(model):

            def hook(module: nn.Module, inputs: Any, output: Any, name: str = name) -> Any:
                return after(name, module, inputs, output) if isinstance(output, Tensor) else None

            # In front of the user's own hooks, which may change the output.
            handles.append(module.register_forward_hook(hook, prepend=True))
            if before is not None and isinstance(module, _CONSUMERS):
                handles.append(module.register_forward_pre_hook(functools.partial(before, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def channel_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The convolutions, linear layers and norms, as ``named_modules`` orders them."""
    return [(name, module) for name, module in named_parts(model) if isinstance(module, _LAYERS)]
