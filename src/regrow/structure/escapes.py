"""Which layers' channels leave a network with no weights behind them, in whatever form they leave.

A pass is followed operation by operation, with or without a gradient, and afterwards every memory that an
operation filled is asked whether somebody still holds it. So an output is found in an object, an attribute or
an array too, detached or counted. What cannot be followed counts as an output.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from regrow.looking.calls import run, tensors
from regrow.looking.hooks import carrying, hooked
from regrow.modules import CONSUMER_CLASSES, channel_dim
from regrow.structure.labels import MOST, both, compact, contracted, lies_along, moved, numbered, simplest
from regrow.torch_private import TorchDispatchMode, operator_arguments, storage_key

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
_OFTEN = 16  # memories
_READERS |= {"__reduce_ex__", "__deepcopy__", "__repr__", "__format__"}


def escapes(probe: nn.Module, example_inputs: Any, *, training: bool = False) -> dict[str, str]:
    """The convolutions and linear layers whose channels leave ``probe`` with no weights behind them.

    Args:
        probe: a copy of a model, whose parameters need no gradient: a graph would hold what a pass computes.
            In train mode its running statistics change.
        example_inputs: what it takes.
        training: whether the pass is in train mode.

    Returns:
        {qualified name: the reason, as it follows "the filters cannot be removed: "}.

    Raises:
        PassFailed: the model raised an error.
    """
    follow = _Follow(probe)
    layers = [
        (name, module) for name, module in probe.named_modules() if isinstance(module, CONSUMER_CLASSES)
    ]
    # Statistics are no outputs. In evaluation only single numbers are taken for statistics.
    kept = [buffer for buffer in probe.buffers() if training or buffer.numel() < 2]
    with hooked(layers, follow.after, follow.before), follow, _Reading(follow):
        output, _ = run(probe, example_inputs, training=training)
    follow.end(list(tensors(output)), kept)
    return follow.found


class _Memory:
    """What is known of the memory of some tensors.

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

    def labels(self, tensor: Tensor) -> list[tuple[set[str], Tensor | None]]:
        """The labels of a tensor that lies in this memory, part by part."""
        return [(names, labels.of(tensor)) for names, labels in self.parts]

    def forget(self) -> None:
        """Drop the labels."""
        self.parts = [(names, labels.unknown()) for names, labels in self.parts]

    def add(self, tensor: Tensor, names: set[str], labels: Tensor | None) -> None:
        """Note that channels of the layers ``names`` are in a tensor that lies in this memory."""
        labels = simplest(labels, tensor.shape)
        for others, known in self.parts:
            if known.is_just(tensor, labels):
                others |= names
                return
            if names <= others:
                known.write(tensor, labels)
                return
        self.parts.append((set(names), _Labels(tensor, labels)))


class _Labels:
    """The labels of all elements of a memory, written tensor by tensor."""

    def __init__(self, tensor: Tensor, labels: Tensor | None) -> None:
        self._size = tensor.element_size()
        # As long as one tensor alone was written to, its labels stay small: see ``compact``.
        self._one: tuple[Any, Tensor | None] | None = (_geometry(tensor), labels)
        self._all: Tensor | None = None

    def unknown(self) -> _Labels:
        """These labels, when nothing is known of them any more."""
        self._one, self._all = None, None
        return self

    def is_just(self, tensor: Tensor, labels: Tensor | None) -> bool:
        """Whether these labels were written to this tensor, and nothing else was."""
        if self._one is None or self._one[0] != _geometry(tensor):
            return False
        known = self._one[1]
        if known is None or labels is None:
            return known is labels
        return known.shape == labels.shape and torch.equal(known, labels)

    def of(self, tensor: Tensor) -> Tensor | None:
        """The labels of a tensor, with size 1 in the dimensions along which they are the same."""
        if self._one is not None and self._one[0] == _geometry(tensor):
            return self._one[1]
        every = self._every(tensor)
        return None if every is None else compact(_at(every, tensor)).clone()

    def write(self, tensor: Tensor, labels: Tensor | None) -> None:
        """Give the elements of a tensor further labels."""
        every = self._every(tensor)
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
        if self._one is not None and self._one[1] is not None:
            self._all = torch.zeros(count, dtype=torch.int32)
            self._all.as_strided(*self._one[0]).copy_(self._one[1])
        return None if self._all is None or len(self._all) != count else self._all


