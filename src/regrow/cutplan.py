"""How filters leave a network, for good or for a while, layer by layer, and never with a wrong result.

Two things are always right, whatever comes behind a layer: to compute the kept filters alone and put them
at their places among zeros, and to pick, of an input, the channels that are not zero. Where the graph
says who reads a channel and who adds to it, both fall away: the channel leaves the tensors in between.
Each step that goes beyond masks is taken only if forward passes on a copy confirm it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.cutprobe import Probe
from regrow.cuts import CutPlan, is_cut
from regrow.filters import Convolution, unwrap
from regrow.readers import Norm, Readers
from regrow.removal import Removal, plan_removal
from regrow.structure import per_channel, tied_modules

__all__ = ["CutPlan", "plan_cut"]

# How far the filters of a convolution leave, best last.
_MASKED, _PLACED, _PLACED_BEHIND_NORM, _OUT = range(4)


def plan_cut(
    model: nn.Module,
    keep: Mapping[str, Tensor],
    example_inputs: Any,
    *,
    readers: Mapping[str, Readers] | None = None,
    followers: bool = True,
) -> CutPlan:
    """Plan how ``model`` computes what ``remove_filters(model, keep)`` would leave of it, with less.

    Args:
        model: any module; it is only read. Wrappers are looked through.
        keep: {name: BoolTensor[filters]}, True = alive.
        example_inputs: as for ``read_structure``.
        readers: what ``read_structure`` says of the model, where that is known already.
        followers: rows of grouped convolutions that read removed channels only go with them, as in
            ``remove_filters``; without, they go on computing what their norms make of 0.

    Returns:
        A plan whose network equals the masked one, confirmed on a copy in eval and train mode, with random
        parameters where the model's own would hide a mistake.

    Raises:
        ValueError: as ``remove_filters``; the model has been cut before; which layers run depends on the
            data; no filter of a layer would be left.
    """
    model = unwrap(model)
    if is_cut(model):
        raise ValueError("the model has been cut before, and a plan fits uncut models only.")
    removal = plan_removal(model, keep, example_inputs, readers)
    if not followers:
        removal = Removal(removal.readers, removal.dropped, {})
    if not removal.gone:
        return CutPlan()
    return _Planner(model, removal, Probe(model, removal, example_inputs)).plan()


@dataclass(frozen=True)
class _Draft:
    """A plan, and which channels it leaves in the tensors that arrive at a layer."""

    plan: CutPlan
    present: dict[str, Tensor]


class _Planner:
    def __init__(self, model: nn.Module, removal: Removal, probe: Probe) -> None:
        self._removal, self._probe = removal, probe
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._tied = tied_modules(model)
        self._convs: dict[str, Convolution] = {name: self._modules[name] for name in removal.readers}
        self._alive = {name: self._alive_filters(name) for name in self._convs}
        self._flows = {name: self._flow(found) for name, found in removal.readers.items()}
        self._fixed = {name for name in self._convs if not self._owns_weight(name)}
        for name in self._convs:
            if name not in self._fixed and not probe.separable(name, rows=True):
                self._fixed.add(name)
        written: dict[str, Tensor] = {}
        for flow in self._flows.values():
            for reader, (_, indices) in flow.items():
                mask = written.setdefault(reader, torch.zeros(self._width(reader), dtype=torch.bool))
                mask[indices] = True
        self._written = written
        self._wanted = {name: self._wanted_channels(name) for name in {*written, *probe.dead}}

    def plan(self) -> CutPlan:
        """The best plan that the probe confirms.

        Raises:
            ValueError: not even masks are confirmed: the model does not compute the same twice.
        """
        gone = self._removal.gone
        wished = dict.fromkeys(self._convs, _OUT)
        for name, found in self._removal.readers.items():
            known = self._flows[name] and not found.blocked and name in self._probe.exercised
            if not known or self._probe.partial:
                wished[name] = _PLACED_BEHIND_NORM
            if name in self._fixed:
                wished[name] = _MASKED
        if self._refuted(wished) is None:
            return self._draft(wished).plan
        levels = dict.fromkeys(self._convs, _MASKED)
        if self._refuted(levels) is not None:  # a channel that is zero in eval mode only, say
            self._wanted = {name: torch.ones_like(wanted) for name, wanted in self._wanted.items()}
            if self._refuted(levels) is not None:
                raise ValueError(
                    "the model does not compute the same twice from the same input and the same random seed, "
                    "or its numbers overflow, so no cut can be confirmed. Does its forward method keep "
                    "something from call to call?"
                )
        for level in (_PLACED, _PLACED_BEHIND_NORM):
            # A convolution that loses nothing has nothing to place.
            able = [name for name in gone if wished[name] >= level and levels[name] == level - 1]
            self._raise(levels, able, level)
        self._raise(levels, [name for name in self._convs if wished[name] == _OUT], _OUT)
        return self._draft(levels).plan

    def _raise(self, levels: dict[str, int], names: Sequence[str], level: int) -> None:
        """Raise as many of ``names``, which are in order of execution, to ``level`` as the probe confirms."""
        names = list(names)
        while names:
            ran = self._refuted(levels | dict.fromkeys(names, level))
            if ran is None:
                levels.update(dict.fromkeys(names, level))
                return
            # Some beginning of those that ran is just too long. It mostly ends where the failure showed.
            suspects = [name for name in names if name in ran]
            good, bad, step = 0, len(suspects), 1
            while good + 1 < bad:
                middle = max(bad - step, (good + bad) // 2) if good == 0 else (good + bad) // 2
                if self._refuted(levels | dict.fromkeys(suspects[:middle], level)) is None:
                    good = middle
                else:
                    bad, step = middle, 2 * step
            levels.update(dict.fromkeys(suspects[:good], level))
            names = [name for name in names if name not in suspects[: max(bad, 1)]]

    def _refuted(self, levels: Mapping[str, int]) -> set[str] | None:
        draft = self._draft(levels)
        return self._probe.refutes(draft.plan, draft.present)

    def _alive_filters(self, name: str) -> Tensor:
        alive = torch.ones(self._convs[name].out_channels, dtype=torch.bool)
        alive[self._removal.gone.get(name, [])] = False
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
            reader: (torch.tensor(reads.filters), torch.tensor(reads.indices))
            for reader, reads in found.reached.items()
            # A PReLU with one parameter takes any number of channels.
            if getattr(self._modules[reader], "num_parameters", 2) > 1
        }

    def _width(self, name: str) -> int:
        module = self._modules[name]
        counts = ("in_features", "in_channels", "num_features", "num_channels", "num_parameters")
        return int(
            next((vars(module)[count] for count in counts if count in vars(module)), len(module.weight))
        )

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
            return every if name in self._fixed or name not in self._convs else ~every
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
        emitted = {name: torch.full_like(alive, levels[name] < _OUT) for name, alive in self._alive.items()}
        present = {name: wanted.clone() for name, wanted in self._wanted.items()}
        for name, mask in present.items():
            mask |= ~self._written.get(name, torch.zeros_like(mask))
        before = -1
        while True:
            count = sum(int(mask.sum()) for mask in [*emitted.values(), *present.values()])
            if count == before:
                hollow = [name for name, mask in emitted.items() if not (mask & self._alive[name]).any()]
                if not hollow:
                    return emitted, present
                emitted[hollow[0]][int(self._alive[hollow[0]].int().argmax())] = True
            before = count
            for name, flow in self._flows.items():
                for reader, (filters, indices) in flow.items():
                    emitted[name][filters[present[reader][indices]]] = True
                    present[reader][indices[emitted[name][filters]]] = True
            for name, conv in self._convs.items():
                if conv.groups > 1 and name in present:
                    computed = emitted[name] if levels[name] == _MASKED else emitted[name] & self._alive[name]
                    busy = computed.view(conv.groups, -1).any(1)
                    present[name].view(conv.groups, -1)[busy] = True

    def _draft(self, levels: Mapping[str, int]) -> _Draft:
        levels = dict(levels)
        while True:
            emitted, present = self._settle(levels)
            uneven = [name for name in self._convs if levels[name] > _MASKED and self._uneven(name, emitted)]
            if not uneven:
                break
            levels |= dict.fromkeys(uneven, _MASKED)
        plan = CutPlan()
        placed_norms = set()
        for name in self._convs:
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
        return _Draft(plan, present)

    def _uneven(self, name: str, emitted: Mapping[str, Tensor]) -> bool:
        groups = self._convs[name].groups
        counts = (emitted[name] & self._alive[name]).view(groups, -1).sum(1)
        return groups > 1 and len(counts[counts > 0].unique()) > 1

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
        if level == _MASKED:
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
        if level == _PLACED or norm not in present or norm in self._tied:
            norm = ""
        plan.placed[norm or name] = (int(emitted.sum()), positions)
        if norm:
            plan.channels[norm] = _indices(computed)
        return norm

    def _write_norm(self, plan: CutPlan, name: str, present: Tensor) -> None:
        if not present.all():
            plan.channels[name] = _indices(present)
        silent = torch.zeros_like(present)
        for conv, found in self._removal.readers.items():
            if name in found.norms:
                silent[found.norms[name].of(self._removal.gone.get(conv, ()))] = True
        module = self._modules[name]
        own = [p for p in module._parameters.values() if p is not None]
        fits = bool(own) and all(len(parameter) == len(present) for parameter in own)
        if (silent & present).any() and fits and name not in self._tied:
            plan.spread[name] = _indices(present & ~silent)

    def _write_columns(self, plan: CutPlan, name: str, present: Tensor) -> None:
        module: Any = self._modules[name]
        groups = getattr(module, "groups", 1)
        if groups > 1:
            if name not in plan.rows:
                return
            busy = torch.zeros(groups, dtype=torch.bool)
            busy[torch.tensor(plan.rows[name]) // (module.out_channels // groups)] = True
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
