"""The one adapter to torch-pruning: its graph of a model, and where the graph says channels go.

The graph takes every operation that it does not know for an element-wise one, so its answers are proposals.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from regrow.interrupts import uninterrupted
from regrow.log import gave_up
from regrow.looking.calls import PassFailed
from regrow.modules import Consumer, Norm, channels_read, filter_count, per_channel
from regrow.structure.readers import Readers, Reads
from regrow.torch_private import pruning_operation, pruning_places, pruning_stride

# Steps per filter; in DenseNet-201, where each channel has hundreds of readers, it takes 1500.
_LONGEST_WALK, _LEAST_WALK = 6000, 400
_SUMS = ("AddBackward", "SubBackward", "AddcmulBackward")


class LostCount(Exception):
    """torch-pruning's graph gives no channels, or channels that do not exist."""


class Graph:
    """torch-pruning's graph of ``probe``, traced with ``example_inputs``.

    Args:
        probe: a copy of a model, in evaluation mode.
        forward: (model, inputs) → the tensors that count as the model's outputs, with a gradient.

    Raises:
        PassFailed: as ``forward``.
        LostCount: torch-pruning cannot trace the model.
    """

    def __init__(
        self, probe: nn.Module, example_inputs: Any, forward: Callable[[nn.Module, Any], list[Tensor]]
    ) -> None:
        with uninterrupted():  # while it is imported it takes KeyboardInterrupt for a missing library
            import torch_pruning  # it imports timm and torchvision where they are installed: seconds

        self._names = {module: name for name, module in probe.named_modules()}
        self._patience = _Patience()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._graph = torch_pruning.DependencyGraph().build_dependency(
                    probe, example_inputs=example_inputs, forward_fn=forward, verbose=False
                )
            except PassFailed:
                raise
            except Exception as error:  # torch-pruning may raise any kind of error
                raise LostCount(
                    f"torch-pruning could not trace the model ({type(error).__name__})"
                ) from error

    def readers(self, conv: Any) -> Readers | None:
        """Where the channels of a convolution of the probe go; None where torch-pruning loses count."""
        readers = Readers()
        try:
            _walk(self._graph, conv, self._names, readers, self._patience)
        except LostCount as error:
            gave_up(f"following the channels of {self._names[conv]!r}", error)
            return None
        return readers

    def has(self, conv: nn.Module) -> bool:
        """Whether the graph has a convolution of the probe: not if an operation of the user's hides it."""
        return conv in self._graph.module2node

    def close(self) -> None:
        """Take the nodes apart: they refer to each other, and would wait for Python's garbage collector."""
        for node in self._graph.module2node.values():
            vars(node).clear()


