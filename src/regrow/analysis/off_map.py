"""Which filter was off when. Imports no PyTorch, so that a report can draw it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def off_map(
    events: Iterable[Any], filters: Mapping[str, int], steps: int, *, time: str = "step"
) -> NDArray[np.bool_]:
    """Which filter was off in which step: a map of RePr's drops and restores (arXiv 1811.07275).

    A filter dropped after step a and restored after step b is off in steps a+1 to b, which are columns a to
    b−1; one that is not restored is off to the end.

    Args:
        events: what ``RePr.step`` returned, in order; None, which it returns where nothing happens, is
            passed over. Dictionaries, as ``Event.to_dict`` gives them, will do.
        filters: {qualified name: number of filters} of the layers to show, in the order of the rows.
        steps: how many calls of ``RePr.step`` there were, which is the number of columns.
        time: the entry of an event that says when it happened.

    Returns:
        bool [filters of all layers, steps].

    Raises:
        ValueError: an event that drops filters which the layers in ``filters`` do not have, or ``steps``
            is negative.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"steps is the number of calls of RePr.step, a whole number, got {steps!r}.")
    starts = dict(zip(filters, np.cumsum([0, *filters.values()]).tolist(), strict=False))
    off = np.zeros((sum(filters.values()), steps), dtype=bool)
    for event in events:
        if event is None:
            continue
        said = event if isinstance(event, Mapping) else event.to_dict()
        for layer, indices in said["filters"].items():
            if layer not in filters:
                continue
            rows = np.asarray(indices, dtype=int)
            if len(rows) and not (rows.min() >= 0 and rows.max() < filters[layer]):
                raise ValueError(
                    f"an event names filter {int(rows.max())} of {layer!r}, which has {filters[layer]} in "
                    "filters=."
                )
            off[starts[layer] + rows, said[time] :] = said["kind"] == "drop"
    return off
