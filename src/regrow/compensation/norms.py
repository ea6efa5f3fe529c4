"""Batch-norm statistics from unlabelled images: re-estimated, or matched to those of another network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
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


@torch.no_grad()
def match_norms(model: nn.Module, like: nn.Module, calibration: Iterable[Any]) -> dict[str, Any]:
    """Have each batch norm of ``model`` make the means and variances that it makes in ``like``, in place.

    Use it for a network that lost filters, ``remove_filters`` for example, with the network as it was before.
    The statistics of ``model`` change so that on the images each channel behind each norm has the mean and
    variance that it has in ``like``; if the two networks compute the same, nothing changes. (Statistics that
    are re-estimated take those of the images instead, which cost a network that was trained with augmentation
    some accuracy even with no filter gone.) Norms as in ``reestimate_norms``; channels that do not vary keep
    their variance.

    Args:
        model: any module, in any mode; wrappers are looked through.
        like: the same network with other weights in its convolutions; it is only read.
        calibration: as in ``compensate``.

    Returns:
        JSON-able record: version, norms [qualified names], images.

    Raises:
        ValueError: there is no batch norm with running statistics, the two networks have different ones, or
            ``calibration`` is empty, does not fit the models or yields NaN. The model is unchanged then.
    """
    check(model, "match_norms")
    model, like = unwrap(model), unwrap(like)
    norms, others = running_norms(model), running_norms(like)
    shapes = [{name: len(norm.running_mean) for name, norm in each.items()} for each in (norms, others)]
    if not norms or shapes[0] != shapes[1]:
        raise ValueError(
            "match_norms needs two networks with the same batch norms with running statistics, such as a "
            "network and its copy after remove_filters."
        )
    check_batches(calibration, "calibration")
    arrived: dict[str, list[_Arrived]] = {}
    totals: dict[str, tuple[_Arrived, _Arrived]] = {}

    def remember(name: str, _norm: Any, inputs: Any) -> None:
        arrived.setdefault(name, []).append(_Arrived.of(inputs[0]))

    def recolour(name: str, _norm: Any, inputs: Any) -> tuple[Tensor, ...]:
        # Later norms see what this one makes with its new statistics, those of this batch.
        here, there = _Arrived.of(inputs[0]), arrived[name].pop(0)
        before = totals.get(name)
        totals[name] = (here, there) if before is None else (before[0] + here, before[1] + there)
        shape = (1, -1, *[1] * (inputs[0].dim() - 2))
        ratio = _ratio(here, there).to(inputs[0].dtype)
        mean, wanted = (each.mean.to(inputs[0].dtype) for each in (here, there))
        moved = (inputs[0] - mean.view(shape)) / ratio.view(shape) + wanted.view(shape)
        return (moved, *inputs[1:])

    images = 0
    with evaluating(model), evaluating(like):
        for inputs in inputs_of(model, calibration):
            with hooked(list(others.items()), before=remember):
                images += forward(like, inputs)
            with hooked(list(norms.items()), before=recolour):
                forward(model, inputs)
            arrived.clear()
    for name, both in totals.items():
        check_finite_results(name, *(part for each in both for part in (each.sums, each.squares)))
    for name, (here, there) in totals.items():
        norm, other, ratio = norms[name], others[name], _ratio(here, there)
        # What is equal in both networks must leave no rounding: hence differences, and ratio - 1.
        mean, variance = other.running_mean.double(), other.running_var.double()
        wide = variance + other.eps
        shift = (here.mean - there.mean) + (there.mean - mean) * (1 - ratio)
        norm.running_mean.copy_(mean + shift)
        norm.running_var.copy_((variance + wide * (ratio.square() - 1)).clamp_min(0))
    return {"version": _VERSION, "norms": list(totals), "images": images}


@dataclass(frozen=True)
class _Arrived:
    """Sums of what arrives at a norm, and of its squares: Tensor[channels] in float64."""

    count: int
    sums: Tensor
    squares: Tensor

    @classmethod
    def of(cls, x: Tensor) -> _Arrived:
        values = x.to(torch.float64).transpose(0, 1).flatten(1)
        return cls(values.shape[1], values.sum(1), values.square().sum(1))

    def __add__(self, other: _Arrived) -> _Arrived:
        return _Arrived(self.count + other.count, self.sums + other.sums, self.squares + other.squares)

    @property
    def mean(self) -> Tensor:
        return self.sums / self.count

    @property
    def variance(self) -> Tensor:
        return (self.squares / self.count - self.mean.square()).clamp_min(0)


def _ratio(here: _Arrived, there: _Arrived) -> Tensor:
    """How many times as large the deviations are here as there; 1 where either is 0 but for rounding."""
    varies = [each.variance > 1e-9 * each.squares / each.count for each in (here, there)]
    ratio = (here.variance / there.variance.where(varies[1], 1)).sqrt()
    return ratio.where(varies[0] & varies[1], 1)


def running_norms(model: nn.Module) -> dict[str, Any]:
    """Return the batch norms that have running statistics and are not frozen (momentum 0)."""
    norms: dict[str, Any] = {name: layer for name, layer in model.named_modules() if has_statistics(layer)}
    return {name: norm for name, norm in norms.items() if norm.momentum != 0}


def has_statistics(module: nn.Module) -> bool:
    """Return whether ``module`` is a batch norm with running statistics."""
    return isinstance(module, BatchNorm) and module.running_mean is not None
