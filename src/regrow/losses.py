"""Losses to train with in your own loop, each a function of a model or of its outputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from regrow.filters import convolutions, eligible, excluded, rows, unit_rows
from regrow.given import is_real, kind_of
from regrow.marks import check_whole
from regrow.modules import filters_first
from regrow.numbers import at_least_float32
from regrow.torch_private import own_parameters


def orthogonal_loss(model: nn.Module, *, exclude: Iterable[str] = ()) -> Tensor:
    """How much the filters of each layer overlap, Σ_l Σ_fj |Ŵ_l Ŵ_lᵀ − I|[f, j] (RePr, arXiv 1811.07275,
    eq. 1–2): 0 if all filters of a layer are orthogonal to each other.

    ``Ŵ`` has the filters of a layer as rows of unit length. A filter of zeros has no direction, and adds
    nothing. RePr adds ``0.01 * orthogonal_loss(model)`` to the loss of the task.

    Args:
        model: any module; wrappers are looked through. Every ungrouped convolution that is trained and has
            two filters or more counts, transposed ones too; a weight that layers share counts once.
        exclude: qualified names of convolutions, or of containers of convolutions, to leave out.

    Returns:
        Tensor [], differentiable, float32 (float64 for float64 weights), on the device of the first weight.

    Raises:
        ValueError: an unknown name, no convolution left, complex weights, a sharded model (FSDP).
    """
    check_whole(model, "orthogonal_loss")
    every = convolutions(model)
    dropped = excluded(exclude, every)
    alike: dict[Any, dict[int, Tensor]] = {}
    for name, conv in every.items():
        weight = own_parameters(conv).get("weight")
        if name in dropped or weight is None or nn.parameter.is_lazy(weight) or conv.groups > 1:
            continue
        if conv.out_channels < 2 or not weight.requires_grad:
            continue
        if weight.is_complex():
            raise ValueError(f"{name!r} has complex weights ({weight.dtype}): exclude that layer.")
        matrix = at_least_float32(rows(filters_first(conv, weight)))
        alike.setdefault((matrix.shape, matrix.dtype, matrix.device), {}).setdefault(id(weight), matrix)
    if not alike:
        eligible(model, exclude)  # says what is there, and why nothing of it can be used
        raise ValueError("no convolution is left to work on: exclude fewer layers.")
    sums = [_overlap(torch.stack([*matrices.values()])) for matrices in alike.values()]
    return sum(part.to(sums[0]) for part in sums[1:]) + sums[0]


def _overlap(matrices: Tensor) -> Tensor:
    """Σ |Ŵ Ŵᵀ| beside the diagonals of ``matrices``, [layers, filters, D]."""
    layers, filters, _ = matrices.shape
    unit = unit_rows(matrices.flatten(0, 1)).unflatten(0, (layers, filters))
    with torch.autocast(matrices.device.type, enabled=False):
        cosine = unit @ unit.mT
    others = 1 - torch.eye(filters, dtype=cosine.dtype, device=cosine.device)
    return (cosine * others).abs().sum()


def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    weight: float = 0.9,
) -> Tensor:
    """The loss of a student that learns from a teacher (Hinton et al. 2015, arXiv 1503.02531):
    ``weight · T² · KL(teacher ‖ student) + (1 − weight) · cross entropy``, both distributions softened by T.

    Args:
        logits: [pictures, classes, …], the student's scores.
        teacher_logits: as ``logits``; no gradient flows into them.
        labels: [pictures, …] int64, or [pictures, classes, …] probabilities; with None the second term is
            left out, and you add your own.
        temperature: T, above 0.
        weight: of the teacher, 0 to 1.

    Returns:
        Tensor [], the mean over pictures (and pixels), differentiable in ``logits``; float32, or float64.

    Raises:
        ValueError: ``temperature`` or ``weight`` is out of range, the tensors do not fit each other.
    """
    for name, value in (("logits", logits), ("teacher_logits", teacher_logits)):
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
            given = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else kind_of(value)
            raise ValueError(f"{name} must be scores [pictures, classes, …] of real numbers, got {given}.")
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"logits {list(logits.shape)} and teacher_logits {list(teacher_logits.shape)} must have one "
            "shape: give both the same pictures, and take a teacher with the same classes."
        )
    if not is_real(temperature) or not 0 < temperature < 1e6:
        raise ValueError(f"temperature must be a number above 0, such as 4, got {temperature!r}.")
    if not is_real(weight) or not 0 <= weight <= 1:
        raise ValueError(f"weight must lie between 0 and 1, got {weight!r}.")
    student, teacher = at_least_float32(logits), at_least_float32(teacher_logits.detach()).to(logits.device)
    softened = nn.functional.log_softmax(student / temperature, 1)
    target = nn.functional.log_softmax(teacher.to(softened) / temperature, 1)
    # The teacher's probability 0 of a class adds 0, also where its logarithm is −∞.
    terms = target.exp() * (target - softened)
    divergence = torch.where(target.exp() > 0, terms, 0).sum(1).mean()
    loss = weight * temperature**2 * divergence
    return loss if labels is None else loss + (1 - weight) * nn.functional.cross_entropy(student, labels)
