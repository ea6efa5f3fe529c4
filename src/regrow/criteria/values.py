"""The value of a filter: the last tensor of a pass that holds what one filter makes, and nothing of others.

A pass is followed operation by operation. Behind a convolution, its value goes on through norms and through
operations that compute each number from the same number (activations, scales, casts). It ends where the
channels meet others (a sum, a concatenation), where they change their places (pooling, a flatten), where
weights read them, or where it takes two ways that do not meet again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from regrow.looking.calls import mapped, tensors
from regrow.looking.hooks import hooked
from regrow.modules import Convolution, Norm, channel_axis
from regrow.torch_private import TorchDispatchMode, operator_arguments, storage_key, tree_leaves

# Operations on each number that PyTorch does not tag as such.
_POINTWISE = {"hardswish", "hardswish_", "log_sigmoid_forward", "_prelu_kernel", "_to_copy", "clone"}
_NORMS = ("batch_norm", "group_norm", "layer_norm", "instance_norm")
# The first of these shows up where autograd saves a result; the others read no more than a shape.
_NO_READERS = ("detach", "new_", "empty_like", "zeros_like", "ones_like", "full_like", "rand", "sym_", "is_")
_MARK = "_regrow_value"

Measure = Callable[[str, Tensor], Any]


@dataclass(eq=False)
class _Value:
    """A tensor behind a convolution.

    Attributes:
        before: the values that it was computed from, by number.
        tensor: itself, until something reads it.
        measured: what the caller measured when it was first read.
        leaves: something else than the next value read it, or it is an output of the model.
    """

    call: _Call
    number: int
    before: set[int]
    tensor: Tensor | None
    measured: Any = None
    leaves: bool = False


@dataclass(eq=False)
class _Call:
    """One call of a convolution, and the values behind it, in the order in which they were computed."""

    name: str
    shape: torch.Size
    values: list[_Value] = field(default_factory=list)

    def add(self, tensor: Tensor, before: set[int]) -> None:
        value = _Value(self, len(self.values), before, tensor)
        self.values.append(value)
        setattr(tensor, _MARK, value)

    def last(self) -> _Value:
        """The last value on every way that leads on."""
        return next(
            value for value in reversed(self.values) if value.number == 0 or not self._ways_around(value)
        )

    def _ways_around(self, avoided: _Value) -> bool:
        reached = {0}
        for value in self.values[1:]:
            if value is not avoided and value.before & reached:
                reached.add(value.number)
        return any(self.values[number].leaves for number in reached)


class Watch(TorchDispatchMode):
    """Follows the values behind convolutions through passes; see ``watching``."""

    def __init__(self, model: nn.Module, measure: Measure, keep: Callable[[Any], None]) -> None:
        super().__init__()
        self._measure, self._keep = measure, keep
        self._own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._calls: list[_Call] = []
        self._paused = 0  # how many norms and measurements are being computed, one inside the other

    def inputs(self, inputs: Any) -> Any:
        """The inputs of a pass: what is computed from them is no constant."""

        def marked(tensor: Tensor) -> Tensor:
            setattr(tensor, _MARK, None)
            return tensor

        return mapped(inputs, marked)

    def take(self, outputs: Any) -> dict[str, list[Any]]:
        """What was measured of each convolution in the pass that has ended, one entry for each call.

        Args:
            outputs: what the pass returned.
        """
        for value in _values_of(tensors(outputs)):
            value.leaves = True
        found: dict[str, list[Any]] = {}
        for call in self._calls:
            self._read(call.values)
            found.setdefault(call.name, []).append(call.last().measured)
        self._calls = []
        return found

    def before_norm(self, _name: str, _norm: nn.Module, _inputs: Any) -> None:
        self._paused += 1

    def after_norm(self, _name: str, _norm: nn.Module, inputs: Any, output: Tensor) -> None:
        self._paused -= 1
        if not self._paused:
            given = [each for each in inputs if isinstance(each, Tensor)]
            self._read(_values_of(given))
            self._follow(given, output, True)

    def after_convolution(self, name: str, _conv: nn.Module, _inputs: Any, output: Tensor) -> None:
        if self._paused:
            return
        if (inner := getattr(output, _MARK, None)) is not None:  # one convolution inside of another
            inner.leaves = True
        call = _Call(name, output.shape)
        self._calls.append(call)
        call.add(output, set())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if self._paused or name.startswith(_NO_READERS):
            return func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        values = _values_of(given)
        self._read(values)
        if any(writes for _, writes in operator_arguments(func)):
            self._keep_all(values)
        output = func(*args, **kwargs)
        goes_on = torch.Tag.pointwise in func.tags or name in _POINTWISE or any(n in name for n in _NORMS)
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        for place, tensor in enumerate(made):
            if not place or not goes_on:
                self._follow(given, tensor, goes_on)
            elif any(hasattr(each, _MARK) for each in given):  # the means and variances of a norm
                setattr(tensor, _MARK, None)
        if values and {*map(_memory, made)} & {*map(_memory, given)}:  # it may be written to by another name
            self._keep_all(values)
        return output

    def _follow(self, given: list[Tensor], made: Tensor, goes_on: bool) -> None:
        """Mark ``made``, which an operation computed from ``given``, as a value, or as none.

        Args:
            goes_on: whether the operation is one that a value goes on through.
        """
        data = [tensor for tensor in given if hasattr(tensor, _MARK)]
        if not data or id(made) in self._own:
            return
        values = _values_of(data)
        calls = {id(value.call): value.call for value in values}
        alone = goes_on and len(calls) == 1 and all(getattr(tensor, _MARK) is not None for tensor in data)
        if alone and made.shape == values[0].call.shape:
            values[0].call.add(made, {value.number for value in values})
            return
        for value in values:
            value.leaves = True
        setattr(made, _MARK, None)

    def _read(self, values: list[_Value]) -> None:
        self._paused += 1
        for value in values:
            if value.tensor is not None:
                value.measured, value.tensor = self._measure(value.call.name, value.tensor), None
        self._paused -= 1

    def _keep_all(self, values: list[_Value]) -> None:
        for value in values:
            self._keep(value.measured)


def _memory(tensor: Tensor) -> int:
    return storage_key(tensor.untyped_storage()) if tensor.layout is torch.strided else 0


def _values_of(tensors: list[Tensor]) -> list[_Value]:
    found = {id(value): value for tensor in tensors if (value := getattr(tensor, _MARK, None)) is not None}
    return list(found.values())


@contextmanager
def watching(
    model: nn.Module,
    convs: Mapping[str, Convolution],
    measure: Callable[[str, Tensor], Any],
    keep: Callable[[Any], None] = lambda _measured: None,
) -> Iterator[Watch]:
    """Follow the values of ``convs`` in every pass in the block.

    Args:
        measure: called with a layer's name and each tensor that may turn out to be its value, when the first
            operation is about to read it. What it returns for the value comes from ``Watch.take``.
        keep: called with what ``measure`` returned, when the tensor may be written to.
    """
    watch = Watch(model, measure, keep)
    norms = [each for each in model.named_modules() if isinstance(each[1], get_args(Norm))]
    with (
        hooked(list(convs.items()), watch.after_convolution),
        hooked(norms, watch.after_norm, watch.before_norm),
        watch,
    ):
        yield watch


def of_filters(conv: Convolution, values: Tensor) -> Tensor:
    """``values`` of the channels that a layer puts out, as those of its filters.

    A layer that a cut made puts its channels among zeros.
    """
    placed = vars(conv).get("_regrow_at", {}).get("_regrow_placed")
    return values if placed is None else values[torch.tensor(placed, device=values.device)]


def channel_sums(conv: Convolution, tensor: Tensor, batch: bool = False) -> Tensor:
    """The sums of ``tensor``, a value of ``conv``, over all dimensions but the channels, or but these and
    the first; in double precision, on devices that have it."""
    kept = {channel_axis(conv), -tensor.dim() if batch else 0}
    dims = [dim for dim in range(-tensor.dim(), 0) if dim not in kept]
    return tensor.sum(dims, dtype=_widest(tensor)) if dims else wide(tensor)


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in double precision, on devices that have it."""
    return tensor.to(_widest(tensor))


def _widest(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
