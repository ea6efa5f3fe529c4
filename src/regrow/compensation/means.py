"""The mean of what each layer lacks behind removed filters, folded into biases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.compensation.targets import shift_holders
from regrow.looking.calls import evaluating
from regrow.looking.hooks import hooked
from regrow.looking.images import check_finite_results, forward, there
from regrow.modules import channel_dim
from regrow.torch_private import ConvNd

NO_HOLDER = "it has no unshared bias, and no batch norm directly behind that serves it alone"


def mean_shifts(
    model: nn.Module, cut: nn.Module, gone: Mapping[str, list[int]], batches: Iterable[Any]
) -> tuple[dict[str, Tensor], int]:
    """Return by how much each layer's outputs fall, on average, when no removed channel reaches the layer.

    Each layer of ``cut`` passes on the output that it has in ``model``, so that the next layer lacks only
    the removed channels. (Passing on the corrected output gives lower accuracy: later biases then make up
    for what earlier layers have lost for good.)

    Returns:
        {name: Tensor[outputs]} for the layers whose outputs change, and the number of images.
    """
    originals: dict[str, list[Tensor]] = {}
    totals: dict[str, Tensor] = {}
    positions: Counter[str] = Counter()

    def remember(name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        # Store a copy, because the activation behind the layer may work in place.
        originals.setdefault(name, []).append(output.clone())

    def replace(name: str, module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        original = originals[name].pop(0)
        dim = channel_dim(module, output)
        alive = torch.ones(output.shape[dim], dtype=torch.bool, device=output.device)
        alive[gone.get(name, [])] = False
        original, output = original.movedim(dim, -1), output.movedim(dim, -1)
        wide = torch.promote_types(original.dtype, torch.float32)
        lack = torch.where(alive, original.to(wide) - output.to(wide), 0).reshape(-1, len(alive))
        # Not every device has double precision: the sum is on the CPU.
        total = lack.mean(0).cpu().double() * len(lack)
        totals[name] = totals[name] + total if name in totals else total
        positions[name] += len(lack)
        return torch.where(alive, original, output).movedim(-1, dim)

    images = 0
    with evaluating(model), evaluating(cut), hooked(_layers(model), remember), hooked(_layers(cut), replace):
        for each in batches:
            inputs = there(model, each)
            images += forward(model, inputs)
            forward(cut, inputs)
            originals.clear()
    shifts = {name: total / positions[name] for name, total in totals.items() if total.any()}
    for name, shift in shifts.items():
        check_finite_results(name, shift)
    return shifts, images


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the convolutions, transposed ones too, and the linear layers."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, ConvNd | nn.Linear)]


def fold(
    model: nn.Module, shifts: Mapping[str, Tensor], norms: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Add ``shifts`` to the outputs of the layers; return {layer: why its output cannot be shifted}.

    Args:
        norms: the norms that each layer has for itself (``own_norms``).
    """
    unfolded = {}
    for name, shift in shifts.items():
        holders = shift_holders(model, norms, name, len(shift))
        for tensor, sign in holders:
            tensor.add_(sign * shift.to(tensor))
        if not holders:
            unfolded[name] = NO_HOLDER
    return unfolded
