"""Which layers' channels leave a network with no weights behind them, in whatever form they leave.

A pass is followed operation by operation, with or without a gradient, and afterwards every memory that an
operation filled is asked whether somebody still holds it. So an output is found in an object, an attribute or
an array too, detached or counted. What cannot be followed counts as an output.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from regrow.looking.calls import run, tensors
from regrow.looking.hooks import carrying, hooked, instead
from regrow.modules import CONSUMER_CLASSES, channel_dim, channel_layers
from regrow.structure.labels import (
    CONTRACTIONS,
    MOST,
    NOWHERE,
    Where,
    both,
    compact,
    contracted,
    keeps_apart,
    lies_along,
    moved,
    written_out,
)
from regrow.structure.stock import Operation, is_plain, single_operation
from regrow.torch_private import (
    TorchDispatchMode,
    modes_running,
    operator_arguments,
    outside_modes,
    storage_key,
)

OUTPUT = "its filters are the network's output, like a classifier's"
_MAYBE = "so they may be the network's output"
_HELD = f"the network keeps what it computes from its filters after a pass (in an attribute, say), {_MAYBE}"
_READ = f"the network reads what it computes from its filters as numbers of Python or NumPy, {_MAYBE}"
_UNUSED = f"no operation reads what the network computes from its filters, {_MAYBE}"
_LOST = f"its filters reach a tensor without plain memory (a sparse one, say), {_MAYBE}"

# The results of these operations hold nothing of the tensors that they are given.
_EMPTY = {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"}
_EMPTY |= {"new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"}
_READERS = {"numpy", "tolist", "item", "data_ptr", "untyped_storage", "storage", "__array__", "__dlpack__"}
_READERS |= {"__reduce_ex__", "__deepcopy__", "__repr__", "__format__"}


@dataclass
class Followed:
    """What a pass shows of the ways that channels take.

    Attributes:
        escapes: convolution or linear layer → why its channels count as an output, as it follows "the filters
            cannot be removed: ".
        apart: no operation was seen that may compute a number of several channels without weights.
    """

    escapes: dict[str, str] = field(default_factory=dict)
    apart: bool = True


def follow(
    probe: nn.Module,
    example_inputs: Any,
    *,
    training: bool = False,
    after: Callable[[str, nn.Module, Any, Tensor], None] | None = None,
) -> Followed:
    """Find the layers whose channels leave ``probe`` with no weights behind them.

    Args:
        probe: a copy of a model, whose parameters need no gradient: a graph would hold what a pass computes.
            In train mode its running statistics change.
        example_inputs: what it takes.
        training: whether the pass is in train mode.
        after: called behind each convolution, linear layer and norm, as ``hooked`` does.

    Raises:
        PassFailed: the model raised an error.
    """
    following = _Follow(probe)
    layers = [
        (name, module) for name, module in probe.named_modules() if isinstance(module, CONSUMER_CLASSES)
    ]
    # Statistics are no outputs. In evaluation only single numbers are taken for statistics.
    kept = [buffer for buffer in probe.buffers() if training or buffer.numel() < 2]
    with (
        instead(following.shortcuts(probe)),
        hooked(layers, following.after, following.before),
        hooked(channel_layers(probe) if after else [], after),
        following,
        _Reading(following),
    ):
        following.begin()
        output, _ = run(probe, example_inputs, training=training)
    following.end(list(tensors(output)), kept)
    return following.found


class _Memory:
    """A block of memory, and what a pass has shown of the tensors that lie in it.

    Attributes:
        alive: a reference that does not hold it.
        parts: layers whose channels are in it, with the labels that say where; equal labels are one part.
        weights: it was computed from parameters alone.
        fed: it was computed from the input of a layer.
        read: an operation took it as input.
        first: it holds the first result of an operation; the others may be there for a backward pass.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.alive = StorageWeakRef(tensor.untyped_storage())
        self.parts: list[tuple[set[str], _Labels]] = []
        self.weights, self.fed, self.read, self.first = False, False, False, True

    @property
    def names(self) -> set[str]:
        """The layers whose channels are in it."""
        return set().union(*(names for names, _ in self.parts))

    def find(self, tensor: Tensor) -> list[tuple[set[str], Where]]:
        """Where the channels lie in a tensor of this memory, part by part."""
        return [(names, labels.of(tensor)) for names, labels in self.parts]

    def forget(self) -> None:
        """Drop the labels, and keep the names of the layers."""
        self.parts = [(names, labels.unknown()) for names, labels in self.parts]

    def add(self, tensor: Tensor, names: set[str], where: Where) -> None:
        """Note that channels of the layers ``names`` are in a tensor of this memory."""
        for others, known in self.parts:
            if known.is_just(tensor, where):
                others |= names
                return
            if names <= others:
                known.write(tensor, where)
                return
        self.parts.append((set(names), _Labels(tensor, where)))


