"""Train better convolutional filters, and remove the ones a network does not need.

The names below are imported on first use, so that ``import regrow`` stays quick and
``regrow --help`` never waits for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from regrow.bridgeout_layers import add_bridgeout, remove_bridgeout
    from regrow.bridgeout_noise import bridgeout
    from regrow.compensation import compensate, read_as, reestimate_norms
    from regrow.cycle import Event, RePr
    from regrow.scoring import overlap, score
    from regrow.selection import select

_HOMES = {
    "Event": "regrow.cycle",
    "RePr": "regrow.cycle",
    "add_bridgeout": "regrow.bridgeout_layers",
    "bridgeout": "regrow.bridgeout_noise",
    "compensate": "regrow.compensation",
    "overlap": "regrow.scoring",
    "read_as": "regrow.compensation",
    "reestimate_norms": "regrow.compensation",
    "remove_bridgeout": "regrow.bridgeout_layers",
    "score": "regrow.scoring",
    "select": "regrow.selection",
}

__all__ = [
    "Event",
    "RePr",
    "add_bridgeout",
    "bridgeout",
    "compensate",
    "overlap",
    "read_as",
    "reestimate_norms",
    "remove_bridgeout",
    "score",
    "select",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'regrow' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
