"""Units, which are filters of convolutions and outputs of linear layers: which can be drawn anew, how much
each is used, and the renewal itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.filters import left_out as conv_left_out
from regrow.indexing import index_tensor
from regrow.marks import borrowed_weight
from regrow.modules import (
    CONVOLUTION_CLASSES,
    channels_read,
    filter_count,
    filters_first,
)
from regrow.restarts.fresh import drawn_rows
from regrow.restarts.linear import linear_readers
from regrow.restarts.seeds import seed_of
from regrow.short import by_reason
from regrow.structure.read import read_structure
from regrow.structure.readers import Readers, column_mask, per_channel_tensors
from regrow.torch_private import own_parameters


@dataclass(frozen=True)
class Units:
    """The layers whose units can be drawn anew without a change of the output.

    Attributes:
        layers: {qualified name: readers of its channels}.
        left_out: {qualified name of a convolution or linear layer: why it is left alone}.
    """

    layers: dict[str, Readers]
    left_out: dict[str, str]


def find_units(model: nn.Module, example_inputs: Any) -> Units:
    """Read the structure of ``model``, the user's own module, which is not changed.

    Raises:
        ValueError: the model cannot be copied, its pass fails on ``example_inputs``, or no layer is left.
    """
    readers: dict[str, Readers] = {}
    if any(isinstance(module, CONVOLUTION_CLASSES) for module in model.modules()):
        readers = read_structure(model, example_inputs)
    linear, reasons = linear_readers(model, example_inputs)
    reasons |= conv_left_out(model)
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, (*CONVOLUTION_CLASSES, nn.Linear)) or name in reasons:
            continue
        found = readers.get(name) or linear.get(name)
        why = "example_inputs do not reach it" if found is None else _why_not(model, module, found)
        if found is None or why:
            reasons[name] = why
        else:
            layers[name] = found
    if not layers:
        raise ValueError(f"no layer is left to work on ({by_reason(reasons)}).")
    return Units(layers, reasons)


def _why_not(model: nn.Module, layer: Any, found: Readers) -> str:
    if found.output or found.mixed:
        return found.output or found.mixed
    bias = own_parameters(layer).get("bias")
    if bias is not None and not bias.requires_grad:
        return "its bias is frozen (requires_grad is False)"
    if found.unsilenced:
        return f"{found.unsilenced!r} behind it cannot be reset for its channels alone"
    for norm in found.norms:
        if any(
            not parameter.requires_grad for parameter in model.get_submodule(norm).parameters(recurse=False)
        ):
            return f"the norm behind it, {norm!r}, is frozen"
    for consumer in found.consumers:
        module = model.get_submodule(consumer)
        if why := borrowed_weight(module):
            return f"{consumer!r}, which reads it, is left alone: {why}"
        if not own_parameters(module)["weight"].requires_grad:
            return f"{consumer!r} reads it and is frozen"
    read = {each for reads in found.consumers.values() for each in reads.filters}
    if len(read) < filter_count(layer, layer.weight):
        return "no layer reads some of its units"
    return ""


def width_of(layer: Any) -> int:
    """How many units a layer has."""
    return filter_count(layer, layer.weight)


def input_width(layer: nn.Module) -> int:
    """How many channels a convolution or linear layer reads."""
    width = channels_read(layer)
    assert width is not None
    return width


@torch.no_grad()
def renew(
    model: nn.Module,
    readers: Mapping[str, Readers],
    chosen: Mapping[str, Sequence[int]],
    seed: int,
    fresh: nn.Module | None = None,
) -> dict[nn.Parameter, Tensor]:
    """Draw the units ``chosen``, {layer: indices}, anew: their incoming weights as at the start, their bias
    0, the norms behind them reset, and the weights that read them 0.

    Args:
        readers: of the layers in ``chosen``.
        seed: of the draws.
        fresh: a newly built model of the same structure, from which filters are taken; None draws by each
            layer's ``reset_parameters``.

    Returns:
        {parameter: BoolTensor over its first one or two dimensions, True = new value}.
    """
    masks: dict[nn.Parameter, Tensor] = {}

    def note(parameter: nn.Parameter, mask: Tensor) -> None:
        mask = mask.to(parameter.device)
        masks[parameter] = masks[parameter] | mask if parameter in masks else mask

    layers: list[tuple[str, Any, Tensor]] = [
        (name, model.get_submodule(name), index_tensor(list(indices))) for name, indices in chosen.items()
    ]
    for number, (name, layer, indices) in enumerate(layers):
        rows, weight = _new_rows(name, layer, len(indices), seed_of(seed, number), fresh), layer.weight
        at = indices.to(weight.device)
        filters_first(layer, weight.detach())[at] = rows.to(weight)
        mask = torch.zeros(weight.shape[:2], dtype=torch.bool)
        filters_first(layer, mask)[indices] = True
        note(weight, mask)
        bias = own_parameters(layer).get("bias")
        if bias is not None:
            bias[at] = 0
            note(bias, _at(bias, indices))
        for norm, reads in readers[name].norms.items():
            module, channels = model.get_submodule(norm), index_tensor(reads.of(indices.tolist()))
            for key, tensor in per_channel_tensors(module).items():
                tensor[channels.to(tensor.device)] = 1 if key in ("weight", "running_var") else 0
                if isinstance(tensor, nn.Parameter):
                    note(tensor, _at(tensor, channels))
    # Columns behind rows: a new unit must not read another new unit of the layer before it either.
    for name, _, indices in layers:
        for consumer, reads in readers[name].consumers.items():
            reader: Any = model.get_submodule(consumer)
            mask = column_mask(reader, reads.of(indices.tolist()))
            reader.weight[mask.to(reader.weight.device)] = 0
            note(reader.weight, mask)
    return masks


def _new_rows(name: str, layer: nn.Module, count: int, seed: int, fresh: nn.Module | None) -> Tensor:
    """New incoming weights for ``count`` units of ``layer``, units first."""
    if fresh is None:
        return drawn_rows(layer, count, seed)
    there: Any = fresh.get_submodule(name)
    every = filters_first(there, there.weight.detach())
    # Filters of a given model are taken in an order of chance, or a unit would always begin in the same way.
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    return every[order[:count].to(every.device)]


def _at(tensor: Tensor, indices: Tensor) -> Tensor:
    mask = torch.zeros(len(tensor), dtype=torch.bool)
    mask[indices] = True
    return mask
