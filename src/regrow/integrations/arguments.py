"""What the callbacks of all trainers check and say alike."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from regrow.callers import warn
from regrow.noise.layers import add_bridgeout
from regrow.repr.cycle import RePr


def check_repr(example_inputs: Any, per: str, settings: Mapping[str, Any]) -> None:
    """Raise an error where ``per`` is no unit, or where ``regrow.RePr`` takes no such ``settings``."""
    if per not in ("epoch", "step"):
        raise ValueError(f"per must be 'epoch' or 'step', got {per!r}.")
    inspect.signature(RePr).bind(None, None, example_inputs=example_inputs, **settings)


def check_bridgeout(settings: Mapping[str, Any]) -> None:
    """Raise ``TypeError`` where ``regrow.add_bridgeout`` takes no such ``settings``."""
    inspect.signature(add_bridgeout).bind(None, **settings)


def warn_of_dropped(what: str) -> None:
    """Warn that filters are at 0 at the end, because of ``what``; called from a callback's method."""
    warn(
        f"{what}, and they stay at 0. Choose full, sub and cycles so that the last restore comes before the "
        "end, or go on from a checkpoint."
    )
