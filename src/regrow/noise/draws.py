"""Which random numbers a weight gets: by the seed, the number of the pass, and its place in the model.

A pass has one pair (start, key) for all weights of a model, and a weight's position there tells its number
(``kernels.scrambled``). Weights of neighbouring parameters have neighbouring positions, so that one kernel
serves many parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

# Positions of a parameter begin at a multiple: memory laid out by position is then aligned, to 256 bytes in
# float32.
ALIGNED = 64
# Numbers of positions that are 2^29 and more apart depend on each other: a base serves this many weights.
SEGMENT = 2**26
# The constants of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014), as
# signed numbers, which PyTorch's integers are.
STEP = 0x9E3779B97F4A7C15 - 2**64
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
N = TypeVar("N", int, Tensor)


class Place(NamedTuple):
    """Where the random numbers of a parameter begin.

    Attributes:
        base: a 64-bit number, in place of the seed.
        offset: the position of the first weight in memory; the others follow in memory order.
    """

    base: int
    offset: int


def base(seed: int, segment: int = 0) -> int:
    """A number −2^63 ≤ n < 2^63 in place of ``seed``, which may be any whole number."""
    digest = hashlib.blake2b(f"{seed} {segment}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def places(sizes: Iterable[int], seed: int) -> list[Place]:
    """A place for each of the parameters of a model, which have ``sizes`` weights."""
    found, segment, offset = [], 0, 0
    for size in sizes:
        if offset and offset + size > SEGMENT:
            segment, offset = segment + 1, 0
        found.append(Place(base(seed, segment), offset))
        offset += aligned(size)
    return found


def aligned(size: int) -> int:
    """``size`` rounded up to a multiple of ``ALIGNED``."""
    return -(-size // ALIGNED) * ALIGNED


def start_and_key(base: int, number: N) -> tuple[N, N]:
    """The pair (start, key) of a pass, for ``kernels.scrambled``: 32-bit numbers, key odd.

    Args:
        base: from a ``Place``.
        number: of the pass; in a tensor [] int64 nothing leaves its device, and the pair comes as int32.
    """
    mixed = _wrapped(number * STEP + base)
    # PyTorch shifts signed numbers: the masks take away the copies of the sign.
    mixed = _wrapped((mixed ^ (mixed >> 30 & 2**34 - 1)) * FIRST)
    mixed = _wrapped((mixed ^ (mixed >> 27 & 2**37 - 1)) * SECOND)
    mixed = mixed ^ (mixed >> 31 & 2**33 - 1)
    start, key = mixed & 2**32 - 1, mixed >> 32 & 2**32 - 1 | 1
    if isinstance(start, Tensor) and isinstance(key, Tensor):
        return start.to(torch.int32), key.to(torch.int32)
    return start, key


def _wrapped(number: N) -> N:
    # Integers of a tensor wrap around by themselves.
    return number if isinstance(number, Tensor) else (number + 2**63) % 2**64 - 2**63
