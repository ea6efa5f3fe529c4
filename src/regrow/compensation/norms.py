"""Re-estimate batch-norm statistics from unlabelled images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from regrow.looking.calls import evaluating
from regrow.looking.hooks import hooked
from regrow.looking.images import check_batches, check_finite_results, forward, inputs_of
from regrow.marks import check
from regrow.modules import unwrap
from regrow.torch_private import BatchNorm

_VERSION = 1


@torch.no_grad()
def reestimate_norms(model: nn.Module, calibration: Iterable[Any]) -> dict[str, Any]:
    """Replace the running statistics of batch norms by their mean over ``calibration``, in place.

    Use it if a network's activations have changed since the statistics were recorded: filters were
    removed, or the network was trained with noise on its weights. Only batch norms are in train mode
    meanwhile (dropout is off). Each batch is weighted by its number of values. A constant channel gets
    variance 1. Batch norms that have no running statistics, have momentum 0 (frozen) or are not reached by
    the images stay as they are.

    Args:
        model: any module, in any mode; wrappers are looked through.
        calibration: as in ``compensate``.

    Returns:
        JSON-able record: version, norms [qualified names], images.

    Raises:
        ValueError: there is no batch norm to re-estimate, or ``calibration`` is empty, does not fit the model
            or yields NaN. The model is unchanged then.
    """
    check(model, "reestimate_norms")
    model = unwrap(model)
    norms = running_norms(model)
    if not norms:
        raise ValueError(
            "the model has no batch norm with running statistics (and momentum above 0), so there is "
            "nothing to re-estimate."
        )
    check_batches(calibration, "calibration")
    momenta = {name: norm.momentum for name, norm in norms.items()}
    saved = {name: [buffer.clone() for buffer in norm.buffers(recurse=False)] for name, norm in norms.items()}
    values: Counter[str] = Counter()

    def weigh(name: str, norm: Any, inputs: tuple[Tensor, ...]) -> None:
        count = inputs[0].numel() // inputs[0].shape[1]
        values[name] += count
        norm.momentum = count / values[name]  # makes the running statistics a weighted mean

    measured: list[str] = []
    try:
        with evaluating(model), hooked(list(norms.items()), before=weigh):
            for norm in norms.values():
                norm.reset_running_stats()
                norm.train()
            images = sum(forward(model, inputs) for inputs in inputs_of(model, calibration))
        reached = [name for name in norms if values[name]]
        for name in reached:
            check_finite_results(name, norms[name].running_mean, norms[name].running_var)
        measured = reached
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
            if name not in measured:
                for buffer, old in zip(norm.buffers(recurse=False), saved[name], strict=True):
                    buffer.copy_(old)
    for name in measured:
        variance: Any = norms[name].running_var
        variance[variance == 0] = 1
    return {"version": _VERSION, "norms": measured, "images": images}


def running_norms(model: nn.Module) -> dict[str, Any]:
    """Return the batch norms that have running statistics and are not frozen (momentum 0)."""
    norms: dict[str, Any] = {name: layer for name, layer in model.named_modules() if has_statistics(layer)}
    return {name: norm for name, norm in norms.items() if norm.momentum != 0}


def has_statistics(module: nn.Module) -> bool:
    """Return whether ``module`` is a batch norm with running statistics."""
    return isinstance(module, BatchNorm) and module.running_mean is not None
