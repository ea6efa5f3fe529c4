"""Filters that are dropped or restored together, and what a drop and a restore write (RePr §3).

A sub phase drops filters at its start and restores them at its end. A restart does both at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regrow.filters import rows
from regrow.indexing import Where, clear, index_tensor
from regrow.modules import filters_first
from regrow.repr.averaged import Averaged
from regrow.repr.regrowth import drawn_as_new, orthogonal_rows
from regrow.repr.slots import Copies, refresh_slots
from regrow.structure.readers import (
    Readers,
    column_mask,
    entries_of,
    per_channel_tensors,
    place_in,
    silence,
    silent_entries,
)
from regrow.structure.sums import silence_norms
from regrow.suggest import nearest

# The weight of a norm that hides a channel. Where all summands of a channel are hidden, a sum of exactly 0
# would meet a ReLU, whose gradient is 0 there: the channel would be silent for ever.
_BARELY = 1e-6
CONSUMERS = ("zero", "keep", "init")
ROWS = ("orthogonal", "init")


def check_restoring(consumers: str, new_rows: str) -> None:
    """Raise ``ValueError`` unless these are among ``CONSUMERS`` and ``ROWS``."""
    if consumers not in CONSUMERS:
        raise ValueError(f"unknown choice consumers={consumers!r}{nearest(str(consumers), CONSUMERS)}")
    if new_rows not in ROWS:
        raise ValueError(f"unknown choice rows={new_rows!r}{nearest(str(new_rows), ROWS)}")


Columns = Sequence[tuple[str, nn.Parameter, Tensor]]


@dataclass(frozen=True)
class Filters:
    """Filters of a model that are dropped or restored together.

    Attributes:
        model: the user's own module, not a wrapper.
        readers: {qualified name: readers of the layer's channels}, for every layer in ``dropped``.
        dropped: {qualified name: indices of the filters}.
        silenced: {norm: channels}: the channels of norms behind sums to which only dropped filters write, as
            in ``Removal``.
    """

    model: nn.Module
    readers: Mapping[str, Readers]
    dropped: Mapping[str, list[int]]
    silenced: Mapping[str, list[int]] = field(default_factory=dict)

    def silence(self) -> None:
        """Make the filters emit exactly 0: see ``structure.readers.silence``."""
        silence(self.model, self.readers, self.dropped)
        silence_norms(self.model, self.silenced)

    def dead(self) -> list[tuple[nn.Parameter, Where]]:
        """The parameters that are 0 while the filters are dropped, each with an index of where."""
        return silent_entries(self.model, self.readers, self.dropped) + self.silenced_norms()

    def silenced_norms(self) -> list[tuple[nn.Parameter, Where]]:
        """The parameters of the norms in ``silenced``, each with an index of where."""
        return [
            entry
            for name, channels in self.silenced.items()
            for entry in entries_of(self.model.get_submodule(name), index_tensor(channels))
        ]

    def silenced_tensors(self) -> list[tuple[str, Tensor, Tensor]]:
        """The tensors of the norms in ``silenced``: (key, tensor, indices of the silent channels)."""
        return [
            (f"{name}.{key}", tensor.detach(), index_tensor(channels, tensor.device))
            for name, channels in self.silenced.items()
            for key, tensor in per_channel_tensors(self.model.get_submodule(name)).items()
        ]

    def written(self) -> Iterator[tuple[str, Tensor, Where]]:
        """All that a drop and a restore write, but for the consumers: (name, tensor, index of where)."""
        rows = [*self.dropped.items(), *self.silenced.items()]
        for name, filters in self.dropped.items():
            rows += [(norm, reads.of(filters)) for norm, reads in self.readers[name].norms.items()]
        for name, those in rows:
            module = self.model.get_submodule(name)
            for key, tensor in per_channel_tensors(module).items():
                yield f"{name}.{key}", tensor, place_in(module, tensor, index_tensor(those))

    def columns(self) -> Columns:
        """The weights that read only dropped filters: (consumer, weight, mask).

        A mask is a BoolTensor over the first two dimensions of the weight. It leaves out dropped filters of
        the consumer, which get new values in all channels.
        """
        masks: dict[str, Tensor] = {}
        for name, indices in self.dropped.items():
            if self.readers[name].mixed:
                continue
            for consumer, reads in self.readers[name].consumers.items():
                layer: Any = self.model.get_submodule(consumer)
                mask = column_mask(layer, reads.of(indices))
                if gone := self.dropped.get(consumer):
                    filters_first(layer, mask)[gone] = False
                masks[consumer] = masks[consumer] | mask if consumer in masks else mask
        weights: dict[str, Any] = {name: self.model.get_submodule(name).weight for name in masks}
        return [(name, weights[name], mask.to(weights[name].device)) for name, mask in masks.items()]

    @torch.no_grad()
    def values(self, consumers: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The rows of the filters now; and the weights that read them, where ``consumers`` is "keep"."""
        columns = self.columns() if consumers == "keep" else []
        return (
            {name: self._weight(name)[indices] for name, indices in self.dropped.items()},
            {name: weight.detach()[mask] for name, weight, mask in columns},
        )

    @torch.no_grad()
    def regrow(
        self,
        old_rows: Mapping[str, Tensor],
        old_columns: Mapping[str, Tensor],
        consumers: str,
        new_rows: str,
        generator: torch.Generator,
    ) -> tuple[Columns, list[str], list[str]]:
        """Give silent filters new rows, their norms weight 1, bias 0 and statistics 0 and 1, and their
        consumers the weights that are asked for.

        Args:
            old_rows, old_columns: what ``values`` gave ahead of the drop.
            consumers, new_rows: one of ``CONSUMERS`` and one of ``ROWS``.
            generator: draws the new rows.

        Returns:
            The consumers' weights that were written; the layers whose null space was too small for
            orthogonal rows; and a note for each layer whose consumers could not be treated as asked.
        """
        # Columns before rows: a column changes the kept rows to which the new rows must be orthogonal.
        columns = self.columns()
        for consumer, parameter, mask in columns:
            weight = parameter.detach()
            if consumers == "zero":
                weight[mask] = 0
            elif consumers == "keep":
                weight[mask] = old_columns[consumer].to(weight)
            else:
                weight[mask] = drawn_as_new(weight, weight[mask].shape, generator=generator)
        least_covered, notes = [], []
        for name, indices in self.dropped.items():
            weight = self._weight(name)
            if new_rows == "init":
                own: Any = self.model.get_submodule(name).weight
                weight[indices] = drawn_as_new(own, weight[indices].shape, generator=generator)
            else:
                alive = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
                alive[indices] = False
                old = rows(old_rows[name]).to(weight)
                new, fallback = orthogonal_rows(rows(weight)[alive], old, generator=generator)
                weight[indices] = new.view_as(weight[indices])
                if fallback:
                    least_covered.append(name)
            self._wake_norms(name, indices, consumers)
            readers = self.readers[name]
            if readers.mixed and consumers == "zero" and not readers.norm_first:
                notes.append(f"{name}: the output moves at this restore, because {readers.mixed}.")
            if readers.mixed and consumers == "init":
                notes.append(f"{name}: its consumers keep their weights, because {readers.mixed}.")
        return columns, least_covered, notes

    def pass_on(
        self,
        columns: Columns,
        optimizer: torch.optim.Optimizer,
        copies: Copies,
        averaged: Sequence[Averaged] = (),
    ) -> list[str]:
        """Give averaged copies the new values, and bring the optimizer's slots up to date.

        Args:
            columns: the consumers' weights that ``regrow`` has written.

        Returns:
            What ``refresh_slots`` has to say.
        """
        for copy in averaged:
            copy.take(self.written())
            copy.take((f"{consumer}.weight", parameter, mask) for consumer, parameter, mask in columns)
        return self.forget(optimizer, copies, columns)

    def forget(self, optimizer: torch.optim.Optimizer, copies: Copies, columns: Columns = ()) -> list[str]:
        """Clear the optimizer's state of the dead rows, and of the consumers' columns; notes on the rest."""
        return refresh_slots(optimizer, self._fresh(columns), copies.known)

    def clear_gradients(self, columns: Columns) -> None:
        """Set the gradients that were accumulated for values that are no more to 0."""
        for parameter, where in self.dead():
            if parameter.grad is not None:
                clear(parameter.grad, where)
        for _, parameter, mask in columns:
            if parameter.grad is not None:
                parameter.grad[mask] = 0

    def _fresh(self, columns: Columns) -> dict[nn.Parameter, Tensor]:
        fresh: dict[nn.Parameter, Tensor] = {}
        for parameter, indices in self.dead():
            shape = parameter.shape[:2]
            mask = fresh.setdefault(parameter, torch.zeros(shape, dtype=torch.bool, device=parameter.device))
            mask[indices] = True
        for _, parameter, mask in columns:
            fresh[parameter] = fresh[parameter] | mask if parameter in fresh else mask
        return fresh

    def _weight(self, layer: str) -> Tensor:
        """A view of a layer's weight, filters first."""
        module: Any = self.model.get_submodule(layer)
        return filters_first(module, module.weight.detach())

    def _wake_norms(self, name: str, indices: list[int], consumers: str) -> None:
        """Reset the norms behind restored filters: weight 1, bias 0, running mean 0 and variance 1."""
        readers = self.readers[name]
        # No column can hide a channel that is added to others, but a small norm weight before the sum can.
        hide = consumers == "zero" and bool(readers.mixed) and readers.norm_first
        for norm_name, reads in readers.norms.items():
            norm: Any = self.model.get_submodule(norm_name)
            for tensor, value in (
                (norm.weight, _BARELY if hide else 1),
                (norm.bias, 0),
                (getattr(norm, "running_mean", None), 0),
                (getattr(norm, "running_var", None), 1),
            ):
                if tensor is not None:
                    tensor[reads.of(indices)] = value


@torch.no_grad()
def restart_filters(
    filters: Filters,
    optimizer: torch.optim.Optimizer,
    copies: Copies,
    *,
    consumers: str,
    new_rows: str,
    generator: torch.Generator,
    averaged: Sequence[Averaged] = (),
    agree: Callable[[], None] = lambda: None,
) -> tuple[list[str], list[str]]:
    """Drop filters and restore them at once.

    Args:
        agree: is called when the model has its new values, ahead of what copies them.

    Returns:
        The layers whose null space was too small for orthogonal rows; and notes.
    """
    old_rows, old_columns = filters.values(consumers)
    copies.look()
    filters.silence()
    columns, least_covered, notes = filters.regrow(old_rows, old_columns, consumers, new_rows, generator)
    agree()
    filters.clear_gradients(columns if consumers != "keep" else [])
    return least_covered, notes + filters.pass_on(columns, optimizer, copies, averaged)