class _Follow(TorchDispatchMode):
    """Follows the channels of layers through the operations of a pass.

    Attributes:
        found: layer → why its channels count as an output.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._memories: dict[int, _Memory] = {}
        self._lasting: list[_Memory] = []  # those whose tensors were still there when it was looked
        self._inside: list[str] = []
        self._labelling = False
        self._noted = carrying(self._note)
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

    def before(self, name: str, _module: nn.Module, inputs: Any) -> None:
        """Note that a convolution or linear layer begins to compute."""
        self._inside.append(name)
        self._labelling = True  # what follows is not the model's
        for tensor in _tensors_in(inputs):
            if (memory := self._memory(tensor)) is not None:
                memory.fed = True
        self._labelling = False

    def after(self, name: str, module: nn.Module, _inputs: Any, output: Tensor) -> None:
        """Note that it has computed ``output``."""
        while self._inside and self._inside.pop() != name:
            pass  # layers that returned no tensor
        self._labelling = True
        self._mark(name, module, output)
        self._labelling = False

    def _mark(self, name: str, module: nn.Module, output: Tensor) -> None:
        memory = self._memory(output)
        if memory is None:
            self._leave([name], _LOST)
            return
        for names, _ in memory.parts:
            names.discard(name)
        memory.add(output, {name}, numbered(output.shape, channel_dim(module, output)))

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
        passed = [*returned, *(self._memory(tensor) for tensor in kept)]
        others = [memory for memory in self._memories.values() if memory.parts and memory not in passed]
        if any(not memory.alive.expired() for memory in others):
            gc.collect()  # a circle of references holds tensors for a while
        for memory in others:
            if not memory.alive.expired():
                self._leave(memory.names, _HELD)
            elif memory.first and not memory.read:
                self._leave(memory.names, _UNUSED)

    def _leave(self, names: Iterable[str], reason: str) -> None:
        for name in names:
            self.found.setdefault(name, reason)

    def _memory(self, tensor: Tensor) -> _Memory | None:
        """The memory of ``tensor``; None if it has none of the plain kind."""
        key = _key(tensor)
        if key is not None and key not in self._memories:
            self._memories[key] = _Memory(tensor)
            self._lasting.append(self._memories[key])
            if len(self._memories) % _OFTEN == 0:
                self._forget()
        return None if key is None else self._memories[key]

    def _forget(self) -> None:
        """Drop the labels of tensors that are no more."""
        for memory in self._lasting:
            if memory.alive.expired():
                memory.forget()
        self._lasting = [memory for memory in self._lasting if not memory.alive.expired()]

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        operation = func.overloadpacket.__name__.rstrip("_")
        if operation in _EMPTY:
            return
        given = [(tensor, self._memory(tensor)) for tensor in _tensors_in((args, kwargs))]
        written = _written(func, args, kwargs)
        made = [tensor for tensor in _tensors_in(result) if not any(tensor is other for other in written)]
        results = {_key(tensor) for tensor in (*made, *written)}
        sums = contracted(operation, args)
        memories = [memory for _, memory in given if memory is not None]
        moving: list[tuple[set[str], Tensor, Tensor | None]] = []
        for tensor, memory in given:
            if memory is None:
                continue
            if _key(tensor) not in results:
                memory.read = True
            if not (operation == "copy" and tensor is args[0]):  # which is overwritten
                moving += [
                    (names, tensor, labels)
                    for names, labels in memory.labels(tensor)
                    if not self._mixes(sums, args, tensor, labels)
                ]
        fed = any(memory.fed for memory in memories)
        inside = {self._inside[-1]} if self._inside and fed else set()
        if not results:  # a number of Python's
            self._leave({*inside, *(name for names, _, _ in moving for name in names)}, _READ)
        before = {_key(tensor) for tensor, _ in given}
        for place, tensor in enumerate((*written, *made)):
            if place >= len(written) and _key(tensor) in before:
                continue  # a view, whose labels lie in the memory
            memory = self._memory(tensor)
            if memory is None:
                self._leave({*inside, *(name for names, _, _ in moving for name in names)}, _LOST)
                continue
            known = [other for other in memories if other is not memory]
            memory.fed |= fed
            memory.weights = (
                bool(known)
                and all(other.weights or not (other.parts or other.fed or sums) for other in known)
                and any(other.weights for other in known)
            )
            memory.first = memory.first and place <= len(written)
            for names, operand, labels in moving:
                memory.add(tensor, names, moved(func, args, kwargs, operand, labels, tensor.shape))
            if inside:
                memory.add(tensor, inside, torch.zeros((1,) * tensor.dim(), dtype=torch.int32))

    def _mixes(self, sums: Any, args: Any, tensor: Tensor, labels: Tensor | None) -> bool:
        """Whether an operation multiplies the channels in ``tensor`` by weights and sums over all of them."""
        for place, dim in sums:
            if args[place] is tensor:
                by = next((args[other] for other, _ in sums if other != place), args[1])
                weights = [self._memory(part) for part in _tensors_in(by)]
                return lies_along(labels, dim) and all(map(self._is_weight, weights))
        return False

    def _is_weight(self, memory: _Memory | None) -> bool:
        """Whether a memory holds weights: what is computed from parameters, or any constant in a layer."""
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


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation writes to."""
    arguments = operator_arguments(func)
    values = [(written, value) for (_, written), value in zip(arguments, args, strict=False)]
    values += [(written, kwargs.get(name)) for name, written in arguments]
    return [tensor for written, value in values if written for tensor in _tensors_in(value)]


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in the arguments or the result of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors_in(part)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
