"""The readers of a convolution's channels, and how to silence a channel for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress

import torch
from torch import Tensor, nn

from regrow.indexing import Where, clear, index_tensor
from regrow.modules import Consumer, filters_at, grouped, unwrap
from regrow.torch_private import own_buffers, own_parameters


@dataclass
class Reads:
    """Channels of a convolution that one layer reads: pairs of a filter and an index into the layer."""

    filters: Sequence[int]
    indices: Sequence[int]

    def add(self, filters: Sequence[int], indices: Sequence[int]) -> None:
        """Append more pairs."""
        self.filters, self.indices = [*self.filters, *filters], [*self.indices, *indices]

    def of(self, dropped: Iterable[int]) -> list[int]:
        """The layer's indices that carry the filters in ``dropped``."""
        if isinstance(self.filters, range) and self.filters is self.indices:  # the usual case, done quickly
            return sorted(set(dropped).intersection(self.filters))
        return list(compress(self.indices, map(set(dropped).__contains__, self.filters)))


@dataclass
class Readers:
    """The readers of one convolution's channels.

    Attributes:
        norms: the normalisation layers that read these channels alone, before any sum. They must be silenced
            with a channel.
        consumers: the convolutions and linear layers that read the channels; an index is an input
            channel of the layer.
        mixed: empty, or why zeroing the consumers' columns would not hide a channel from the rest of the
            network (it is added to other channels, it leaves as output, an activation turns 0 into
            another number, …).
        norm_first: the channels reach the rest of the network through ``norms`` alone, which take their
            statistics per channel, so a norm weight of 0 hides a channel even where it is mixed.
        output: empty, or how the channels leave the network, or may leave it: with no weights behind them, as
            a classifier's do, or with weights that hand each channel on by itself (``escapes``).
        unsilenced: empty, or the name of a norm that reads the channels and cannot be silenced for them
            alone (it serves other channels too, it has no weight to set to 0, …).
        noisy: the ``consumers`` that a silenced channel reaches as another number than 0.
        reached: the layers that the channels reach, sums included, up to layers that multiply them by
            weights. This is the graph's proposal, which no pass has confirmed.
        blocked: empty, or why the channels cannot leave the tensors on the way (a proposal too).
    """

    norms: dict[str, Reads] = field(default_factory=dict)
    consumers: dict[str, Reads] = field(default_factory=dict)
    mixed: str = ""
    norm_first: bool = False
    output: str = ""
    unsilenced: str = ""
    noisy: list[str] = field(default_factory=list)
    reached: dict[str, Reads] = field(default_factory=dict)
    blocked: str = ""


def column_mask(layer: Consumer, indices: Sequence[int]) -> Tensor:
    """Where ``layer.weight`` multiplies the input channels ``indices``: BoolTensor over its first two
    dimensions, on the CPU.

    In a grouped convolution an input channel is read by the filters of its own group only.
    """
    mask = torch.zeros(layer.weight.shape[:2], dtype=torch.bool)
    parts, index = grouped(layer, mask), index_tensor(indices)
    channels = parts.shape[2]
    parts[index // channels, :, index % channels] = True
    return mask


@torch.no_grad()
def silence(model: nn.Module, readers: Mapping[str, Readers], dropped: Mapping[str, Sequence[int]]) -> None:
    """Make the filters ``dropped`` of convolutions, {name: indices}, emit exactly 0, in train and eval mode.

    Their rows and biases become 0, and the weight, bias and running mean of the norms behind them: behind a
    row of zeros alone the channel would emit the norm's bias (RePr, arXiv 1811.07275, §4).
    """
    for module, indices in _silent_rows(model, readers, dropped):
        zero_channels(module, indices)


def zero_channels(module: nn.Module, indices: Tensor) -> None:
    """Set the weight, bias and running mean of a layer, as far as it has them, to 0 at ``indices``."""
    for tensor in (*affine(module), getattr(module, "running_mean", None)):
        if isinstance(tensor, Tensor):
            clear(tensor, place_in(module, tensor, indices))


def silent_entries(
    model: nn.Module, readers: Mapping[str, Readers], dropped: Mapping[str, Sequence[int]]
) -> list[tuple[nn.Parameter, Where]]:
    """The parameters that must be 0 for the filters ``dropped`` to be silent, each with an index of where."""
    return [
        entry
        for module, indices in _silent_rows(model, readers, dropped)
        for entry in entries_of(module, indices)
    ]


def entries_of(module: nn.Module, indices: Tensor) -> list[tuple[nn.Parameter, Where]]:
    """Weight and bias of a layer, as far as it has them, each with an index of these filters or channels."""
    return [(parameter, place_in(module, parameter, indices)) for parameter in affine(module)]


def place_in(module: nn.Module, tensor: Tensor, indices: Tensor) -> Where:
    """The index of filters or channels of ``module`` in ``tensor``, one of its parameters or buffers."""
    indices = indices.to(tensor.device)
    return filters_at(module, indices) if tensor.dim() > 1 else indices


def _silent_rows(
    model: nn.Module, readers: Mapping[str, Readers], dropped: Mapping[str, Sequence[int]]
) -> list[tuple[nn.Module, Tensor]]:
    """The convolutions and their norms, each with the rows that must be 0."""
    modules = dict(unwrap(model).named_modules())
    rows: list[tuple[str, Sequence[int]]] = []
    for name, filters in dropped.items():
        rows.append((name, filters))
        rows += [(norm, reads.of(filters)) for norm, reads in readers[name].norms.items()]
    return [(modules[layer], index_tensor(those)) for layer, those in rows if len(those)]


def per_channel_tensors(norm: nn.Module) -> dict[str, Tensor]:
    """Weight, bias, running mean and variance of a norm, as far as it has them."""
    keys = ("weight", "bias", "running_mean", "running_var")
    own = own_parameters(norm) | own_buffers(norm)
    return {key: tensor for key in keys if (tensor := own.get(key)) is not None}


def affine(module: nn.Module) -> list[nn.Parameter]:
    """Weight and bias of a layer, as far as it has them."""
    both = (own_parameters(module).get("weight"), own_parameters(module).get("bias"))
    return [parameter for parameter in both if isinstance(parameter, nn.Parameter)]
