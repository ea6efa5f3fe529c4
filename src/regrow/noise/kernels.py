"""Batch Bridgeout weight by weight: as PyTorch runs it, or compiled into one pass over memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The least size of a weight in the derivative's denominator: far below any that matters to the output.
_SMALLEST = 1e-6
# 2^32 divided by the golden ratio, and a multiplier of "lowbias32" (Chris Wellons, 2018), modulo 2^32.
SPACING, _MULTIPLIER = 0x9E3779B9 - 2**32, 0xD35A2D97 - 2**32
# A compiler plans for about as many weights as it sees first: with few, for one thread.
_TYPICAL = 2**20


def spaced(count: int, device: torch.device) -> Tensor:
    """What ``scrambled`` makes random numbers of: [count] int32, far from each other (modulo 2^32)."""
    return torch.arange(count, dtype=torch.int32, device=device).mul_(SPACING)


def scrambled(numbers: Tensor, start: Tensor, key: Tensor) -> Tensor:
    """Random numbers, all 2^32 values equally likely, out of numbers that differ.

    A hash of x = ``numbers`` + ``start`` (modulo 2^32): x·(2x + ``key``), which is a permutation for an odd
    key (Rivest et al., "The RC6 Block Cipher", 1998, with key 1), then the high bits folded onto the low
    ones and multiplied. Good in its high bits, which is what comparing reads.

    Args:
        numbers: [n] int32, of ``spaced``.
        start: [] int32.
        key: [] int32, odd.

    Returns:
        [n] int32.
    """
    scrambled = numbers + start
    scrambled *= torch.add(key, scrambled, alpha=2)
    # PyTorch shifts copies of the sign in: they are masked away.
    scrambled ^= (scrambled >> 15).bitwise_and_(2**17 - 1)
    scrambled *= _MULTIPLIER
    return scrambled


def noisy(
    weight: Tensor,
    numbers: Tensor,
    start: Tensor,
    key: Tensor,
    last_kept: Tensor,
    scale: Tensor,
    q: Tensor,
    three_quarters: bool,
    chosen: Tensor | None,
    out: Tensor,
) -> None:
    """Write w̃ = w + |w|^(q/2) ⊙ (m/(1−p) − 1) to ``out``.

    Args:
        weight, out: [n]. Below 32 bits the arithmetic is done in float32.
        numbers, start, key: see ``scrambled``.
        last_kept: [] int32; m is 1 where what ``scrambled`` makes is at most this.
        scale: 1/(1−p), [].
        q: [].
        three_quarters: that q/2 is 3/4, the published setting.
        chosen: [n] bool, the weights to perturb; None for all.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    amplitude = weight.abs()
    if three_quarters:  # two square roots take a tenth of the time of a power
        amplitude.sqrt_().mul_(amplitude.sqrt())
    else:
        amplitude.pow_(q / 2)
    if chosen is not None:
        amplitude *= chosen
    kept = scrambled(numbers, start, key).le_(last_kept)
    # For m = 0 this is exactly −1: with q = 2 the weight is then exactly 0, a dropped connection.
    factor = kept.to(weight.dtype).mul_(scale).sub_(1)
    torch.addcmul(weight, amplitude, factor, out=out)


def scaled(gradient: Tensor, weight: Tensor, noisy: Tensor, q: Tensor, out: Tensor) -> None:
    """Write ``gradient`` · ∂w̃/∂w to ``out``, all [n], where ∂w̃/∂w = 1 + (q/2)·(w̃ − w)/w."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # At w = 0 the bound meets a noise of 0.
    inverse = weight.reciprocal().clamp_(-1 / _SMALLEST, 1 / _SMALLEST)
    relative = (noisy - weight).mul_(inverse).mul_(q / 2)
    torch.addcmul(gradient, gradient, relative, out=out)


def _noisy_at_once(weight: Tensor, *given: Any) -> None:
    noisy(weight, spaced(len(weight), weight.device), *given)


@functools.cache
def compiled() -> tuple[Callable[..., None], Callable[..., None]]:
    """``noisy``, which numbers the weights itself, and ``scaled``, each as one kernel of any length."""
    return torch.compile(_noisy_at_once, dynamic=True), torch.compile(scaled, dynamic=True)


def check_compiler(weight: Tensor, three_quarters: bool, targeted: bool) -> None:
    """Compile for weights like ``weight``, or raise ``RuntimeError`` that says what is missing."""
    ones, out = weight.new_ones(_TYPICAL), weight.new_empty(_TYPICAL)
    number, factor = torch.tensor(1, dtype=torch.int32), torch.tensor(1.0, dtype=torch.float64)
    chosen = weight.new_ones(_TYPICAL, dtype=torch.bool) if targeted else None
    perturb, scale = compiled()
    try:
        with torch.no_grad():
            perturb(ones, number, number, number, factor, factor, three_quarters, chosen, out)
            scale(ones, ones, ones, factor, out)
    except Exception as error:
        # The first line names the cause; PyTorch's own advice on debugging its compiler follows it.
        cause = str(error).strip().partition("\n")[0]
        raise RuntimeError(
            f"compiled=True: PyTorch cannot compile on this machine ({cause}). It needs a C++ compiler and "
            "Python's headers (in Debian: g++ and python3-dev) for the CPU, Triton for a GPU. Without "
            "compiled=True the noise is the same, and takes longer."
        ) from error