class _Labels:
    """Where channels lie in a memory, written tensor by tensor."""

    def __init__(self, tensor: Tensor, where: Where) -> None:
        self._size = tensor.element_size()
        # As long as one tensor alone was written to, it is kept how.
        self._one: tuple[Any, Where] | None = (_geometry(tensor), where)
        self._all: Tensor | None = None

    @property
    def heavy(self) -> bool:
        """Whether there is a label for each element."""
        return self._all is not None

    def unknown(self) -> _Labels:
        """These labels, when nothing is known of them any more."""
        self._one, self._all = None, None
        return self

    def is_just(self, tensor: Tensor, where: Where) -> bool:
        """Whether this was written to this tensor, and nothing else was."""
        if self._one is None or self._one[0] != _geometry(tensor):
            return False
        known = self._one[1]
        if isinstance(known, Tensor) and isinstance(where, Tensor):
            return known.shape == where.shape and torch.equal(known, where)
        return type(known) is type(where) and known == where

    def of(self, tensor: Tensor) -> Where:
        """Where the channels lie in a tensor."""
        if self._one is not None and self._one[0] == _geometry(tensor):
            return self._one[1]
        every = self._every(tensor)
        return None if every is None else compact(_at(every, tensor))

    def write(self, tensor: Tensor, where: Where) -> None:
        """Note where further channels lie in a tensor."""
        every, labels = self._every(tensor), written_out(where, tensor.shape)
        self._one = None
        if every is None or labels is None:
            self._all = None
        else:
            known = _at(every, tensor)
            known.copy_(both(known, labels) if known.any() else labels)

    def _every(self, tensor: Tensor) -> Tensor | None:
        """The labels of all elements; None if nothing is known of them."""
        count = tensor.untyped_storage().nbytes() // self._size
        if tensor.element_size() != self._size or count > MOST:
            return None
        if self._one is not None and self._all is None:
            (shape, *lies), where = self._one
            labels = written_out(where, shape)
            if labels is not None:
                self._all = torch.zeros(count, dtype=torch.int32)
                self._all.as_strided(shape, *lies).copy_(labels)
        return None if self._all is None or len(self._all) != count else self._all


