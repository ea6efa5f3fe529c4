"""Names for variants of one method in a comparison, such as RePr with two fractions."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

from regrow.study.identity import describe, differing, own_settings
from regrow.study.words import label

Key = TypeVar("Key", bound=Hashable)


def variant_names(settings: Mapping[Key, Mapping[str, Any]]) -> dict[Key, str]:
    """The name to group each run of a comparison by, and to show.

    Args:
        settings: of every run, as in its ``config.yaml``.

    Returns:
        For each run the method, or, if runs of a method differ in settings that are the method's own, the
        method's label with the settings that differ: ``"RePr, fraction 0.2"``.
    """
    names: dict[Key, str] = {}
    for method in dict.fromkeys(each["method"] for each in settings.values()):
        own = own_settings(method)
        runs = {
            key: {name: value for name, value in each.items() if name in own}
            for key, each in settings.items()
            if each["method"] == method
        }
        keys = differing(list(runs.values()))
        for key, each in runs.items():
            names[key] = f"{label(method)}, {describe(each, keys)}" if keys else method
    return {key: names[key] for key in settings}
