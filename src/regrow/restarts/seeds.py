"""Random numbers that depend on a seed alone, and leave the generators of the process as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(seed: int, number: int) -> int:
    """A seed for the draw ``number`` of those that ``seed`` begins."""
    return (seed * 1_000_003 + number) % 2**63


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """What draws on the CPU inside of the block draws from ``seed``; afterwards the generator goes on."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        yield
