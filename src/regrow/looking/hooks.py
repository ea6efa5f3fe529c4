"""Callbacks around the layers of a model, and layers that compute something else, while a block lasts.

They are functions in front of each layer's ``forward``: closer to the layer than the user's own hooks, which
may change what a layer reads and makes, and a third of the cost of PyTorch's hooks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from regrow.modules import is_stock

Layers = Sequence[tuple[str, nn.Module]]
_Room = dict[tuple[torch.dtype, torch.device], Tensor]
_LARGE = 1 << 14  # numbers; clearing memory is most of an idle pass
_SHAPED_ALIKE = {
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm),
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.PReLU),
    *(nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid),
}


@contextmanager
def hooked(
    layers: Layers, after: Callable[..., Any] | None = None, before: Callable[..., Any] | None = None
) -> Iterator[None]:
    """``before(name, module, inputs)`` ahead of each of ``layers``, and behind each that makes a tensor
    ``after(name, module, inputs, output)``.

    A value that they return replaces the output, or the inputs. An error that they raise ends the pass
    and leaves the block as it was raised: the model's own ``except Exception`` does not see it, and no
    caller takes it for an error of the model.
    """
    ahead, behind = (carrying(callback or (lambda *_: None)) for callback in (before, after))
    with instead((module, _between(name, module, ahead, behind)) for name, module in layers):
        yield


@contextmanager
def instead(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Each module, once at most, computes by the ``forward`` beside it."""
    replaced: list[tuple[dict[str, Any], Any]] = []
    try:
        for module, forward in forwards:
            replaced.append((vars(module), vars(module).get("forward")))
            vars(module)["forward"] = forward
        yield
    except _Carried as carried:
        raise carried.error from carried.error.__cause__
    finally:
        for attributes, former in reversed(replaced):
            if former is None:
                del attributes["forward"]
            else:
                attributes["forward"] = former


class _Carried(BaseException):
    """An error of a callback, on its way through code that may catch every ``Exception``."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def carrying(callback: Callable[..., Any]) -> Callable[..., Any]:
    """``callback``, whose errors leave the block of ``instead`` that it is called in."""

    def guarded(*args: Any) -> Any:
        try:
            return callback(*args)
        except Exception as error:
            raise _Carried(error) from None

    return guarded


def _between(
    name: str, module: nn.Module, ahead: Callable[..., Any], behind: Callable[..., Any]
) -> Callable[..., Any]:
    inner = module.forward

    def forward(*inputs: Any, **named: Any) -> Any:
        changed = ahead(name, module, inputs)
        inputs = inputs if changed is None else changed
        output = inner(*inputs, **named)
        changed = behind(name, module, inputs, output) if isinstance(output, Tensor) else None
        return output if changed is None else changed

    return forward


@contextmanager
def idle(layers: Layers) -> Iterator[None]:
    """Those of ``layers`` that are PyTorch's own compute nothing: convolutions and linear layers make zeros
    of the right shape, norms and activations return their input.

    Large zeros share memory: where the model writes to one of them in place, all of them change.
    """
    room: _Room = {}
    able = [
        module
        for _, module in layers
        if is_stock(module) or (type(module) in _SHAPED_ALIKE and "forward" not in vars(module))
    ]
    with instead((module, functools.partial(_idly, room, module)) for module in able):
        yield


def _idly(room: _Room, module: Any, input: Tensor) -> Tensor:  # the name that the layers give it
    x = input
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
        return cast(Tensor, type(module).forward(module, x))  # its own error says best what is wrong
    count = math.prod(shape)
    if count < _LARGE:
        return x.new_zeros(shape)
    key = x.dtype, x.device
    if key not in room or len(room[key]) < count:
        room[key] = x.new_zeros(count)
    return room[key][:count].view(shape)
