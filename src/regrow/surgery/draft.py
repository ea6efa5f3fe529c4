"""From how far the filters of each convolution leave, to what that leaves of every layer."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.filters import Convolution, named_parts
from regrow.indexing import index_tensor
from regrow.structure.readers import Norm, Readers, per_channel, tied_modules
from regrow.surgery.layers import CutPlan
from regrow.surgery.removal import Removal
from regrow.surgery.verify import Probe

# How far the filters of a convolution leave: held at 0; placed among zeros, right behind it or behind its
# norm; out of the tensors behind it too.
MASKED, PLACED, PLACED_BEHIND_NORM, OUT = range(4)


@dataclass(frozen=True)
class Draft:
    """A plan, and which channels it leaves in the tensors that arrive at a layer."""

    plan: CutPlan
    present: dict[str, Tensor]


class Drafting:
    """What is known of a model's layers, and the plans that follow from it.

    Attributes:
        convolutions: those that run, in that order.
        fixed: those that cannot compute some of their filters alone.
        flows: convolution → layer that its channels reach → (filters, the layer's input channels).
    """

    def __init__(self, model: nn.Module, removal: Removal, probe: Probe) -> None:
        self._removal, self._probe = removal, probe
        self._modules: dict[str, Any] = dict(named_parts(model))
        self._tied = tied_modules(model)
        self.convolutions: dict[str, Convolution] = {name: self._modules[name] for name in removal.readers}
        self._alive = {name: self._alive_filters(name) for name in self.convolutions}
        self.flows = {name: self._flow(found) for name, found in removal.readers.items()}
        self.fixed = {name for name in self.convolutions if not self._owns_weight(name)}
        for name in self.convolutions:
            if name not in self.fixed and not probe.separable(name, rows=True):
                self.fixed.add(name)
        readers = [*(reader for flow in self.flows.values() for reader in flow), *probe.dead, *probe.norms]
        self._wanted = {name: self._wanted_channels(name) for name in dict.fromkeys(readers)}
        self._pairs = _Pairs(self.flows, self._alive, self._wanted)

    @functools.cached_property
    def together(self) -> dict[str, set[str]]:
        """Convolution → those that write to channels of the same tensors, itself among them."""
        together = {name: {name} for name in self.convolutions}
        writers: dict[str, Tensor] = {}  # of each channel of a layer, the number of the last one seen
        names = list(self.convolutions)
        for number, name in enumerate(names):
            for reader, (_, indices) in self.flows[name].items():
                last = writers.setdefault(reader, torch.full((self._width(reader),), -1))
                for other in last[indices].unique().tolist():
                    if other >= 0 and names[other] not in together[name]:
                        both = together[name] | together[names[other]]
                        together |= dict.fromkeys(both, both)
                last[indices] = number
        return together

    def want_everything(self) -> None:
        """Pick no channels: let every layer read all that it does now."""
        self._wanted = {name: torch.ones_like(wanted) for name, wanted in self._wanted.items()}

    def _alive_filters(self, name: str) -> Tensor:
        alive = torch.ones(self.convolutions[name].out_channels, dtype=torch.bool)
        alive[index_tensor(self._removal.gone.get(name, []))] = False
        if not alive.any():
            raise ValueError(
                f"no filter of {name!r} would be left: those in keep read removed channels only. Keep one of "
                "them that reads a channel that is kept."
            )
        return alive

    def _owns_weight(self, name: str) -> bool:
        weight = self._modules[name]._parameters.get("weight")
        return weight is not None and name not in self._tied

    def _flow(self, found: Readers) -> dict[str, tuple[Tensor, Tensor]]:
        """Where the channels of a convolution go: {layer: (filters, the layer's input channels)}."""
        return {
            reader: (index_tensor(reads.filters), index_tensor(reads.indices))
            for reader, reads in found.reached.items()
            # A PReLU with one parameter takes any number of channels.
            if getattr(self._modules[reader], "num_parameters", 2) > 1
        }

    def _width(self, name: str) -> int:
        module = self._modules[name]
        counts = ("in_features", "in_channels", "num_features", "num_channels", "num_parameters")
        known = next((vars(module)[count] for count in counts if count in vars(module)), None)
        return int(len(module.weight) if known is None else known)

    def _wanted_channels(self, name: str) -> Tensor:
        """The input channels that a layer needs in the tensor that arrives, whatever the others do."""
        module = self._modules[name]
        width = self._width(name)
        every = torch.ones(width, dtype=torch.bool)
        if isinstance(module, nn.PReLU):
            return every if name in self._tied else ~every
        if isinstance(module, Norm):
            return ~every if per_channel(module) and name not in self._tied else every
        if getattr(module, "groups", 1) > 1:
            return every if name in self.fixed or name not in self.convolutions else ~every
        dead = self._probe.dead.get(name, ~every)
        if not self._owns_weight(name) or len(dead) != width or not self._probe.separable(name, rows=False):
            return every
        if dead.all():
            dead = dead.clone()
            dead[0] = False
        return ~dead

    def _settle(self, levels: Mapping[str, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Which filters each convolution emits, and which channels then arrive at each reader.

        A channel that a reader wants is emitted by everyone who adds to it, and one that is emitted
        arrives everywhere it leads to.
        """
        pairs = self._pairs
        alive = torch.cat(list(self._alive.values()))
        out = torch.tensor([levels[name] == OUT for name in self._alive])
        all_emitted = ~out[pairs.owner]
        # Nothing is known of any reader where the graph breaks and the model bears no noise.
        nothing = torch.zeros(0, dtype=torch.bool)
        all_present = torch.cat([nothing, *self._wanted.values()]) | ~pairs.written
        emitted = {name: all_emitted[where] for name, where in pairs.filters.items()}
        present = {name: all_present[where] for name, where in pairs.channels.items()}
        grouped = [(name, conv) for name, conv in self.convolutions.items() if conv.groups > 1]
        before = -1
        while True:
            count = int(all_emitted.sum()) + int(all_present.sum())
            if count == before:
                left = torch.zeros(len(emitted)).index_add_(0, pairs.owner, (all_emitted & alive).float())
                hollow = [name for name, kept in zip(emitted, left.tolist(), strict=True) if not kept]
                if not hollow:
                    return emitted, present
                emitted[hollow[0]][int(self._alive[hollow[0]].int().argmax())] = True
            before = count
            all_emitted[pairs.sources[all_present[pairs.targets]]] = True
            all_present[pairs.targets[all_emitted[pairs.sources]]] = True
            for name, conv in grouped:
                if name in present:
                    masked = levels[name] == MASKED
                    computed = emitted[name] if masked else emitted[name] & self._alive[name]
                    busy = computed.view(conv.groups, -1).any(1)
                    present[name].view(conv.groups, -1)[busy] = True

    def draft(self, levels: Mapping[str, int]) -> Draft:
        """The plan in which the filters of each convolution leave as far as ``levels`` says."""
        levels = dict(levels)
        while True:
            emitted, present = self._settle(levels)
            uneven = [
                name for name in self.convolutions if levels[name] > MASKED and self._uneven(name, emitted)
            ]
            if not uneven:
                break
            levels |= dict.fromkeys(uneven, MASKED)
        plan = CutPlan()
        placed_norms = set()
        for name in self.convolutions:
            placed_norms.add(self._write_rows(plan, name, levels[name], emitted[name], present))
        for name, mask in present.items():
            module = self._modules[name]
            if isinstance(module, Norm):
                if name not in placed_norms:
                    self._write_norm(plan, name, mask)
            elif isinstance(module, nn.PReLU):
                if not mask.all():
                    plan.channels[name] = _indices(mask)
            else:
                self._write_columns(plan, name, mask)
        return Draft(plan, present)

    def _uneven(self, name: str, emitted: Mapping[str, Tensor]) -> bool:
        groups = self.convolutions[name].groups
        if groups == 1:
            return False
        counts = (emitted[name] & self._alive[name]).view(groups, -1).sum(1)
        return len(counts[counts > 0].unique()) > 1

    def _write_rows(
        self,
        plan: CutPlan,
        name: str,
        level: int,
        emitted: Tensor,
        present: Mapping[str, Tensor],
    ) -> str:
        """The part of one convolution; returns the norm that places its output, if one does."""
        computed = emitted & self._alive[name]
        if level == MASKED:
            if not self._alive[name].all():
                plan.masked[name] = (
                    "its groups lose different numbers of filters"
                    if self._uneven(name, {name: emitted})
                    else "computing its kept filters alone was not confirmed"
                )
                plan.spread[name] = _indices(self._alive[name])
            return ""
        if not computed.all():
            plan.rows[name] = _indices(computed)
        if torch.equal(computed, emitted):
            return ""
        positions = _indices(computed[emitted])
        norm = self._probe.own.get(name, "")
        if level == PLACED or norm not in present or norm in self._tied:
            norm = ""
        plan.placed[norm or name] = (int(emitted.sum()), positions)
        if norm:
            plan.channels[norm] = _indices(computed)
        return norm

    def _write_norm(self, plan: CutPlan, name: str, present: Tensor) -> None:
        if not present.all():
            plan.channels[name] = _indices(present)
        loud = present.clone()
        for silent in (self._removal.norms.get(name), self._removal.silenced.get(name)):
            if silent is not None:
                loud[index_tensor(silent)] = False
        module = self._modules[name]
        own = [p for p in module._parameters.values() if p is not None]
        fits = bool(own) and all(parameter.shape == present.shape for parameter in own)
        if fits and name not in self._tied and not torch.equal(loud, present):
            plan.spread[name] = _indices(loud)

    def _write_columns(self, plan: CutPlan, name: str, present: Tensor) -> None:
        module: Any = self._modules[name]
        groups = getattr(module, "groups", 1)
        if groups > 1:
            if name not in plan.rows:
                return
            busy = torch.zeros(groups, dtype=torch.bool)
            busy[index_tensor(plan.rows[name]) // (module.out_channels // groups)] = True
            read = busy.repeat_interleave(len(present) // groups)
            if not busy.all():
                plan.groups[name] = int(busy.sum())
        else:
            read = present & self._wanted[name]
            if not read.all():
                plan.columns[name] = _indices(read)
        if not torch.equal(read, present):
            plan.picked[name] = _indices(read[present])


def _indices(mask: Tensor) -> list[int]:
    indices: list[int] = mask.nonzero().flatten().tolist()
    return indices


class _Pairs:
    """Which filters reach which channels of which layers, both numbered over the whole network.

    Attributes:
        sources, targets: [pairs] the filter and the channel.
        filters, channels: convolution, or layer → where its numbers are.
        owner: [filters] the number of the convolution.
        written: BoolTensor[channels]: some filter reaches it.
    """

    def __init__(
        self,
        flows: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
        filters: Mapping[str, Tensor],
        channels: Mapping[str, Tensor],
    ) -> None:
        self.filters, self.channels = _slices(filters), _slices(channels)
        empty = torch.zeros(0, dtype=torch.long)
        sources, targets = [empty], [empty]
        for name, flow in flows.items():
            for reader, (those, indices) in flow.items():
                sources.append(those + self.filters[name].start)
                targets.append(indices + self.channels[reader].start)
        self.sources, self.targets = torch.cat(sources), torch.cat(targets)
        counts = torch.tensor([len(mask) for mask in filters.values()])
        self.owner = torch.arange(len(counts)).repeat_interleave(counts)
        self.written = torch.zeros(sum(map(len, channels.values())), dtype=torch.bool)
        self.written[self.targets] = True


def _slices(masks: Mapping[str, Tensor]) -> dict[str, slice]:
    """Where each of ``masks`` lies when all are put one after the other."""
    found, start = {}, 0
    for name, mask in masks.items():
        found[name] = slice(start, start + len(mask))
        start += len(mask)
    return found
