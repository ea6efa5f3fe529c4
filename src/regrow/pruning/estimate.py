"""Estimate a network's size after a cut, from its structure alone: quick, and nearly right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.looking.calls import call, evaluating
from regrow.looking.hooks import hooked
from regrow.modules import Consumer, channel_dim, filter_count, filter_dim
from regrow.pruning.cost import count_macs, count_parameters
from regrow.structure.flows import Flows
from regrow.structure.readers import Readers


class Estimate:
    """Estimates the size of a network after a cut, without making the cut.

    The estimate multiplies a layer's size by the share of its filters that are kept, and by the share of its
    channels that still arrive. It does not know which filters a cut can only hold at zero, nor which readers
    the graph does not show: measure the cut network before you rely on a number.

    Args:
        model: an uncut network; it is only read.
        example_inputs: as ``read_structure`` takes them.
        readers: the result of ``read_structure`` for the model.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, readers: Mapping[str, Readers]) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, Consumer)}
        self._flows = Flows(model, readers)
        self._followed = self._shares({})
        self._grouped = {name for name, layer in layers.items() if getattr(layer, "groups", 1) > 1}
        self._filters = {name: filter_count(layer, layer.weight) for name, layer in layers.items()}
        self._macs = _layer_macs(model, example_inputs, layers)
        self._weights = {name: layer.weight.numel() for name, layer in layers.items()}
        self._per_filter = {name: len(layer.bias) for name, layer in layers.items() if layer.bias is not None}
        self._per_channel = {
            name: sum(parameter.numel() for parameter in model.get_submodule(name).parameters())
            for name in self._followed
            if name not in layers
        }
        counted = (*self._weights.values(), *self._per_filter.values(), *self._per_channel.values())
        self._others = {
            "macs": count_macs(model, example_inputs) - sum(self._macs.values()),
            "params": count_parameters(model) - sum(counted),
        }

    def of(self, gone: Mapping[str, Sequence[int]]) -> dict[str, float]:
        """Return ``macs`` and ``params`` of the network without the filters ``gone``, {name: indices}."""
        rows: defaultdict[str, float] = defaultdict(lambda: 1.0)
        rows.update({name: 1 - len(indices) / self._filters[name] for name, indices in gone.items()})
        reads: defaultdict[str, float] = defaultdict(lambda: 1.0)
        reads.update(self._shares(gone))
        # A grouped layer loses filters along with the channels that they read: count the loss once.
        reads.update(dict.fromkeys(self._grouped, 1.0))
        totals: dict[str, float] = dict(self._others)
        totals["macs"] += sum(macs * rows[name] * reads[name] for name, macs in self._macs.items())
        totals["params"] += sum(
            [number * rows[name] * reads[name] for name, number in self._weights.items()]
            + [number * rows[name] for name, number in self._per_filter.items()]
            + [number * reads[name] for name, number in self._per_channel.items()]
        )
        return totals

    def _shares(self, gone: Mapping[str, Sequence[int]]) -> dict[str, float]:
        """Return {layer: of its channels that filters reach, the share that filters not ``gone`` reach}."""
        followed = self._flows.arriving(self._flows.emitted_without({}))
        present = self._flows.arriving(self._flows.emitted_without(gone))
        counts = {
            name: (int(present[where].sum()), int(followed[where].sum()))
            for name, where in self._flows.channels.items()
        }
        return {name: left / count for name, (left, count) in counts.items() if count}


def _layer_macs(model: nn.Module, example_inputs: Any, layers: Mapping[str, Any]) -> dict[str, int]:
    """Return the multiply-accumulates of each layer in one pass, summed over its calls."""
    found: defaultdict[str, int] = defaultdict(int)

    def counting(name: str, layer: Any, inputs: Any, output: Tensor) -> None:
        # A transposed convolution multiplies each position of its input, any other each of its output.
        each = inputs[0] if filter_dim(layer) else output
        found[name] += each.numel() // each.shape[channel_dim(layer, each)] * layer.weight.numel()

    with torch.no_grad(), evaluating(model), hooked(list(layers.items()), counting):
        call(model, example_inputs)
    return dict(found)
