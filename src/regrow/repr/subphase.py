"""The sub phase of a RePr cycle: filters are dropped, held at 0, and restored with new directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from regrow.callers import warn
from regrow.indexing import Where, index_tensor
from regrow.marks import Mark, marks_on
from regrow.modules import filters_first
from regrow.repr.averaged import Averaged
from regrow.repr.hold import Hold
from regrow.repr.narrow import Narrowing, narrow
from regrow.repr.restoring import Filters
from regrow.repr.slots import Copies, capturing, readable
from regrow.short import listed, short
from regrow.structure.readers import Readers, per_channel_tensors, place_in, silent_entries
from regrow.surgery.plan import CutPlan
from regrow.torch_private import own_parameters


class _Held(Mark):
    """The mark on the layers of a sub phase, which can end the phase without the cycle object."""

    travels = False

    def __init__(self, phase: SubPhase) -> None:
        self.phase = phase

    def state(self) -> str:
        return "masked" if self.phase.plan is None else "narrowed"

    def undo(self, module: nn.Module) -> None:  # noqa: ARG002
        """End the phase for all its layers."""
        self.phase.release()


def phases_on(model: nn.Module) -> list[SubPhase]:
    """The running sub phases of ``model``; there are several if several cycles train parts of it."""
    return list(dict.fromkeys(mark.phase for *_, mark in marks_on(model) if isinstance(mark, _Held)))


class SubPhase:
    """Drops filters of ``model`` at its construction, and holds them at 0 until ``restore`` or ``release``.

    Args:
        model: the user's own module, not a wrapper.
        optimizer: the optimizer that trains ``model``.
        readers: {qualified name: readers of the layer's channels}, for every layer in ``dropped``.
        dropped: {qualified name: indices of the filters}.
        consumers: the weights of the consumers after the restore, one of ``CONSUMERS``.
        memory: an earlier ``state``, from which the values before the drop are taken; None takes the values
            from the model.
        plan: a plan from ``plan_cut`` by which the layers compute without the dropped filters; with None
            the dropped filters are computed and held at 0.
        silenced: {norm: channels}: the channels of norms behind sums to which only dropped filters write, as
            in ``Removal``. They are held at 0 too, and get their old values back at the restore.
        copies: which slots of the optimizer hold copies of the weights; None judges by what they hold now.
        averaged: the averaged copies of the model that follow it.
        worth: is asked ahead of the first pass in train mode whether leaving filters out of a pass with these
            arguments is quicker than computing them; with None it is done as ``plan`` says.
        new_rows: the rows of the filters after the restore, one of ``ROWS``.
        replicated: whether ``model`` runs in ``nn.DataParallel``; ``plan`` is None then.

    Attributes:
        captured: whether a CUDA graph has captured a pass.
        notes: what was done to the optimizer's memory at the drop, beside clearing dropped filters' slots.

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
        copies: Copies | None = None,
        averaged: Sequence[Averaged] = (),
        worth: Callable[[Any], bool] | None = None,
        replicated: bool = False,
        new_rows: str = "orthogonal",
    ) -> None:
        self.plan = plan
        self._looked = self.captured = False
        self._calls = 0
        self._model = model
        self._optimizer = optimizer
        self._readers = readers
        self._consumers, self._new_rows = consumers, new_rows
        self.dropped = {name: list(indices) for name, indices in dropped.items()}
        self._silenced = {name: list(channels) for name, channels in silenced.items()}
        self._filters = Filters(model, readers, self.dropped, self._silenced)
        self._worth = worth
        # The replicas of nn.DataParallel run in threads of their own, and share what is put on the layers.
        self._narrowing = None if replicated else self._narrowed(plan or CutPlan())
        if memory is not None:
            self._old_rows = _copy(memory["old_rows"])
            self._old_columns = _copy(memory["old_columns"])
            self._old_norms = _copy(memory.get("old_norms", {}))
        else:
            self._old_rows, self._old_columns = self._filters.values(consumers)
            self._old_norms = {key: tensor[i] for key, tensor, i in self._filters.silenced_tensors()}
        self._copies = copies or Copies(optimizer)
        self._copies.look()
        self._filters.silence()
        self._averaged = averaged
        for copy in averaged:
            self.silence_in(copy)
        self.notes = self._filters.forget(optimizer, self._copies) if memory is None else []
        dead, held = self._filters.dead(), set[nn.Parameter]()
        if self._narrowing is not None:
            pushed = {parameter for parameter, _ in self._pushed_entries()}
            held = {*self._narrowing.held} | {parameter for parameter, _ in dead if parameter not in pushed}
        self._hold = Hold(dead, optimizer, held)
        names = {*self.dropped, *self._silenced, *(plan.layers() if plan is not None else ())}
        names.update(norm for name in self.dropped for norm in readers[name].norms)
        self._marked = [model.get_submodule(name) for name in names]
        for module in self._marked:
            module._regrow_held = _Held(self)  # type: ignore[assignment]

    def state(self) -> dict[str, Any]:
        """The state to save, which ``memory`` takes: tensors, numbers and strings only."""
        return {
            "dropped": {name: list(indices) for name, indices in self.dropped.items()},
            "old_rows": _copy(self._old_rows),
            "old_columns": _copy(self._old_columns),
            "silenced": {name: list(channels) for name, channels in self._silenced.items()},
            "old_norms": _copy(self._old_norms),
            "plan": None if self.plan is None else self.plan.to_dict(),
        }

    def release(self) -> None:
        """Stop holding the filters, and compute with them again; they stay 0 until something writes them."""
        if self._narrowing is not None:
            self._narrowing.release()
        self._hold.release()
        for module in self._marked:
            vars(module).pop("_regrow_held", None)

    def silence_in(self, copy: Averaged) -> None:
        """Have an averaged copy of the model emit 0 where the model does."""
        copy.silence(entry for entry in self._filters.written() if not entry[0].endswith("running_var"))

    def moved_now(self, last: bool) -> list[str]:
        """``moved`` in the first, second, fourth, eighth … call and in the last: the device is waited for.

        Filters that have moved are at 0 again then, and held more firmly.
        """
        self._calls += 1
        if self._calls & (self._calls - 1) and not last:
            return []
        if names := self.moved():
            self._hold.firmly()
        return names

    def moved(self) -> list[str]:
        """The layers in which something has moved dropped filters off 0."""
        moved = {id(parameter) for parameter in self._hold.moved()}
        names = [name for name, parameter in self._model.named_parameters() if id(parameter) in moved]
        return list(dict.fromkeys(name.rpartition(".")[0] for name in names))

    def missed_steps(self) -> bool:
        """See ``Hold.missed_steps``."""
        return self._hold.missed_steps()

    def _narrowed(self, plan: CutPlan) -> Narrowing:
        return narrow(self._model, plan, self._before_pass, self._pushed_entries())

    def _before_pass(self, training: bool, arguments: Any) -> None:
        self.captured = self.captured or capturing()
        if training and self._worth is not None:
            worth, self._worth = self._worth(arguments), None
            if not worth and self._narrowing is not None:
                self._narrowing.release()
                self.plan, self._narrowing = None, self._narrowed(CutPlan())
        # Weights that were swapped in for an evaluation are back in their place when the cycle steps.
        looks = self.plan is not None and not training and not self._looked
        if looks and readable() and (names := self.moved()):
            warn(
                f"dropped filters of {listed(names)} hold other values than 0 in an evaluation, which leaves "
                "them out. Averaged weights that are swapped in must be dropped with the model: call "
                "cycle.follow(the averaged copy)."
            )
        self._looked = not training

    @torch.no_grad()
    def restore(
        self, generator: torch.Generator, agree: Callable[[], None] = lambda: None
    ) -> tuple[list[str], list[str]]:
        """Restore the dropped filters with new rows, reset norms and a cleared optimizer state (RePr §3).

        Args:
            generator: draws the new rows.
            agree: is called when the model has its new values, ahead of what copies them.

        Returns:
            The layers whose null space was too small for orthogonal rows; and notes on layers whose
            consumers could not be treated as asked, and on the optimizer's memory.
        """
        self.release()
        columns, least_covered, notes = self._filters.regrow(
            self._old_rows, self._old_columns, self._consumers, self._new_rows, generator
        )
        for key, tensor, channels in self._filters.silenced_tensors():
            tensor[channels] = self._old_norms[key].to(tensor)
        agree()
        return least_covered, notes + self._filters.pass_on(
            columns, self._optimizer, self._copies, self._averaged
        )

    def _pushed_entries(self) -> list[tuple[nn.Parameter, Where]]:
        """The entries among ``Filters.dead`` that would get gradients if nothing masked them.

        A norm with a weight of 0 hands back a gradient of 0. The gradient of that weight is a multiple of the
        norm's input, which is 0 too. So where nothing but such norms reads a dropped filter, only the biases
        of the norms would get gradients.
        """
        quiet = {name for name in self.dropped if self._readers[name].norm_first}
        others = {name: filters for name, filters in self.dropped.items() if name not in quiet}
        entries = silent_entries(self._model, self._readers, others) + self._filters.silenced_norms()
        for name in quiet:
            for norm, reads in self._readers[name].norms.items():
                module = self._model.get_submodule(norm)
                bias = own_parameters(module).get("bias")
                if bias is not None:
                    entries.append((bias, place_in(module, bias, index_tensor(reads.of(self.dropped[name])))))
        return entries


