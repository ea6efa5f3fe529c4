"""Cut filters out for good: smaller parameters, buffers and optimizer, and a record of what was done."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regrow.filters import check_keep, convolutions
from regrow.marks import check
from regrow.modules import unwrap
from regrow.structure.read import read_structure
from regrow.structure.readers import Readers
from regrow.surgery.layers import Replaced, apply_plan, is_cut, widen
from regrow.surgery.planning import plan_removal_and_cut
from regrow.surgery.removal import unremovable
from regrow.torch_private import own_parameters

__all__ = ["apply_plan", "cut", "filter_counts", "keep_of_uncut"]

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

    The smaller network computes what ``remove_filters`` would leave, in train and eval mode, and stays
    equal to it (its dropped filters held dead) in training. Parameters and buffers become smaller,
    module attributes (``out_channels``, ``num_features``, …) tell the truth, ``state_dict()`` keys stay.
    Where a channel is added to others that are still alive, the layer computes its kept filters alone
    and puts them at their places among zeros. Parameters are new objects: take them from
    ``model.parameters()`` again for anything that holds them, other than ``optimizer``.

    Args:
        model: any module with convolutions, not one inside DataParallel or DistributedDataParallel.
        keep: {name: BoolTensor[filters]}, True = alive, as ``select`` gives it. Layers not named keep all.
            A model that was cut before is cut again: masks are of the filters that it has left.
        example_inputs: what ``model`` takes: a tensor, a tuple of arguments or a dict of keywords; one
            picture is enough.
        optimizer: its groups and what it remembers of the parameters become smaller too.

    Returns:
        JSON-able record: version; plan (``CutPlan.from_dict`` reads it); dropped {name: filters that
        went}; layers {name: filters before and after}; parameters before and after; masked {name: why its
        dropped filters are held at 0 instead}. After a second cut plan and dropped stand for both, and
        count the filters of the uncut model.

    Raises:
        ValueError: the model has no convolution or is wrapped for data-parallel training, sharded, or
            under Bridgeout; ``keep`` does not fit; a layer in it shares its weight with another, is not
            reached, or is the network's output; ``example_inputs`` do not fit; which layers run depends
            on the data; the optimizer remembers something of another shape than its parameter.
            Nothing is changed.
    """
    check(model, "cut")
    model = unwrap(model)
    if not convolutions(model):
        raise ValueError(
            "the model has no convolution to cut: pass one with Conv1d, Conv2d or Conv3d layers."
        )
    before, parameters = filter_counts(model), _count(model)
    whole, keep, readers = model, check_keep(model, keep), None
    if is_cut(model):
        # What a cut leaves picks and places channels by index: it is planned anew, from the uncut model.
        widen(whole := copy.deepcopy(model))
        readers = read_structure(whole, example_inputs)
        keep = keep_of_uncut(model, keep, readers)
    planned = plan_removal_and_cut(whole, keep, example_inputs, readers=readers)
    removal, plan = planned.removal, planned.plan
    if optimizer is not None:
        _check_slots(model, optimizer)
    if removal.gone:
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
    """Keep masks of a model that was cut before, over the filters that it had before that.

    Args:
        model: as it is now.
        keep: {name: BoolTensor[filters]} of the filters it has left. Layers not named keep those.
        readers: what ``read_structure`` says of the uncut model.

    Returns:
        {name: BoolTensor[filters before the first cut]}; layers that were not cut are listed if ``keep``
        names them.
    """
    found = {}
    for name, conv in convolutions(model).items():
        left = vars(conv).get("_regrow_left", {"kept": {}})
        rows = left["kept"].get("weight", {}).get(0)
        mask = keep.get(name)
        if rows is None:
            if mask is not None:
                found[name] = mask
        elif mask is not None or not unremovable(readers, name):
            alive = torch.zeros(left["shapes"]["weight"][0], dtype=torch.bool)
            # A layer that is spread goes on counting all its filters.
            alive[rows] = True if mask is None else mask[rows] if len(mask) == len(alive) else mask
            found[name] = alive
    return found


def filter_counts(model: nn.Module) -> dict[str, int]:
    """{name: how many filters a convolution holds}, after cuts too."""
    # The weight itself: one that is spread has more rows while the layer computes.
    return {
        name: conv.out_channels if (weight := own_parameters(conv).get("weight")) is None else len(weight)
        for name, conv in convolutions(model).items()
    }


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _check_slots(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ``ValueError`` if the optimizer remembers what cannot be cut as its parameter is."""
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
    """Have ``optimizer`` step the new parameters, with what it remembers of the old ones."""
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