class _Follow(TorchDispatchMode):
    """Follows the channels of layers through the operations of a pass; ``found`` is what it finds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found = Followed()
        self._memories: dict[int, _Memory] = {}
        self._heavy: list[_Memory] = []
        self._inside: list[str] = []
        self._labelling = False
        self._noted, self._handed_on = carrying(self._note), carrying(self._hands_on)
        self._modes: tuple[int, int] | None = None
        for parameter in model.parameters():
            if (memory := self._memory(parameter)) is not None:
                memory.weights = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._labelling:
            self._labelling = True  # code of torch.jit keeps this mode in force here
            self._noted(func, args, kwargs or {}, result)
            self._labelling = False
        return result

    def begin(self) -> None:
        """Note that the pass begins, in which this mode alone is in force so far."""
        self._modes = modes_running()

    def shortcuts(self, model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """What layers of ``model`` compute, each with a ``forward`` that notes its one operation itself.

        PyTorch would take a way through Python around each operation, and around each function that calls it.
        """
        for module in model.modules():
            if (operation := single_operation(module)) is not None:
                forward = type(module).forward
                yield module, functools.partial(self._shortcut, module, forward, carrying(operation))

    def _shortcut(self, module: nn.Module, forward: Any, operation: Operation, input: Any) -> Any:
        # The model's own modes, and transforms of torch.func, see each operation.
        if self._modes is not None and modes_running() == self._modes:
            with outside_modes():
                key = _key(input) if is_plain(input) else None
                memory = None if key is None else self._memories.get(key)
                func, args = (None, ()) if memory is None else operation(module, input)
                if memory is not None and func is not None:
                    output = forward(module, input)
                    if not self._handed_on(memory, args, output):
                        self._noted(func, args, {}, output)
                    return output
        return forward(module, input)

    def _hands_on(self, memory: _Memory, args: tuple[Any, ...], output: Tensor) -> bool:
        """Note, as ``_note`` would in more time, that a norm or an activation leaves the channels in their
        places; returns whether it is one, and no more is to be said.

        Args:
            memory: of the input, the first of ``args``.
        """
        input, *others = args
        if type(args[-1]) is int or self._inside or len(memory.parts) > 1 or input.shape != output.shape:
            return False  # a convolution, for instance, whose last argument is its number of groups
        if output is input:
            return True
        known = [other for part in others if isinstance(part, Tensor) and (other := self._memory(part))]
        made = self._memory(output)
        if made is None or made is memory or any(other.parts or other.fed for other in known):
            return False
        memory.read = True
        made.fed |= memory.fed
        pure = memory.weights or not (memory.parts or memory.fed)
        made.weights = pure and (memory.weights or any(other.weights for other in known))
        for names, where in memory.find(input):
            made.add(output, names, where)
        self._forget([memory])
        return True

    def before(self, name: str, _module: nn.Module, inputs: Any) -> None:
        """Note that a convolution or linear layer begins to compute."""
        self._inside.append(name)
        self._labelling = True  # what follows is not the model's
        with outside_modes():
            for tensor in _tensors_in(inputs):
                if (memory := self._memory(tensor)) is not None:
                    memory.fed = True
        self._labelling = False

    def after(self, name: str, module: nn.Module, _inputs: Any, output: Tensor) -> None:
        """Note that it has computed ``output``."""
        while self._inside and self._inside.pop() != name:
            pass  # layers that returned no tensor
        self._labelling = True
        with outside_modes():
            self._mark(name, module, output)
        self._labelling = False

    def _mark(self, name: str, module: nn.Module, output: Tensor) -> None:
        memory = self._memory(output)
        if memory is None:
            self._leave([name], _LOST)
            return
        memory.parts = [(left, labels) for names, labels in memory.parts if (left := names - {name})]
        memory.add(output, {name}, channel_dim(module, output))

    def read(self, tensor: Tensor) -> None:
        """Note that the model takes a tensor's numbers out of PyTorch."""
        if not self._labelling and (memory := self._memory(tensor)) is not None:
            self._leave(memory.names, _READ)

    def end(self, outputs: Sequence[Tensor], kept: Iterable[Tensor]) -> None:
        """Look which memories are held or were never read, after the pass.

        Args:
            outputs: the tensors that the model returned.
            kept: tensors whose memory may be held.
        """
        returned = [memory for tensor in outputs if (memory := self._memory(tensor)) is not None]
        for memory in returned:
            self._leave(memory.names, OUTPUT)
        passed = {id(memory) for memory in (*returned, *(self._memory(tensor) for tensor in kept))}
        others = [memory for memory in self._memories.values() if memory.parts and id(memory) not in passed]
        if any(not memory.alive.expired() for memory in others):
            gc.collect()  # a circle of references holds tensors for a while
        for memory in others:
            if not memory.alive.expired():
                self._leave(memory.names, _HELD)
            elif memory.first and not memory.read:
                self._leave(memory.names, _UNUSED)

    def _leave(self, names: Iterable[str], reason: str) -> None:
        for name in names:
            self.found.escapes.setdefault(name, reason)

    def _memory(self, tensor: Tensor) -> _Memory | None:
        """The memory of ``tensor``; None if it has none of the plain kind."""
        key = _key(tensor)
        if key is not None and key not in self._memories:
            self._memories[key] = _Memory(tensor)
        return None if key is None else self._memories[key]

    def _forget(self, used: Iterable[_Memory]) -> None:
        """Drop the labels of tensors that are no more: with one for each element they take much room."""
        for memory in used:
            if memory.parts and memory not in self._heavy and any(labels.heavy for _, labels in memory.parts):
                self._heavy.append(memory)
        if not self._heavy:
            return
        for memory in self._heavy:
            if memory.alive.expired():
                memory.forget()
        self._heavy = [memory for memory in self._heavy if not memory.alive.expired()]

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        operation, facts = func.overloadpacket.__name__.rstrip("_"), _facts(func)
        if facts.empty:
            return
        given = [(tensor, self._memory(tensor)) for tensor in _tensors_in((args, kwargs))]
        memories = [memory for _, memory in given if memory is not None]
        written = _written(facts, args, kwargs)
        filled = [(tensor, self._memory(tensor), True) for tensor in written]
        filled += [
            (tensor, self._memory(tensor), False)
            for tensor in _tensors_in(result)
            if not any(tensor is other for other in written)
        ]
        sums = contracted(operation, args) if facts.contracts else ()
        moving: list[tuple[set[str], Tensor, Where]] = []
        for tensor, memory in given:
            if memory is None:
                continue
            memory.read |= all(memory is not other for _, other, _ in filled)
            if memory.parts and not (operation == "copy" and tensor is args[0]):  # which is overwritten
                moving += [
                    (names, tensor, where)
                    for names, where in memory.find(tensor)
                    if not (sums and self._mixes(sums, args, tensor, where))
                ]
        if not self._inside and self.found.apart and moving:
            places = [(operand, where) for _, operand, where in moving]
            self.found.apart = keeps_apart(func, args, kwargs, places)
        fed = any(memory.fed for memory in memories)
        inside = {self._inside[-1]} if self._inside and fed else set()
        if not filled:  # a number of Python's
            self._leave(inside.union(*(names for names, _, _ in moving)), _READ)
        for place, (tensor, memory, changed) in enumerate(filled):
            if memory is None:
                self._leave(inside.union(*(names for names, _, _ in moving)), _LOST)
                continue
            if not changed and any(memory is other for other in memories):
                continue  # a view, whose labels lie in the memory
            known = [other for other in memories if other is not memory]
            memory.fed |= fed
            pure = all(other.weights or not (other.parts or other.fed or sums) for other in known)
            memory.weights = pure and (memory.weights if changed else any(each.weights for each in known))
            memory.first = memory.first and place <= len(written)
            for names, operand, where in moving:
                memory.add(tensor, names, moved(func, args, kwargs, operand, where, tensor.shape))
            if inside:
                memory.add(tensor, inside, NOWHERE)
        self._forget(memories)

    def _mixes(self, sums: Any, args: Any, tensor: Tensor, where: Where) -> bool:
        """Whether an operation multiplies the channels in ``tensor`` by weights and sums over all of them."""
        for place, dim in sums:
            if args[place] is tensor:
                by = next((args[other] for other, _ in sums if other != place), args[1])
                weights = [self._memory(part) for part in _tensors_in(by)]
                return lies_along(where, dim, tensor.dim()) and all(map(self._is_weight, weights))
        return False

    def _is_weight(self, memory: _Memory | None) -> bool:
        """Whether a memory holds weights: values made from parameters alone, or any constant in a layer."""
        if memory is None or memory.parts:
            return False
        return memory.weights or bool(self._inside and not memory.fed)