def check_memory(
    model: nn.Module, readers: Mapping[str, Readers], consumers: str, state: Mapping[str, Any]
) -> None:
    """Raise a ``ValueError`` with the layer's name if ``state`` of a ``SubPhase`` does not fit ``model``."""
    _check_parts(state)
    for name, indices in state["dropped"].items():
        if name not in readers:
            raise ValueError(f"the state names {short(name)}, which this RePr does not work on.")
        layer: Any = model.get_submodule(name)
        weight = filters_first(layer, layer.weight)
        old = state["old_rows"].get(name)
        shape = (len(indices), *weight.shape[1:]) if _are_indices(indices, len(weight)) else None
        if old is None or old.shape != shape or len(indices) == len(weight):
            raise ValueError(f"the state does not fit {name!r} of shape {list(weight.shape)}.")
    modules = dict(model.named_modules())
    for name, channels in state.get("silenced", {}).items():
        tensors = per_channel_tensors(modules[name]) if name in modules else {}
        old = {key: state.get("old_norms", {}).get(f"{name}.{key}") for key in tensors}
        fits = tensors and _are_indices(channels, min(map(len, tensors.values())))
        if not fits or any(v is None or v.shape != (len(channels),) for v in old.values()):
            raise ValueError(f"the state does not fit {short(name)}, a norm whose channels it names.")
    if consumers == "keep":
        columns = Filters(model, readers, state["dropped"]).columns()
        shapes = {name: weight[mask].shape for name, weight, mask in columns}
        if other := shapes.items() ^ {name: old.shape for name, old in state["old_columns"].items()}.items():
            raise ValueError(
                "the state was saved from a model in which other channels were read by "
                f"{short(min(name for name, _ in other))}: load it into a model of the same structure."
            )


def _check_parts(state: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless the parts of a ``SubPhase``'s ``state`` are mappings, three of tensors."""
    if not isinstance(state, Mapping):
        raise ValueError(f"the state of a sub phase is a mapping, got {short(state)}.")
    for part in ("dropped", "old_rows", "old_columns", "silenced", "old_norms"):
        # States of earlier versions have no silenced norms.
        values = state.get(part, {} if part in ("silenced", "old_norms") else None)
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise ValueError(f"{part} in a state of RePr maps layers to values, got {short(values)}.")
        for name, value in values.items():
            if part.startswith("old_") and not (isinstance(value, Tensor) and value.is_floating_point()):
                raise ValueError(
                    f"{part} in a state of RePr holds tensors of real numbers, not {short(value)}."
                )
            if not part.startswith("old_") and not isinstance(value, list):
                raise ValueError(
                    f"{part} in a state of RePr has lists of indices, not {short(value)} for {short(name)}."
                )


def _are_indices(value: Sequence[Any], width: int) -> bool:
    """Whether ``value`` holds indices below ``width``, at least one, and none twice."""
    whole = all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each < width for each in value)
    return whole and 0 < len(value) == len(set(value))


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
