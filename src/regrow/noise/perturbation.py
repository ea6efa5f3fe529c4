"""Batch Bridgeout's noise on one weight tensor (arXiv 2009.10893)."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from regrow.filters import rows
from regrow.given import check_weight, kind_of
from regrow.noise import kernels
from regrow.noise.pool import Pool
from regrow.noise.transforms import slope, transformed
from regrow.torch_private import is_transformed

_PART = 2**18  # weights per part on a CPU: the intermediate results of a part fit into the cores' caches
_MOST = 2**30  # weights per part otherwise: positions are 32-bit numbers
pool = Pool()  # for w̃ and its gradients, which have the same sizes in every step


def bridgeout(
    weight: Tensor,
    p: float = 0.3,
    q: float = 1.5,
    *,
    target_fraction: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One draw of w̃ = w + |w|^(q/2) ⊙ (m/(1−p) − 1), m ~ Bernoulli(1−p) (Batch Bridgeout, arXiv 2009.10893).

    E[w̃] = w and Var[w̃] = |w|^q · p/(1−p); with q = 2 and weights ≥ 0 it is DropConnect. A weight of 0
    stays 0. ∂w̃/∂w = 1 + (q/2)·noise/w, which has mean 1. For q < 2 it is unbounded at 0, so |w| in the
    denominator is taken as at least 1e-6: the derivative is then at most
    1 + (q/2)·1000^(2−q)·max(1, p/(1−p)) in size, its mean is still 1, and it is exactly 1 at w = 0.

    Args:
        weight: [filters, ...], real floating point. Below 32 bits the arithmetic is done in float32.
        p: probability that a weight's m is 0, 0 ≤ p < 1. With p = 0 the result equals ``weight``.
        q: the norm of the penalty that the noise is equivalent to, above 0.
        target_fraction: share of each filter's weights that is perturbed: the smallest in magnitude, rounded
            to a whole number of weights. Of equal magnitudes the first are taken.
        generator: supplies one number, which decides the whole draw; None takes PyTorch's global generator
            of the CPU.

    Returns:
        A new tensor like ``weight``, which can be differentiated any number of times.

    Raises:
        ValueError: p, q or target_fraction out of range, or ``weight`` is a scalar or has another type.
    """
    check_weight(weight, "bridgeout")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator is a torch.Generator or None, and got {kind_of(generator)}. For a seed write "
            "torch.Generator().manual_seed(0)."
        )
    check_noise(p, q, target_fraction)
    if not weight.is_floating_point() or weight.dim() == 0:
        raise ValueError(
            f"weight must be a real floating-point tensor [filters, ...], got {weight.dtype} of shape "
            f"{list(weight.shape)}."
        )
    device = "cpu" if generator is None else generator.device
    number = torch.randint(2**63 - 1, (), generator=generator, device=device)
    return drawn(weight, p, q, target_fraction, 0, 0, number, False, False)


