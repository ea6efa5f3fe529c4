"""Which of a run's processes this process is. Imports no PyTorch."""

from __future__ import annotations

import os


def is_first() -> bool:
    """Whether this process is the one that writes and prints: alone, or the first of ``torchrun``'s."""
    return int(os.environ.get("RANK", 0)) == 0
