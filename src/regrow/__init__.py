"""Train better convolutional filters, and remove the ones a network does not need.

The names below are imported on first use, so that ``import regrow`` stays quick and
``regrow --help`` never waits for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from regrow.compensation import compensate, read_as, reestimate_norms
    from regrow.cycle import Event, RePr
    from regrow.scoring import overlap, score
    from regrow.selection import select

_HOMES = {
    "Event": "regrow.cycle",
    "RePr": "regrow.cycle",
    "compensate": "regrow.compensation",
    "overlap": "regrow.scoring",
    "read_as": "regrow.compensation",
    "reestimate_norms": "regrow.compensation",
    "score": "regrow.scoring",
    "select": "regrow.selection",
}

__all__ = [
    "Event",
    "RePr",
    "compensate",
    "overlap",
    "read_as",
    "reestimate_norms",
    "score",
    "select",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'regrow' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
