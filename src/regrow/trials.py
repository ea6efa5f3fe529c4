"""A network with some filters gone: small copies to measure, and how the original becomes one of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.compensation import compensate
from regrow.cutplan import plan_cut
from regrow.cuts import CutPlan, apply_plan
from regrow.readers import Readers
from regrow.removal import plan_removal


@dataclass(frozen=True)
class Trial:
    """A cut copy of a model.

    Attributes:
        model: the copy.
        keep: {name: BoolTensor[filters]}, True = alive.
        plan: what was left of each layer.
        gone: {name: indices of the filters that went}, followers too.
        compensation: the record of ``compensate``, or None.
    """

    model: nn.Module
    keep: Mapping[str, Tensor]
    plan: CutPlan
    gone: Mapping[str, list[int]]
    compensation: dict[str, Any] | None


class Bench:
    """Makes copies of one model, in evaluation mode, with filters removed.

    Args:
        model: the network as it is; it is only read.
        example_inputs: as ``read_structure`` takes them.
        readers: what ``read_structure`` says of the model.
        images: batches to compensate with; None does not compensate.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        readers: Mapping[str, Readers],
        images: Sequence[Any] | None,
    ) -> None:
        self._model, self._example, self._readers, self._images = model, example_inputs, readers, images

    def masked(self, keep: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Any] | None]:
        """A copy of the full size that computes what the cut and compensated network does; the record."""
        model = copy.deepcopy(self._model).eval()
        if self._images is not None:
            record = compensate(model, keep, self._images, example_inputs=self._example)
            return model, {key: record[key] for key in ("folded", "unfolded", "norms", "images")}
        with torch.no_grad():
            plan_removal(model, keep, self._example, self._readers).apply(model)
        return model, None

    def cut(self, keep: Mapping[str, Tensor], *, compensated: bool) -> Trial:
        """A small copy; one that is not compensated has the right sizes only."""
        plan = plan_cut(self._model, keep, self._example, readers=self._readers)
        record = None
        if compensated:
            model, record = self.masked(keep)
        else:
            model = copy.deepcopy(self._model).eval()
        gone = plan_removal(self._model, keep, self._example, self._readers).gone
        if gone:
            apply_plan(model, plan)
        return Trial(model, keep, plan, gone, record)


@torch.no_grad()
def become(model: nn.Module, trial: Trial) -> None:
    """Cut ``model``, the one that ``trial`` is of, in place, and give it the trial's values."""
    if not trial.gone:
        return
    apply_plan(model, trial.plan)
    for mine, theirs in (
        *zip(model.parameters(), trial.model.parameters(), strict=True),
        *zip(model.buffers(), trial.model.buffers(), strict=True),
    ):
        mine.copy_(theirs)
