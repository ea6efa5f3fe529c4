"""What stands in front of the layers that make or read channels, for the passes of a probe."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from regrow.filters import named_parts
from regrow.structure.readers import Consumer, Norm

# Tuples are tested faster than unions.
_CONSUMERS = get_args(Consumer)
_LAYERS = (*_CONSUMERS, *get_args(Norm))
_Room = dict[tuple[torch.dtype, torch.device], Tensor]
_LARGE = 1 << 14  # numbers; the clearing of memory is most of an idle pass
_SHAPED_ALIKE = {
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm),
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.PReLU),
    *(nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid),
}


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
    with instead((module, _between(name, module, after, before)) for name, module in layers):
        yield


@contextmanager
def instead(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Each module, once at most, computes by the ``forward`` beside it."""
    own: list[tuple[dict[str, Any], Any]] = []
    try:
        for module, forward in forwards:
            own.append((vars(module), vars(module).get("forward")))
            vars(module)["forward"] = forward
        yield
    finally:
        for attributes, former in own:
            if former is None:
                del attributes["forward"]
            else:
                attributes["forward"] = former


def _between(
    name: str, module: nn.Module, after: Callable[..., Any], before: Callable[..., Any] | None
) -> Callable[..., Any]:
    inner = module.forward
    ahead = before if isinstance(module, _CONSUMERS) else None

    def forward(*inputs: Any, **named: Any) -> Any:
        if ahead is not None and (changed := ahead(name, module, inputs)) is not None:
            inputs = changed
        output = inner(*inputs, **named)
        if isinstance(output, Tensor) and (changed := after(name, module, inputs, output)) is not None:
            return changed
        return output

    return forward


@contextmanager
def idle(layers: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
    """Those of ``layers`` that are PyTorch's own compute nothing: convolutions and linear layers make zeros
    of the shape that they would make, norms and activations give back what they are given.

    Large ones share memory: where the model goes on to write to one in place, all have those numbers.
    """
    room: _Room = {}
    able = [
        module
        for _, module in layers
        if stock(module) or (type(module) in _SHAPED_ALIKE and "forward" not in vars(module))
    ]
    with instead((module, functools.partial(_idly, room, module)) for module in able):
        yield


def _idly(room: _Room, module: Any, x: Tensor) -> Tensor:
    if type(module) in _SHAPED_ALIKE:
        return x
    if isinstance(module, nn.Linear):
        shape = [*x.shape[:-1], module.out_features]
        fits = x.dim() and x.shape[-1] == module.in_features
    else:
        kernel, sizes = len(module.kernel_size), list(x.shape)
        if module.padding == "same":
            made = sizes[-kernel:]
        else:
            padding = (0,) * kernel if module.padding == "valid" else module.padding
            settings = zip(module.kernel_size, module.dilation, padding, module.stride, strict=True)
            made = [
                (size + 2 * pad - wide * (taps - 1) - 1) // step + 1
                for size, (taps, wide, pad, step) in zip(sizes[-kernel:], settings, strict=False)
            ]
        shape = [*sizes[: -kernel - 1], module.out_channels, *made]
        fits = x.dim() in (kernel + 1, kernel + 2) and sizes[-kernel - 1] == module.in_channels
        fits = fits and min(made) > 0
    if not fits:
        return cast(Tensor, type(module).forward(module, x))  # the layer says best what is wrong
    count = math.prod(shape)
    if count < _LARGE:
        return x.new_zeros(shape)
    key = x.dtype, x.device
    if key not in room or len(room[key]) < count:
        room[key] = x.new_zeros(count)
    return room[key][:count].view(shape)


def stock(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's own convolutions or linear layers, and computes what those do."""
    # Exactly these classes: one of the model's own may compute something else.
    return type(module) in _CONSUMERS and "forward" not in vars(module)


def channel_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The convolutions, linear layers and norms, as ``named_modules`` orders them."""
    return [(name, module) for name, module in named_parts(model) if isinstance(module, _LAYERS)]
