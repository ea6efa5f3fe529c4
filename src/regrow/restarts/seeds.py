"""Random numbers that depend on a seed alone, and leave the generators of the process as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_OTHERS = 0x5EED


def seed_of(seed: int, number: int) -> int:
    """A seed for the draw ``number`` of those that ``seed`` begins."""
    return (seed * 1_000_003 + number) % 2**63


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """What draws on the CPU inside of the block draws from ``seed``; afterwards the generator goes on.

    These are other numbers than after ``torch.manual_seed(seed)``: with them a model that was built there
    would get the very values anew that it had at the start.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed_of(seed, _OTHERS))
        yield
