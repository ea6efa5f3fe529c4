"""A smaller picture that takes the same way through a model: probes look at channels, not at pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.log import gave_up
from regrow.looking.calls import PassFailed, call, undisturbed
from regrow.looking.hooks import hooked, idle
from regrow.modules import channel_layers

# Pixels of the shorter side: a network that halves its maps five times ends with maps of 2×2.
_SIDE = 64
_MOST = 2

Way = list[tuple[str, int]]


def smaller_picture(model: nn.Module, example_inputs: Any, known: Way | None = None) -> Any:
    """``shrunk`` pictures, if they take the same way through the layers of ``model``.

    ``example_inputs`` as they are for any other kind of input, and where the way differs or a pass fails.

    Args:
        model: a copy, in evaluation mode; it runs once on each size.
        known: the way that ``example_inputs`` take, where that is known already.
    """
    small = shrunk(example_inputs)
    if small is None:
        return example_inputs
    try:
        return small if way(model, small) == (known or way(model, example_inputs)) else example_inputs
    except PassFailed as error:
        gave_up("smaller pictures", error)
        return example_inputs


def shrunk(example_inputs: Any) -> Tensor | None:
    """The first two of the pictures [batch, channels, height, width], 64 pixels on the shorter side.

    None for pictures with a shorter side of less than 128 pixels, and for any other kind of input.
    """
    if not isinstance(example_inputs, Tensor) or example_inputs.dim() != 4 or not len(example_inputs):
        return None
    height, width = example_inputs.shape[2:]
    if not example_inputs.is_floating_point() or min(height, width) < 2 * _SIDE:
        return None
    scale = _SIDE / min(height, width)
    size = [round(side * scale / 32) * 32 for side in (height, width)]
    return F.interpolate(example_inputs[:_MOST], size, mode="area")


def way(model: nn.Module, pictures: Tensor) -> Way:
    """The layers that run, in order, and how many channels each makes. ``PassFailed`` if the model fails."""
    with watched(model) as found, torch.no_grad(), undisturbed(model):
        call(model, pictures[:_MOST])
    return found


def idle_way(model: nn.Module, pictures: Tensor) -> Way:
    """``way``, while PyTorch's own layers compute nothing: a fifth of the time for large pictures.

    It is the way of a network in which no number decides which layers run.
    """
    with idle(list(model.named_modules())):
        return way(model, pictures)


@contextmanager
def watched(model: nn.Module, then: Callable[..., None] | None = None) -> Iterator[Way]:
    """The way that passes in this block take; each step calls ``then(name, module, inputs, output)``."""
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
