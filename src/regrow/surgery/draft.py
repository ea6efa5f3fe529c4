"""Drafts of plans: from how far the filters of each convolution leave, to what remains of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.indexing import index_tensor
from regrow.modules import Convolution, Norm, filter_dim, per_channel, tied_modules
from regrow.structure.flows import Flows
from regrow.surgery.plan import CutPlan, NoPlan
from regrow.surgery.removal import Removal
from regrow.surgery.verify import Probe
from regrow.torch_private import own_parameters

# How far the dropped filters of a convolution leave: they are held at 0; or the kept ones are computed alone,
# and placed among zeros right behind the convolution, or behind its norm; or their channels leave the tensors
# behind it too.
MASKED, PLACED, PLACED_BEHIND_NORM, OUT = range(4)


@dataclass(frozen=True)
class Draft:
    """A plan, and {layer: BoolTensor[channels]}: the channels present in the tensor that arrives there."""

    plan: CutPlan
    present: dict[str, Tensor]


class Drafting:
    """Drafts the plans of a removal, from the readers and from what a probe shows.

    Attributes:
        convolutions: those that run, in that order.
        fixed: those that cannot compute some of their filters alone.
        flows: which filters reach which channels.
    """

    def __init__(self, model: nn.Module, removal: Removal, probe: Probe) -> None:
        self._removal, self._probe = removal, probe
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._tied = tied_modules(model)
        self.convolutions: dict[str, Convolution] = {name: self._modules[name] for name in removal.readers}
        self._alive = {name: self._alive_filters(name) for name in self.convolutions}
        self.flows = Flows(model, removal.readers, [*probe.dead, *probe.norms])
        self.fixed = {name for name in self.convolutions if not self._owns_weight(name)}
        for name in self.convolutions:
            if name not in self.fixed and not probe.separable(name, rows=True):
                self.fixed.add(name)
        self._wanted = {name: self._wanted_channels(name) for name in self.flows.channels}
        every = torch.ones(len(self.flows.owner), dtype=torch.bool)
        self._written = self.flows.arriving(every)

    def want_everything(self) -> None:
        """Pick no channels: let every layer read all channels that it reads now."""
        self._wanted = {name: torch.ones_like(wanted) for name, wanted in self._wanted.items()}

    def _alive_filters(self, name: str) -> Tensor:
        alive = torch.ones(self.convolutions[name].out_channels, dtype=torch.bool)
        alive[index_tensor(self._removal.gone.get(name, []))] = False
        if not alive.any():
            raise NoPlan(
                f"no filter of {name!r} would be left: the filters in keep read removed channels only. Keep "
                "a filter that reads a kept channel."
            )
        return alive

    def _owns_weight(self, name: str) -> bool:
        weight = own_parameters(self._modules[name]).get("weight")
        return weight is not None and name not in self._tied

    def _wanted_channels(self, name: str) -> Tensor:
        """BoolTensor: the input channels that a layer needs in the arriving tensor."""
        module = self._modules[name]
        where = self.flows.channels[name]
        width = where.stop - where.start
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

        All writers of a channel emit it if one of its readers needs it, and an emitted channel arrives at all
        of its readers.
        """
        flows = self.flows
        alive = torch.cat(list(self._alive.values()))
        out = torch.tensor([levels[name] == OUT for name in self._alive])
        all_emitted = ~out[flows.owner]
        # There is no reader at all where the graph breaks and the model fails on noise.
        nothing = torch.zeros(0, dtype=torch.bool)
        all_present = torch.cat([nothing, *self._wanted.values()]) | ~self._written
        emitted = {name: all_emitted[where] for name, where in flows.filters.items()}
        present = {name: all_present[where] for name, where in flows.channels.items()}
        grouped = [(name, conv) for name, conv in self.convolutions.items() if conv.groups > 1]
        before = -1
        while True:
            count = int(all_emitted.sum()) + int(all_present.sum())
            if count == before:
                left = torch.zeros(len(emitted)).index_add_(0, flows.owner, (all_emitted & alive).float())
                hollow = [name for name, kept in zip(emitted, left.tolist(), strict=True) if not kept]
                if not hollow:
                    return emitted, present
                emitted[hollow[0]][int(self._alive[hollow[0]].int().argmax())] = True
            before = count
            all_emitted[flows.sources[all_present[flows.targets]]] = True
            all_present[flows.targets[all_emitted[flows.sources]]] = True
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
        """Whether the groups of a convolution that are left cannot be computed by one smaller layer."""
        conv = self.convolutions[name]
        if conv.groups == 1:
            return False
        kept = (emitted[name] & self._alive[name]).view(conv.groups, -1)
        kept = kept[kept.any(1)]
        # The weight of a transposed convolution keeps the same places in every group.
        alike = kept if filter_dim(conv) else kept.sum(1)
        return bool((alike != alike[:1]).any())

    def _write_rows(
        self,
        plan: CutPlan,
        name: str,
        level: int,
        emitted: Tensor,
        present: Mapping[str, Tensor],
    ) -> str:
        """Plan the rows of one convolution; returns the norm that places its output, or an empty name."""
        computed = emitted & self._alive[name]
        if level == MASKED:
            if not self._alive[name].all():
                conv = self.convolutions[name]
                alike = "filters" if filter_dim(conv) else "numbers of filters"
                plan.masked[name] = (
                    f"its groups lose different {alike}"
                    if self._uneven(name, {name: emitted})
                    else "computing its kept filters alone was not confirmed"
                )
                if conv.groups == 1 or not filter_dim(conv):
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
        own = [p for p in own_parameters(module).values() if p is not None]
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
