"""w̃ of a group of weights at once: one operator, and one for their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from regrow.filters import rows
from regrow.memory import in_memory, is_dense, lies_by
from regrow.noise.draws import Place
from regrow.noise.pool import Pool
from regrow.noise.transforms import slope
from regrow.noise.vectors import (
    PART,
    Strength,
    joined,
    most,
    parted,
    perturb,
    rejoined,
    runs,
    scale,
)  # fmt: skip
from regrow.torch_private import writes_to

pool = Pool()  # for w̃ and its gradients, which have the same sizes in every step


class Part(NamedTuple):
    """What is to be known of a weight in a group.

    Attributes:
        place: where its random numbers begin; all weights of a group have one base.
        transposed: 0, or the number of groups of a transposed convolution, whose filters lie in dim 1.
        alone: whether a single convolution or linear layer of PyTorch reads w̃ and nothing else does. Then
            nothing else reads the gradient of w̃ either, and the backward pass may overwrite it.
    """

    place: Place
    transposed: int
    alone: bool


def together(
    weights: Sequence[Tensor], parts: Sequence[Part], number: Tensor, strength: Strength
) -> Sequence[Tensor]:
    """w̃ of each of ``weights``: new tensors like them, in the pass ``number``, [] int64."""
    given = ([part.place.offset for part in parts], [part.transposed for part in parts])
    settings = (parts[0].place.base, *strength)
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        alone = [part.alone for part in parts]
        return cast(Sequence[Tensor], _Noisy.apply(number, given, settings, alone, *weights))
    return cast(Sequence[Tensor], _noisy(weights, number, *given, *settings))


def smallest(weight: Tensor, fraction: float, transposed: int = 0) -> Tensor:
    """The ``fraction`` of each filter's weights that is smallest in magnitude, BoolTensor like ``weight``.

    ``fraction`` is rounded to a whole number of weights per filter. Of equal magnitudes the first are taken.
    """
    if transposed:
        return _swapped(smallest(_swapped(weight, transposed), fraction), transposed)
    sizes = rows(weight).abs()
    # 0.29 · 50 is 14.499999999999998 in binary: without the 1e-9 a half would be rounded down.
    count = math.floor(fraction * sizes.shape[1] + 0.5 + 1e-9)
    if count == 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    limit = sizes.kthvalue(count, dim=1, keepdim=True).values
    below, tied = sizes < limit, sizes == limit
    room = count - below.sum(1, keepdim=True)
    return (below | (tied & (tied.cumsum(1) <= room))).view(weight.shape)


def noisy(
    weights: Sequence[Tensor], number: Tensor, offsets: Sequence[int], transposed: Sequence[int], base: int,
    p: float, q: float, target_fraction: float, compiled: bool,
) -> list[Tensor]:  # fmt: skip
    """The operator ``regrow::noisy``; see ``Part`` and ``Strength``. Joined weights share their memory."""
    if p == 0:
        return [weight.clone() for weight in weights]
    strength = Strength(p, q, target_fraction, compiled)
    if not weights[0].is_cpu:
        number = number.to(weights[0].device)
    outs: list[Tensor] = list(weights)
    chosen = None
    for run in _runs(weights, offsets):
        members = [weights[i] for i in run]
        if len(run) == 1:
            out = pool.empty_like(members[0])
            outs[run[0]], made = out, [out]
            source, target = in_memory(members[0], out.stride()), in_memory(out, out.stride())
        else:
            source = target = joined([in_memory(weight, weight.stride()) for weight in members])
            made = parted(target, members)
            for i, out in zip(run, made, strict=True):
                outs[i] = out
        if target_fraction < 1:
            masks = [
                in_memory(_smallest(weights[i], target_fraction, transposed[i]), outs[i].stride())
                for i in run
            ]
            chosen = masks[0] if len(run) == 1 else joined(masks)
        if len(source):
            perturb(source, target, offsets[run[0]], number, base, strength, chosen)
    return outs


def noisy_gradients(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], noisy: Sequence[Tensor], offsets: Sequence[int],
    overwritten: Sequence[bool], q: float, compiled: bool,
) -> list[Tensor]:  # fmt: skip
    """The operator ``regrow::noisy_gradients``: each of ``gradients`` · ∂w̃/∂w, see ``kernels.scaled``.

    Returns:
        New tensors like the weights, for those that are not ``overwritten``.
    """
    outs: list[Tensor] = list(gradients)
    for run in _runs(weights, offsets, overwritten):
        if len(run) == 1:
            (i,) = run
            # autograd uses a tensor with the layout of the weight as ``.grad`` without a copy.
            out = gradients[i] if overwritten[i] else pool.empty_like(weights[i])
            outs[i], target = out, in_memory(out, out.stride())
            gradient = target if overwritten[i] else in_memory(gradients[i], out.stride())
            weight, moved = in_memory(weights[i], out.stride()), in_memory(noisy[i], out.stride())
        else:
            members = [weights[i] for i in run]
            gradient = target = joined([in_memory(gradients[i], weights[i].stride()) for i in run])
            weight = joined([in_memory(member, member.stride()) for member in members])
            moved = rejoined([noisy[i] for i in run])
            for i, out in zip(run, parted(target, members), strict=True):
                outs[i] = out
        if len(target):
            scale(gradient, weight, moved, q, compiled, target)
    return [out for out, kept in zip(outs, overwritten, strict=True) if not kept]


class _Noisy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, number: Tensor, given: Any, settings: Any, alone: Sequence[bool], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        outs = _noisy(weights, number, *given, *settings)
        ctx.offsets, ctx.q, ctx.compiled, ctx.alone = given[0], settings[2], settings[4], alone
        # w̃ needs no extra memory: the layer that reads it saves it too. What a weight may not do is checked
        # for the weights with gradients alone: somebody may train the others meanwhile.
        ctx.save_for_backward(*outs)
        ctx.weights, ctx.written = weights, [writes_to(weight) for weight in weights]
        ctx.kept = None
        ctx.set_materialize_grads(False)  # the gradient of a layer that did not run stays None
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        outs = ctx.saved_tensors if ctx.kept is None else ctx.kept
        some = [
            (i, gradient, ctx.weights[i], outs[i])
            for i, gradient in enumerate(gradients)
            if gradient is not None
        ]
        if len(some) < len(gradients):
            # Another backward pass may bring the other gradients, and PyTorch forgets what it saved. Without
            # detach the node would hold itself.
            ctx.kept = [out.detach() for out in outs]
        # What traces a backward pass has stand-ins for the weights, and knows no operator that overwrites.
        traced = torch.compiler.is_compiling()
        if not traced and any(writes_to(weight) != ctx.written[i] for i, _, weight, _ in some):
            raise RuntimeError(
                "a weight with Bridgeout has been modified by an inplace operation between its forward pass "
                "and its backward pass. Run optimizer.step() after backward()."
            )
        results: list[Tensor | None] = [None] * len(gradients)
        if not some:
            return None, None, None, None, *results
        if traced or torch.is_grad_enabled():  # the caller differentiates once more
            for i, gradient, weight, out in some:
                results[i] = (gradient * slope(weight, out, ctx.q)).to(gradient.dtype)
            return None, None, None, None, *results
        numbers, given, weights, noisy = zip(*some, strict=True)
        overwritten = [ctx.alone[i] and _may_overwrite(gradient, out) for i, gradient, _, out in some]
        offsets = [ctx.offsets[i] for i in numbers]
        made = iter(_noisy_gradients(given, weights, noisy, offsets, overwritten, ctx.q, ctx.compiled))
        for i, gradient, kept in zip(numbers, given, overwritten, strict=True):
            results[i] = gradient if kept else next(made)
        return None, None, None, None, *results


def _may_overwrite(gradient: Tensor, out: Tensor) -> bool:
    # Smaller gradients are joined.
    return (
        gradient.is_cpu
        and gradient.numel() >= PART
        and lies_by(gradient, out.stride())
        and not gradient.requires_grad
    )


def _runs(
    weights: Sequence[Tensor], offsets: Sequence[int], alone: Sequence[bool] = ()
) -> Sequence[tuple[int, ...]]:
    """The weights to join, by index; those ``alone`` by themselves."""
    if len(weights) == 1 or not all(is_dense(weight) for weight in weights):
        return [(i,) for i in range(len(weights))]
    sizes, width = tuple(weight.numel() for weight in weights), most(weights[0].device)
    if not any(alone):
        return runs(sizes, tuple(offsets), width)
    others = [i for i, by_itself in enumerate(alone) if not by_itself]
    found = runs(tuple(sizes[i] for i in others), tuple(offsets[i] for i in others), width)
    return [(i,) for i, by_itself in enumerate(alone) if by_itself] + [
        tuple(others[i] for i in run) for run in found
    ]


def _smallest(weight: Tensor, fraction: float, transposed: int) -> Tensor:
    """``smallest`` in the memory layout of ``weight``; on a CPU a few filters at a time."""
    if transposed or not weight.is_cpu or weight.numel() <= PART:
        return smallest(weight, fraction, transposed)
    chosen = torch.empty_like(weight, dtype=torch.bool)
    filters = max(1, PART * len(weight) // weight.numel())
    for few, out in zip(weight.split(filters), chosen.split(filters), strict=True):
        out.copy_(smallest(few, fraction))
    return chosen


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """The weight of a transposed convolution with its filters first, and back."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


