"""Shares of filters to remove, layer by layer: checked, and handed down from containers to their layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from regrow.criteria.select import check_selection
from regrow.filters import excluded
from regrow.short import by_reason


def check_shares(shares: Mapping[Any, Any], scope: str) -> None:
    """Raise ``ValueError`` unless ``shares`` is {name: share}, not empty, for the scope ``"layer"``."""
    if not shares:
        raise ValueError(
            'fraction={} names no layer: write fraction={"layer3": 0.6}, or fraction=0.6 for all.'
        )
    for name, share in shares.items():
        if not isinstance(name, str):
            raise ValueError(
                f"fraction= names layers by their qualified names, got a {type(name).__name__}: write "
                'fraction={"layer3": 0.6}, as model.named_modules() calls them.'
            )
        try:
            check_selection(share, "layer", 0.0)
        except ValueError as error:
            raise ValueError(f"fraction[{name!r}]: {error}") from None
    if scope != "layer":
        raise ValueError(
            f"a share for each layer needs scope='layer', got scope={scope!r}, which ranks the filters of "
            "several layers together. Leave scope= out, or give one number as fraction=."
        )


def layer_shares(shares: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """The share of each layer that ``shares`` name, or that lies in a container they name: {layer: share}.

    Of several names for a layer the longest counts: {"layer3": 0.6, "layer3.0": 0.2}.

    Args:
        names: of all convolutions.

    Raises:
        ValueError: a name matches no convolution; the message suggests the nearest names.
    """
    names, found = list(names), dict[str, float]()
    for name in sorted(shares, key=len):
        found |= dict.fromkeys(excluded(name, names), float(shares[name]))
    return {name: found[name] for name in names if name in found}


def check_reach(shares: Mapping[str, float], names: Iterable[str], whole: Mapping[str, str]) -> None:
    """Raise ``ValueError`` if one of ``shares`` means only layers that stay ``whole``, {layer: why}."""
    names = list(names)
    for name in shares:
        meant = sorted(excluded(name, names))
        if all(layer in whole for layer in meant):
            reasons = by_reason({layer: whole[layer] for layer in meant})
            raise ValueError(
                f"fraction names {name!r}, where no filter can be removed ({reasons}). Leave it out."
            )
