"""What follows a layer whose filters are dropped one at a time, for many filters and pictures in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from regrow.criteria.one_channel import PAIRS, Cases, OneChannel, is_relu, on_one_channel, read_one
from regrow.criteria.small_maps import Quick, lies_positions_first, max_pool, pictures_first, positions_first
from regrow.criteria.taken_apart import NotTakenApart, Parts
from regrow.modules import CONVOLUTION_CLASSES

_FRESH = (*CONVOLUTION_CLASSES, nn.Linear)  # layers whose output is no view of anything
_NUMBERS = {"cpu": 2**25}  # of the largest tensor of a batch of cases; of other devices:
_NUMBERS_ELSEWHERE = 2**28
_MOST_CASES = {"cpu": 256}  # more would leave the caches
_MOST_CASES_ELSEWHERE = 2**14

Values = dict[fx.Node, Any]


class Pass:
    """The values of the full network's pass over a batch of pictures.

    Raises:
        NotTakenApart: an operation fails.
    """

    def __init__(self, parts: Parts, inputs: Any, pictures: int) -> None:
        self.pictures = pictures
        self.values = parts.values(inputs)
        self.outputs = self.values[parts.nodes[-1]]
        for node, value in self.values.items():
            # The layout in which ``read_one`` takes the outputs of convolutions.
            if type(parts.module(node)) is nn.Conv2d and value.is_cpu and value.dim() == 4:
                self.values[node] = pictures_first(positions_first(value))

    def is_batched(self, value: Any) -> bool:
        """Whether a value of the pass is a tensor with the pictures in its first dimension."""
        return isinstance(value, Tensor) and value.dim() > 0 and len(value) == self.pictures


class Following:
    """The operations behind one layer, repeated for its dropped filters on the pictures of one pass.

    Args:
        parts: the model taken apart.
        layer: a convolution.
        silent: {layer: the channel in which it is silent without filter i, Tensor[filters]}, of the convolution
            and of the norms that are silenced with its filters.
        clean: the pass of the full network.
        quick: what the convolutions of small pictures are computed with.

    Raises:
        NotTakenApart: the model does not call the layer.
    """

    def __init__(
        self, parts: Parts, layer: str, silent: Mapping[str, Tensor], clean: Pass, quick: Quick
    ) -> None:
        self._parts, self._silent, self._clean, self._quick = parts, silent, clean, quick
        self._calls = parts.calls_of(layer)
        if not self._calls:
            raise NotTakenApart(f"its pass does not call {layer!r} as a layer")
        self._steps = parts.affected(self._calls)
        if self._steps[-1] is not parts.nodes[-1]:
            raise NotTakenApart(f"its output does not depend on {layer!r}")
        self._last = {node: place for place, step in enumerate(self._steps) for node in step.all_input_nodes}
        sizes = [clean.values[step].numel() for step in self._steps if clean.is_batched(clean.values[step])]
        made = clean.values[self._calls[0]]
        if not clean.is_batched(made) or made.dim() < 3:
            raise NotTakenApart(f"{layer!r} does not make a channel of each picture")
        device = made.device.type
        self._made = made
        self.filters = torch.arange(made.shape[1], device=made.device)
        self.largest = made[:, 0].numel()  # numbers in the channel that a filter makes of all pictures
        fit = _NUMBERS.get(device, _NUMBERS_ELSEWHERE) * clean.pictures // max(sizes)
        self._most = max(1, min(_MOST_CASES.get(device, _MOST_CASES_ELSEWHERE), fit))

    def loudest(self, count: int) -> Tensor:
        """The filters that make the largest numbers."""
        loudness = self._made.abs().transpose(0, 1).flatten(1).mean(1)
        return loudness.topk(min(count, len(loudness))).indices.sort().values

    def outputs(self, filters: Tensor) -> Iterator[tuple[Cases, Any]]:
        """The model's outputs without each of ``filters`` alone, for the pictures that show a difference.

        Yields:
            Some of the pairs (filter, picture), as numbers, and the outputs for them.

        Raises:
            NotTakenApart: an operation fails.
        """
        every = torch.arange(self._clean.pictures, device=filters.device)
        cases = Cases(filters.repeat_interleave(len(every)), every.repeat(len(filters)))
        values: Values = {}
        begun = 0
        while begun < len(self._steps) and self._step(begun, values, cases, alone=True):
            begun += 1
        changed = torch.zeros(len(cases), dtype=torch.bool, device=filters.device)
        for one in values.values():
            changed |= (one.maps != one.before(cases)).view(len(cases), -1).any(1)
        kept = changed.nonzero().flatten()
        for some in kept.split(self._most):
            these = cases.at(some)
            going = {node: one.at(some) for node, one in values.items()}
            for place in range(begun, len(self._steps)):
                self._step(place, going, these, alone=False)
            yield these, going[self._steps[-1]]

    def _step(self, place: int, values: Values, cases: Cases, *, alone: bool) -> bool:
        """Do one operation; with ``alone`` only if it changes one channel of each case. Whether it was done."""
        node = self._steps[place]
        module = self._parts.module(node)
        value: Any = self._on_one_channel(node, module, values, cases)
        if value is None:
            if alone:
                return False
            value = self._on_all(node, module, place, values, cases)
        if node.op == "call_module" and str(node.target) in self._silent:
            value = _silenced(value, self._silent[str(node.target)][cases.filters], cases)
        values[node] = value
        for used in node.all_input_nodes:
            if self._last[used] == place:
                values.pop(used, None)
        return True

    def _on_one_channel(self, node: fx.Node, module: Any, values: Values, cases: Cases) -> OneChannel | None:
        clean = self._clean.values[node]
        changed = [values[other] for other in node.all_input_nodes if other in values]
        if not changed:  # a call of the layer itself, which _step silences
            channels = self._silent[str(node.target)][cases.filters]
            return OneChannel(clean, channels, clean.new_zeros(1).expand(len(cases), *clean.shape[2:]))
        if node.op == "output" or not all(isinstance(each, OneChannel) for each in changed):
            return None

        def value_of(other: fx.Node) -> Any:
            return values[other] if other in values else self._unchanged(other, cases)

        args, kwargs = map_arg(node.args, value_of), map_arg(node.kwargs, value_of)
        return on_one_channel(module, node.target, args, dict(kwargs), clean, cases)

    def _unchanged(self, node: fx.Node, cases: Cases) -> Any:
        if self._parts.is_number(node):
            return self._parts.numbers(node, self._clean.values, self._clean.pictures, len(cases))
        return self._clean.values[node]

    def _on_all(self, node: fx.Node, module: Any, place: int, values: Values, cases: Cases) -> Any:
        source = node.all_input_nodes[0]
        first = values.get(source)
        if isinstance(first, OneChannel) and module is not None and not node.kwargs:
            made = read_one(module, (first, *node.args[1:]), self._clean.values[node], cases)
            if made is not None:
                return made

        def value_of(other: fx.Node) -> Any:
            value = values[other] if other in values else self._unchanged(other, cases)
            if isinstance(value, OneChannel):
                return value.whole(cases)
            if other not in values and self._depends(other) and self._clean.is_batched(value):
                return value[cases.pictures]
            return value

        if isinstance(first, Tensor) and len(node.args) == 1 and not node.kwargs and first.dim() == 4:
            if is_relu(module, node.target) and self._last[source] == place and self._is_fresh(source):
                return first.relu_()
            if type(module) is nn.Conv2d and (made := self._quick.convolved(module, first)) is not None:
                return made
            if type(module) is nn.MaxPool2d and lies_positions_first(first):
                if (made := max_pool(module, first)) is not None:
                    return made
        return self._parts.evaluate(node, value_of)

    def _depends(self, node: fx.Node) -> bool:
        """Whether a value may hold pictures in its first dimension: a parameter does not."""
        return node.op != "get_attr"

    def _is_fresh(self, node: fx.Node) -> bool:
        return type(self._parts.module(node)) in _FRESH or node.target in PAIRS


def _silenced(value: Any, channels: Tensor, cases: Cases) -> Any:
    """``value`` with zeros in one channel of each case."""
    if isinstance(value, OneChannel):
        if torch.equal(value.channels, channels):
            return OneChannel(value.clean, value.channels, torch.zeros_like(value.maps))
        value = value.whole(cases)
    value = value.clone()
    value[torch.arange(len(cases), device=value.device), channels] = 0
    return value
