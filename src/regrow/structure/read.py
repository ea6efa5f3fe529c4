"""Which layers read which channels: the one adapter to torch-pruning's dependency graph.

The graph takes every operation it does not know for an element-wise one, so what it says is a proposal:
``read_structure`` gives it out only after forward passes with silenced and with scrambled filters have
confirmed it. All of it happens on a copy; the model is not touched.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.filters import Convolution, named_parts, unwrap
from regrow.looking.calls import call, floating, set_mode, undisturbed
from regrow.looking.copies import copied
from regrow.looking.small_inputs import Way, idle_way, shrunk, smaller_picture, watched
from regrow.structure.confirm import confirm, rule_out
from regrow.structure.readers import Consumer, Norm, Readers, Reads, per_channel

# Steps per filter; in DenseNet-201, where each channel has hundreds of readers, it takes 1500.
_LONGEST_WALK, _LEAST_WALK = 6000, 400
_SUMS = ("AddBackward", "SubBackward", "AddcmulBackward")


def read_structure(model: nn.Module, example_inputs: Any) -> dict[str, Readers]:
    """Find what reads the channels of each convolution that ``example_inputs`` reach.

    Args:
        model: any module; wrappers are looked through.
        example_inputs: what ``model`` takes: a tensor, a tuple of arguments or a dict of keywords; one
            picture is enough.

    Returns:
        {qualified name: readers}, in the order the forward pass reaches the convolutions.

    Raises:
        ValueError: the model cannot be copied, or its forward pass fails on ``example_inputs``.
    """
    return propose_structure(model, example_inputs).confirmed()


@dataclass(frozen=True)
class Proposal:
    """What torch-pruning's graph says of a model, which nothing has confirmed yet.

    Attributes:
        model: that, which is not touched.
        probe: a copy of it, in evaluation mode; whoever needs one first may use it up.
        example_inputs: what it takes; of large pictures two at most.
        small: the same, shrunk; None where there is nothing to shrink. The model may not bear them.
        way: the way that ``example_inputs`` take.
        readers: {qualified name: readers}, as ``read_structure`` gives them.
    """

    model: nn.Module
    probe: nn.Module
    example_inputs: Any
    small: Tensor | None
    way: Way
    readers: dict[str, Readers]

    def confirmed(self) -> dict[str, Readers]:
        """The readers without what forward passes contradict; the proposal is used up."""
        probe = copied(self.model)
        set_mode(probe, False)
        with undisturbed(probe), torch.no_grad():
            confirm(probe, smaller_picture(probe, self.example_inputs, self.way), self.readers)
        return self.readers


def propose_structure(model: nn.Module, example_inputs: Any) -> Proposal:
    """The first half of ``read_structure``: a single forward pass, and what the graph makes of it.

    Raises:
        ValueError: as ``read_structure``.
    """
    model = unwrap(model)
    try:
        probe = copied(model, requires_grad=True)
        set_mode(probe, False)
    except Exception as error:
        raise ValueError(
            f"the model cannot be copied to read its structure ({error}). Build regrow's objects before a "
            "forward pass leaves tensors with a gradient on the model, and take weight_norm from "
            "torch.nn.utils.parametrizations."
        ) from error
    with undisturbed(probe), torch.enable_grad():
        small = shrunk(example_inputs)
        if small is not None:
            example_inputs = example_inputs[: len(small)]
        seen = _Seen(probe)
        graph, reason = _traced_small(probe, example_inputs, small, seen) or _traced(
            probe, example_inputs, seen
        )
        modules: dict[str, Any] = dict(named_parts(probe))
        names = {module: name for name, module in modules.items()}
        patience = _Patience()
        readers = {}
        for name, norms in seen.behind.items():
            conv = modules[name]
            found = None if graph is None else _walked(graph, conv, names, patience)
            if found is None:
                reason = reason or "torch-pruning could not follow its channels"
                filters = range(conv.out_channels)
                found = Readers(
                    norms={norm: Reads(filters, filters) for norm in norms}, mixed=reason, blocked=reason
                )
            readers[name] = found
        if graph is not None:
            for node in graph.module2node.values():
                # Its nodes hold each other: Python would look through all that a cut leaves to find them.
                vars(node).clear()
        rule_out(probe, readers)
    return Proposal(model, probe, example_inputs, small, seen.way, readers)


class _Seen:
    """What one forward pass shows.

    Attributes:
        behind: convolution → the norms whose input is its own output; in order of execution.
        way: as ``shrinking.way`` gives it.
        done: it came to its end.
    """

    def __init__(self, probe: nn.Module) -> None:
        self._probe = probe
        self.behind: dict[str, list[str]] = {}
        self.way: Way = []
        self.done = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Forward passes in here are seen."""
        self.behind, self.done = {}, False
        produced: dict[int, tuple[str, Tensor]] = {}

        def after(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
            if isinstance(module, Norm):
                if inputs and id(inputs[0]) in produced:
                    self.behind[produced[id(inputs[0])][0]].append(name)
            elif isinstance(module, Convolution):
                self.behind.setdefault(name, [])
                produced[id(output)] = (name, output)  # holding the tensor keeps its id from being used again

        with watched(self._probe, after) as self.way:
            yield
        self.done = True


def _run(probe: nn.Module, example_inputs: Any, seen: _Seen) -> Any:
    try:
        with seen.watching():
            return call(probe, example_inputs)
    except Exception as error:
        raise ValueError(
            f"the model's forward pass fails on example_inputs: {error}. Pass what the model takes, for "
            "example one batch of your loader, x[:1]; a tuple for several arguments, a dict for keywords."
        ) from error


def _traced(probe: nn.Module, example_inputs: Any, seen: _Seen) -> tuple[Any, str]:
    try:
        return _trace(probe, example_inputs, seen), ""
    except Exception as error:  # torch-pruning raises whatever it stumbled over
        if not seen.done:
            _run(probe, example_inputs, seen)
        return None, f"torch-pruning could not trace the model ({type(error).__name__})"


def _traced_small(
    probe: nn.Module, example_inputs: Any, small: Tensor | None, seen: _Seen
) -> tuple[Any, str] | None:
    """``_traced`` with the ``small`` pictures, if they take the way that the large ones do."""
    if small is not None:
        with suppress(Exception):  # a model of one size, or a failure that large pictures bring about too
            known = idle_way(probe, example_inputs)
            found = _traced(probe, small, seen)
            if seen.way == known:
                return found
    return None


def _trace(probe: nn.Module, example_inputs: Any, seen: _Seen) -> Any:
    import torch_pruning  # it imports timm and torchvision where they are installed: seconds

    def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
        return [tensor for tensor in floating(_run(model, inputs, seen)) if tensor.requires_grad]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_pruning.DependencyGraph().build_dependency(
            probe, example_inputs=example_inputs, forward_fn=outputs, verbose=False
        )


class _Patience:
    """How many steps per filter a walk over the graph may take.

    An operation that multiplies indices makes some walks endless, and others of the model mostly lead to
    it too: after each that took all its steps, those that follow get fewer.
    """

    def __init__(self) -> None:
        self.steps = _LONGEST_WALK

    def spend(self, steps: int, allowed: int) -> None:
        """Raises ``ValueError`` if these are more ``steps`` than ``allowed``."""
        if steps > allowed:
            self.steps = max(self.steps // 4, _LEAST_WALK)
            raise ValueError("torch-pruning has lost count of the channels: there is no end of them")


def _walked(graph: Any, conv: Any, names: Mapping[nn.Module, str], patience: _Patience) -> Readers | None:
    """``_walk``, or None where torch-pruning stumbles or loses count of the channels."""
    readers = Readers()
    try:
        _walk(graph, conv, names, readers, patience)
    except Exception:  # torch-pruning raises whatever it stumbled over
        return None
    return readers


def _channels(module: Any) -> float:
    """How many channels a layer reads; without limit for one that takes any number."""
    if isinstance(module, nn.PReLU):
        return module.num_parameters if module.num_parameters > 1 else math.inf
    counts = ("in_features", "in_channels", "num_features", "num_channels")
    known = next((vars(module)[count] for count in counts if count in vars(module)), None)
    weight = getattr(module, "weight", None)
    return known if known is not None else math.inf if weight is None else len(weight)


def _walk(
    graph: Any, conv: Any, names: Mapping[nn.Module, str], readers: Readers, patience: _Patience
) -> None:
    """Follow a convolution's channels forward until something multiplies them by weights or adds to them."""
    if conv not in graph.module2node:
        readers.mixed = readers.blocked = "its output does not reach the network's"
        return
    start = graph.module2node[conv]
    readers.norm_first = bool(start.outputs) and all(_hides(node.module) for node in start.outputs)
    stack = [(start, _places(conv.weight.shape[0]))]
    sums: list[tuple[Any, list[Any]]] = []
    for node, indices in _visits(stack, len(conv.weight), patience):
        if not node.outputs:
            readers.output = True
            readers.mixed = readers.mixed or "it is part of the network's output"
            readers.blocked = readers.blocked or readers.mixed
        for target_node, mapped in _steps(node, indices, len(conv.weight), patience):
            target = target_node.module
            if isinstance(target, Norm | Consumer):
                _note(readers.norms if isinstance(target, Norm) else readers.consumers, target, mapped, names)
                if isinstance(target, Norm) and not per_channel(target):
                    readers.mixed = readers.mixed or f"{names[target]!r} normalises several channels together"
            elif _weighs(target, names):
                readers.mixed = readers.mixed or f"it is read by a {type(target).__name__}"
            elif len(target_node.inputs) > 1 and str(getattr(target, "_grad_fn", "")).startswith(_SUMS):
                readers.mixed = readers.mixed or "it is added to other channels"
                sums.append((target_node, mapped))
                continue
            if _reach(readers, target, mapped, names):
                stack.append((target_node, mapped))
    try:
        for node, indices in _visits(sums, len(conv.weight), patience):
            if not node.outputs:
                readers.blocked = readers.blocked or "it is part of the network's output"
            sums += [
                (target, mapped)
                for target, mapped in _steps(node, indices, len(conv.weight), patience)
                if _reach(readers, target.module, mapped, names)
            ]
    except Exception:  # torch-pruning raises whatever it stumbled over
        readers.reached, readers.blocked = {}, "torch-pruning could not follow its channels"


@functools.lru_cache(maxsize=64)
def _places(filters: int) -> list[Any]:
    """Where the channels of a convolution begin; not to be changed."""
    from torch_pruning._helpers import _HybridIndex

    return [_HybridIndex(idx=i, root_idx=i) for i in range(filters)]


def _visits(
    stack: list[tuple[Any, list[Any]]], filters: int, patience: _Patience
) -> Iterator[tuple[Any, list[Any]]]:
    """What is on ``stack``, to which the caller adds, each channel of each node once."""
    visited: dict[int, set[Any]] = {}
    whole: set[int] = set()  # nodes that saw all channels first, which most do, and mostly nothing else
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
        # Channel by channel: the ways through splits and sums are more than can be walked one by one.
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
            stride = getattr(mapping, "_stride", 1)
            if stride > 1 and not mapping.reverse:  # before millions of places are listed
                channels = _channels(edge.target.module)
                many = max(patience.steps * filters, int(channels) if channels < math.inf else 0)
                patience.spend(len(mapped) * stride, many)
            mapped = mapping(mapped)
        if mapped:
            yield edge.target, mapped


def _note(found: dict[str, Reads], layer: Any, mapped: list[Any], names: Mapping[nn.Module, str]) -> None:
    filters: Sequence[int]
    indices: Sequence[int]
    if mapped is _places(len(mapped)):
        filters = indices = range(len(mapped))
    else:
        filters, indices = [index.root_idx for index in mapped], [index.idx for index in mapped]
    if max(indices) >= _channels(layer):
        # A split into uneven parts, a tensor that is folded.
        raise ValueError(f"torch-pruning has lost count of the channels that {names[layer]!r} reads")
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
    """Note that the channels reach ``target``; whether they go on behind it."""
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
