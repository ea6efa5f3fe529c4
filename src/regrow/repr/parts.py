"""The parameters and statistics of a narrowed model's layers, taken for many layers at once in every pass."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.repr.joined import Layout, Slice, is_dense, take_parts, take_vector, written
from regrow.together import Together
from regrow.torch_private import (
    copy_all,
    has_pre_hooks,
    own_buffers,
    own_parameters,
    writes_to,
)

Tensors = dict[str, Tensor]


class Parts:
    """What the layers of a narrowed model compute with, made for many layers at once in every pass.

    Statistics of norms are written back at the end of the pass.

    Args:
        slices: {layer: {name of a parameter or buffer: what stays of it}}, as far as it is known in the order
            in which the layers run.
    """

    def __init__(self, slices: Mapping[nn.Module, Mapping[str, Slice]]) -> None:
        self._slices, order = slices, list(slices)
        self._together: Together[Tensors] = Together(self._make, self._kind, _size, self._stamp, order)
        self._layouts: dict[Hashable, Layout] = {}
        self._read: dict[nn.Module, list[_Statistics]] = {}
        self._changed: dict[nn.Module, None] = {}

    def has(self, module: nn.Module) -> bool:
        """Whether ``module`` is one of the layers."""
        return module in self._slices

    def of(self, layer: nn.Module) -> Tensors | None:
        """The tensors that ``layer`` computes with, by name; None if it has to take them by itself."""
        made = self._together.get(layer)
        if made is None and layer in self._changed:
            # It ran in this pass before, and its statistics are read from the buffers now.
            self._write([layer])
            self._together.leave(layer)
        return made

    def changed(self, layer: nn.Module) -> None:
        """Tell that ``layer`` has written to the statistics among its tensors."""
        if layer in self._read:
            self._changed[layer] = None

    def begin(self) -> None:
        """A pass of the model begins."""
        self._read, self._changed = {}, {}
        self._together.begin()

    def end(self, whole: bool) -> None:
        """A pass ends, after all of its layers or at an error."""
        self._write(list(self._changed))
        self._read, self._changed = {}, {}
        self._together.end(whole)

    def _kind(self, layer: nn.Module) -> Hashable:
        # A hook of the user's may change the weights, and of Bridgeout's w̃ slices are taken too.
        if has_pre_hooks(layer) or not self._slices[layer]:
            return None
        own, wide = _own(layer), type(layer).__mro__[2]
        tensors = [own.get(name) for name in self._slices[layer]]
        if any(isinstance(getattr(wide, name, None), property) for name in self._slices[layer]):
            return None
        if any(tensor is None or not is_dense(tensor) for tensor in tensors):
            return None
        return next(tensor.device for tensor in tensors if tensor is not None)

    def _stamp(self, layer: nn.Module) -> Hashable:
        own = own_parameters(layer)
        return tuple(
            (id(own[name]), writes_to(own[name])) for name in self._slices[layer] if own.get(name) is not None
        )

    def _make(self, layers: Sequence[nn.Module]) -> list[Tensors]:
        made: list[Tensors] = [{} for _ in layers]
        alike: dict[tuple[torch.dtype, bool], list[_Entry]] = {}
        for number, layer in enumerate(layers):
            own, buffers = _own(layer), own_buffers(layer)
            for name in self._slices[layer]:
                tensor = own[name]
                alike.setdefault((tensor.dtype, name in buffers), []).append(
                    _Entry(number, layer, name, tensor)
                )
        for (_, are_buffers), entries in alike.items():
            layout = self._layout(entries)
            tensors = [entry.tensor for entry in entries]
            if are_buffers:
                vector = take_vector(tensors, layout)
                slices = layout.parts(vector)
                statistics = _Statistics(layout, vector, [(entry.layer, entry.tensor) for entry in entries])
                for entry in entries:
                    self._read.setdefault(entry.layer, []).append(statistics)
            else:
                slices = take_parts(tensors, layout)
            for entry, one in zip(entries, slices, strict=True):
                made[entry.number][entry.name] = one
        return made

    def _layout(self, entries: Sequence[_Entry]) -> Layout:
        # A model may be moved, or change its memory format, between two passes.
        key = tuple((id(e.layer), e.name, e.tensor.device, e.tensor.stride()) for e in entries)
        if key not in self._layouts:
            slices = [self._slices[entry.layer][entry.name] for entry in entries]
            self._layouts[key] = Layout([entry.tensor for entry in entries], slices)
        return self._layouts[key]

    @torch.no_grad()
    def _write(self, layers: Sequence[nn.Module]) -> None:
        """Write the statistics of ``layers`` from their slices into the buffers."""
        among = {layer: self._changed.pop(layer, None) for layer in layers}
        read = {id(each): each for layer in among for each in self._read[layer]}
        for statistics in read.values():
            buffers = [buffer for _, buffer in statistics.entries]
            whole = written(buffers, statistics.vector, statistics.layout)
            pairs = [
                (buffer.data, new)
                for (layer, buffer), new in zip(statistics.entries, whole, strict=True)
                if layer in among
            ]
            # A norm too writes through .data: a graph that holds the buffer stays valid.
            copy_all(*zip(*pairs, strict=True))


@dataclass(frozen=True)
class _Entry:
    number: int  # of the layer, in its group
    layer: nn.Module
    name: str
    tensor: Tensor


@dataclass(eq=False)
class _Statistics:
    """What stays of some buffers, in a vector, while a pass runs."""

    layout: Layout
    vector: Tensor
    entries: list[tuple[nn.Module, Tensor]]


def _own(layer: nn.Module) -> Mapping[str, Any]:
    return own_parameters(layer) | own_buffers(layer)


def _size(layer: nn.Module) -> int:
    tensors: Iterable[Any] = own_parameters(layer).values()
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
