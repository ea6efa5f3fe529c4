"""Which layers read which units of a linear layer, as forward passes on a copy show it.

The graph in ``structure`` follows channels of convolutions. Here noise stands for the outputs of all layers
with weights, and is drawn anew in some units of one: a channel of another layer's input that changes then,
and only then, is that unit's. A layer is left alone unless each unit arrives at one channel of the same
number, mixed with nothing else, and nothing but the linear layers found reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regrow.log import gave_up
from regrow.looking.calls import PassFailed, floating, mapped, run, switch
from regrow.looking.copies import copied
from regrow.looking.hooks import hooked
from regrow.looking.noise import unsettle
from regrow.marks import borrowed_weight
from regrow.modules import Norm, channel_dims, channel_layers, channels_read, per_channel, tied_modules
from regrow.structure.readers import Readers, Reads
from regrow.torch_private import own_parameters

_NONE = torch.zeros(0, dtype=torch.int64)
_DRAWS = 4  # of each half of the units: an activation may stop half of the numbers


def linear_readers(model: nn.Module, example_inputs: Any) -> tuple[dict[str, Readers], dict[str, str]]:
    """Find the readers of every linear layer of ``model``, the user's own module, which is only read.

    Returns:
        {qualified name: readers} of the layers whose units can be drawn anew; {name: reason} of the others.
    """
    found: dict[str, Readers] = {}
    left_out: dict[str, str] = {}
    passes = None
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if why := _why_not(model, name, layer):
            left_out[name] = why
            continue
        try:
            passes = passes or _Passes(model, example_inputs)
            readers = passes.readers(name)
        except PassFailed as error:
            gave_up(f"following the units of {name!r}", error)
            readers = "passes with noise in place of its units fail"
        if isinstance(readers, str):
            left_out[name] = readers
        else:
            found[name] = readers
    return found, left_out


def _why_not(model: nn.Module, name: str, layer: nn.Linear) -> str:
    weight = own_parameters(layer).get("weight")
    if weight is None:
        return borrowed_weight(layer)
    if not weight.requires_grad:
        return "its weight is frozen (requires_grad is False)"
    return "it shares its weight with another layer" if name in tied_modules(model) else ""


class _Passes:
    """Passes of a copy of a model in which noise stands for the units of one layer."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self._probe = switch(copied(model, requires_grad=False), False)
        unsettle(self._probe, torch.Generator().manual_seed(0))
        self._inputs = example_inputs
        self._layers = channel_layers(self._probe)
        self._tied = tied_modules(model)
        self._calls = 0  # of the layer, in the last pass

    def readers(self, name: str) -> Readers | str:
        """The readers of the units of a linear layer; or why it is left alone."""
        units = self._units(name)
        candidates = {
            reader: module
            for reader, module in self._layers
            if reader != name and channels_read(module) == units and isinstance(module, nn.Linear | Norm)
        }

        def is_linear(reader: str) -> bool:
            return isinstance(candidates[reader], nn.Linear)

        if not any(map(is_linear, candidates)):
            return "no linear layer reads its units one by one"
        every = torch.arange(units)
        reached = {reader: torch.zeros(units, dtype=torch.bool) for reader in candidates}
        wrong: set[str] = set()
        before, _ = self._seen(name, candidates, _NONE, 0, others=1)
        if self._calls != 1:
            return "it runs more than once" if self._calls else "example_inputs do not reach it"
        for bit in range(max(1, (units - 1).bit_length())):
            for value in (0, 1):
                some = every[(every >> bit & 1) == value]
                for draw in range(_DRAWS):
                    after, _ = self._seen(name, candidates, some, 1 + draw, others=1)
                    for reader, module in candidates.items():
                        moved = _moved(module, before.get(reader, []), after.get(reader, []))
                        if moved is None or bool(moved[~torch.isin(every, some)].any()):
                            wrong.add(reader)
                        else:
                            reached[reader] |= moved
        if mixed := [reader for reader in candidates if reader in wrong and is_linear(reader)]:
            return f"{mixed[0]!r} does not read its units one by one"
        reading = [reader for reader in candidates if reader not in wrong and bool(reached[reader].any())]
        linear = [reader for reader in reading if is_linear(reader)]
        if not linear or not torch.stack([reached[reader] for reader in linear]).any(0).all():
            return "no linear layer reads all of its units"
        for reader in linear:
            weight = own_parameters(candidates[reader]).get("weight")
            if weight is None or reader in self._tied:
                return f"{reader!r}, which reads it, shares or computes its weight"
        if self._depends(name, {reader: candidates[reader] for reader in linear}):
            return "its units are mixed with other numbers on their way"
        if self._heard(name, linear):
            return "something reads it beside the linear layers behind it"
        numbers = range(units)
        norms = [
            reader
            for reader in reading
            if per_channel(candidates[reader]) and reader not in linear and reader not in self._tied
        ]
        return Readers(
            norms={norm: Reads(numbers, numbers) for norm in norms},
            consumers={reader: Reads(numbers, numbers) for reader in linear},
        )

    def _units(self, name: str) -> int:
        layer: Any = self._probe.get_submodule(name)
        return int(layer.out_features)

    def _seen(
        self, name: str, readers: dict[str, nn.Module], some: Tensor, draw: int, others: int = 0
    ) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
        """The inputs of ``readers``, and the model's outputs, in one pass.

        Args:
            some: the units that are drawn anew, from the seed ``draw``.
            others: a seed from which the model's inputs and the outputs of all other layers with weights are
                drawn, but for norms; with 0 they are as they are.
        """
        seen: dict[str, list[Tensor]] = {}
        self._calls = ran = 0

        def before(reader: str, _module: nn.Module, inputs: Any) -> None:
            if reader in readers and inputs and isinstance(inputs[0], Tensor):
                seen.setdefault(reader, []).append(inputs[0].clone())

        def after(layer: str, module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
            nonlocal ran
            if layer == name:
                self._calls += 1
                index = some.to(output.device)
                return _noise(output, 0).index_copy(-1, index, _noise(output, draw).index_select(-1, index))
            if not others or isinstance(module, Norm):
                return None
            ran += 1
            return _noise(output, 1000 * others + ran)

        inputs = self._inputs
        if others:
            inputs = mapped(inputs, lambda x: _noise(x, others))
        with hooked(self._layers, after=after, before=before):
            output, _ = run(self._probe, inputs, training=False)
        return seen, floating(output)

    def _depends(self, name: str, readers: dict[str, nn.Module]) -> bool:
        """Whether what ``readers`` read depends on anything but the units of the layer."""
        one, _ = self._seen(name, readers, _NONE, 0, others=1)
        two, _ = self._seen(name, readers, _NONE, 0, others=2)
        for reader, module in readers.items():
            moved = _moved(module, one.get(reader, []), two.get(reader, []))
            if moved is None or bool(moved.any()):
                return True
        return False

    def _heard(self, name: str, readers: list[str]) -> bool:
        """Whether the units move the outputs though the weights of ``readers`` are 0."""
        weights: list[Any] = [self._probe.get_submodule(reader).weight for reader in readers]
        saved = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.data.zero_()
        every = torch.arange(self._units(name))
        _, before = self._seen(name, {}, every, 1)
        after = [self._seen(name, {}, every, 1 + draw)[1] for draw in range(1, _DRAWS)]
        for weight, values in zip(weights, saved, strict=True):
            weight.data.copy_(values)
        return any(len(one) != len(before) or not all(map(torch.equal, before, one)) for one in after)


def _moved(module: nn.Module, before: list[Tensor], after: list[Tensor]) -> Tensor | None:
    """BoolTensor[channels]: which of a layer's input channels changed between two passes; None if unclear."""
    if len(before) != len(after) or any(a.shape != b.shape for a, b in zip(before, after, strict=True)):
        return None
    width = channels_read(module) or 0
    moved = torch.zeros(width, dtype=torch.bool)
    for one, two in zip(before, after, strict=True):
        dims = [dim for dim in channel_dims(module, one) if dim < one.dim() and one.shape[dim] == width]
        if not dims:
            return None
        differ = (one != two) & ~(one.isnan() & two.isnan())
        moved |= differ.movedim(dims[-1], 0).flatten(1).any(1).cpu()
    return moved


def _noise(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(like)
