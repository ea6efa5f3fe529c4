"""Filters cut out for good: smaller parameters, buffers and optimizer slots, and a record of the cut."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regrow.filters import check_keep, convolutions
from regrow.given import check_inputs, check_optimizer
from regrow.interrupts import uninterrupted
from regrow.looking.copies import copied
from regrow.marks import check
from regrow.modules import filter_count, unwrap
from regrow.structure.read import read_structure
from regrow.structure.readers import Readers
from regrow.surgery.layers import Replaced, apply_plan, filters_left, is_cut, widen
from regrow.surgery.planning import plan_removal_and_cut
from regrow.surgery.removal import unremovable
from regrow.torch_private import own_parameters

_VERSION = 1


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """A cut makes so many objects that Python would search its whole heap several times: half of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_without_garbage_collection()
def cut(
    model: nn.Module,
    keep: Mapping[str, Tensor],
    *,
    example_inputs: Any,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Any]:
    """Remove dropped filters from ``model`` for good, in place.

    In train and eval mode the smaller network computes the same as the one that ``remove_filters`` leaves,
    and stays equal to it in training while the dropped filters there are held dead. Parameters and buffers
    become smaller, module attributes (``out_channels``, ``num_features``, …) follow, ``state_dict()`` keys
    stay. Where a channel is added to others that are still alive, the layer computes its kept filters alone
    and places them among zeros. Parameters are new objects: whatever holds the old ones, except
    ``optimizer``, must take them from ``model.parameters()`` again.

    Args:
        model: any module with convolutions, not one inside DataParallel or DistributedDataParallel.
        keep: {name: BoolTensor[filters]}, True = alive, as ``select`` gives it. Layers not named keep all.
            A model that was cut before is cut again: masks are of the filters that it has left.
        example_inputs: what ``model`` takes: a tensor, a tuple of arguments or a dict of keywords; one
            picture is enough.
        optimizer: its groups get the new parameters, and its slots become smaller too.

    Returns:
        JSON-able record: version; plan (``CutPlan.from_dict`` reads it); dropped {name: removed filters};
        layers {name: filters before and after}; parameters before and after; masked {name: why its dropped
        filters are held at 0 instead}. After a second cut, plan and dropped describe both cuts, with indices
        of the uncut model.

    Raises:
        ValueError: the model is in a state that refuses cuts (``marks.REFUSED``) or has no convolution;
            ``keep`` does not fit; a layer in it shares its weight with another, is not reached, or is the
            network's output; ``example_inputs`` do not fit; the data decide which layers run; a slot of the
            optimizer has another shape than its parameter. Nothing is changed.
    """
    check(model, "cut")
    check_inputs(example_inputs, "cut")
    if optimizer is not None:
        check_optimizer(optimizer, "cut")
    model = unwrap(model)
    if not convolutions(model):
        raise ValueError(
            "the model has no convolution to cut: pass one with Conv1d, Conv2d or Conv3d layers, or with "
            "ConvTranspose1d, ConvTranspose2d or ConvTranspose3d layers."
        )
    before, parameters = filter_counts(model), _count(model)
    whole, keep, readers = model, check_keep(model, keep), None
    if is_cut(model):
        # A cut model picks and places channels by index: both cuts are planned from the uncut model.
        widen(whole := copied(model, torch.clone))
        readers = read_structure(whole, example_inputs)
        keep = keep_of_uncut(model, keep, readers)
    planned = plan_removal_and_cut(whole, keep, example_inputs, readers=readers)
    removal, plan = planned.removal, planned.plan
    if optimizer is not None:
        _check_slots(model, optimizer)
    if removal.gone:
        with uninterrupted():
            widened = widen(model)
            removal.apply(model)
            replaced = apply_plan(model, plan)
            if optimizer is not None:
                _repoint(optimizer, widened)
                _repoint(optimizer, replaced)
    after = filter_counts(model)
    return {
        "version": _VERSION,
        "plan": plan.to_dict(),
        "dropped": removal.gone,
        "layers": {name: {"before": before[name], "after": after[name]} for name in before},
        "parameters": {"before": parameters, "after": _count(model)},
        "masked": dict(plan.masked),
    }


def keep_of_uncut(
    model: nn.Module, keep: Mapping[str, Tensor], readers: Mapping[str, Readers]
) -> dict[str, Tensor]:
    """Keep masks of a model that was cut before, over the filters that it had before the first cut.

    Args:
        model: as it is now.
        keep: {name: BoolTensor[filters]} of its present filters. Layers not named keep all of them.
        readers: the result of ``read_structure`` for the uncut model.

    Returns:
        {name: BoolTensor[filters before the first cut]}; layers that were not cut are listed if ``keep``
        names them.
    """
    found = {}
    for name, conv in convolutions(model).items():
        left, mask = filters_left(conv), keep.get(name)
        if left is None:
            if mask is not None:
                found[name] = mask
        elif mask is not None or not unremovable(readers, name):
            count, rows = left
            alive = torch.zeros(count, dtype=torch.bool)
            # A spread layer still counts all its filters.
            alive[rows] = True if mask is None else mask[rows] if len(mask) == len(alive) else mask
            found[name] = alive
    return found


def filter_counts(model: nn.Module) -> dict[str, int]:
    """{name: how many filters a convolution holds}, after cuts too."""
    # The parameter itself: a spread layer computes with more rows.
    return {
        name: conv.out_channels
        if (weight := own_parameters(conv).get("weight")) is None
        else filter_count(conv, weight)
        for name, conv in convolutions(model).items()
    }


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _check_slots(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ``ValueError`` if a slot of the optimizer cannot be cut as its parameter is."""
    for name, parameter in model.named_parameters():
        for key, slot in optimizer.state.get(parameter, {}).items():
            plain = not isinstance(slot, list | tuple | dict)
            if not plain or (isinstance(slot, Tensor) and slot.dim() and not _fits(slot, parameter)):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key!r} of {name!r} in another shape than the "
                    "parameter's, and it cannot be cut: pass no optimizer, and build a new one after the cut."
                )


def _fits(slot: Tensor, parameter: Tensor) -> bool:
    """Whether ``slot`` has the parameter's shape, or 1 in some of its dimensions, as Adafactor's have."""
    pairs = zip(slot.shape, parameter.shape, strict=False)
    return slot.dim() == parameter.dim() and all(mine in (1, other) for mine, other in pairs)


def _repoint(optimizer: torch.optim.Optimizer, replaced: Sequence[Replaced]) -> None:
    """Have ``optimizer`` step the new parameters, with the slots of the old ones."""
    by_old = {one.old: one for one in replaced}
    for group in optimizer.param_groups:
        group["params"][:] = [by_old[p].new if p in by_old else p for p in group["params"]]
    for old, one in by_old.items():
        if old in optimizer.state:
            slots = optimizer.state.pop(old)
            optimizer.state[one.new] = {
                key: one.of(slot) if isinstance(slot, Tensor) and slot.dim() else slot
                for key, slot in slots.items()
            }
