"""The parameters and statistics of a narrowed model's layers, taken for many layers at once in every pass."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from regrow.memory import is_dense
from regrow.repr.joined import (
    Layout,
    Slice,
    store_parts,
    take_parts,
    take_vector,
    take_views,
    written,
)
from regrow.together import Together
from regrow.torch_private import (
    copy_all,
    has_pre_hooks,
    own_buffers,
    own_parameters,
    writes_to,
)

Tensors = dict[str, Tensor]
_Entry = tuple[
    nn.Module, str, Tensor, Tensors
]  # layer, name of a tensor, the tensor, parts made for the layer


class Parts:
    """What the layers of a narrowed model compute with, made for many layers at once in every pass.

    Statistics of norms are written back at the end of the pass.

    Args:
        slices: {layer: {name of a parameter or buffer: what stays of it}}, as far as it is known in the order
            in which the layers run.
    """

    def __init__(self, slices: Mapping[nn.Module, Mapping[str, Slice]]) -> None:
        self._slices = slices
        self._computed = {
            layer
            for layer, names in slices.items()
            if any(isinstance(getattr(type(layer), name, None), property) for name in names)
        }
        # Layers that can say ahead of their own pass with which weight they will compute.
        self._ahead = {
            layer
            for layer in self._computed
            if getattr(type(layer), "_regrow_weight_ahead", None) is not None
        }
        self._preparing = True
        self._layouts: dict[Hashable, Layout | None] = {}
        self._numbers = {layer: number for number, layer in enumerate(slices)}
        self._batches: list[_Batch] = []
        # What the layers compute with in compiled code, and the vectors in which it lies.
        self._given: list[Tensors] | None = None
        self._vectors: list[Tensor] = []
        self._read: dict[nn.Module, dict[int, _Statistics]] = {}
        self._changed: dict[nn.Module, None] = {}
        # A tensor that was freed could lend its identity, which stamps hold, to another one.
        self._alive: list[Tensor] = []
        self._together: Together[Tensors] = Together(self._make, self._kind, _size, self._stamp, list(slices))
        self._together.prepare()
        self._preparing = False
        self._read, self._alive = {}, []
        self.lock = threading.RLock()  # of the thread whose pass is served

    def has(self, module: nn.Module) -> bool:
        """Whether ``module`` is one of the layers."""
        return module in self._slices

    def of(self, layer: nn.Module) -> Tensors | None:
        """The tensors that ``layer`` computes with, by name; None if it has to take them by itself."""
        if torch.compiler.is_compiling():
            return None if self._given is None else self._given[self._numbers[layer]]
        made = self._together.get(layer)
        if made is None and layer in self._read:
            # In the rest of this pass its statistics are read from the buffers, and written to them.
            if layer in self._changed:
                self._write([layer])
            self._together.leave(layer)
        return made

    def changed(self, layer: nn.Module) -> None:
        """Tell that ``layer`` has written to the statistics among its tensors."""
        if not torch.compiler.is_compiling() and layer in self._read:
            self._changed[layer] = None

    def begin(self) -> None:
        """A pass of the model begins, perhaps inside of another one."""
        self._write(list(self._changed))
        self._read, self._changed, self._alive = {}, {}, []
        self._together.begin()

    def end(self, whole: bool) -> None:
        """A pass ends, after all of its layers or at an error."""
        self._write(list(self._changed))
        self._read, self._changed, self._alive = {}, {}, []
        self._together.end(whole)

    def begin_compiled(self) -> None:
        """``begin`` in code that a compiler traces: all is taken at once, by operations without a group."""
        given: list[Tensors] = [{} for _ in self._slices]
        self._vectors = []
        for batch in self._batches:
            whole = batch.whole()
            if [tensor.stride() for tensor in whole] != batch.strides:
                given = []  # the memory format has changed: the layers take their tensors themselves
                break
            parts, vector = take_views(whole, batch.layout)
            self._vectors.append(vector)
            for (_, number, name), part in zip(batch.names, parts, strict=True):
                given[number][name] = part
        self._given = given or None

    def end_compiled(self) -> None:
        """``end`` in code that a compiler traces; statistics are written back."""
        if self._given is not None:
            for batch, vector in zip(self._batches, self._vectors, strict=True):
                if batch.are_buffers and any(layer.training for layer, _, _ in batch.names):
                    store_parts(batch.whole(), vector.detach(), batch.layout)
        self._given, self._vectors = None, []

    def _kind(self, layer: nn.Module) -> Hashable:
        """The device of a layer that can share an operation; None for one that takes its tensors itself."""
        # A hook of the user's may change the weights.
        if (layer in self._computed and layer not in self._ahead) or has_pre_hooks(layer):
            return None
        own, buffers = own_parameters(layer), own_buffers(layer)
        tensors = [own.get(name, buffers.get(name)) for name in self._slices[layer]]
        whole = [tensor for tensor in tensors if tensor is not None]
        return whole[0].device if whole and len(whole) == len(tensors) else None

    def _stamp(self, layer: nn.Module) -> Hashable:
        own, buffers = own_parameters(layer), own_buffers(layer)
        tensors = [own[name] if name in own else buffers[name] for name in self._slices[layer]]
        return tuple([(id(tensor), writes_to(tensor)) for tensor in tensors])

    def _make(self, layers: Sequence[nn.Module]) -> list[Tensors | None]:
        made: list[Tensors | None] = [{} for _ in layers]
        alike: dict[tuple[torch.dtype, bool, bool], list[_Entry]] = {}
        for number, layer in enumerate(layers):
            own, buffers = own_parameters(layer), own_buffers(layer)
            ahead: Tensor | None = None
            if layer in self._ahead and "weight" in self._slices[layer]:
                ahead = own["weight"] if self._preparing else cast(Any, layer)._regrow_weight_ahead()
                if ahead is None:
                    made[number] = None
                    continue
            tensors = made[number] = {}
            for name in self._slices[layer]:
                is_buffer, is_ahead = name in buffers, name == "weight" and ahead is not None
                tensor = cast(Tensor, ahead if is_ahead else buffers[name] if is_buffer else own[name])
                kind = tensor.dtype, is_buffer, is_ahead
                alike.setdefault(kind, []).append((layer, name, tensor, tensors))
        for (dtype, are_buffers, are_ahead), entries in alike.items():
            whole = [tensor for _, _, tensor, _ in entries]
            self._alive += whole
            strides = tuple([tensor.stride() for tensor in whole])
            # A model may be moved, or change its memory format, between two passes.
            those = tuple([id(layer) for layer, *_ in entries])
            key = whole[0].device, dtype, are_buffers, are_ahead, those, strides
            if key not in self._layouts:
                self._layouts[key] = self._laid_out(entries, whole, are_buffers, are_ahead)
            layout = self._layouts[key]
            if layout is None:
                return [None] * len(layers)
            if are_buffers:
                vector = take_vector(whole, layout)
                # A change of one part must not count as a change of the others, which a norm in eval mode has
                # saved for its backward pass: .data gives each part its own count.
                parts = [part.data for part in layout.small.parts(vector)]
                statistics = _Statistics(layout, vector, [(layer, buffer) for layer, _, buffer, _ in entries])
                for layer, *_ in entries:
                    self._read.setdefault(layer, {})[id(statistics)] = statistics
            else:
                parts = take_parts(whole, layout)
            for (_, name, _, tensors), part in zip(entries, parts, strict=True):
                tensors[name] = part
        return made

    def _laid_out(
        self, entries: Sequence[_Entry], whole: Sequence[Tensor], are_buffers: bool, are_ahead: bool
    ) -> Layout | None:
        """The layout of the tensors ``whole`` of ``entries``; None if one does not fill its memory."""
        if not all(map(is_dense, whole)):
            return None
        layout = Layout(whole, [self._slices[layer][name] for layer, name, _, _ in entries])
        # A CUDA graph that is captured later finds the indices there.
        _ = layout.written if are_buffers else layout.spread
        names = [(layer, self._numbers[layer], name) for layer, name, _, _ in entries]
        strides = [tensor.stride() for tensor in whole]
        if not are_ahead:  # in compiled code each layer makes its weight, and takes what stays of it
            self._batches.append(_Batch(layout, strides, are_buffers, names))
        return layout

    @torch.no_grad()
    def _write(self, layers: Sequence[nn.Module]) -> None:
        """Write the statistics of ``layers`` from their slices into the buffers."""
        among = {layer: self._changed.pop(layer, None) for layer in layers}
        read: dict[int, _Statistics] = {}
        for layer in among:
            read.update(self._read[layer])
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


@dataclass(eq=False)
class _Batch:
    """Tensors that are taken in one operation: (layer, its number, name) of each, and their strides."""

    layout: Layout
    strides: list[tuple[int, ...]]
    are_buffers: bool
    names: list[tuple[nn.Module, int, str]]

    def whole(self) -> list[Tensor]:
        kept = own_buffers if self.are_buffers else own_parameters
        return [kept(layer)[name] for layer, _, name in self.names]


@dataclass(eq=False)
class _Statistics:
    """What stays of some buffers, in a vector, while a pass runs."""

    layout: Layout
    vector: Tensor
    entries: list[tuple[nn.Module, Tensor]]


def _size(layer: nn.Module) -> int:
    tensors: Iterable[Any] = own_parameters(layer).values()
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
