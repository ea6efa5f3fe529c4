"""Which layers read which units of a linear layer, as forward passes on a copy show it.

The graph in ``structure`` follows channels of convolutions. Here noise stands for the outputs of a linear
layer, and is drawn anew in some units: a reader's channel that changes only when a unit is drawn anew reads
that unit. A layer is left alone unless each unit arrives at one channel of the same number, mixed with
nothing else, and nothing but the linear layers found reads it.
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

    def readers(self, name: str) -> Readers | str:
        """The readers of the units of a linear layer; or why it is left alone."""
        units = self._units(name)
        candidates = {
            reader: module
            for reader, module in self._layers
            if reader != name and channels_read(module) == units and isinstance(module, nn.Linear | Norm)
        }
        if not any(isinstance(module, nn.Linear) for module in candidates.values()):
            return "no linear layer reads its units one by one"
        every = torch.arange(units)
        reached = {reader: torch.zeros(units, dtype=torch.bool) for reader in candidates}
        wrong: set[str] = set()
        before, _ = self._seen(name, candidates, torch.zeros(0, dtype=torch.int64), 0)
        if before is None:
            return "example_inputs do not reach it"
        for bit in range(max(1, (units - 1).bit_length())):
            for value in (0, 1):
                some = every[(every >> bit & 1) == value]
                for draw in range(_DRAWS):
                    after, _ = self._seen(name, candidates, some, 1 + draw)
                    for reader, module in candidates.items():
                        moved = _moved(module, before.get(reader, []), (after or {}).get(reader, []))
                        if moved is None or bool(moved[~torch.isin(every, some)].any()):
                            wrong.add(reader)
                        else:
                            reached[reader] |= moved
        if mixed := [reader for reader in wrong if isinstance(candidates[reader], nn.Linear)]:
            return f"{mixed[0]!r} does not read its units one by one"
        reading = [reader for reader in candidates if reader not in wrong and bool(reached[reader].any())]
        linear = [reader for reader in reading if isinstance(candidates[reader], nn.Linear)]
        if not linear or not torch.stack([reached[reader] for reader in linear]).any(0).all():
            return "no linear layer reads all of its units"
        for reader in linear:
            weight = own_parameters(candidates[reader]).get("weight")
            if weight is None or reader in self._tied:
                return f"{reader!r}, which reads it, shares or computes its weight"
        if self._depends(name, {reader: candidates[reader] for reader in linear}):
            return "its units are mixed with other numbers on their way"
        if self._heard(name, linear):
            return "something reads it beside linear layers"
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
    ) -> tuple[dict[str, list[Tensor]] | None, list[Tensor]]:
        """The inputs of ``readers`` and the model's outputs in one pass; None if the layer did not run.

        Args:
            some: the units that are drawn anew, from the seed ``draw``.
            others: a seed from which the inputs and the outputs of all other layers are drawn; 0: they stay.
        """
        seen: dict[str, list[Tensor]] = {}
        count = 0

        def before(reader: str, _module: nn.Module, inputs: Any) -> None:
            if reader in readers and inputs and isinstance(inputs[0], Tensor):
                seen.setdefault(reader, []).append(inputs[0].clone())

        def after(layer: str, module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
            nonlocal count
            if layer == name:
                count += 1
                noise = _noise(output, count)
                some_too = some.to(output.device)
                again = _noise(output, 1000 * draw + count).index_select(-1, some_too)
                return noise.index_copy(-1, some_too, again)
            if others and not isinstance(module, Norm):
                return _noise(output, 77 * others)
            return None

        inputs = self._inputs
        if others:
            inputs = mapped(inputs, lambda x: _noise(x, others))
        with hooked(self._layers, after=after, before=before):
            output, _ = run(self._probe, inputs, training=False)
        return (seen if count else None), floating(output)

    def _depends(self, name: str, readers: dict[str, nn.Module]) -> bool:
        """Whether what ``readers`` read depends on anything but the units of the layer."""
        none = torch.zeros(0, dtype=torch.int64)
        one, _ = self._seen(name, readers, none, 0, others=1)
        two, _ = self._seen(name, readers, none, 0, others=2)
        for reader, module in readers.items():
            moved = _moved(module, (one or {}).get(reader, []), (two or {}).get(reader, []))
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
