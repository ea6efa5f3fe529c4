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
    from regrow.checkpoint import load, save
    from regrow.compensation import compensate, read_as
    from regrow.cycle import Event, RePr
    from regrow.deploy import fold_norms
    from regrow.export import export_onnx
    from regrow.pruning import prune
    from regrow.reestimation import reestimate_norms
    from regrow.scoring import overlap, score
    from regrow.selection import select
    from regrow.surgery import cut

_HOMES = {
    "Event": "regrow.cycle",
    "RePr": "regrow.cycle",
    "add_bridgeout": "regrow.bridgeout_layers",
    "bridgeout": "regrow.bridgeout_noise",
    "compensate": "regrow.compensation",
    "cut": "regrow.surgery",
    "export_onnx": "regrow.export",
    "fold_norms": "regrow.deploy",
    "load": "regrow.checkpoint",
    "overlap": "regrow.scoring",
    "prune": "regrow.pruning",
    "read_as": "regrow.compensation",
    "reestimate_norms": "regrow.reestimation",
    "remove_bridgeout": "regrow.bridgeout_layers",
    "save": "regrow.checkpoint",
    "score": "regrow.scoring",
    "select": "regrow.selection",
}

__all__ = [
    "Event",
    "RePr",
    "add_bridgeout",
    "bridgeout",
    "compensate",
    "cut",
    "export_onnx",
    "fold_norms",
    "load",
    "overlap",
    "prune",
    "read_as",
    "reestimate_norms",
    "remove_bridgeout",
    "save",
    "score",
    "select",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'regrow' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
