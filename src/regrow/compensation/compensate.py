"""The three readings of "pruned", and the compensation of removed filters without labels or training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regrow.compensation.norms import has_statistics, reestimate_norms, running_norms
from regrow.given import check_inputs
from regrow.interrupts import uninterrupted
from regrow.looking.calls import evaluating
from regrow.looking.copies import copied
from regrow.looking.hooks import hooked
from regrow.looking.images import check_batches, check_finite_results, forward, inputs_of
from regrow.marks import check
from regrow.modules import channel_dim, unwrap
from regrow.structure.norms import own_norms
from regrow.structure.readers import Readers
from regrow.suggest import nearest
from regrow.surgery.removal import plan_removal, remove_filters, zero_filters
from regrow.torch_private import ConvNd, own_parameters

READINGS = ("zeroed", "removed", "compensated")
_VERSION = 1


def read_as(
    model: nn.Module,
    keep: Mapping[str, Tensor],
    reading: str,
    *,
    example_inputs: Any,
    calibration: Iterable[Any] | None = None,
) -> dict[str, Any]:
    """Turn ``model``, in place, into one reading of "these filters are pruned"; return a JSON-able record.

    Args:
        model: any trained module; wrappers are looked through.
        keep: {qualified name: BoolTensor[filters]}, True = alive.
        reading: ``"zeroed"`` calls ``zero_filters`` (the reading in Batch Bridgeout's curves), ``"removed"``
            calls ``remove_filters`` (what a smaller network computes), ``"compensated"`` ``compensate``.
        example_inputs: inputs of ``model``; one picture is enough.
        calibration: batches of images for ``"compensated"``; the other two need none.

    Raises:
        ValueError: the reading is unknown, calibration is missing, or the function called raises the error.
    """
    check(model, "read_as")
    if reading not in READINGS:
        raise ValueError(f"unknown reading {reading!r}{nearest(str(reading), READINGS)}")
    if reading == "zeroed":
        return zero_filters(model, keep)
    check_inputs(example_inputs, "read_as")
    if reading == "removed":
        return remove_filters(model, keep, example_inputs=example_inputs)
    if calibration is None:
        raise ValueError(
            "the reading 'compensated' needs calibration=: batches of a few hundred images in all, such as "
            "itertools.islice(loader, 4), or [x] for one batch. Labels are ignored."
        )
    return compensate(model, keep, calibration, example_inputs=example_inputs)


@torch.no_grad()
def compensate(
    model: nn.Module,
    keep: Mapping[str, Tensor],
    calibration: Iterable[Any],
    *,
    example_inputs: Any,
    fold: bool = True,
    reestimate: bool = True,
    readers: Mapping[str, Readers] | None = None,
) -> dict[str, Any]:
    """Remove filters from a trained model, in place, and make up for them on unlabelled images.

    First the mean activation of every removed channel, as its consumers see it (behind norm, activation,
    pooling, residual sum, gate), is folded into the consumers' biases; then batch-norm statistics are
    re-estimated with these biases. The mean is over images and positions, while all other channels are as
    in the original network. A constant channel is replaced exactly, except at a padded border, where part
    of the kernel reads zeros instead of the channel: no bias is exact both there and in the interior. The
    bias is the one with the smallest mean squared error over all positions.

    If a layer has no bias, the running mean of the batch norm directly behind it takes the fold. If it has
    no such norm either, nothing is added and the record names the layer (batch norms further on still make
    up for part of the loss). No parameter is added or renamed.

    Args:
        model: any trained module, in any mode; wrappers are looked through. It must not have been cut.
        keep: {qualified name: BoolTensor[filters]}, True = alive.
        calibration: batches: a tensor, a tuple or list whose first item is the input (labels are
            ignored), or a dict of keywords. A few hundred images in all are enough, 64 or more a batch;
            every batch is used, twice, on the model's device. Under data parallelism give every rank the
            same batches.
        example_inputs: inputs of ``model``; one picture is enough.
        fold: whether to fold the means.
        reestimate: whether to re-estimate the batch norms (``reestimate_norms``).
        readers: the result of ``structure.read_structure`` for the model, if you have it: reading the
            structure takes most of the time when there are few images.

    Returns:
        JSON-able record: the record of ``remove_filters``, and folded [layers that took a mean], unfolded
        {layer: why it could not}, norms [re-estimated norms], images (how many were read). If ``keep`` drops
        no filter, the model stays as it is.

    Raises:
        ValueError: as ``remove_filters``; ``calibration`` is empty, does not fit the model or yields NaN.
            The model is unchanged then.
    """
    check(model, "compensate")
    check_inputs(example_inputs, "compensate")
    model = unwrap(model)
    removal = plan_removal(model, keep, example_inputs, readers)
    check_batches(calibration, "calibration")
    record = removal.record("compensated") | {"folded": [], "unfolded": {}, "norms": [], "images": 0}
    if not removal.gone:
        return record
    if isinstance(calibration, Iterator):  # an iterator yields its batches once; they are needed twice
        calibration = list(calibration)
    cut = copied(model)
    removal.apply(cut)
    shifts: dict[str, Tensor] = {}
    behind: dict[str, list[str]] = {}
    if fold:
        shifts, record["images"] = _mean_shifts(model, cut, removal.gone, calibration)
        behind = _running(model, own_norms(model, example_inputs))
        record["unfolded"] = _fold(cut, shifts, behind)
        record["folded"] = [name for name in shifts if name not in record["unfolded"]]
    if reestimate and running_norms(cut):
        estimated = reestimate_norms(cut, calibration)
        record["norms"], record["images"] = estimated["norms"], estimated["images"]

    with uninterrupted():
        removal.apply(model)
        _fold(model, shifts, behind)
        for name in record["norms"]:
            norm, estimates = model.get_submodule(name), cut.get_submodule(name).buffers(recurse=False)
            for buffer, estimate in zip(norm.buffers(recurse=False), estimates, strict=True):
                buffer.copy_(estimate)
    return record


def _mean_shifts(
    model: nn.Module, cut: nn.Module, gone: Mapping[str, list[int]], calibration: Iterable[Any]
) -> tuple[dict[str, Tensor], int]:
    """Return by how much each layer's outputs fall, on average, when no removed channel reaches the layer.

    Each layer of ``cut`` passes on the output that it has in ``model``, so that the next layer lacks only
    the removed channels. (Passing on the corrected output gives lower accuracy: later biases then make up
    for what earlier layers have lost for good.)

    Returns:
        {name: Tensor[outputs]} for the layers whose outputs change, and the number of images.
    """
    originals: dict[str, list[Tensor]] = {}
    totals: dict[str, Tensor] = {}
    positions: Counter[str] = Counter()

    def remember(name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        # Store a copy, because the activation behind the layer may work in place.
        originals.setdefault(name, []).append(output.clone())

    def replace(name: str, module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        original = originals[name].pop(0)
        dim = channel_dim(module, output)
        alive = torch.ones(output.shape[dim], dtype=torch.bool, device=output.device)
        alive[gone.get(name, [])] = False
        original, output = original.movedim(dim, -1), output.movedim(dim, -1)
        wide = torch.promote_types(original.dtype, torch.float32)
        lack = torch.where(alive, original.to(wide) - output.to(wide), 0).reshape(-1, len(alive))
        # Not every device has double precision: the sum is on the CPU.
        total = lack.mean(0).cpu().double() * len(lack)
        totals[name] = totals[name] + total if name in totals else total
        positions[name] += len(lack)
        return torch.where(alive, original, output).movedim(-1, dim)

    images = 0
    with evaluating(model), evaluating(cut), hooked(_layers(model), remember), hooked(_layers(cut), replace):
        for inputs in inputs_of(model, calibration):
            images += forward(model, inputs)
            forward(cut, inputs)
            originals.clear()
    shifts = {name: total / positions[name] for name, total in totals.items() if total.any()}
    for name, shift in shifts.items():
        check_finite_results(name, shift)
    return shifts, images


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the convolutions, transposed ones too, and the linear layers."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, ConvNd | nn.Linear)]


def _running(model: nn.Module, norms: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return the entries of ``norms`` that list only batch norms with running statistics."""
    running = {name for name, module in model.named_modules() if has_statistics(module)}
    return {name: own for name, own in norms.items() if running.issuperset(own)}


def _fold(model: nn.Module, shifts: Mapping[str, Tensor], behind: Mapping[str, list[str]]) -> dict[str, str]:
    """Add ``shifts`` to the outputs of the layers; return {layer: why its output cannot be shifted}."""
    holders = Counter(id(p) for module in model.modules() for p in own_parameters(module).values())
    unfolded = {}
    for name, shift in shifts.items():
        bias = own_parameters(model.get_submodule(name)).get("bias")
        if bias is not None and holders[id(bias)] == 1 and bias.shape == shift.shape:
            bias.add_(shift.to(bias))
        elif name in behind:
            for norm in behind[name]:
                mean: Any = model.get_submodule(norm).running_mean
                mean.sub_(shift.to(mean))
        else:
            unfolded[name] = "it has no unshared bias, and no batch norm directly behind that serves it alone"
    return unfolded
