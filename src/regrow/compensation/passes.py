"""A pass that stops at each layer whose weights are to change, and goes on with the new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor, nn

from regrow.compensation.selections import Selections
from regrow.compensation.targets import Target
from regrow.least_squares.unfolded import inputs_at, outputs_at, with_batch
from regrow.looking.hooks import hooked
from regrow.looking.images import forward
from regrow.looking.shortcuts import Uses
from regrow.torch_private import writes_to

_AT_ONCE = 1 << 24  # numbers of a layer's output that are made anew at one time


@dataclass
class Call:
    """What one call of a layer read and made, at some positions of each picture.

    Attributes:
        chosen: the positions.
        output: [rows, channels].
        shape: of the whole output.
        inputs: [groups, rows, columns], where they were asked for.
        other: [rows, channels], the other summand of the sum that the output goes into; None where none is
            known.
    """

    chosen: Tensor
    output: Tensor
    shape: Size
    inputs: Tensor | None = None
    other: Tensor | None = None


class Ended(BaseException):
    """Ends a pass. It is no error, so the model's own code does not catch it."""


class Stale(Ended):
    """What follows a layer was computed with its old weights, and cannot be computed anew from here."""


Choose = Callable[[Target, int, nn.Module, Tensor], Tensor | None]
Met = Callable[[Target, list[Call]], bool]


class _Follower:
    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        choose: Choose,
        met: Met,
        selections: Selections,
        reads: bool,
    ) -> None:
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._targets = {target.name: target for target in targets}
        self._norms = {target.norm: target for target in targets if target.added and target.norm}
        self._choose, self._met, self._reads = choose, met, reads
        self._selections = selections
        self.calls: dict[str, list[Call]] = {name: [] for name in self._targets}
        self.waiting: dict[str, set[int]] = {name: set() for name in self._targets}
        self._normed = dict.fromkeys(self._targets, 0)
        self._apart: set[str] = set()  # layers that make outputs of other shapes than in the uncut network
        # The last call of each layer: its input, and how often that was written to.
        self._last: dict[str, tuple[Tensor, int]] = {}
        self.watcher = Uses(self._summed)

    def layers(self) -> list[tuple[str, nn.Module]]:
        return [(name, self._modules[name]) for name in (*self._targets, *self._norms)]

    @torch.no_grad()  # the model's own code may switch gradients on
    def after(self, name: str, module: Any, read: Any, output: Tensor) -> None:
        with self._selections.paused():
            self._after(name, module, read, output)

    def _after(self, name: str, module: Any, read: Any, output: Tensor) -> None:
        if name not in self._targets:  # a norm
            name = self._norms[name].name
            self._note(name, self._normed[name], output)
            self._normed[name] += 1
            return
        target, calls = self._targets[name], self.calls[name]
        if self._reads and len(calls) == target.calls:
            return  # the uncut network does not call it as often
        chosen = self._choose(target, len(calls), module, output)
        if chosen is None:  # the calls of this layer are never complete
            self._apart.add(name)
        if chosen is None or name in self._apart:
            return
        # Clones, because the activation behind the layer may work in place.
        call = Call(chosen, outputs_at(module, output, chosen).clone(), output.shape)
        if self._reads:
            call.inputs = (
                call.output.new_zeros(1, len(call.output), 0)
                if target.why
                else inputs_at(module, read[0], output, chosen)
            )
        calls.append(call)
        if self._reads:
            self._last[name] = read[0], writes_to(read[0])
        if target.added:
            self.waiting[name].add(len(calls) - 1)
            if not target.norm:
                self._note(name, len(calls) - 1, output)
        elif self._is_complete(target):
            self._remake(target, output)

    def _note(self, name: str, number: int, output: Tensor) -> None:
        self.watcher.note(output, (name, number, output))

    @torch.no_grad()
    def _summed(self, key: tuple[str, int, Tensor], other: Tensor | None) -> None:
        name, number, made = key
        if other is None or number not in self.waiting[name]:
            return
        target, call = self._targets[name], self.calls[name][number]
        self.waiting[name].remove(number)
        with self._selections.paused():
            call.other = outputs_at(self._modules[name], other, call.chosen).clone()
            if self._is_complete(target):
                self._remake(target, made)  # the sum is its only reader

    def _is_complete(self, target: Target) -> bool:
        return len(self.calls[target.name]) == target.calls and not self.waiting[target.name]

    def _remake(self, target: Target, made: Tensor) -> None:
        """Write into ``made`` what the layer, and the norm of a summand, make with the weights that ``met``
        gave it."""
        calls = self.calls[target.name]
        changed = self._met(target, calls)
        x, version = self._last.pop(target.name, (None, 0))
        if self._reads:
            for call in calls:  # they have been read, and would fill the memory
                call.inputs = call.other = None
                call.output = call.output.new_empty(0)
        if not changed or x is None:
            return
        # Autocast keeps copies of weights, and would not see that these changed.
        torch.clear_autocast_cache()
        written = writes_to(x) != version or (target.added and x.is_inference())  # then nobody knows
        if target.calls > 1 or target.why or written:
            raise Stale
        layer = self._modules[target.name]
        norm = self._modules[target.norm] if target.added and target.norm else None
        for some, place in _in_parts(layer, norm, x, made):
            part = type(layer).forward(layer, some)
            if norm is not None:
                part = type(norm).forward(norm, part)
            if part.shape != place.shape:  # it was asked for another size
                raise Stale
            place.copy_(part)


def _in_parts(layer: nn.Module, norm: Any, x: Tensor, made: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some pictures at a time of a layer's input and output, so that no second output lies in the memory."""
    by_batch = norm is not None and norm.running_var is None  # its statistics are those of all pictures
    if by_batch or with_batch(layer, x) is not x or len(x) != len(made):
        yield x, made
        return
    each = max(1, len(x) * _AT_ONCE // max(1, made.numel()))
    yield from zip(x.split(each), made.split(each), strict=True)


def follow(
    model: nn.Module,
    targets: Sequence[Target],
    inputs: Any,
    choose: Choose,
    met: Met,
    selections: Selections,
    *,
    reads: bool,
) -> dict[str, list[Call]]:
    """One pass, which shows what each of ``targets`` read and made.

    Args:
        choose: (layer, number of the call, module, output) → positions, or None where the call cannot be
            compared with the uncut network's.
        met: called as soon as all calls of a layer, and the sums that its outputs go into, are known. If it
            changed the weights it returns True, and the pass goes on with what they make.
        selections: of the uncut network.
        reads: whether ``Call.inputs`` are wanted, and the selections are repeated; else they are noted.

    Returns:
        The calls of the layers of which all sums are known; there may be more or fewer than ``Target.calls``.

    Raises:
        PassFailed: the model's forward pass fails.
        Stale: the pass went too far with the old weights of a layer that ``met`` changed.
    """
    follower = _Follower(model, targets, choose, met, selections, reads)
    selecting = selections.repeated() if reads else selections.noted()
    with selecting, hooked(follower.layers(), follower.after), follower.watcher:
        forward(model, inputs)
    return {name: calls for name, calls in follower.calls.items() if calls and not follower.waiting[name]}
