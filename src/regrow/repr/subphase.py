"""The sub phase of a RePr cycle: filters dropped and held dead, then restored with new directions."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from regrow.filters import rows
from regrow.indexing import index_tensor
from regrow.marks import Mark, marks_on
from regrow.repr.hold import Hold
from regrow.repr.narrow import narrow
from regrow.repr.regrowth import orthogonal_rows
from regrow.repr.slots import refresh_slots
from regrow.structure.readers import (
    Readers,
    affine,
    column_mask,
    per_channel_tensors,
    silence,
    silent_entries,
)
from regrow.structure.sums import silence_norms
from regrow.surgery.plan import CutPlan

CONSUMERS = ("keep", "zero", "init")


class _Held(Mark):
    """On the layers that a sub phase works on, so that the phase can be ended where the cycle is lost."""

    travels = False

    def __init__(self, phase: SubPhase) -> None:
        self.phase = phase

    def state(self) -> str:
        """See ``Mark``."""
        return "masked" if self.phase.plan is None else "narrowed"

    def undo(self, module: nn.Module) -> None:  # noqa: ARG002
        """End the phase for all its layers."""
        self.phase.release()


def phases_on(model: nn.Module) -> list[SubPhase]:
    """The sub phases that ``model`` is in: more than one only if several cycles train its parts."""
    return list(dict.fromkeys(mark.phase for *_, mark in marks_on(model) if isinstance(mark, _Held)))


class SubPhase:
    """Holds ``dropped`` filters of ``model`` dead from its construction until ``restore`` or ``release``.

    Args:
        model: the user's own module, no wrapper.
        optimizer: the one that trains it.
        readers: {qualified name: what reads its channels}, of every layer in ``dropped``.
        dropped: {qualified name: indices of the filters}.
        consumers: what their consumers do after the restore, one of ``CONSUMERS``.
        memory: ``old_rows`` and ``old_columns`` of an earlier ``state``; without it they are taken from
            the model as it is.
        plan: how the layers compute without the dropped filters while they are dead; without it they
            compute with them, at 0. From ``plan_cut``, for ``dropped``.
        silenced: {norm: channels} behind sums that dropped filters alone write to, as ``Removal`` has them:
            held at 0 too, and given their values back.

    Raises:
        ValueError: the plan does not fit the model (see ``narrow``). Nothing is changed.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        readers: Mapping[str, Readers],
        dropped: Mapping[str, list[int]],
        consumers: str,
        memory: Mapping[str, Mapping[str, Tensor]] | None = None,
        plan: CutPlan | None = None,
        silenced: Mapping[str, list[int]] = MappingProxyType({}),
    ) -> None:
        self.plan = plan
        self._narrowing = None if plan is None else narrow(model, plan)
        self._model = model
        self._optimizer = optimizer
        self._readers = readers
        self._consumers = consumers
        self.dropped = {name: list(indices) for name, indices in dropped.items()}
        self._silenced = {name: list(channels) for name, channels in silenced.items()}
        columns = private_columns(model, readers, self.dropped)
        if memory is not None:
            self._old_rows = _copy(memory["old_rows"])
            self._old_columns = _copy(memory["old_columns"])
            self._old_norms = _copy(memory.get("old_norms", {}))
        else:
            self._old_rows = {name: self._weight(name)[i].clone() for name, i in self.dropped.items()}
            self._old_columns = {}
            if consumers == "keep":
                self._old_columns = {name: weight[mask].clone() for name, weight, mask in columns}
            self._old_norms = {key: tensor[i].clone() for key, tensor, i in self._silenced_entries()}
        silence(model, readers, self.dropped)
        silence_norms(model, self._silenced)
        if memory is None:
            self._forget(self._dead_entries())
        self._hold = Hold(self._dead_entries(), optimizer)
        names = {*self.dropped, *self._silenced, *(plan.layers() if plan is not None else ())}
        names.update(norm for name in self.dropped for norm in readers[name].norms)
        self._marked = [model.get_submodule(name) for name in names]
        for module in self._marked:
            module._regrow_held = _Held(self)  # type: ignore[assignment]

    def state(self) -> dict[str, Any]:
        """What ``memory`` takes, with ``dropped`` beside it: tensors, numbers and strings only."""
        return {
            "dropped": {name: list(indices) for name, indices in self.dropped.items()},
            "old_rows": _copy(self._old_rows),
            "old_columns": _copy(self._old_columns),
            "silenced": {name: list(channels) for name, channels in self._silenced.items()},
            "old_norms": _copy(self._old_norms),
            "plan": None if self.plan is None else self.plan.to_dict(),
        }

    def release(self) -> None:
        """Stop holding the filters, and compute with them again; they stay at 0 until they are written."""
        if self._narrowing is not None:
            self._narrowing.release()
        self._hold.release()
        for module in self._marked:
            vars(module).pop("_regrow_held", None)

    @torch.no_grad()
    def restore(self, generator: torch.Generator) -> tuple[list[str], list[str]]:
        """Regrow the dropped filters (RePr §3, step 5 of METHODS: new rows, fresh norms, cleared slots).

        Returns:
            The layers whose null space was too small for orthogonal rows, and notes on layers whose
            consumers could not be treated as asked.
        """
        self.release()
        # The consumers first: restored rows must be orthogonal to the kept rows as they will be.
        columns = private_columns(self._model, self._readers, self.dropped)
        for consumer, parameter, mask in columns:
            self._set_columns(consumer, parameter, mask, generator)
        least_covered, notes = [], []
        for name, indices in self.dropped.items():
            weight = self._weight(name)
            alive = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
            alive[indices] = False
            old = rows(self._old_rows[name]).to(weight)
            new, fallback = orthogonal_rows(rows(weight)[alive], old, generator=generator)
            weight[indices] = new.view_as(weight[indices])
            if fallback:
                least_covered.append(name)
            self._wake_norms(name, indices)
            if note := self._note(name):
                notes.append(note)
        for key, tensor, channels in self._silenced_entries():
            tensor[channels] = self._old_norms[key].to(tensor)
        self._forget(self._dead_entries(), columns)
        return least_covered, notes

    def _weight(self, layer: str) -> Tensor:
        weight = self._model.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def _set_columns(self, name: str, weight: Tensor, mask: Tensor, generator: torch.Generator) -> None:
        if self._consumers == "zero":
            weight[mask] = 0
        elif self._consumers == "keep":
            weight[mask] = self._old_columns[name].to(weight)
        else:
            bound = weight[0].numel() ** -0.5  # PyTorch's own initialisation of both kinds of layer
            drawn = torch.rand(weight[mask].shape, generator=generator) * 2 - 1
            weight[mask] = (drawn * bound).to(weight)

    def _wake_norms(self, name: str, indices: list[int]) -> None:
        """Norms behind restored filters: weight 1, bias 0, running statistics 0 and 1."""
        readers = self._readers[name]
        # Where a channel is added to others no column can hide it, but a norm weight of 0 before the sum can.
        hide = self._consumers == "zero" and bool(readers.mixed) and readers.norm_first
        for norm_name, reads in readers.norms.items():
            norm: Any = self._model.get_submodule(norm_name)
            for tensor, value in (
                (norm.weight, 0 if hide else 1),
                (norm.bias, 0),
                (getattr(norm, "running_mean", None), 0),
                (getattr(norm, "running_var", None), 1),
            ):
                if tensor is not None:
                    tensor[reads.of(indices)] = value

    def _note(self, name: str) -> str:
        """What could not be done as asked with the channels of ``name``, or nothing."""
        readers = self._readers[name]
        if readers.mixed and self._consumers == "zero" and not readers.norm_first:
            return f"{name}: the output moves at this restore, because {readers.mixed}."
        if readers.mixed and self._consumers == "init":
            return f"{name}: its consumers keep their weights, because {readers.mixed}."
        return ""

    def _dead_entries(self) -> list[tuple[nn.Parameter, Tensor]]:
        entries = silent_entries(self._model, self._readers, self.dropped)
        for name, channels in self._silenced.items():
            own = affine(self._model.get_submodule(name))
            entries += [(parameter, index_tensor(channels, parameter.device)) for parameter in own]
        return entries

    def _silenced_entries(self) -> list[tuple[str, Tensor, Tensor]]:
        """What norms behind sums hold of their channels that are silent: (key, tensor, indices)."""
        return [
            (f"{name}.{key}", tensor.detach(), index_tensor(channels, tensor.device))
            for name, channels in self._silenced.items()
            for key, tensor in per_channel_tensors(self._model.get_submodule(name)).items()
        ]

    def _forget(
        self,
        entries: list[tuple[nn.Parameter, Tensor]],
        columns: list[tuple[str, nn.Parameter, Tensor]] | None = None,
    ) -> None:
        """Clear the optimizer's memory of rows, and of the consumers' columns."""
        fresh: dict[nn.Parameter, Tensor] = {}
        for parameter, indices in entries:
            shape = parameter.shape[:2]
            mask = fresh.setdefault(parameter, torch.zeros(shape, dtype=torch.bool, device=parameter.device))
            mask[indices] = True
        for _, parameter, mask in columns or ():
            fresh[parameter] = fresh[parameter] | mask if parameter in fresh else mask
        for parameter, mask in fresh.items():
            refresh_slots(self._optimizer, parameter, mask)


