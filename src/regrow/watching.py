"""Hooks on the layers that make or read channels, for the passes of a probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    layers: Sequence[tuple[str, nn.Module]],
    after: Callable[..., Any],
    before: Callable[..., Any] | None = None,
) -> Iterator[None]:
    """``after(name, module, inputs, output)`` behind each of ``layers`` that makes a tensor, and
    ``before(name, module, inputs)`` ahead of convolutions and linear layers.

    As with PyTorch's hooks, what they return takes the place of the output, and of the inputs. They stand
    closer to the layer than the user's own hooks, which may change what it reads and makes, and cost a third
    of what those do: one in front of each layer's ``forward``, and no handles.
    """
    own: list[tuple[dict[str, Any], Any]] = []
    try:
        for name, module in layers:
            ahead = before if isinstance(module, _CONSUMERS) else None
            forward = _between(name, module, after, ahead)
            own.append((vars(module), vars(module).get("forward")))
            vars(module)["forward"] = forward
        yield
    finally:
        for attributes, forward in own:
            if forward is None:
                del attributes["forward"]
            else:
                attributes["forward"] = forward


def _between(
    name: str, module: nn.Module, after: Callable[..., Any], before: Callable[..., Any] | None
) -> Callable[..., Any]:
    inner = module.forward

    def forward(*inputs: Any, **named: Any) -> Any:
        if before is not None and (changed := before(name, module, inputs)) is not None:
            inputs = changed
        output = inner(*inputs, **named)
        if isinstance(output, Tensor) and (changed := after(name, module, inputs, output)) is not None:
            return changed
        return output

    return forward


def channel_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The convolutions, linear layers and norms, as ``named_modules`` orders them."""
    return [(name, module) for name, module in named_parts(model) if isinstance(module, _LAYERS)]
