"""Weights in memory order as vectors, the vectors of neighbours joined, and the kernels that serve them.

On a GPU a launch is what costs, so all neighbours become one vector. On a CPU the memory is what costs: small
neighbours are joined, and a large weight is worked on where it lies, a part at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regrow.memory import in_memory
from regrow.noise import kernels
from regrow.noise.draws import aligned, start_and_key

PART = 2**18  # weights per part on a CPU: the intermediate results of a part fit into the cores' caches
_MOST = 2**30  # weights per part otherwise: positions are 32-bit numbers


class Strength(NamedTuple):
    """How strong the noise is (see ``bridgeout``), and whether kernels from torch.compile compute it."""

    p: float
    q: float
    target_fraction: float
    compiled: bool


def most(device: torch.device) -> int:
    """How many weights are joined into one vector."""
    return PART if device.type == "cpu" else _MOST


@functools.lru_cache(maxsize=4096)
def runs(sizes: tuple[int, ...], offsets: tuple[int, ...], most: int) -> tuple[tuple[int, ...], ...]:
    """Which weights are joined: runs of at most ``most`` positions without a gap, by index.

    Args:
        sizes, offsets: of the weights, see ``draws``.
    """
    found: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=offsets.__getitem__):
        last = found[-1] if found else []
        if (
            last
            and offsets[last[-1]] + aligned(sizes[last[-1]]) == offsets[i]
            and offsets[i] + aligned(sizes[i]) - offsets[last[0]] <= most
        ):
            last.append(i)
        else:
            found.append([i])
    return tuple(tuple(run) for run in found)


def joined(vectors: Sequence[Tensor]) -> Tensor:
    """A vector of all ``vectors``, each at a multiple of ``ALIGNED``; what is in between is left open."""
    parts = []
    for vector in vectors:
        parts.append(vector)
        if gap := aligned(len(vector)) - len(vector):
            parts.append(vector.new_empty(gap))
    return torch.cat(parts)


def parted(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The memory of ``vector``, from ``joined``, as tensors like ``tensors``.

    No tensor is a view in autograd's eyes: writing to one is no change of the others.
    """
    found, start, storage = [], vector.storage_offset(), vector.untyped_storage()
    for tensor in tensors:
        found.append(vector.new_empty(0).set_(storage, start, tensor.shape, tensor.stride()))
        start += aligned(tensor.numel())
    return found


def rejoined(tensors: Sequence[Tensor]) -> Tensor:
    """``joined`` for dense ``tensors``, without a copy if they lie as ``parted`` has laid them."""
    first, size = tensors[0], sum(aligned(tensor.numel()) for tensor in tensors)
    at, address = first.storage_offset(), first.untyped_storage().data_ptr()
    fits = first.untyped_storage().nbytes() >= (at + size) * first.element_size()
    for tensor in tensors:
        lies = int(tensor.storage_offset()) == at and tensor.untyped_storage().data_ptr() == address
        fits, at = fits and lies, at + aligned(tensor.numel())
    if fits:
        return first.as_strided((size,), (1,))
    return joined([in_memory(tensor, tensor.stride()) for tensor in tensors])


def perturb(
    source: Tensor, target: Tensor, position: int, number: Tensor, base: int, strength: Strength,
    chosen: Tensor | None,
) -> None:  # fmt: skip
    """Write w̃ of the weights ``source`` to ``target``, both [n]; they are one tensor if weights were joined.

    Args:
        position, base: of the first weight, see ``draws``.
        number: [] int64, of the pass; on the weights' device, unless that is a CPU.
        chosen: [n] bool, the weights to perturb; None for all.
    """
    scale, q = 1 / (1 - strength.p), strength.q
    # A weight is kept if its random number is among the lowest 1 - p of all 2^32 values.
    last_kept = max(1, round((1 - strength.p) * 2**32)) - 2**31 - 1
    if (quick := quick_kernels(source)) is not None:
        quick.noisy(source, target, position, number, base, last_kept, scale, q, chosen)
        return
    # A number on a GPU stays there: reading it would make the CPU wait.
    start, key = _drawn(base, number, source.is_cpu)
    given = (_int32(last_kept), _scalar(scale), _scalar(q), q == 1.5)
    compiled = strength.compiled and source.is_cpu
    part = min(len(source), _MOST if compiled else most(source.device))
    numbers = None if compiled else _numbers(part, source.device)
    if compiled and source is target:
        source = source.clone()  # see kernels.compiled
    for begin in range(0, len(source), part):
        piece = slice(begin, begin + part)
        weight = source[piece]
        out = weight if source is target else target[piece]
        draw = (_int32(start, kernels.SPACING * (position + begin)), _int32(key))
        rest = (*draw, *given, None if chosen is None else chosen[piece], out)
        if numbers is None:
            with torch.no_grad():
                kernels.compiled()[0](weight, *rest)
        else:
            kernels.noisy(weight, numbers[: len(weight)], *rest)


def scale(gradient: Tensor, weight: Tensor, noisy: Tensor, q: float, compiled: bool, target: Tensor) -> None:
    """Write ``gradient`` · ∂w̃/∂w to ``target``, all [n]; ``gradient`` and ``target`` may be one tensor."""
    if (quick := quick_kernels(gradient)) is not None:
        quick.scaled(gradient, weight, noisy, q, target)
    elif compiled and gradient.is_cpu:
        if target is not gradient:
            target.copy_(gradient)
        with torch.no_grad():
            kernels.compiled()[1](target, weight, noisy, _scalar(q))
    else:
        for begin in range(0, len(gradient), most(gradient.device)):
            piece = slice(begin, begin + most(gradient.device))
            part = gradient[piece]
            out = part if target is gradient else target[piece]
            kernels.scaled(part, weight[piece], noisy[piece], _scalar(q), out)


def quick_kernels(vector: Tensor) -> Any:
    """The module with the kernels for a GPU; None where they cannot serve ``vector``."""
    return _triton(vector.device) if vector.is_cuda and vector.dtype != torch.float64 else None


@functools.cache
def _triton(device: torch.device) -> Any:
    try:
        from regrow.noise import triton_kernels
    except ImportError:
        return None
    return triton_kernels if triton_kernels.works(device) else None


def _drawn(base: int, number: Tensor, read: bool) -> tuple[int | Tensor, int | Tensor]:
    return start_and_key(base, int(number)) if read else start_and_key(base, number)


def _numbers(count: int, device: torch.device) -> Tensor:
    return _numbers_of_a_part()[:count] if device.type == "cpu" else kernels.spaced(count, device)


@functools.cache
def _numbers_of_a_part() -> Tensor:
    with torch.inference_mode(False):
        return kernels.spaced(PART, torch.device("cpu"))


def _int32(number: int | Tensor, more: int = 0) -> Tensor:
    """``number`` + ``more`` modulo 2^32, as an int32 tensor with the same bits."""
    if isinstance(number, Tensor):
        return number + ((more + 2**31) % 2**32 - 2**31) if more else number
    return torch.tensor((number + more + 2**31) % 2**32 - 2**31, dtype=torch.int32, device="cpu")


def _scalar(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64, device="cpu")
