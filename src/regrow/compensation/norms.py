"""Batch-norm statistics taken anew from unlabelled images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from regrow.compensation.images import check_calibration, check_finite_results, forward, inputs_of
from regrow.looking.calls import evaluating
from regrow.looking.hooks import hooked
from regrow.marks import check
from regrow.modules import unwrap
from regrow.torch_private import BatchNorm

_VERSION = 1


@torch.no_grad()
def reestimate_norms(model: nn.Module, calibration: Iterable[Any]) -> dict[str, Any]:
    """Replace the running statistics of batch norms by their mean over ``calibration``, in place.

    For a network whose activations have changed since they were recorded: filters were removed, or it
    was trained with noise on its weights. Batch norms alone are in train mode meanwhile (dropout is
    off); each batch counts by its number of values. A channel that does not vary at all gets variance 1.
    Batch norms without running statistics, or with momentum 0 (frozen), are left alone, and so are
    those the images do not reach.

    Args:
        model: any module, in any mode; wrappers are looked through.
        calibration: as in ``compensate``.

    Returns:
        JSON-able record: version, norms [qualified names], images.

    Raises:
        ValueError: no such batch norm; ``calibration`` is empty, does not fit the model or yields NaN.
            Nothing is changed then.
    """
    check(model, "reestimate_norms")
    model = unwrap(model)
    norms = running_norms(model)
    if not norms:
        raise ValueError(
            "the model has no batch norm with running statistics (and momentum above 0), so there is "
            "nothing to re-estimate."
        )
    check_calibration(calibration)
    momenta = {name: norm.momentum for name, norm in norms.items()}
    saved = {name: [buffer.clone() for buffer in _buffers(norm)] for name, norm in norms.items()}
    values: Counter[str] = Counter()

    def weigh(name: str, norm: Any, inputs: tuple[Tensor, ...]) -> None:
        count = inputs[0].numel() // norm.num_features
        values[name] += count
        norm.momentum = count / values[name]  # makes the running statistics a weighted mean

    done = False
    try:
        with evaluating(model), hooked(list(norms.items()), before=weigh):
            for norm in norms.values():
                norm.reset_running_stats()
                norm.train()
            images = sum(forward(model, inputs) for inputs in inputs_of(model, calibration))
        reached = [name for name in norms if values[name]]
        for name in reached:
            check_finite_results(name, norms[name].running_mean, norms[name].running_var)
        done = True
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
            if not done or not values[name]:
                for buffer, old in zip(_buffers(norm), saved[name], strict=True):
                    buffer.copy_(old)
    for name in reached:
        variance: Any = norms[name].running_var
        variance[variance == 0] = 1
    return {"version": _VERSION, "norms": reached, "images": images}


def running_norms(model: nn.Module) -> dict[str, Any]:
    """The batch norms whose running statistics are there and not frozen."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.running_mean is not None and module.momentum != 0
    }


def _buffers(norm: nn.Module) -> list[Tensor]:
    return list(norm.buffers(recurse=False))
