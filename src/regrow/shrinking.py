"""A smaller picture that takes the same way through a model: probes look at channels, not at pixels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.readers import Consumer, Norm

# Of the shorter side: at 64 pixels a network that halves its maps five times still has four in the last.
_SIDE = 64
_MOST = 2


def smaller_picture(model: nn.Module, example_inputs: Any) -> Any:
    """Pictures [batch, channels, height, width] made smaller, if the same layers then run with as many
    channels; else, and for any other kind of input, ``example_inputs`` as they are.

    Args:
        model: a copy, in evaluation mode; it runs once on each size.
        example_inputs: two pictures at most are kept. Those with a side below 128 pixels stay as they are.
    """
    if not isinstance(example_inputs, Tensor) or example_inputs.dim() != 4 or not len(example_inputs):
        return example_inputs
    height, width = example_inputs.shape[2:]
    if not example_inputs.is_floating_point() or min(height, width) < 2 * _SIDE:
        return example_inputs
    few = example_inputs[:_MOST]
    scale = _SIDE / min(height, width)
    size = [round(side * scale / 32) * 32 for side in (height, width)]
    small = F.interpolate(few, size, mode="area")
    try:
        return small if _way(model, small) == _way(model, few) else example_inputs
    except Exception:  # a model of one size, or a failure that the caller's own pass will report
        return example_inputs


def _way(model: nn.Module, pictures: Tensor) -> list[tuple[str, int]]:
    """The layers that run, in order, and how many channels each makes."""
    found: list[tuple[str, int]] = []

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found.append((name, output.shape[1] if isinstance(output, Tensor) and output.dim() > 1 else 0))

        return hook

    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, Consumer | Norm)
    ]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(pictures)
    finally:
        for handle in handles:
            handle.remove()
    return found
