"""Batch Bridgeout's arithmetic: noise on a weight, scaled by a power of the weight's own size."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from regrow.filters import rows
from regrow.leasing import Pool

# Weights worked on at a time on a CPU: little scratch memory, and it stays in the core's cache.
_CHUNK = 2**18
# The least size of a weight in the derivative's denominator: far below any that matters to the output.
_SMALLEST = 1e-6
# One 64-bit random number decides about four weights.
_LANES, _LEVELS = 4, 2**16
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
    return perturbed(weight, p, q, target_fraction, 0, 0, number)


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
    # A threshold among 2^16 levels, dithered per draw, so that the probability is p and not its rounding.
    kept_levels = math.floor((1 - p) * _LEVELS + dither)
    noisy = pool.empty_like(weight)
    chunk, scratch, spare = _scratch(weight)
    bits = torch.empty(math.ceil(scratch.numel() / _LANES), dtype=torch.int64, device=weight.device)
    lanes = bits.view(torch.int16)[: scratch.numel()].as_strided(scratch.shape, scratch.stride())
    for part, out in zip(weight.split(chunk), noisy.split(chunk), strict=True):
        part = part.to(scratch.dtype)
        amplitude = _amplitude(part, q, scratch[: len(part)], spare[: len(part)])
        if target_fraction < 1:
            amplitude *= smallest(part, target_fraction)
        # From -2^63 on: without a lower end random_ leaves the sign bit, and so every fourth lane's, at 0.
        bits.random_(-(2**63), None, generator=generator)
        kept = spare[: len(part)].copy_(lanes[: len(part)]).le_(kept_levels - 1 - _LEVELS // 2)
        # For m = 0 this is exactly −1: with q = 2 the weight is then exactly 0, a dropped connection.
        factor = kept.mul_(1 / (1 - p)).sub_(1)
        torch.addcmul(part, amplitude, factor, out=out)
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


def _scratch(weight: Tensor) -> tuple[int, Tensor, Tensor]:
    """How many filters to work on at a time, and two scratch tensors for that many."""
    # Elsewhere than on a CPU a pass over all of the weights is one kernel, and more would be slower.
    chunk = max(1, _CHUNK * len(weight) // weight.numel()) if weight.is_cpu else len(weight)
    scratch = torch.empty_like(weight[:chunk], dtype=torch.promote_types(weight.dtype, torch.float32))
    return chunk, scratch, torch.empty_like(scratch)


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
    out = pool.empty_like(gradient)
    if weight.numel() == 0:
        return out
    chunk, scratch, spare = _scratch(weight)
    parts = (tensor.split(chunk) for tensor in (gradient, weight, noisy, out))
    for gradient_part, weight_part, noisy_part, out_part in zip(*parts, strict=True):
        weight_part = weight_part.to(scratch.dtype)
        inverse = torch.reciprocal(weight_part, out=scratch[: len(weight_part)])
        # At w = 0 the bound meets a noise of 0.
        inverse.clamp_(-1 / _SMALLEST, 1 / _SMALLEST)
        relative = torch.sub(noisy_part, weight_part, out=spare[: len(weight_part)]).mul_(inverse)
        torch.addcmul(gradient_part, gradient_part, relative, value=q / 2, out=out_part)
    return out


@scaled.register_fake
def _(gradient: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(gradient)
