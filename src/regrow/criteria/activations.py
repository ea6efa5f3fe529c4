"""Criteria of the numbers that filters make: mean activation, and the share of them that are not zero.

Both read a filter's value (see ``values``): its output behind its norm and its activation, up to where it
meets other filters, changes its places, or is read by weights. Where a convolution's output meets others at
once, as in front of a sum, that is the output itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regrow.criteria.batches import only_read, read_batches, run
from regrow.criteria.values import channel_sums, of_filters, watching
from regrow.modules import Convolution, device_of

ACTIVATION_CRITERIA = ("mean-activation", "apoz")


def activation_scores(
    model: nn.Module, convs: Mapping[str, Convolution], batches: Iterable[Any], criterion: str
) -> dict[str, Tensor]:
    """Score filters by their values, over all pictures and positions.

    ``"mean-activation"`` is the mean value; ``"apoz"`` is 1 − the share of values that are exactly 0, the
    average percentage of zeros of Hu et al. 2016 (arXiv 1607.03250). Every number counts once, so a
    large picture counts more than a small one.

    Args:
        batches: inputs, or pairs of inputs and labels, which are not read.

    Returns:
        {name: Tensor[filters]} of the layers that a pass reached.
    """

    def measure(name: str, tensor: Tensor) -> tuple[Tensor, int]:
        numbers = tensor if criterion == "mean-activation" else tensor != 0
        sums = channel_sums(convs[name], numbers)
        return sums, tensor.numel() // len(sums)

    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    with only_read(model), torch.no_grad():
        for batch in read_batches(batches, device_of(model), needs_labels=False):
            with watching(model, convs, measure) as watch:
                outputs = run(model, watch.inputs(batch.inputs))
            for name, calls in watch.take(outputs).items():
                for sums, count in calls:
                    totals[name] = totals[name] + sums if name in totals else sums
                    counts[name] = counts.get(name, 0) + count
    return {name: of_filters(convs[name], total / counts[name]) for name, total in totals.items()}
