"""Batch Bridgeout's arithmetic: noise on a weight, scaled by a power of the weight's own size."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from regrow.coins import COLUMNS, factors, limit, toss
from regrow.filters import rows
from regrow.leasing import Pool, unshared

# Weights worked on at a time on a CPU: little scratch memory, and each core's share stays in its cache.
_CHUNK = 2**17
# The least size of a weight in the derivative's denominator: far below any that matters to the output.
_SMALLEST = 1e-6
# A step's perturbed weights and their gradients are as large as those of the step before.
pool = Pool()


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
        q: the norm of the penalty that the noise amounts to, above 0.
        target_fraction: share of each filter's weights that is perturbed, those smallest in magnitude,
            rounded to a whole number of weights; equal magnitudes are taken in order of position.
        generator: one number is drawn from it (without it, from PyTorch's global generator of the
            CPU); that number decides the whole draw.

    Returns:
        A new tensor like ``weight``, differentiable in it once.

    Raises:
        ValueError: p, q or target_fraction out of range, or a weight that is not as described.
    """
    check_noise(p, q, target_fraction)
    if not weight.is_floating_point() or weight.dim() == 0:
        raise ValueError(
            f"weight must be a real floating-point tensor [filters, ...], got {weight.dtype} of shape "
            f"{list(weight.shape)}."
        )
    device = "cpu" if generator is None else generator.device
    number = torch.randint(2**63 - 1, (), generator=generator, device=device)
    return draw(weight, p, q, target_fraction, 0, 0, number)


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


def draw(
    weight: Tensor, p: float, q: float, target_fraction: float, seed: int, layer: int, number: Tensor
) -> Tensor:
    """``perturbed``, with less memory written in the backward pass."""
    inputs = (weight, p, q, target_fraction, seed, layer, number)
    return perturbed(*inputs) if torch.compiler.is_compiling() else _Draw.apply(*inputs)[0]


# An operator of its own, so that torch.compile calls it as it is, random generator included.
@torch.library.custom_op("regrow::bridgeout", mutates_args=())
def perturbed(
    weight: Tensor, p: float, q: float, target_fraction: float, seed: int, layer: int, number: Tensor
) -> Tensor:
    """``bridgeout``, with the draw decided by (``seed``, ``layer``, ``number``) and nothing else.

    ``number`` [] is an integer in a tensor: torch.compile would compile again for every plain number.
    """
    if p == 0 or weight.numel() == 0:
        return weight.clone()
    generator, dither = _stream(weight.device, f"{seed} {layer} {int(number)}")
    below = limit(1 - p, dither)
    noisy = pool.empty_like(weight)
    chunk, (scratch, kept, rest), table = _scratch(weight, 3)
    size = scratch.numel()
    tossed, flat = table.view(-1)[:size], kept.as_strided((size,), (1,))
    parts = weight.split(chunk)
    tables = factors(len(parts), size, weight.device, generator)
    for part, out, row, column in zip(parts, noisy.split(chunk), *tables, strict=True):
        if (length := len(part)) < chunk:
            scratch, kept, rest = scratch[:length], kept[:length], rest[:length]
        part = part.to(scratch.dtype)
        amplitude = _amplitude(part, q, scratch, kept)
        if target_fraction < 1:
            amplitude *= smallest(part, target_fraction)
        toss(row, column, below, table)
        flat.copy_(tossed)
        # For m = 0 it is w − |w|^(q/2) alone: with q = 2 exactly 0, a dropped connection.
        torch.addcmul(torch.sub(part, amplitude, out=rest), amplitude, kept, value=1 / (1 - p), out=out)
    return noisy


@perturbed.register_fake
def _(weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight)


def smallest(weight: Tensor, fraction: float) -> Tensor:
    """The ``fraction`` of each filter's weights that is smallest in magnitude.

    Args:
        weight: [filters, ...].
        fraction: rounded to a whole number of weights per filter.

    Returns:
        BoolTensor like ``weight``. Of equal magnitudes the first in order of position are taken.
    """
    sizes = rows(weight).abs()
    # 0.29 · 50 is 14.499999999999998 in binary: without the slack a half would be rounded down.
    count = math.floor(fraction * sizes.shape[1] + 0.5 + 1e-9)
    if count == 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    limit = sizes.kthvalue(count, dim=1, keepdim=True).values
    below, tied = sizes < limit, sizes == limit
    room = count - below.sum(1, keepdim=True)
    return (below | (tied & (tied.cumsum(1) <= room))).view(weight.shape)


