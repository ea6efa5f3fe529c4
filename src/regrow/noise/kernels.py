"""Batch Bridgeout's arithmetic on a vector of weights, as PyTorch operations or compiled into one kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The smallest |w| in the derivative's denominator; smaller weights do not matter to the output.
SMALLEST = 1e-6
# 2^32 divided by the golden ratio, and a multiplier of "lowbias32" (Chris Wellons, 2018), modulo 2^32.
SPACING, MULTIPLIER = 0x9E3779B9 - 2**32, 0xD35A2D97 - 2**32
# The compiler optimises for the number of weights that it sees first; for few weights it uses one thread.
_TYPICAL = 2**20


def spaced(count: int, device: torch.device) -> Tensor:
    """The ``numbers`` for ``scrambled``: [count] int32, evenly spaced by ``SPACING`` (modulo 2^32)."""
    return torch.arange(count, dtype=torch.int32, device=device).mul_(SPACING)


def scrambled(numbers: Tensor, start: Tensor, key: Tensor) -> Tensor:
    """Random numbers [n] int32, all 2^32 values equally likely, from distinct numbers.

    The numbers are a hash of x = ``numbers`` + ``start`` (modulo 2^32): x·(2x + ``key``), which is a
    permutation for an odd key (Rivest et al., "The RC6 Block Cipher", 1998, with key 1); then the high bits
    are folded onto the low bits, and the result is multiplied. Its high bits, which a comparison reads, are
    well mixed.

    Args:
        numbers: [n] int32, from ``spaced``.
        start, key: [] int32 each, ``key`` odd.
    """
    scrambled = numbers + start
    scrambled *= torch.add(key, scrambled, alpha=2)
    # PyTorch's shift fills the high bits with copies of the sign, which the mask removes.
    scrambled ^= (scrambled >> 15).bitwise_and_(2**17 - 1)
    scrambled *= MULTIPLIER
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
        weight, out: [n], which may be one tensor. Below 32 bits the arithmetic is done in float32.
        numbers, start, key: see ``scrambled``.
        last_kept: [] int32; m is 1 where a weight's random number is at most ``last_kept``.
        scale, q: [] each; ``scale`` is 1/(1−p).
        three_quarters: whether q/2 is 3/4, the published setting.
        chosen: [n] bool, the weights to perturb; None for all.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    amplitude = weight.abs()
    if three_quarters:  # two square roots take a tenth of the time of pow_
        amplitude.sqrt_().mul_(amplitude.sqrt())
    else:
        amplitude.pow_(q / 2)
    if chosen is not None:
        amplitude *= chosen
    kept = scrambled(numbers, start, key).le_(last_kept)
    # For m = 0 the factor is exactly −1: with q = 2 the weight becomes exactly 0, a dropped connection.
    factor = kept.to(weight.dtype).mul_(scale).sub_(1)
    torch.addcmul(weight, amplitude, factor, out=out)


def scaled(gradient: Tensor, weight: Tensor, noisy: Tensor, q: Tensor, out: Tensor) -> None:
    """Write ``gradient`` · ∂w̃/∂w to ``out``, all [n], where ∂w̃/∂w = 1 + (q/2)·(w̃ − w)/w.

    ``gradient`` and ``out`` may be one tensor.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # At w = 0 the bounded reciprocal is multiplied by a noise of 0.
    inverse = weight.reciprocal().clamp_(-1 / SMALLEST, 1 / SMALLEST)
    relative = (noisy - weight).mul_(inverse).mul_(q / 2)
    torch.addcmul(gradient, gradient, relative, out=out)


def _noisy_at_once(weight: Tensor, *given: Any) -> None:
    noisy(weight, spaced(len(weight), weight.device), *given)


def _scaled_in_place(gradient: Tensor, weight: Tensor, noisy: Tensor, q: Tensor) -> None:
    # The compiler refuses two arguments that are different views of one memory, and writes to one of them.
    scaled(gradient, weight, noisy, q, gradient)


@functools.cache
def compiled() -> tuple[Callable[..., None], Callable[..., None]]:
    """``noisy`` without its argument ``numbers``, and ``scaled`` in place, compiled for any length.

    ``out`` of the first must be other memory than ``weight``; the second has no argument ``out``.
    """
    return torch.compile(_noisy_at_once, dynamic=True), torch.compile(_scaled_in_place, dynamic=True)


def check_compiler(weight: Tensor, three_quarters: bool, targeted: bool) -> None:
    """Compile for weights like ``weight``, or raise a ``RuntimeError`` that says what is missing."""
    ones, out = weight.new_ones(_TYPICAL), weight.new_ones(_TYPICAL)
    number, factor = torch.tensor(1, dtype=torch.int32), torch.tensor(1.0, dtype=torch.float64)
    chosen = weight.new_ones(_TYPICAL, dtype=torch.bool) if targeted else None
    perturb, scale = compiled()
    try:
        with torch.no_grad():
            perturb(ones, number, number, number, factor, factor, three_quarters, chosen, out)
            scale(out, ones, ones, factor)
    except Exception as error:
        # The first line names the cause; the other lines are advice on debugging PyTorch's compiler.
        cause = str(error).strip().partition("\n")[0]
        raise RuntimeError(
            f"compiled=True: PyTorch cannot compile on this machine ({cause}). It needs a C++ compiler and "
            "Python's headers (in Debian: g++ and python3-dev). Without compiled=True the noise is the same, "
            "and takes longer."
        ) from error
