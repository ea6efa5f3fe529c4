"""A smaller picture that takes the same way through a model: probes look at channels, not at pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.filters import named_parts
from regrow.looking.calls import undisturbed
from regrow.looking.hooks import channel_layers, hooked, idle

# Of the shorter side: at 64 pixels a network that halves its maps five times still has four in the last.
_SIDE = 64
_MOST = 2

Way = list[tuple[str, int]]


def smaller_picture(model: nn.Module, example_inputs: Any, known: Way | None = None) -> Any:
    """``shrunk`` pictures, if ``model`` takes the same way through its layers for them; else, and for any
    other kind of input, ``example_inputs`` as they are.

    Args:
        model: a copy, in evaluation mode; it runs once on each size.
        known: the way that ``example_inputs`` take, where that is known already.
    """
    small = shrunk(example_inputs)
    if small is None:
        return example_inputs
    try:
        return small if way(model, small) == (known or way(model, example_inputs)) else example_inputs
    except Exception:  # a model of one size, or a failure that the caller's own pass will report
        return example_inputs


def shrunk(example_inputs: Any) -> Tensor | None:
    """The first two of the pictures [batch, channels, height, width], 64 pixels on the shorter side; None if
    that has less than 128, and for any other kind of input."""
    if not isinstance(example_inputs, Tensor) or example_inputs.dim() != 4 or not len(example_inputs):
        return None
    height, width = example_inputs.shape[2:]
    if not example_inputs.is_floating_point() or min(height, width) < 2 * _SIDE:
        return None
    scale = _SIDE / min(height, width)
    size = [round(side * scale / 32) * 32 for side in (height, width)]
    return F.interpolate(example_inputs[:_MOST], size, mode="area")


def way(model: nn.Module, pictures: Tensor) -> Way:
    """The layers that run, in order, and how many channels each makes."""
    with watched(model) as found, torch.no_grad(), undisturbed(model):
        model(pictures[:_MOST])
    return found


def idle_way(model: nn.Module, pictures: Tensor) -> Way:
    """``way``, with PyTorch's own layers computing nothing: the way of a network in which no number decides
    which layers run. Large pictures take a fifth of the time."""
    with idle(named_parts(model)):
        return way(model, pictures)


@contextmanager
def watched(model: nn.Module, then: Callable[..., None] | None = None) -> Iterator[Way]:
    """The way that passes in here take; ``then(name, module, inputs, output)`` at each step."""
    found: Way = []

    def after(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        found.append(step(name, output))
        if then is not None:
            then(name, module, inputs, output)

    with hooked(channel_layers(model), after):
        yield found


def step(name: str, output: Tensor) -> tuple[str, int]:
    """One step of a way: a layer, and how many channels it makes."""
    return name, output.shape[1] if output.dim() > 1 else 0
