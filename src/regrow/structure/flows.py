"""Which filters reach which channels of which layers: the one numbering of both over a whole network."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from regrow.filters import convolutions
from regrow.indexing import index_tensor
from regrow.modules import channels_read, is_depthwise
from regrow.structure.readers import Readers


class Flows:
    """Filters and channels, numbered layer after layer, and the pairs in which one reaches the other.

    Args:
        model: an uncut network.
        readers: from ``read_structure``; their ``reached`` is what is numbered.
        layers: names of layers whose channels are numbered too, whether a filter reaches them or not.

    Attributes:
        sources, targets: [pairs] int64, the number of a filter and of a channel that it reaches.
        filters: {convolution: the slice of its numbers}.
        channels: {layer: the slice of its input channels' numbers}; layers that take any number of channels
            are not listed.
        owner: [filters] int64, the position in ``filters`` of each filter's convolution.
        reached: {convolution: the layers in ``channels`` that its filters reach}.
    """

    def __init__(self, model: nn.Module, readers: Mapping[str, Readers], layers: Iterable[str] = ()) -> None:
        modules = dict(model.named_modules())
        convs = convolutions(model)
        names = [*(layer for found in readers.values() for layer in found.reached), *layers]
        widths = {name: channels_read(modules[name]) for name in dict.fromkeys(names)}
        self.filters = _slices({name: convs[name].out_channels for name in readers})
        self.channels = _slices({name: width for name, width in widths.items() if width is not None})
        self.reached = {
            name: [layer for layer in found.reached if layer in self.channels]
            for name, found in readers.items()
        }
        counts = index_tensor([where.stop - where.start for where in self.filters.values()])
        self.owner = torch.arange(len(counts)).repeat_interleave(counts)
        sources, targets = [index_tensor([])], [index_tensor([])]
        for name, reached in self.reached.items():
            for layer in reached:
                reads = readers[name].reached[layer]
                sources.append(index_tensor(reads.filters) + self.filters[name].start)
                targets.append(index_tensor(reads.indices) + self.channels[layer].start)
        self.sources, self.targets = torch.cat(sources), torch.cat(targets)
        self._channel_count = max((where.stop for where in self.channels.values()), default=0)

    def arriving(self, emitted: Tensor) -> Tensor:
        """BoolTensor[channels]: those that a filter in ``emitted``, BoolTensor[filters], reaches."""
        present = torch.zeros(self._channel_count, dtype=torch.bool)
        present[self.targets[emitted[self.sources]]] = True
        return present

    def emitted_without(self, gone: Mapping[str, Iterable[int]]) -> Tensor:
        """BoolTensor[filters]: all but the filters ``gone``, {convolution: indices}."""
        emitted = torch.ones(len(self.owner), dtype=torch.bool)
        for name, indices in gone.items():
            emitted[index_tensor(list(indices)) + self.filters[name].start] = False
        return emitted

    @functools.cached_property
    def together(self) -> dict[str, set[str]]:
        """{convolution: those that write to channels of the same tensors, itself among them}."""
        names = list(self.filters)
        nodes = len(names) + self._channel_count
        labels = components(nodes, self.owner[self.sources], len(names) + self.targets).tolist()
        groups: defaultdict[int, set[str]] = defaultdict(set)
        for name, label in zip(names, labels, strict=False):
            groups[label].add(name)
        return {name: groups[label] for name, label in zip(names, labels, strict=False)}

    def coupled(self, model: nn.Module) -> list[dict[str, list[int]]]:
        """Filters that arrive at one channel of some layer, where they are added up: {convolution: indices}.

        Only if all of them go does the channel leave the tensors. Filters that share no channel are not
        listed, nor are those of a layer whose channels could not be followed.
        """
        filters = len(self.owner)
        sources, targets = [self.sources], [self.targets + filters]
        for name, conv in convolutions(model).items():
            if is_depthwise(conv) and name in self.filters and name in self.channels:
                rows = torch.arange(conv.out_channels)
                read = rows // (conv.out_channels // conv.groups)
                sources.append(rows + self.filters[name].start)
                targets.append(read + self.channels[name].start + filters)
        labels = components(filters + self._channel_count, torch.cat(sources), torch.cat(targets))
        units: defaultdict[int, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for name, where in self.filters.items():
            for index, label in enumerate(labels[where].tolist()):
                units[label][name].append(index)
        return [dict(unit) for unit in units.values() if sum(map(len, unit.values())) > 1]


def components(count: int, one: Tensor, other: Tensor) -> Tensor:
    """[count] the connected component of each of the numbers 0, 1, …: the smallest number in it.

    Args:
        one, other: [edges] int64, the two ends of each edge.
    """
    labels = torch.arange(count)
    while True:
        least = torch.minimum(labels[one], labels[other])
        new = labels.scatter_reduce(0, one, least, "amin").scatter_reduce(0, other, least, "amin")
        new = new[new]  # halves the way to the smallest
        if torch.equal(new, labels):
            return labels
        labels = new


def _slices(counts: Mapping[str, int]) -> dict[str, slice]:
    found, start = {}, 0
    for name, count in counts.items():
        found[name] = slice(start, start + count)
        start += count
    return found