# Not torch.library.custom_op: it forbids results that share their memory, and these do by design.
_LIBRARY = torch.library.Library("regrow", "FRAGMENT")
_LIBRARY.define(
    "noisy(Tensor[] weights, Tensor number, int[] offsets, int[] transposed, int base, float p, float q, "
    "float target_fraction, bool compiled) -> Tensor[]"
)
_LIBRARY.define(
    "noisy_gradients(Tensor(a!)[] gradients, Tensor[] weights, Tensor[] noisy, int[] offsets, "
    "bool[] overwritten, float q, bool compiled) -> Tensor[]"
)
_LIBRARY.impl("noisy", noisy, "CompositeExplicitAutograd")
_LIBRARY.impl("noisy_gradients", noisy_gradients, "CompositeExplicitAutograd")
_noisy: Any = torch.ops.regrow.noisy.default
_noisy_gradients: Any = torch.ops.regrow.noisy_gradients.default


@torch.library.register_fake("regrow::noisy", lib=_LIBRARY)
def _(weights: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(weight) for weight in weights]


@torch.library.register_fake("regrow::noisy_gradients", lib=_LIBRARY)
def _(
    _: Any, weights: Sequence[Tensor], __: Any, ___: Any, overwritten: Sequence[bool], *____: Any
) -> list[Tensor]:
    return [torch.empty_like(weight) for weight, kept in zip(weights, overwritten, strict=True) if not kept]
