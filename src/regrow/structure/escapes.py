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
from regrow.structure.labels import both, compact, contracted, lies_along, moved, numbered, scattered
from regrow.torch_private import TorchDispatchMode, operator_arguments, storage_key

OUTPUT = "its filters are the network's output, like a classifier's"
_MAYBE = "so they may be the network's output"
_HELD = f"the network keeps what it computes from its filters after a pass (in an attribute, say), {_MAYBE}"
_READ = f"the network reads what it computes from its filters as numbers of Python or NumPy, {_MAYBE}"
_UNUSED = f"no operation reads what the network computes from its filters, {_MAYBE}"
_LOST = f"its filters reach a tensor without plain memory (a sparse one, say), {_MAYBE}"

_WEIGHTS = "weights."  # stands among the names for all parameters; no layer's name ends with a dot
# The results of these operations hold nothing of the tensors that they are given.
_EMPTY = {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"}
_EMPTY |= {"new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"}
_READERS = {"numpy", "tolist", "item", "data_ptr", "untyped_storage", "storage", "__array__", "__dlpack__"}
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
        names: the layers whose channels are in it.
        read: an operation took it as input.
        first: it holds the first result of an operation; the others may be there for a backward pass.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.alive = StorageWeakRef(tensor.untyped_storage())
        self.names: set[str] = set()
        self.read, self.first = False, True
        self._size = tensor.element_size()
        # The labels of one tensor that lies here, in their compact form, or those of all elements.
        self._one: tuple[Any, Tensor] | None = None
        self._all: Tensor | None = None

    @property
    def channels(self) -> set[str]:
        """The names without that of the weights."""
        return self.names - {_WEIGHTS}

    def labels(self, tensor: Tensor) -> Tensor:
        """The labels of a tensor that lies in this memory, with size 1 where they are the same."""
        if self._one is not None and self._one[0] == _geometry(tensor):
            return self._one[1]
        every = self._every(tensor)
        return scattered(tensor.shape) if every is None else compact(_at(every, _geometry(tensor))).clone()

    def write(self, tensor: Tensor, labels: Tensor) -> None:
        """Give the elements of a tensor that lies in this memory new labels."""
        known = self._one is not None or self._all is not None
        if not known or (self._one is not None and self._one[0] == _geometry(tensor)):
            self._one, self._all = (_geometry(tensor), labels), None
            return
        every = self._every(tensor)
        if every is not None:
            self._one = None
            _at(every, _geometry(tensor)).copy_(labels)

    def _every(self, tensor: Tensor) -> Tensor | None:
        """The labels of all elements; None if a tensor's elements are of another size."""
        count = tensor.untyped_storage().nbytes() // self._size
        if tensor.element_size() != self._size or (self._all is not None and len(self._all) != count):
            return None
        if self._all is None:
            self._all = torch.zeros(count, dtype=torch.int64)
            if self._one is not None:
                _at(self._all, self._one[0]).copy_(self._one[1])
        return self._all


class _Follow(TorchDispatchMode):
    """Follows the channels of layers through the operations of a pass.

    Attributes:
        found: layer → why its channels count as an output.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._memories: dict[int, _Memory] = {}
        self._inside: list[str] = []
        self._labelling = False
        self._noted = carrying(self._note)
        for parameter in model.parameters():
            if (memory := self._memory(parameter)) is not None:
                memory.names.add(_WEIGHTS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._labelling:
            self._noted(func, args, kwargs or {}, result)
        return result

    def before(self, name: str, _module: nn.Module, _inputs: Any) -> None:
        """Note that a convolution or linear layer begins to compute."""
        self._inside.append(name)

    def after(self, name: str, module: nn.Module, _inputs: Any, output: Tensor) -> None:
        """Note that it has computed ``output``."""
        while self._inside and self._inside.pop() != name:
            pass  # layers that returned no tensor
        self._labelling = True  # what follows is not the model's
        self._mark(name, module, output)
        self._labelling = False

    def _mark(self, name: str, module: nn.Module, output: Tensor) -> None:
        memory = self._memory(output)
        if memory is None:
            self._leave([name], _LOST)
            return
        own = numbered(output.shape, channel_dim(module, output))
        memory.write(output, both(own, memory.labels(output)) if memory.channels - {name} else own)
        memory.names.add(name)

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
        others = [memory for memory in self._memories.values() if memory.channels and memory not in passed]
        if any(not memory.alive.expired() for memory in others):
            gc.collect()  # a circle of references holds tensors for a while
        for memory in others:
            if not memory.alive.expired():
                self._leave(memory.names, _HELD)
            elif memory.first and not memory.read:
                self._leave(memory.names, _UNUSED)

    def _leave(self, names: Iterable[str], reason: str) -> None:
        for name in names:
            if name != _WEIGHTS:
                self.found.setdefault(name, reason)

    def _memory(self, tensor: Tensor) -> _Memory | None:
        """The memory of ``tensor``; None if it has none of the plain kind."""
        key = _key(tensor)
        if key is not None and key not in self._memories:
            self._memories[key] = _Memory(tensor)
        return None if key is None else self._memories[key]

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        operation = func.overloadpacket.__name__.rstrip("_")
        if operation in _EMPTY:
            return
        given = [(tensor, self._memory(tensor)) for tensor in _tensors_in((args, kwargs))]
        written = _written(func, args, kwargs)
        made = [tensor for tensor in _tensors_in(result) if not any(tensor is other for other in written)]
        results = {_key(tensor) for tensor in (*made, *written)}
        sums = contracted(operation, args)
        names: set[str] = set()
        mine: list[tuple[Tensor, Tensor]] = []
        for tensor, memory in given:
            if memory is None:
                continue
            if _key(tensor) not in results:
                memory.read = True
            if operation == "copy" and tensor is args[0]:
                continue  # its channels are overwritten
            if memory.channels and not self._mixes(sums, args, tensor, memory):
                mine.append((tensor, memory.labels(tensor)))
                names |= memory.channels
        known = [memory.names for _, memory in given if memory is not None]
        if {_WEIGHTS} in known and all(each == {_WEIGHTS} or not (each or sums) for each in known):
            names = {_WEIGHTS}  # computed from weights alone
        if self._inside and (sums or mine):
            names.add(self._inside[-1])
        if not results:
            self._leave(names, _READ)  # a number of Python's
        if not names:
            return
        before = {_key(tensor) for tensor, _ in given}
        for place, tensor in enumerate((*written, *made)):
            if place >= len(written) and _key(tensor) in before:
                continue  # a view, whose labels lie in the memory
            memory = self._memory(tensor)
            if memory is None:
                self._leave(names, _LOST)
                continue
            memory.names |= names
            memory.first = memory.first and place <= len(written)
            if mine:
                memory.write(tensor, moved(func, args, kwargs, mine, tensor.shape))

    def _mixes(self, sums: Any, args: Any, tensor: Tensor, memory: _Memory) -> bool:
        """Whether an operation multiplies the channels in ``tensor`` by weights and sums over all of them."""
        for place, dim in sums:
            if args[place] is tensor:
                by = next((args[other] for other, _ in sums if other != place), args[1])
                weights = [self._memory(part) for part in _tensors_in(by)]
                return lies_along(memory.labels(tensor), dim) and all(map(self._is_weight, weights))
        return False

    def _is_weight(self, memory: _Memory | None) -> bool:
        """Whether a memory holds weights: what is computed from parameters, or any constant in a layer."""
        return memory is not None and not memory.channels and bool(memory.names or self._inside)


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


def _at(every: Tensor, geometry: tuple[Any, Any, Any]) -> Tensor:
    return every.as_strided(*geometry)


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