class _Reading(TorchFunctionMode):
    """Notes where the model takes numbers out of PyTorch, which starts no operation."""

    def __init__(self, follow: _Follow) -> None:
        super().__init__()
        self._read = carrying(follow.read)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _READERS and args and isinstance(args[0], Tensor):
            self._read(args[0])
        return func(*args, **(kwargs or {}))


def _key(tensor: Tensor) -> int | None:
    """What tensors with the same memory have in common; None for a tensor without plain memory."""
    try:
        return storage_key(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None


def _geometry(tensor: Tensor) -> tuple[Any, Any, Any]:
    """Where the elements of a tensor lie in its memory."""
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def _at(every: Tensor, tensor: Tensor) -> Tensor:
    return every.as_strided(*_geometry(tensor))


@dataclass(frozen=True)
class _Facts:
    """What holds of every call of an operation.

    Attributes:
        empty: its result holds nothing of the tensors that it is given.
        writes: the places and names of the arguments that it writes to.
        contracts: it may multiply channels by weights and sum over them.
    """

    empty: bool
    writes: tuple[tuple[int, str], ...]
    contracts: bool


@functools.lru_cache(maxsize=1024)
def _facts(func: Any) -> _Facts:
    operation = func.overloadpacket.__name__.rstrip("_")
    places = enumerate(operator_arguments(func))
    writes = tuple((place, name) for place, (name, written) in places if written)
    return _Facts(operation in _EMPTY, writes, operation in CONTRACTIONS)


def _written(facts: _Facts, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation writes to."""
    values = [args[place] if place < len(args) else kwargs.get(name) for place, name in facts.writes]
    return _tensors_in(values)


def _tensors_in(value: Any) -> list[Tensor]:
    """The tensors in the arguments or the result of an operation."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    for part in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    ):
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, list | tuple | dict):
            found += _tensors_in(part)
    return found
