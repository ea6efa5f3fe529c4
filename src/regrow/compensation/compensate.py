"""The three readings of "pruned", and the compensation of removed filters without labels or training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regrow.callers import warn
from regrow.compensation.means import fold, mean_shifts
from regrow.compensation.reconstruct import reconstruct
from regrow.criteria.bar import progress_bar
from regrow.given import check_inputs
from regrow.interrupts import uninterrupted
from regrow.looking.copies import copied
from regrow.looking.images import check_batches, of_another_size, of_one_class, picked
from regrow.marks import check
from regrow.modules import unwrap
from regrow.structure.norms import own_norms
from regrow.structure.readers import Readers
from regrow.suggest import nearest
from regrow.surgery.removal import plan_removal, remove_filters, zero_filters

READINGS = ("zeroed", "removed", "compensated")
METHODS = ("least-squares", "means")


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
    method: str = "least-squares",
    readers: Mapping[str, Readers] | None = None,
    progress: Callable[[float], object] | None = None,
) -> dict[str, Any]:
    """Remove filters from a trained model, in place, and make up for them on unlabelled images.

    ``"least-squares"`` goes through the convolutions and linear layers in the order of the pass. Each gets
    the weights whose outputs, from what the layer reads in the smaller network, come closest to what it made
    in the network with all filters: a ridge regression towards the old weights, with a new bias. Where the
    output is added to a shortcut, as in residual networks, the layer makes up for what the shortcut lacks
    too. The penalty is the one that does best on the half of the images that the weights were not fitted to;
    where none is better than a shift by the mean, the layer gets that shift alone.

    ``"means"`` folds the mean of what each removed channel brought to a layer into the layer's bias, and
    changes no weight. The mean is over images and positions, while all other channels are as in the original
    network. A constant channel is replaced exactly, except at a padded border.

    If a layer has no bias, the running mean of the batch norm directly behind it takes the shift. If it has
    no such norm either, it takes none. No parameter is added or renamed, and no statistics are estimated
    anew: a network that was trained with noise on its weights has better ones after ``reestimate_norms``,
    before this.

    Args:
        model: any trained module, in any mode; wrappers are looked through. It must not have been cut.
        keep: {qualified name: BoolTensor[filters]}, True = alive.
        calibration: batches: a tensor, a tuple or list whose first item is the input (labels are
            ignored), or a dict of keywords. For a model of several inputs, whose ``example_inputs`` are a
            tuple of them, a batch is such a tuple too, or a pair of it and labels. A few hundred images in
            all are enough, 64 or more a batch. All are used, on the model's device: in one pass where they
            fit into 60 % of its memory, else in a pass for each layer. Under data parallelism give every
            rank the same batches.
        example_inputs: inputs of ``model``; one picture is enough.
        method: ``"least-squares"`` or ``"means"``.
        readers: the result of ``structure.read_structure`` for the model, if you have it: reading the
            structure takes most of the time when there are few images.
        progress: called with the share of the layers that are done, 0 to 1. Without it, a bar on a terminal
            shows what takes over two seconds.

    Returns:
        JSON-able record: the record of ``remove_filters``, and method, layers {layer that changed: how
        ("least squares" or "mean"), penalty (as a share of the mean square of what the layer reads), error
        (which share of the squared error is left)}, unfolded {layer: why it took neither weights nor a
        shift}, images (how many were read). If ``keep`` drops no filter, the model stays as it is.

    Raises:
        ValueError: as ``remove_filters``; the method is unknown; ``calibration`` is empty, does not fit the
            model or yields NaN. The model is unchanged then.

    Warns:
        UserWarning: there are fewer images (and positions in them) than a layer has inputs, all labels that
            come with the images are the same, or the images are of another size than ``example_inputs``.
    """
    check(model, "compensate")
    check_inputs(example_inputs, "compensate")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}{nearest(str(method), METHODS)}")
    model = unwrap(model)
    removal = plan_removal(model, keep, example_inputs, readers)
    check_batches(calibration, "calibration")
    record = removal.record("compensated") | {"method": method, "layers": {}, "unfolded": {}, "images": 0}
    if not removal.gone:
        return record
    given = list(calibration)
    batches = list(picked(given, example_inputs))
    for warning in (of_one_class(given, example_inputs), of_another_size(batches, example_inputs)):
        if warning:
            warn(warning)
    norms = own_norms(model, example_inputs)
    cut = copied(model)
    removal.apply(cut)
    if method == "means":
        shifts, record["images"] = mean_shifts(model, cut, removal.gone, batches)
        record["unfolded"] = fold(cut, shifts, norms)
        record["layers"] = {name: {"how": "mean"} for name in shifts if name not in record["unfolded"]}
    else:
        with progress_bar("making up for removed filters", 100, shown=progress is None) as advance:
            shown = 0

            def tell(share: float) -> None:
                nonlocal shown
                advance(round(100 * share) - shown)
                shown = round(100 * share)
                if progress is not None:
                    progress(share)

            done = reconstruct(model, cut, removal.gone, norms, batches, tell)
        record |= {"layers": done.layers, "unfolded": done.unfolded, "images": done.images}
        if done.few:
            _warn_of_few(done.few)
    with uninterrupted():
        removal.apply(model)
        for mine, theirs in zip(
            (*model.parameters(), *model.buffers()), (*cut.parameters(), *cut.buffers()), strict=True
        ):
            if not torch.equal(mine, theirs):
                mine.copy_(theirs)
    return record


def _warn_of_few(few: Mapping[str, tuple[int, int]]) -> None:
    name = max(few, key=lambda each: few[each][1] / few[each][0])
    rows, columns = few[name]
    warn(
        f"the calibration images are few for {len(few)} layer{'s' * (len(few) > 1)}: {name!r} has {columns} "
        f"inputs, and the images give {rows} rows of them. Pass more images, a few hundred in all."
    )
