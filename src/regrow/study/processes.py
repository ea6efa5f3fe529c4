"""Which of a run's processes this is, without torch."""

from __future__ import annotations

import os


def is_first() -> bool:
    """Whether this process is the one that writes and prints: alone, or the first of ``torchrun``'s."""
    return int(os.environ.get("RANK", 0)) == 0
