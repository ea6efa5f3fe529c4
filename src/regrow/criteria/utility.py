"""The contribution utility of a filter: how large what it makes is, times the weights that read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regrow.criteria.batches import only_read, read_batches, run
from regrow.indexing import index_tensor
from regrow.looking.hooks import hooked
from regrow.modules import CONSUMER_CLASSES, Convolution, channel_dim, device_of, grouped
from regrow.numbers import at_least_float32
from regrow.structure.read import read_structure
from regrow.structure.readers import Readers, Reads


def arriving(layer: nn.Module, x: Tensor) -> Tensor:
    """The mean absolute value of each input channel of ``layer`` in ``x``: Tensor[channels]."""
    dim = channel_dim(layer, x) % x.dim()
    others = [each for each in range(x.dim()) if each != dim]
    absolute = at_least_float32(x.detach().abs())
    return absolute.mean(others) if others else absolute


def outgoing(layer: Any) -> Tensor:
    """The sum of the absolute weights by which ``layer`` reads each input channel: Tensor[channels]."""
    # [groups, filters, channels, *kernel]
    weight = at_least_float32(grouped(layer, layer.weight.detach().abs()))
    return weight.flatten(3).sum(3).sum(1).flatten() if weight.dim() > 3 else weight.sum(1).flatten()


class Arrivals:
    """What arrives at layers in the passes of a block: ``with hooked(layers, before=arrivals.look): …``.

    Attributes:
        sums: {layer: Tensor[channels], the mean absolute values times the pictures, of all calls}.
        pictures: {layer: how many pictures arrived, in all calls}.
        calls: {layer: how often it was called}.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.pictures: dict[str, int] = {}
        self.calls: dict[str, int] = {}

    def look(self, name: str, layer: nn.Module, inputs: Any) -> None:
        """Add what arrives in a call of ``layer``."""
        if not inputs or not isinstance(inputs[0], Tensor):
            return
        x = inputs[0]
        count = len(x) if x.dim() else 1
        sums = arriving(layer, x) * count
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums
        self.pictures[name] = self.pictures.get(name, 0) + count
        self.calls[name] = self.calls.get(name, 0) + 1


def utility_scores(
    model: nn.Module, convs: Mapping[str, Convolution], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Score filters by their contribution utility (Dohare et al., Nature 2024, eq. 1).

    The utility of a filter is the sum, over the channels of other layers that it arrives at, of the mean
    absolute value there times the sum of the absolute weights that read it. It is divided by the mean
    utility of its layer, so that layers of all sizes can be ranked together: 1 is usual in a layer. Where a
    channel is a sum of several filters, as behind a shortcut, each of them gets all of it.

    Args:
        model: without wrappers; it is only read.
        batches: inputs, or pairs of inputs and labels, which are not read.

    Returns:
        {name: Tensor[filters]} of the layers that other layers are known to read. Layers without known
        readers, and layers of which nothing is used, have no entry.
    """
    arrivals, passes = Arrivals(), 0
    ways: dict[str, dict[str, Reads]] = {}
    layers: list[tuple[str, nn.Module]] = []
    with only_read(model), torch.no_grad():
        for batch in read_batches(batches, device_of(model), needs_labels=False):
            if not passes:
                readers = read_structure(model, batch.first(1).inputs)
                ways = {name: _readers_of(model, readers[name]) for name in convs if name in readers}
                names = {reader for way in ways.values() for reader in way}
                layers = [(name, model.get_submodule(name)) for name in sorted(names)]
            with hooked(layers, before=arrivals.look):
                run(model, batch.inputs)
            passes += 1
    used = {}
    for name, sums in arrivals.sums.items():
        # A layer that is called twice in a pass reads twice.
        arrived = sums / arrivals.pictures[name] * (arrivals.calls[name] / passes)
        used[name] = arrived * outgoing(model.get_submodule(name))
    found = {}
    for name, conv in convs.items():
        score = torch.zeros(conv.out_channels, dtype=torch.float64)
        for consumer, reads in ways.get(name, {}).items():
            if consumer in used:
                values = used[consumer].double().cpu()[index_tensor(list(reads.indices))]
                score.index_add_(0, index_tensor(list(reads.filters)), values)
        if score.sum() > 0:
            found[name] = (score / score.mean()).to(conv.weight.device)
    return found


def _readers_of(model: nn.Module, found: Readers) -> dict[str, Reads]:
    """The layers whose weights read a convolution's channels, those behind sums included."""
    # A sum has no confirmed readers. The graph's claims are good enough for a score, which changes nothing.
    every = found.consumers or found.reached
    return {
        name: reads
        for name, reads in every.items()
        if isinstance(model.get_submodule(name), CONSUMER_CLASSES)
    }