class _Patience:
    """How many steps per filter a walk over the graph may take.

    An operation that multiplies indices makes some walks endless, and most other walks of the model lead to
    the same operation: after each walk that took all its steps, later walks get fewer.
    """

    def __init__(self) -> None:
        self.steps = _LONGEST_WALK

    def spend(self, steps: int, allowed: int) -> None:
        """Raises ``LostCount`` if ``steps`` are more than ``allowed``."""
        if steps > allowed:
            self.steps = max(self.steps // 4, _LEAST_WALK)
            raise LostCount("there is no end of channels")


def _walk(
    graph: Any, conv: Any, names: Mapping[nn.Module, str], readers: Readers, patience: _Patience
) -> None:
    """Follow a convolution's channels forward until something multiplies them by weights or adds to them."""
    if conv not in graph.module2node:
        readers.mixed = readers.blocked = "its output does not reach the network's"
        return
    start = graph.module2node[conv]
    readers.norm_first = bool(start.outputs) and all(_hides(node.module) for node in start.outputs)
    filters = filter_count(conv, conv.weight)
    stack = [(start, _places(filters))]
    sums: list[tuple[Any, list[Any]]] = []
    for node, indices in _visits(stack, filters, patience):
        if not node.outputs:
            readers.mixed = readers.mixed or "it is part of the network's output"
            readers.blocked = readers.blocked or readers.mixed
        for target_node, mapped in _steps(node, indices, filters, patience):
            target = target_node.module
            if isinstance(target, Norm | Consumer):
                _note(readers.norms if isinstance(target, Norm) else readers.consumers, target, mapped, names)
                if isinstance(target, Norm) and not per_channel(target):
                    readers.mixed = readers.mixed or f"{names[target]!r} normalises several channels together"
            elif _weighs(target, names):
                readers.mixed = readers.mixed or f"it is read by a {type(target).__name__}"
            elif len(target_node.inputs) > 1 and pruning_operation(target).startswith(_SUMS):
                readers.mixed = readers.mixed or "it is added to other channels"
                sums.append((target_node, mapped))
                continue
            if _reach(readers, target, mapped, names):
                stack.append((target_node, mapped))
    try:
        for node, indices in _visits(sums, filters, patience):
            if not node.outputs:
                readers.blocked = readers.blocked or "it is part of the network's output"
            sums += [
                (target, mapped)
                for target, mapped in _steps(node, indices, filters, patience)
                if _reach(readers, target.module, mapped, names)
            ]
    except LostCount:
        readers.reached, readers.blocked = {}, "torch-pruning could not follow its channels"


@functools.lru_cache(maxsize=64)
def _places(filters: int) -> list[Any]:
    """The places where the channels of a convolution begin, shared by all callers: do not change them."""
    return pruning_places(filters)


def _visits(
    stack: list[tuple[Any, list[Any]]], filters: int, patience: _Patience
) -> Iterator[tuple[Any, list[Any]]]:
    """The entries of ``stack``, to which the caller adds, with each channel of each node once."""
    visited: dict[int, set[Any]] = {}
    whole: set[int] = set()  # nodes that saw all channels first; most nodes see them once and nothing else
    left = patience.steps * filters
    places = _places(filters)
    while stack:
        node, indices = stack.pop()
        if indices is places and id(node) not in visited and id(node) not in whole:
            whole.add(id(node))
            patience.spend(len(places), left)
            left -= len(places)
            yield node, places
            continue
        seen = visited.setdefault(id(node), set(places) if id(node) in whole else set())
        # Channel by channel: there are too many ways through splits and sums to walk each of them.
        fresh = list(dict.fromkeys(indices))
        if seen:
            fresh = [index for index in fresh if index not in seen]
        if fresh or not indices:
            seen.update(fresh)
            patience.spend(len(fresh), left)
            left -= len(fresh)
            yield node, fresh


def _steps(
    node: Any, indices: list[Any], filters: int, patience: _Patience
) -> Iterator[tuple[Any, list[Any]]]:
    """The nodes that read ``node``, each with the places where it reads ``indices``."""
    for edge in node.dependencies:
        if edge.source is not node or not any(edge.target is output for output in node.outputs):
            continue
        mapped = indices
        for mapping in edge.index_mapping:
            if mapping is None:
                continue
            stride = pruning_stride(mapping)
            if stride > 1 and not mapping.reverse:  # before millions of places are listed
                width = (
                    channels_read(edge.target.module) if isinstance(edge.target.module, nn.Module) else None
                )
                patience.spend(len(mapped) * stride, max(patience.steps * filters, width or 0))
            try:
                mapped = mapping(mapped)
            except Exception as error:  # torch-pruning may raise any kind of error
                raise LostCount("torch-pruning could not map its indices") from error
        if mapped:
            yield edge.target, mapped


def _note(found: dict[str, Reads], layer: Any, mapped: list[Any], names: Mapping[nn.Module, str]) -> None:
    filters: Sequence[int]
    indices: Sequence[int]
    if mapped is _places(len(mapped)):
        filters = indices = range(len(mapped))
    else:
        filters, indices = [index.root_idx for index in mapped], [index.idx for index in mapped]
    if max(indices) >= (channels_read(layer) or math.inf):
        # A split into uneven parts, a tensor that is folded.
        raise LostCount(f"{names[layer]!r} reads fewer channels")
    if names[layer] in found:
        found[names[layer]].add(filters, indices)
    else:
        found[names[layer]] = Reads(filters, indices)


def _weighs(target: Any, names: Mapping[nn.Module, str]) -> bool:
    """Whether something that is neither norm nor consumer has weights that meet the channels."""
    known = isinstance(target, Norm | Consumer | nn.PReLU)
    return isinstance(target, nn.Parameter) or (
        target in names and not known and any(True for _ in target.parameters())
    )


def _reach(readers: Readers, target: Any, mapped: list[Any], names: Mapping[nn.Module, str]) -> bool:
    """Note that the channels reach ``target``; returns whether they continue behind it."""
    if isinstance(target, Norm | Consumer | nn.PReLU):
        _note(readers.reached, target, mapped, names)
    if isinstance(target, Norm) and not per_channel(target):
        readers.blocked = readers.blocked or f"{names[target]!r} normalises several channels together"
    if _weighs(target, names):
        readers.blocked = readers.blocked or f"they are read by a {type(target).__name__}"
        return False
    return not isinstance(target, Consumer)


def _hides(module: Any) -> bool:
    """Whether a weight of 0 in this module hides a channel from everything behind it."""
    return isinstance(module, Norm) and per_channel(module) and module.weight is not None
