"""A smaller picture that takes the same way through a model: probes look at channels, not at pixels."""

from __future__ import annotations

from collections.abc import Callable
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


def way(model: nn.Module, pictures: Tensor) -> Way:
    """The layers that run, in order, and how many channels each makes. ``PassFailed`` if the model fails."""
    found: Way = []

    def after(name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        found.append(step(name, output))

    with hooked(channel_layers(model), after), torch.no_grad(), undisturbed(model):
        call(model, pictures)
    return found


def smaller_picture(
    model: nn.Module, example_inputs: Any, look: Callable[[nn.Module, Tensor], Way] = way
) -> Any:
    """The first two of the pictures [batch, channels, height, width], with 64 pixels on the shorter side.

    Small pictures must have less than half of the size, and take the same way through ``model``;
    else the first two are returned as they are. Inputs of any other kind are returned as they are.

    Args:
        model: a copy, in evaluation mode; it runs once on each size.
        look: finds the way of the small pictures, where the caller has more to see in that pass.
    """
    if not isinstance(example_inputs, Tensor) or example_inputs.dim() != 4 or not len(example_inputs):
        return example_inputs
    height, width = example_inputs.shape[2:]
    if not example_inputs.is_floating_point() or min(height, width) < 2 * _SIDE:
        return example_inputs
    pictures = example_inputs if len(example_inputs) <= _MOST else example_inputs[:_MOST]
    scale = _SIDE / min(height, width)
    size = [round(side * scale / 32) * 32 for side in (height, width)]
    small = F.interpolate(pictures, size, mode="area")
    try:
        same = look(model, small) == idle_way(model, pictures)
    except PassFailed as error:  # a model of one size, or a failure that large pictures bring about too
        gave_up("smaller pictures", error)
        return pictures
    return small if same else pictures


def idle_way(model: nn.Module, pictures: Tensor) -> Way:
    """``way``, while PyTorch's own layers compute nothing: a fifth of the time for large pictures.

    The two agree for a network in which no value decides which layers run.
    """
    with idle(list(model.named_modules())):
        return way(model, pictures)


def step(name: str, output: Tensor) -> tuple[str, int]:
    """One step of a way: a layer, and how many channels it makes."""
    return name, output.shape[1] if output.dim() > 1 else 0