def private_columns(
    model: nn.Module, readers: Mapping[str, Readers], dropped: Mapping[str, list[int]]
) -> list[tuple[str, nn.Parameter, Tensor]]:
    """What reads dropped filters and nothing else: (consumer, weight, BoolTensor[rows, columns]).

    Rows that are dropped themselves are left out: they get wholly new values.
    """
    masks: dict[str, Tensor] = {}
    for name, indices in dropped.items():
        if readers[name].mixed:
            continue
        for consumer, reads in readers[name].consumers.items():
            layer: Any = model.get_submodule(consumer)
            mask = column_mask(layer, reads.of(indices))
            mask[dropped.get(consumer, [])] = False
            masks[consumer] = masks[consumer] | mask if consumer in masks else mask
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in masks}
    return [(name, weights[name], mask) for name, mask in masks.items()]


def check_memory(
    model: nn.Module, readers: Mapping[str, Readers], consumers: str, state: Mapping[str, Any]
) -> None:
    """Raise ``ValueError`` naming the layer unless ``state``, from ``SubPhase.state``, fits ``model``."""
    for name, indices in state["dropped"].items():
        if name not in readers:
            raise ValueError(f"the state names {name!r}, which this RePr does not work on.")
        weight: Any = model.get_submodule(name).weight
        old = state["old_rows"].get(name)
        if old is None or old.shape != (len(indices), *weight.shape[1:]) or max(indices) >= len(weight):
            raise ValueError(f"the state does not fit {name!r} of shape {list(weight.shape)}.")
    modules = dict(model.named_modules())
    for name, channels in state.get("silenced", {}).items():
        tensors = per_channel_tensors(modules[name]) if name in modules else {}
        old = {key: state.get("old_norms", {}).get(f"{name}.{key}") for key in tensors}
        fits = tensors and all(
            value is not None and value.shape == (len(channels),) for value in old.values()
        )
        if not fits or max(channels) >= min(map(len, tensors.values())):
            raise ValueError(f"the state does not fit {name!r}, a norm whose channels it names.")
    if consumers == "keep":
        columns = private_columns(model, readers, state["dropped"])
        shapes = {name: weight[mask].shape for name, weight, mask in columns}
        if other := shapes.items() ^ {name: old.shape for name, old in state["old_columns"].items()}.items():
            raise ValueError(
                f"the state was saved where other channels were read by {min(other)[0]!r}: load it into a "
                "model of the same structure."
            )


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
