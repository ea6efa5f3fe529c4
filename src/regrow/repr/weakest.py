"""The weakest filters of a model, by a criterion."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from regrow.criteria.score import score
from regrow.criteria.select import select


def weakest(
    model: nn.Module, criterion: str, settings: Mapping[str, Any], *, exclude: Mapping[str, str], seed: int
) -> tuple[dict[str, list[int]], list[str]]:
    """The filters with the lowest scores, as plain JSON-able data, and the warnings of ``select``.

    Args:
        settings: fraction, scope and floor.
        exclude: {convolution: why it is left out}.

    Returns:
        {qualified name: indices of the filters}, without the layers that keep all of theirs; and the
        warnings, as texts.
    """
    scores = score(model, criterion, exclude=exclude, seed=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        keep = select(scores, settings["fraction"], scope=settings["scope"], floor=settings["floor"])
    dropped = {name: (~mask).nonzero().flatten().tolist() for name, mask in keep.items() if not mask.all()}
    return dropped, [str(warning.message) for warning in caught]