def check_noise(p: float, q: float, target_fraction: float) -> None:
    """Raise ``ValueError`` unless 0 ≤ p < 1, 0 < q < ∞ and 0 < target_fraction ≤ 1."""
    for name, value in (("p", p), ("q", q), ("target_fraction", target_fraction)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{name} must be a number, got {value!r}.")
    if not 0 <= p < 1:
        raise ValueError(f"p is the probability of dropping a weight, 0 <= p < 1, got {p!r}. Try p=0.3.")
    if not 0 < q < math.inf:
        raise ValueError(f"q is the norm of the penalty, a finite number above 0, got {q!r}. Try q=1.5.")
    if not 0 < target_fraction <= 1:
        raise ValueError(
            "target_fraction is the share of each filter's weights that is perturbed, "
            f"0 < target_fraction <= 1, got {target_fraction!r}. For all of them write target_fraction=1.0."
        )


def drawn(
    weight: Tensor, p: float, q: float, target_fraction: float, seed: int, layer: int, number: Tensor,
    compiled: bool, alone: bool,
) -> Tensor:  # fmt: skip
    """``perturbed``, also inside of a transform of torch.func: there it is equal up to rounding."""
    if torch.compiler.is_compiling() or not is_transformed(weight):
        return perturbed(weight, p, q, target_fraction, seed, layer, number, compiled, alone)
    # With q = 2, a weight of 1 becomes m/(1−p). The draw depends on the order of the weights in memory.
    ones = torch.ones_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    factor = perturbed(ones, p, 2.0, 1.0, seed, layer, number, False, False) - 1
    if target_fraction < 1:
        factor = factor * smallest(weight, target_fraction)
    return transformed(weight, factor, q)


# A custom operator, so that torch.compile calls it and does not trace into it.
@torch.library.custom_op("regrow::bridgeout", mutates_args=())
def perturbed(
    weight: Tensor,
    p: float,
    q: float,
    target_fraction: float,
    seed: int,
    layer: int,
    number: Tensor,
    compiled: bool,
    alone: bool,  # noqa: ARG001 (_remember reads it)
) -> Tensor:
    """``bridgeout`` with a draw that depends only on ``seed``, ``layer``, ``number`` and the memory layout.

    The device and ``compiled`` have no influence on which weights are dropped.

    Args:
        number: [] an integer in a tensor, because torch.compile compiles again for every plain number.
        alone: whether a single convolution or linear layer of PyTorch reads w̃ and nothing else does. Then
            nothing else reads the gradient of w̃ either, and the backward pass may overwrite it.
    """
    if p == 0 or weight.numel() == 0:
        return weight.clone()
    noisy = pool.empty_like(weight)
    chosen = None if target_fraction == 1 else _in_memory(_smallest(weight, target_fraction), noisy)
    digest = hashlib.blake2b(f"{seed} {layer} {int(number)}".encode(), digest_size=8).digest()
    start, key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little") | 1
    # A weight is kept if its random number is among the lowest 1 - p of all 2^32 values.
    kept = max(1, round((1 - p) * 2**32))
    given = (_int32(kept - 2**31 - 1), _scalar(1 / (1 - p)), _scalar(q), q == 1.5)
    weights, outs = _in_memory(weight, noisy), _in_memory(noisy, noisy)
    part = _part(weight, compiled)
    numbers = None if compiled else kernels.spaced(part, weight.device)
    for begin in range(0, len(weights), part):
        piece = slice(begin, begin + part)
        draw = (_int32(start + kernels.SPACING * begin), _int32(key))
        rest = (*draw, *given, None if chosen is None else chosen[piece], outs[piece])
        if numbers is None:
            with torch.no_grad():
                kernels.compiled()[0](weights[piece], *rest)
        else:
            kernels.noisy(weights[piece], numbers[: len(outs[piece])], *rest)
    return noisy


@perturbed.register_fake
def _(weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight)


def smallest(weight: Tensor, fraction: float) -> Tensor:
    """The ``fraction`` of each filter's weights that is smallest in magnitude, BoolTensor like ``weight``.

    ``fraction`` is rounded to a whole number of weights per filter. Of equal magnitudes the first are taken.
    """
    sizes = rows(weight).abs()
    # 0.29 · 50 is 14.499999999999998 in binary: without the 1e-9 a half would be rounded down.
    count = math.floor(fraction * sizes.shape[1] + 0.5 + 1e-9)
    if count == 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    limit = sizes.kthvalue(count, dim=1, keepdim=True).values
    below, tied = sizes < limit, sizes == limit
    room = count - below.sum(1, keepdim=True)
    return (below | (tied & (tied.cumsum(1) <= room))).view(weight.shape)


def _smallest(weight: Tensor, fraction: float) -> Tensor:
    """``smallest`` in the memory layout of ``weight``; on a CPU a few filters at a time."""
    chosen = torch.empty_like(weight, dtype=torch.bool)
    filters = max(1, _part(weight, False) * len(weight) // weight.numel())
    for few, out in zip(weight.split(filters), chosen.split(filters), strict=True):
        out.copy_(smallest(few, fraction))
    return chosen


def _part(weight: Tensor, compiled: bool) -> int:
    # On a GPU, and compiled, one kernel processes all weights, and several kernels would be slower.
    return min(weight.numel(), _PART if weight.is_cpu and not compiled else _MOST)


def _in_memory(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` as a vector, in the memory order of the elements of ``like``, a dense tensor."""
    if tensor.stride() != like.stride():
        tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def _int32(number: int) -> Tensor:
    """``number`` modulo 2^32, as an int32 tensor with the same bits."""
    return torch.tensor((number + 2**31) % 2**32 - 2**31, dtype=torch.int32, device="cpu")


def _scalar(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64, device="cpu")


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, _, ctx.q, *_, ctx.compiled, ctx.alone = inputs
    # This needs no extra memory: the convolution saves w̃ too, and the parameter exists anyway.
    ctx.save_for_backward(weight, output)


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weight, noisy = ctx.saved_tensors
    if torch.is_grad_enabled():  # the caller differentiates once more
        return (gradient * slope(weight, noisy, ctx.q)).to(gradient.dtype), *[None] * 8
    if ctx.alone and not gradient.requires_grad and gradient.stride() == noisy.stride():
        _scale(gradient, weight, noisy, ctx.q, ctx.compiled, gradient)
        return gradient, *[None] * 8
    return scaled(gradient, weight, noisy, ctx.q, ctx.compiled), *[None] * 8


perturbed.register_autograd(_gradient, setup_context=_remember)


@torch.library.custom_op("regrow::bridgeout_gradient", mutates_args=())
def scaled(gradient: Tensor, weight: Tensor, noisy: Tensor, q: float, compiled: bool) -> Tensor:
    """``gradient`` · ∂w̃/∂w, where ∂w̃/∂w = 1 + (q/2)·(w̃ − w)/w."""
    # autograd uses a tensor with the layout of the weight as ``.grad`` without a copy.
    out = pool.empty_like(weight)
    _scale(gradient, weight, noisy, q, compiled, out)
    return out


@torch.no_grad()
def _scale(gradient: Tensor, weight: Tensor, noisy: Tensor, q: float, compiled: bool, out: Tensor) -> None:
    if weight.numel() == 0:
        return
    part = _part(weight, compiled)
    parts = (_in_memory(tensor.detach(), out).split(part) for tensor in (gradient, weight, noisy, out))
    scale = kernels.compiled()[1] if compiled else kernels.scaled
    for gradient_part, weight_part, noisy_part, out_part in zip(*parts, strict=True):
        scale(gradient_part, weight_part, noisy_part, _scalar(q), out_part)


@scaled.register_fake
def _(_: Tensor, weight: Tensor, *__: Any) -> Tensor:
    return torch.empty_like(weight)
