"""Batch Bridgeout's arithmetic for a GPU: one kernel for w̃, and one for the gradient.

The same as in ``kernels`` and ``draws``, up to rounding; the same weights are dropped. The number of the pass
is read on the device, so that a captured graph draws anew whenever it is replayed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from regrow.noise import draws, kernels

_BLOCK = 1024
# A kernel reads no other names than these.
_STEP, _FIRST, _SECOND = (tl.constexpr(number) for number in (draws.STEP, draws.FIRST, draws.SECOND))
_SPACING, _MULTIPLIER = tl.constexpr(kernels.SPACING), tl.constexpr(kernels.MULTIPLIER)
_LARGEST = tl.constexpr(1 / kernels.SMALLEST)


@triton.jit
def _noisy(  # type: ignore[no-untyped-def]
    source, target, chosen, number, base, position, last_kept, scale, count,
    half_q: tl.constexpr, targeted: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < count
    mixed = tl.load(number) * _STEP + base
    mixed = (mixed ^ ((mixed >> 30) & 0x3FFFFFFFF)) * _FIRST
    mixed = (mixed ^ ((mixed >> 27) & 0x1FFFFFFFFF)) * _SECOND
    mixed = mixed ^ ((mixed >> 31) & 0x1FFFFFFFF)
    key = ((mixed >> 32) | 1).to(tl.int32)
    x = (index + position).to(tl.int32) * _SPACING + mixed.to(tl.int32)
    x = x * (2 * x + key)
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _MULTIPLIER
    weight = tl.load(source + index, mask=inside, other=0.0).to(tl.float32)
    amplitude = tl.abs(weight)
    if half_q == 0.5:
        amplitude = tl.sqrt(amplitude)
    elif half_q == 0.75:
        root = tl.sqrt(amplitude)
        amplitude = root * tl.sqrt(root)
    elif half_q != 1.0:
        amplitude = tl.exp2(tl.log2(amplitude) * half_q)
    if targeted:
        amplitude = amplitude * tl.load(chosen + index, mask=inside, other=0).to(tl.float32)
    factor = tl.where(x <= last_kept, scale - 1.0, -1.0)
    tl.store(target + index, (weight + amplitude * factor).to(target.dtype.element_ty), mask=inside)


@triton.jit
def _scaled(  # type: ignore[no-untyped-def]
    gradient, weight, noisy, target, count, half_q: tl.constexpr, block: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < count
    g = tl.load(gradient + index, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + index, mask=inside, other=1.0).to(tl.float32)
    n = tl.load(noisy + index, mask=inside, other=1.0).to(tl.float32)
    inverse = tl.minimum(tl.maximum(1.0 / w, -_LARGEST), _LARGEST)
    g = g + g * ((n - w) * inverse * half_q)
    tl.store(target + index, g.to(target.dtype.element_ty), mask=inside)


def noisy(
    source: Tensor, target: Tensor, position: int, number: Tensor, base: int, last_kept: int,
    scale: float, q: float, chosen: Tensor | None,
) -> None:  # fmt: skip
    """Write w̃ of the weights ``source`` to ``target``, both [n], which may be one tensor.

    Args:
        position: of the first weight, see ``draws``.
        number: [] int64, on the same device.
        last_kept, scale, chosen: as in ``kernels.noisy``.
    """
    mask = source if chosen is None else chosen.view(torch.uint8)
    given = (source, target, mask, number, base, position, last_kept, scale, len(source))
    _launch(_noisy, source, *given, q / 2, chosen is not None)


def scaled(gradient: Tensor, weight: Tensor, noisy: Tensor, q: float, target: Tensor) -> None:
    """Write ``gradient`` · ∂w̃/∂w to ``target``, all [n]; ``gradient`` and ``target`` may be one tensor."""
    _launch(_scaled, gradient, gradient, weight, noisy, target, len(gradient), q / 2)


def works(device: torch.device) -> bool:
    """Whether this machine can compile and run the kernels on ``device``."""
    three, number = torch.ones(3, device=device), torch.ones((), dtype=torch.int64, device=device)
    try:
        noisy(three, three, 0, number, 1, 0, 2.0, 1.5, None)
        scaled(three, three, three, 1.5, three)
    except Exception:  # without a C compiler, for one; what Triton raises then has no common class
        return False
    return True


def _launch(kernel: Any, like: Tensor, *given: Any) -> None:
    # Triton launches on the current device, whatever the tensors are on.
    if like.is_cuda:
        with torch.cuda.device(like.device):
            kernel[(triton.cdiv(len(like), _BLOCK),)](*given, _BLOCK)
    else:
        kernel[(triton.cdiv(len(like), _BLOCK),)](*given, _BLOCK)
