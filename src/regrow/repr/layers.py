"""The layers whose filters can be dropped and restored, and why the others are left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regrow.filters import check_finite, convolutions, eligible, excluded, left_out
from regrow.modules import unwrap
from regrow.repr.slots import stepping
from regrow.short import by_reason, listed
from regrow.structure.read import read_structure
from regrow.structure.readers import Readers, silent_entries
from regrow.torch_private import own_parameters


@dataclass(frozen=True)
class Layers:
    """The convolutions of a model.

    Attributes:
        readers: {qualified name: readers of the layer's channels}, of every convolution that is reached.
        usable: those among ``readers`` whose filters can be dropped and restored.
        left_out: {qualified name: why it is left alone}, of all other convolutions.
    """

    readers: Mapping[str, Readers]
    usable: Mapping[str, Readers]
    left_out: Mapping[str, str]


def usable_layers(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    example_inputs: Any,
    exclude: Sequence[str],
    skip_first: bool,
) -> Layers:
    """Read the structure of ``model``, which is not changed.

    Raises:
        ValueError: NaN weights, an unknown name, no convolution left, an optimizer that does not hold the
            parameters of the usable layers.
    """
    inner = unwrap(model)
    check_finite(eligible(inner, exclude))
    readers = read_structure(model, example_inputs)
    reasons = _left_out(inner, readers, exclude, skip_first)
    usable = {name: readers[name] for name in eligible(inner, reasons)}
    _check_held(inner, optimizer, usable)
    for each in usable.values():
        for consumer in each.consumers:
            weight = own_parameters(inner.get_submodule(consumer)).get("weight")
            if weight is None or not weight.requires_grad:
                each.mixed = each.mixed or f"{consumer!r} reads it and is frozen"
    return Layers(readers, usable, reasons)


def _left_out(
    model: nn.Module, readers: Mapping[str, Readers], exclude: Sequence[str], skip_first: bool
) -> dict[str, str]:
    every = convolutions(model)
    reasons = dict.fromkeys(sorted(excluded(exclude, every)), "excluded by name")
    if skip_first and readers:
        first = next(iter(readers))
        reasons.setdefault(first, "the first convolution (skip_first=False includes it)")
    for name, reason in left_out(model).items():
        reasons.setdefault(name, reason)
    for name in every:
        if name not in readers:
            reasons.setdefault(name, "example_inputs do not reach it")
            continue
        if why := readers[name].output:
            reasons.setdefault(name, why)
        if norm := readers[name].unsilenced:
            reasons.setdefault(name, f"{norm!r} behind it cannot be silenced for its channels alone")
        for norm in readers[name].norms:
            affine = list(model.get_submodule(norm).parameters(recurse=False))
            if any(not parameter.requires_grad for parameter in affine):
                reasons.setdefault(name, f"the norm behind it, {norm!r}, is frozen")
    if len(reasons) == len(every):
        raise ValueError(
            f"no convolution is left to work on ({by_reason(reasons)}). Exclude fewer layers, unfreeze some "
            "(requires_grad_(True)), or pass skip_first=False."
        )
    return reasons


def _check_held(model: nn.Module, optimizer: torch.optim.Optimizer, usable: Mapping[str, Readers]) -> None:
    # A parameter in another optimizer, such as a bias, would not stay at 0 in a dropped filter.
    groups = [group for part in stepping(optimizer) for group in part.param_groups]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    entries = silent_entries(model, usable, {name: [0] for name in usable})
    needed = {id(parameter) for parameter, *_ in entries if parameter.requires_grad}
    missing = [name for name, p in model.named_parameters() if id(p) in needed - held]
    if missing:
        raise ValueError(
            f"the optimizer does not hold {listed(missing)}. Build it from all of this model's parameters, "
            "after the model has been moved to its device; or list in exclude= the layers that it does not "
            "train, or freeze them."
        )
