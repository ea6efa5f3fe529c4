"""ReDo: units that are hardly ever active are drawn anew."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from regrow.criteria.utility import Arrivals
from regrow.given import check_inputs, check_optimizer, check_seed, is_real
from regrow.interrupts import uninterrupted
from regrow.looking.calls import PassFailed, buffers_kept, call, evaluating
from regrow.looking.hooks import hooked
from regrow.looking.images import check_batches, inputs_of
from regrow.marks import check
from regrow.modules import device_of, unwrap
from regrow.repr.ranks import copy_from_first, first_decides, group_of
from regrow.restarts.fresh import check_fresh
from regrow.restarts.memory import Memory
from regrow.restarts.saved import VERSION
from regrow.restarts.units import Units, find_units, renew, width_of


def redo(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    batches: Iterable[Any],
    example_inputs: Any,
    threshold: float = 0.025,
    seed: int = 0,
    fresh: nn.Module | None = None,
) -> dict[str, Any]:
    """Draw dormant units anew (ReDo, Sokar et al. 2023, arXiv 2302.12902): filters and linear units.

    The score of unit i is E|h_i| divided by its mean over the layer (eq. 1), where h_i is what the readers of
    the unit get, behind norm, activation and pooling, in evaluation mode. A unit whose score is at most
    ``threshold`` gets new incoming weights, the bias 0 and a reset norm, and the weights that read it become
    0. The optimizer forgets what it remembers of these weights.

    Args:
        model: any module, also in wrappers. With DDP, give the wrapper, in every process: the first process
            decides by its batches.
        optimizer: the optimizer that trains ``model``; None if it is built anew.
        batches: an iterable of inputs, or of (inputs, labels), of which the labels are not read.
        example_inputs: an input of ``model``, such as x[:1], by which the readers of each unit are found.
        threshold: at least 0.
        seed: of the new weights, which each layer's ``reset_parameters`` draws.
        fresh: a newly built model of the same structure, whose filters are taken instead.

    Returns:
        A JSON-able record: version, threshold, dormant {layer: indices}, scores {layer: [score of each
        unit]}, left_out {layer: reason}, notes.

    Raises:
        ValueError: an argument out of range, no layer to work on, a pass fails, NaN activations, a state in
            which this is refused. Nothing is changed.
    """
    check(model, "redo")
    if optimizer is not None:
        check_optimizer(optimizer, "redo")
    check_batches(batches, "batches")
    check_inputs(example_inputs, "redo")
    check_seed(seed)
    if not is_real(threshold) or not 0 <= threshold < math.inf:
        raise ValueError(f"threshold must be a number of at least 0, got {threshold!r}.")
    inner, group = unwrap(model), group_of(model)
    fresh = None if fresh is None else check_fresh(inner, fresh)

    units = find_units(inner, example_inputs)

    def choose() -> dict[str, Any]:
        scores = {name: values.tolist() for name, values in _scores(inner, units, batches).items()}
        unseen = dict.fromkeys(
            units.layers.keys() - scores.keys(), "no batch reaches the layers that read it"
        )
        dormant = {
            name: [unit for unit, value in enumerate(values) if value <= threshold]
            for name, values in scores.items()
        }
        return {
            "scores": scores,
            "dormant": {name: found for name, found in dormant.items() if found},
            "left_out": dict(units.left_out) | unseen,
        }

    chosen = first_decides(choose, group, device_of(inner))
    memory = Memory(optimizer)
    with uninterrupted():
        masks = renew(inner, units.layers, chosen["dormant"], seed, fresh)
        if group is not None:
            copy_from_first([*inner.parameters(), *inner.buffers()], group)
        notes = memory.clear(masks)
    return {
        "version": VERSION,
        "threshold": float(threshold),
        **chosen,
        "notes": notes,
    }


@torch.no_grad()
def _scores(model: nn.Module, units: Units, batches: Iterable[Any]) -> dict[str, Tensor]:
    """{layer: Tensor[units] on the CPU}, E|h_i| over the mean of the layer; 0 for a layer that is all 0.

    Layers whose units no batch shows are not listed.
    """
    consumers = {consumer for readers in units.layers.values() for consumer in readers.consumers}
    layers = [(name, model.get_submodule(name)) for name in consumers]
    arrivals = Arrivals()
    with evaluating(model), buffers_kept(model), hooked(layers, before=arrivals.look):
        for inputs in inputs_of(model, batches):
            try:
                call(model, inputs)
            except PassFailed as error:
                raise PassFailed(f"the model's forward pass fails on a batch: {error.__cause__}.") from error
    scores = {}
    for name, readers in units.layers.items():
        total = torch.zeros(width_of(model.get_submodule(name)), dtype=torch.float64)
        times = torch.zeros_like(total)
        for consumer, reads in readers.consumers.items():
            if not arrivals.pictures.get(consumer):
                continue
            filters, places = torch.as_tensor(reads.filters), torch.as_tensor(reads.indices)
            means = arrivals.sums[consumer].double().cpu() / arrivals.pictures[consumer]
            total.index_add_(0, filters, means[places])
            times.index_add_(0, filters, torch.ones(len(filters), dtype=torch.float64))
        if not times.all():
            continue
        mean = total / times
        if not mean.isfinite().all():
            raise ValueError(
                f"the batches give NaN or infinite values behind {name!r}: check them and the model."
            )
        scores[name] = mean / mean.mean() if mean.mean() > 0 else mean
    return scores
