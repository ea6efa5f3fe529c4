"""What a cut would leave of a network's size, from what reads its channels alone: quick, and nearly right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.compensation.images import evaluating
from regrow.indexing import index_tensor
from regrow.looking.calls import call
from regrow.pruning.cost import count_macs, count_parameters
from regrow.structure.readers import Consumer, Readers


class Estimate:
    """The size of a network after cuts that were not made.

    Of a layer stays the share of its filters that are kept, times that of the channels which still arrive.
    What cannot be cut after all, and what reads a channel where the graph does not see it, is not known
    here: measure the cut network before you rely on it.

    Args:
        model: an uncut network; it is only read.
        example_inputs: as ``read_structure`` takes them.
        readers: what ``read_structure`` says of the model.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, readers: Mapping[str, Readers]) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, Consumer)}
        self._flows = _Flows(model, readers)
        self._grouped = {name for name, layer in layers.items() if getattr(layer, "groups", 1) > 1}
        self._filters = {name: len(layer.weight) for name, layer in layers.items()}
        self._macs = _layer_macs(model, example_inputs, layers)
        self._weights = {name: layer.weight.numel() for name, layer in layers.items()}
        self._per_filter = {name: len(layer.bias) for name, layer in layers.items() if layer.bias is not None}
        self._per_channel = {
            name: sum(parameter.numel() for parameter in model.get_submodule(name).parameters())
            for name in self._flows.widths
            if name not in layers
        }
        counted = (*self._weights.values(), *self._per_filter.values(), *self._per_channel.values())
        self._others = {
            "macs": count_macs(model, example_inputs) - sum(self._macs.values()),
            "params": count_parameters(model) - sum(counted),
        }

    def of(self, gone: Mapping[str, Sequence[int]]) -> dict[str, float]:
        """``macs`` and ``params`` without the filters ``gone``: {name: indices}."""
        rows: defaultdict[str, float] = defaultdict(lambda: 1.0)
        rows.update({name: 1 - len(indices) / self._filters[name] for name, indices in gone.items()})
        reads: defaultdict[str, float] = defaultdict(lambda: 1.0)
        reads.update(self._flows.present(gone))
        # A grouped layer's filters go with the channels that they read.
        reads.update(dict.fromkeys(self._grouped, 1.0))
        totals: dict[str, float] = dict(self._others)
        totals["macs"] += sum(macs * rows[name] * reads[name] for name, macs in self._macs.items())
        totals["params"] += sum(
            [number * rows[name] * reads[name] for name, number in self._weights.items()]
            + [number * rows[name] for name, number in self._per_filter.items()]
            + [number * reads[name] for name, number in self._per_channel.items()]
        )
        return totals


class _Flows:
    """Which filters reach which channels of which layers.

    Attributes:
        widths: {layer: how many of its channels come from filters that are followed}.
    """

    def __init__(self, model: nn.Module, readers: Mapping[str, Readers]) -> None:
        pairs = [(name, reader, r) for name, found in readers.items() for reader, r in found.reached.items()]
        widest = 1 + max((max(reads.indices) for *_, reads in pairs), default=0)
        layers = list(dict.fromkeys(reader for _, reader, _ in pairs))
        number = {layer: i * widest for i, layer in enumerate(layers)}
        self._starts, count = {}, 0
        for name in readers:
            self._starts[name] = count
            count += len(model.get_submodule(name).weight)  # type: ignore[arg-type]
        empty = torch.zeros(0, dtype=torch.long)
        self._from = torch.cat([empty, *(index_tensor(r.filters) + self._starts[n] for n, _, r in pairs)])
        self._to = torch.cat([empty, *(index_tensor(r.indices) + number[layer] for _, layer, r in pairs)])
        self._count, self._shape = count, (len(layers), widest)
        self.widths = dict(zip(layers, self._arriving(torch.ones(count, dtype=torch.bool)), strict=True))

    def present(self, gone: Mapping[str, Sequence[int]]) -> dict[str, float]:
        """Of the channels that are followed to a layer, the share that still has a filter."""
        alive = torch.ones(self._count, dtype=torch.bool)
        for name, indices in gone.items():
            alive[index_tensor(indices) + self._starts[name]] = False
        left = self._arriving(alive)
        return {name: now / width for (name, width), now in zip(self.widths.items(), left, strict=True)}

    def _arriving(self, alive: Tensor) -> list[int]:
        channels = torch.zeros(self._shape, dtype=torch.bool)
        channels.view(-1)[self._to[alive[self._from]]] = True
        counts: list[int] = channels.sum(1).tolist()
        return counts


def _layer_macs(model: nn.Module, example_inputs: Any, layers: Mapping[str, Any]) -> dict[str, int]:
    """Multiply-accumulates of each layer in one pass, all its calls together."""
    found: defaultdict[str, int] = defaultdict(int)

    def counting(name: str) -> Callable[..., None]:
        def hook(layer: Any, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found[name] += output.numel() // len(layer.weight) * layer.weight.numel()

        return hook

    handles = [layer.register_forward_hook(counting(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), evaluating(model):
            call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return dict(found)
