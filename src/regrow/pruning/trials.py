"""Make small copies of a network to measure, and turn the original into one of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.compensation.compensate import compensate
from regrow.looking.copies import copied
from regrow.pruning.estimate import Estimate
from regrow.structure.readers import Readers
from regrow.surgery.cut import keep_of_uncut
from regrow.surgery.layers import apply_plan, is_cut, widen
from regrow.surgery.plan import CutPlan
from regrow.surgery.planning import plan_cut
from regrow.surgery.removal import plan_removal


@dataclass(frozen=True)
class Trial:
    """A cut copy of a model.

    Attributes:
        model: the copy.
        keep: {name: BoolTensor[filters]}, True = alive, over the filters of the model.
        plan: what is left of each layer, for the model as it was before its first cut.
        gone: {name: indices of removed filters}, followers too, in the numbering of the model.
        compensation: part of the record of ``compensate``, or None.
    """

    model: nn.Module
    keep: Mapping[str, Tensor]
    plan: CutPlan
    gone: Mapping[str, list[int]]
    compensation: dict[str, Any] | None


class Bench:
    """Makes copies of one model, in evaluation mode, with filters removed.

    Args:
        model: the network, cut before or not; it is only read.
        example_inputs: as ``read_structure`` takes them.
        readers: the result of ``read_structure`` for ``uncut(model)``.
        images: batches to compensate with; None for no compensation.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, readers: Mapping[str, Readers], images: list[Any] | None
    ) -> None:
        self._model, self._example, self._readers, self._images = model, example_inputs, readers, images
        self._whole = uncut(model)
        self._left = keep_of_uncut(model, {}, readers)
        # The masks and plan of the last cut: a search often ends with the cut that it tried last.
        self._planned: tuple[dict[str, Tensor], CutPlan] | None = None

    def masked(self, keep: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Any] | None]:
        """Return a copy of full size with the values of the cut network, and the record of ``compensate``."""
        model = copied(self._whole, torch.clone).eval()
        keep = self._keep(keep)
        if self._images is not None:
            done = compensate(model, keep, self._images, example_inputs=self._example, readers=self._readers)
            return model, {key: done[key] for key in ("method", "layers", "unfolded", "images")}
        with torch.no_grad():
            plan_removal(model, keep, self._example, self._readers).apply(model)
        return model, None

    def cut(self, keep: Mapping[str, Tensor], *, compensated: bool) -> Trial:
        """Return a small copy. Without ``compensated``, only its sizes are right, not its values."""
        if all(mask.all() for mask in keep.values()):
            nothing = (
                {"method": "least-squares", "layers": {}, "unfolded": {}, "images": 0}
                if self._images
                else None
            )
            return Trial(copied(self._model, torch.clone).eval(), keep, CutPlan(), {}, nothing)
        whole = self._keep(keep)
        plan = self._plan(whole)
        model, record = self.masked(keep) if compensated else (copied(self._whole, torch.clone).eval(), None)
        if gone := self._removed(whole):
            apply_plan(model, plan)
        return Trial(model, keep, plan, self._gone(gone), record)

    def estimate(self, keep: Mapping[str, Tensor]) -> dict[str, float]:
        """Estimate which share of its ``macs`` and ``params`` a cut would leave, without making it."""
        before = self._estimate.of(self._removed(self._keep({})))
        after = self._estimate.of(self._removed(self._keep(keep)))
        return {kind: after[kind] / before[kind] for kind in after}

    def savings(
        self, kind: str, filters: Mapping[str, int], units: Sequence[Mapping[str, Sequence[int]]]
    ) -> dict[str, Tensor]:
        """Estimate what the removal of each filter would save, while all others are there.

        It saves the filter's row, and the columns of the layers that read its channel, if that leaves the
        tensors. Filters of one layer that are removed alone save the same, and so do units in the same
        layers.

        Args:
            kind: ``"macs"`` or ``"params"``.
            filters: {layer: how many filters it has}; their names are those of the layers that are ranked.
            units: groups of filters that go together, {layer: indices}. Each of their filters saves an equal
                part of what all save.

        Returns:
            {layer: Tensor[filters]}, float64, above 0.
        """
        before = self._estimate.of(self._removed(self._keep({})))[kind]
        known: dict[tuple[tuple[str, int], ...], float] = {}

        def saved(unit: Mapping[str, Sequence[int]]) -> float:
            alike = tuple((name, len(indices)) for name, indices in sorted(unit.items()))
            if alike not in known:
                keep = {name: torch.ones(filters[name], dtype=torch.bool) for name in unit}
                for name, indices in unit.items():
                    keep[name][list(indices)] = False
                after = self._estimate.of(self._removed(self._keep(keep)))[kind]
                known[alike] = max(1.0, before - after) / sum(map(len, unit.values()))
            return known[alike]

        coupled = {name: {i for unit in units for i in unit.get(name, ())} for name in filters}
        found = {name: torch.empty(count, dtype=torch.float64) for name, count in filters.items()}
        for name, count in filters.items():
            if alone := [index for index in range(count) if index not in coupled[name]]:
                found[name][alone] = saved({name: alone[:1]})
        for unit in units:
            for name, indices in unit.items():
                found[name][list(indices)] = saved(unit)
        return found

    @functools.cached_property
    def _estimate(self) -> Estimate:
        return Estimate(self._whole, self._example, self._readers)

    def _removed(self, whole: Mapping[str, Tensor]) -> dict[str, list[int]]:
        return plan_removal(self._whole, whole, self._example, self._readers, norms=False).gone

    def _plan(self, whole: dict[str, Tensor]) -> CutPlan:
        before, plan = self._planned or ({}, CutPlan())
        if whole.keys() != before.keys() or not all(torch.equal(whole[name], before[name]) for name in whole):
            plan = plan_cut(self._whole, whole, self._example, readers=self._readers)
            self._planned = whole, plan
        return plan

    def _keep(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``keep``, over the filters of the model, as masks over the filters before its first cut."""
        return keep_of_uncut(self._model, keep, self._readers)

    def _gone(self, gone: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """Translate ``gone`` from the uncut numbering to that of the model, without filters cut earlier."""
        found = {}
        for name, indices in gone.items():
            if (left := self._left.get(name)) is not None:
                layer: Any = self._model.get_submodule(name)
                spread = layer.out_channels == len(left)  # the layer still numbers filters held at zero
                indices = [i if spread else int(left[:i].sum()) for i in indices if left[i]]
            if indices:
                found[name] = indices
        return found


def uncut(model: nn.Module) -> nn.Module:
    """Return ``model``, or, if it was cut, a copy in its uncut shapes that computes the same."""
    if is_cut(model):
        widen(model := copied(model, torch.clone))
    return model


@torch.no_grad()
def become(model: nn.Module, trial: Trial) -> None:
    """Cut ``model``, of which ``trial`` holds a cut copy, in place, and copy the trial's values into it."""
    if not trial.gone:
        return
    widen(model)
    apply_plan(model, trial.plan)
    for mine, theirs in (
        *zip(model.parameters(), trial.model.parameters(), strict=True),
        *zip(model.buffers(), trial.model.buffers(), strict=True),
    ):
        mine.copy_(theirs)
