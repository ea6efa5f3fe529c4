"""The three readings of "pruned", and what makes up for removed filters without labels or training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regrow.compensation.images import check_calibration, check_finite_results, forward, inputs_of
from regrow.compensation.norms import reestimate_norms, running_norms
from regrow.looking.calls import evaluating
from regrow.looking.copies import copied
from regrow.looking.hooks import hooked
from regrow.marks import check
from regrow.modules import channel_dim, unwrap
from regrow.structure.norms import own_norms
from regrow.structure.readers import Readers
from regrow.suggest import nearest
from regrow.surgery.removal import plan_removal, remove_filters, zero_filters
from regrow.torch_private import BatchNorm, ConvNd, own_parameters

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
    """Turn ``model``, in place, into one reading of "these filters are pruned".

    Args:
        model: any trained module; wrappers are looked through.
        keep: {qualified name: BoolTensor[filters]}, True = alive.
        reading: ``"zeroed"`` (``zero_filters``, what Batch Bridgeout's curves show), ``"removed"``
            (``remove_filters``, what a smaller network computes) or ``"compensated"`` (``compensate``).
        example_inputs: what ``model`` takes; one picture is enough.
        calibration: batches of images for ``"compensated"``; the other two need none.

    Returns:
        The record of the function called.

    Raises:
        ValueError: an unknown reading, no calibration where it is needed, or as the function called.
    """
    if reading not in READINGS:
        raise ValueError(f"unknown reading {reading!r}{nearest(str(reading), READINGS)}")
    check(model, "read_as")
    if reading == "zeroed":
        return zero_filters(model, keep)
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
    re-estimated with the biases in place. The mean is taken over images and positions while all other
    channels are as in the original network. Of a channel that is constant nothing is lost, where no
    padding is: at a padded border part of the kernel reads zeros instead of the channel, so no single
    bias is exact both there and in the interior. The bias taken is the one with the smallest mean
    squared error over all positions.

    A layer without a bias takes the fold in the running mean of the batch norm directly behind it; if
    there is none, nothing is added and the record names the layer (batch norms further on still make up
    for part of it). No parameter is added or renamed.

    Args:
        model: any trained module, in any mode; wrappers are looked through. It must not have been cut.
        keep: {qualified name: BoolTensor[filters]}, True = alive.
        calibration: batches: a tensor, a tuple or list whose first item is the input (labels are
            ignored), or a dict of keywords. A few hundred images in all are enough, 64 or more a batch;
            all that it yields is used, twice. Batches are moved to the model's device. Under data
            parallelism give every rank the same.
        example_inputs: what ``model`` takes; one picture is enough.
        fold: whether to fold the means.
        reestimate: whether to re-estimate the batch norms (``reestimate_norms``).
        readers: what ``structure.read_structure`` says of the model, where that is known already: it takes
            most of the time for few images.

    Returns:
        JSON-able record: that of ``remove_filters``, and folded [layers that took a mean], unfolded
        {layer: why it could not}, norms [re-estimated], images (how many were read). With nothing to drop
        the model stays as it is.

    Raises:
        ValueError: as ``remove_filters``; ``calibration`` is empty, does not fit the model or yields NaN.
            Nothing is changed then.
    """
    check(model, "compensate")
    model = unwrap(model)
    removal = plan_removal(model, keep, example_inputs, readers)
    check_calibration(calibration)
    record = removal.record("compensated") | {"folded": [], "unfolded": {}, "norms": [], "images": 0}
    if not removal.gone:
        return record
    if isinstance(calibration, Iterator):  # it yields once, and there are two passes
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

    removal.apply(model)
    _fold(model, shifts, behind)
    for name in record["norms"]:
        estimates = cut.get_submodule(name).buffers(recurse=False)
        for buffer, estimate in zip(model.get_submodule(name).buffers(recurse=False), estimates, strict=True):
            buffer.copy_(estimate)
    return record


def _mean_shifts(
    model: nn.Module, cut: nn.Module, gone: Mapping[str, list[int]], calibration: Iterable[Any]
) -> tuple[dict[str, Tensor], int]:
    """What the outputs of each layer lack on average because removed channels reach it no more.

    Each layer of ``cut`` hands on the output it has in ``model``, so that the next one lacks the removed
    channels and nothing else. (Letting it hand on its own, corrected output gives lower accuracy: the
    later biases then make up for what earlier layers have lost for good.)

    Returns:
        {name: Tensor[outputs]} for the layers that lack something, and the number of images.
    """
    originals: dict[str, list[Tensor]] = {}
    totals: dict[str, Tensor] = {}
    positions: Counter[str] = Counter()

    def remember(name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        # A copy, because the activation behind it may work in place.
        originals.setdefault(name, []).append(output.clone())

    def replace(name: str, module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        original = originals[name].pop(0)
        dim = channel_dim(module, output)
        alive = torch.ones(output.shape[dim], dtype=torch.bool, device=output.device)
        alive[gone.get(name, [])] = False
        original, output = original.movedim(dim, -1), output.movedim(dim, -1)
        lack = torch.where(alive, original.float() - output.float(), 0).reshape(-1, len(alive))
        # Summed on the CPU in double precision, which not every device has.
        total = lack.mean(0).cpu().double() * len(lack)
        totals[name] = totals[name] + total if name in totals else total
        positions[name] += len(lack)
        return torch.where(alive, original, output).movedim(-1, dim)

    images = 0
    with (
        evaluating(model),
        evaluating(cut),
        hooked(_weighted(model), remember),
        hooked(_weighted(cut), replace),
    ):
        for inputs in inputs_of(model, calibration):
            images += forward(model, inputs)
            forward(cut, inputs)
            originals.clear()
    shifts = {name: total / positions[name] for name, total in totals.items() if total.any()}
    for name, shift in shifts.items():
        check_finite_results(name, shift)
    return shifts, images


def _weighted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The convolutions, transposed ones too, and linear layers."""
    return [
        (name, module) for name, module in model.named_modules() if isinstance(module, ConvNd | nn.Linear)
    ]


def _running(model: nn.Module, norms: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The layers whose own norms are all batch norms with running statistics, and these norms."""
    running = {
        name
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.running_mean is not None
    }
    return {name: own for name, own in norms.items() if running.issuperset(own)}


def _fold(model: nn.Module, shifts: Mapping[str, Tensor], behind: Mapping[str, list[str]]) -> dict[str, str]:
    """Add ``shifts`` to the outputs of the layers; {layer: reason} where that is not possible."""
    holders = Counter(id(p) for module in model.modules() for p in own_parameters(module).values())
    unfolded = {}
    for name, shift in shifts.items():
        bias = own_parameters(model.get_submodule(name)).get("bias")
        if bias is not None and holders[id(bias)] == 1:
            bias.add_(shift.to(bias))
        elif name in behind:
            for norm in behind[name]:
                mean: Any = model.get_submodule(norm).running_mean
                mean.sub_(shift.to(mean))
        else:
            unfolded[name] = "it has no bias of its own, and no batch norm of its own directly behind it"
    return unfolded