def _scratch(weight: Tensor, count: int) -> tuple[int, list[Tensor], Tensor]:
    """How many filters to work on at a time, and ``count`` scratch tensors for that many.

    The last one's memory also as a table of integers, for ``toss``: one is to be read before the other
    is written.
    """
    # Elsewhere than on a CPU a pass over all of the weights is one kernel, and more would be slower.
    parts = math.ceil(weight.numel() / _CHUNK) if weight.is_cpu else 1
    chunk = math.ceil(len(weight) / parts)
    like = torch.empty_like(weight[:chunk], device="meta")
    size = math.ceil(like.numel() / COLUMNS) * COLUMNS
    dtype = torch.promote_types(weight.dtype, torch.float32)
    memory = torch.empty(count * size, dtype=dtype, device=weight.device)
    scratch = [memory.as_strided(like.shape, like.stride(), i * size) for i in range(count)]
    return chunk, scratch, memory[-size:].view(torch.int32)[:size].view(-1, COLUMNS)


def _amplitude(weight: Tensor, q: float, out: Tensor, spare: Tensor) -> Tensor:
    """|w|^(q/2), written to ``out``; ``spare`` is scratch."""
    size = torch.abs(weight, out=out)
    if q == 1.5:  # the published setting: two square roots take a tenth of the time of a power
        return size.sqrt_().mul_(torch.sqrt(size, out=spare))
    return size.pow_(q / 2)


def _stream(device: torch.device, draw: str) -> tuple[torch.Generator, float]:
    """A generator, and a number in [0, 1), for one draw."""
    # A hash, because the CPU's generator reads only the lower half of a seed, and neighbours must differ.
    digest = hashlib.blake2b(draw.encode(), digest_size=12).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))
    return generator, int.from_bytes(digest[8:], "little") / 2**32


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, _, ctx.q, *_ = inputs
    # The convolution keeps w̃ anyway, and the parameter lives on: nothing extra is held.
    ctx.save_for_backward(weight, output)


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return scaled(gradient, *ctx.saved_tensors, ctx.q), None, None, None, None, None, None


perturbed.register_autograd(_gradient, setup_context=_remember)


@torch.library.custom_op("regrow::bridgeout_gradient", mutates_args=())
def scaled(gradient: Tensor, weight: Tensor, noisy: Tensor, q: float) -> Tensor:
    """``gradient`` · ∂w̃/∂w, where ∂w̃/∂w = 1 + (q/2)·(w̃ − w)/w."""
    return _scale(gradient, weight, noisy, q, out=pool.empty_like(gradient))


@scaled.register_fake
def _(gradient: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(gradient)


def _scale(gradient: Tensor, weight: Tensor, noisy: Tensor, q: float, out: Tensor) -> Tensor:
    """``scaled``, written to ``out``, which may be ``gradient``."""
    if weight.numel() == 0:
        return out
    chunk, (scratch, spare), _ = _scratch(weight, 2)
    parts = (tensor.split(chunk) for tensor in (gradient, weight, noisy, out))
    for gradient_part, weight_part, noisy_part, out_part in zip(*parts, strict=True):
        if (length := len(weight_part)) < chunk:
            scratch, spare = scratch[:length], spare[:length]
        weight_part = weight_part.to(scratch.dtype)
        # At w = 0 the bound meets a noise of 0.
        inverse = torch.reciprocal(weight_part, out=scratch).clamp_(-1 / _SMALLEST, 1 / _SMALLEST)
        relative = torch.sub(noisy_part, weight_part, out=spare).mul_(inverse)
        torch.addcmul(gradient_part, gradient_part, relative, value=q / 2, out=out_part)
    return out


class _Draw(torch.autograd.Function):
    """``perturbed``, which overwrites the gradient that it is given if nothing else can see it.

    The second result has no use. So autograd makes a zero for its gradient and hands that over as it
    does the other, and a gradient that more refers to than to this zero is somebody else's as well.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        noisy = perturbed(*inputs)
        return noisy, noisy.new_empty(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _remember(ctx, inputs, output[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, zero: Tensor) -> tuple[Tensor | None, ...]:
        weight, noisy = ctx.saved_tensors
        if unshared(gradient, zero) and gradient.stride() == noisy.stride():
            _scale(gradient, weight, noisy, ctx.q, out=gradient)
        else:
            gradient = scaled(gradient, weight, noisy, ctx.q)
        return gradient, None, None, None, None, None, None
