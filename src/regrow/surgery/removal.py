"""Filters set to zero, and filters removed: two readings of "pruned" that keep every parameter's shape."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regrow.filters import check_keep, convolutions
from regrow.indexing import index_tensors
from regrow.interrupts import uninterrupted
from regrow.marks import borrowed_weight
from regrow.modules import device_of, grouped, tied_modules, unwrap
from regrow.structure.read import read_structure
from regrow.structure.readers import Readers, column_mask, silence, zero_channels
from regrow.structure.sums import norms_without_writers, silence_norms

_VERSION = 1


def zero_filters(model: nn.Module, keep: Mapping[str, Tensor]) -> dict[str, Any]:
    """Set the rows and biases of dropped filters to 0, in place, and nothing else.

    Batch norms stay as they are, so a dropped channel emits the constant that its norm makes of 0. Batch
    Bridgeout prunes in this way (arXiv 2009.10893).

    Returns:
        JSON-able record: version, reading, dropped {name: indices of the filters}.

    Raises:
        ValueError: ``keep`` does not fit, or names a layer that has no weight of its own.
    """
    model = unwrap(model)
    dropped = dropped_filters(model, keep)
    silence(model, dict.fromkeys(dropped, Readers()), dropped)
    return {"version": _VERSION, "reading": "zeroed", "dropped": dropped}


def remove_filters(model: nn.Module, keep: Mapping[str, Tensor], *, example_inputs: Any) -> dict[str, Any]:
    """Make dropped filters emit exactly 0, behind their norms too, in place.

    A row of a grouped (for instance depthwise) convolution that reads dropped channels only is silenced with
    them, as it is absent from a smaller network. So is a channel of a norm behind a sum, if dropped filters
    alone are added up in it. Parameters keep their shapes.

    Returns:
        JSON-able record: version, reading, dropped {name: indices}, followers {name: rows of grouped
        convolutions silenced with them}, silenced {name: channels of norms behind sums silenced with them}.

    Raises:
        ValueError: as ``zero_filters``; the model cannot be traced; a layer in ``keep`` is not reached, is
            the network's output, or has a norm behind it that cannot be silenced for it alone.
    """
    model = unwrap(model)
    removal = plan_removal(model, keep, example_inputs)
    with uninterrupted():
        removal.apply(model)
    return removal.record("removed")


@dataclass(frozen=True)
class Removal:
    """Filters to remove, and the rows and channels that are removed with them: {name: indices} each.

    Attributes:
        readers: the readers of every convolution of the model.
        followers: rows of grouped convolutions that read removed channels only.
        silenced: channels of norms behind sums that removed filters alone write to.
    """

    readers: Mapping[str, Readers]
    dropped: Mapping[str, list[int]]
    followers: Mapping[str, list[int]]
    silenced: Mapping[str, list[int]] = field(default_factory=dict)

    @functools.cached_property
    def gone(self) -> dict[str, list[int]]:
        """All filters that are removed, followers included: {name: indices}."""
        names = [*self.dropped, *(name for name in self.followers if name not in self.dropped)]
        return {name: sorted({*self.dropped.get(name, ()), *self.followers.get(name, ())}) for name in names}

    @functools.cached_property
    def norms(self) -> dict[str, Tensor]:
        """Norm → int64, its channels that read removed filters alone, before any sum."""
        norms: dict[str, list[int]] = {}
        for name, gone in self.gone.items():
            for norm, reads in self.readers[name].norms.items():
                norms.setdefault(norm, []).extend(reads.of(gone))
        norms = {norm: channels for norm, channels in norms.items() if channels}
        return dict(zip(norms, index_tensors(list(norms.values())), strict=True))

    @torch.no_grad()
    def apply(self, model: nn.Module, *, keep_rows: Collection[str] = ()) -> None:
        """Silence the removed filters in ``model``, the user's own module or a copy of it.

        Args:
            keep_rows: convolutions whose rows keep their values, because the caller silences their output.
        """
        modules = dict(model.named_modules())
        silent = {name: filters for name, filters in self.gone.items() if name not in keep_rows} | self.norms
        for name, those in zip(silent, index_tensors([*silent.values()], device_of(model)), strict=True):
            zero_channels(modules[name], those)
        silence_norms(model, self.silenced)

    def record(self, reading: str) -> dict[str, Any]:
        """The JSON-able record of the removal."""
        return {
            "version": _VERSION,
            "reading": reading,
            "dropped": dict(self.dropped),
            "followers": dict(self.followers),
            "silenced": dict(self.silenced),
        }


def dropped_filters(model: nn.Module, keep: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """{name: indices of the filters to drop}, without layers that lose none. Raises as ``zero_filters``."""
    masks = check_keep(model, keep)
    dropped = {name: (~mask).nonzero().flatten().tolist() for name, mask in masks.items() if not mask.all()}
    borrowed = _borrowed(model)
    for name in dropped:
        if name in borrowed:
            raise ValueError(f"the filters of {name!r} cannot be dropped: {borrowed[name]}.")
    return dropped


def _borrowed(model: nn.Module) -> dict[str, str]:
    """The convolutions that have no weight of their own: {name: reason}."""
    tied = tied_modules(model)
    reasons = {
        name: borrowed_weight(conv) or ("it shares its weight with another layer" if name in tied else "")
        for name, conv in convolutions(model).items()
    }
    return {name: reason for name, reason in reasons.items() if reason}


def plan_removal(
    model: nn.Module,
    keep: Mapping[str, Tensor],
    example_inputs: Any,
    readers: Mapping[str, Readers] | None = None,
    *,
    followers: bool = True,
    norms: bool = True,
) -> Removal:
    """What ``remove_filters`` would do to ``model``, which is only read. Raises as ``remove_filters``.

    Args:
        readers: the result of ``read_structure``, where it is known already.
        followers: whether rows that read removed filters only are removed too.
        norms: whether to look for channels of norms behind sums, which can take forward passes.
    """
    dropped = dropped_filters(model, keep)
    if not dropped:
        return Removal({}, {}, {})
    readers = readers or read_structure(model, example_inputs)
    for name in dropped:
        if reason := unremovable(readers, name):
            raise ValueError(f"the filters of {name!r} cannot be removed: {reason}. Leave it out of keep.")
    removal = Removal(readers, dropped, _followers(model, readers, dropped) if followers else {})
    if not norms:
        return removal
    silenced = norms_without_writers(model, readers, removal.gone, example_inputs)
    return dataclasses.replace(removal, silenced=silenced)


def unremovable(readers: Mapping[str, Readers], name: str) -> str:
    """Empty, or why the filters of convolution ``name`` cannot be removed."""
    if name not in readers:
        return "example_inputs do not reach it"
    if readers[name].output:
        return readers[name].output
    if norm := readers[name].unsilenced:
        return f"{norm!r} behind it cannot be silenced for its channels alone"
    return ""


def _followers(
    model: nn.Module, readers: Mapping[str, Readers], dropped: Mapping[str, list[int]]
) -> dict[str, list[int]]:
    """The rows of grouped convolutions that read removed channels and nothing else."""
    borrowed = _borrowed(model)
    modules: dict[str, Any] = dict(model.named_modules())
    unread: dict[str, Tensor] = {}
    followers: dict[str, list[int]] = {}
    for name, found in readers.items():  # in order of execution: a row's inputs come before the row
        gone = [*dropped.get(name, ()), *followers.get(name, ())]
        if not gone:
            continue
        for consumer, reads in found.consumers.items():
            layer = modules[consumer]
            follows = getattr(layer, "groups", 1) > 1 and consumer not in found.noisy
            if not follows or consumer in borrowed or unremovable(readers, consumer):
                continue
            mask = column_mask(layer, reads.of(gone))
            unread[consumer] = unread[consumer] | mask if consumer in unread else mask
            silent = grouped(layer, unread[consumer]).all(2).flatten()
            if rows := silent.nonzero().flatten().tolist():
                followers[consumer] = rows
    return followers
