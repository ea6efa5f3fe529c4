"""Names, numbers and styles for variants of one method in a comparison, such as RePr with two fractions."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from regrow.study.config import RunConfig
from regrow.study.drawing import Style, styles
from regrow.study.identity import describe, differing, own_settings
from regrow.study.recorded import Recorded
from regrow.study.words import label

Key = TypeVar("Key", bound=Hashable)


def variant_names(settings: Mapping[Key, Mapping[str, Any]]) -> dict[Key, str]:
    """The name to group each run of a comparison by, and to show.

    Args:
        settings: of every run, as in its ``config.yaml``. A setting that is missing has its default.

    Returns:
        For each run the method, or, if runs of a method differ in settings that are the method's own, the
        method's label with the settings that differ: ``"RePr, fraction 0.2"``.
    """
    names: dict[Key, str] = {}
    for method in dict.fromkeys(each["method"] for each in settings.values()):
        runs = {key: _own(each) for key, each in settings.items() if each["method"] == method}
        keys = differing(list(runs.values()))
        for key, each in runs.items():
            names[key] = f"{label(method)}, {describe(each, keys)}" if keys else method
    return {key: names[key] for key in settings}


def fits(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether ``variant_names`` may call a run with ``settings`` by ``name``."""
    method = settings["method"]
    first, *parts = name.split(", ")
    if not parts:
        return name == method
    own = _own(settings)
    return first == label(method) and {*parts} <= {describe(own, [key]) for key in own}


def variant_numbers(
    groups: Mapping[str, Mapping[str, Any]], known: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Number the variants of each method from 0; a figure takes the shade of a variant's colour from it.

    Args:
        groups: {name of a method or variant: settings of one of its runs}.
        known: numbers that stay as they are. The others get the lowest free ones, in the order of their
            settings' values: so the numbers do not depend on the order of ``groups``.
    """
    numbers = {name: number for name, number in (known or {}).items() if name in groups}
    for name in sorted(groups, key=lambda name: (_values(groups[name]), name)):
        method = groups[name]["method"]
        taken = {number for each, number in numbers.items() if groups[each]["method"] == method}
        if name not in numbers:
            numbers[name] = next(number for number in range(len(groups)) if number not in taken)
    return {name: numbers[name] for name in groups}


def known_numbers(
    recorded: Iterable[Recorded], names: Mapping[Path, str], groups: Mapping[str, Mapping[str, Any]]
) -> dict[str, int]:
    """The numbers that variants have had before, as ``known`` of ``variant_numbers``.

    Args:
        recorded: what earlier comparisons have recorded; of two that give one number twice the first wins.
        names: {run folder, resolved: name of its method or variant now}.
        groups: as ``variant_numbers`` takes them.
    """
    known: dict[str, int] = {}
    taken: set[tuple[str, int]] = set()
    for each in recorded:
        for folder, before in each.names.items():
            name, number = names.get(folder), each.numbers.get(before)
            if name is None or number is None or name in known:
                continue
            place = groups[name]["method"], number
            if place not in taken:
                taken.add(place)
                known[name] = number
    return known


def variant_styles(
    groups: Mapping[str, Mapping[str, Any]], known: Mapping[str, int] | None = None
) -> dict[str, Style]:
    """How to draw each method or variant. ``variant_numbers`` describes the arguments."""
    numbers = variant_numbers(groups, known)
    return styles(list(groups), {name: (each["method"], numbers[name]) for name, each in groups.items()})


def _own(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The method's own settings, in the order of ``settings``, then those that are missing there."""
    own = own_settings(settings["method"])
    given = {key: value for key, value in settings.items() if key in own}
    return {**given, **{key: value for key, value in _defaults().items() if key in own and key not in given}}


@functools.cache
def _defaults() -> dict[str, Any]:
    return RunConfig().model_dump(mode="json")


def _values(settings: Mapping[str, Any]) -> list[tuple[str, bool, float, str]]:
    """Own settings as something to sort by: numbers by size, everything else by its text."""
    values = sorted(_own(settings).items())
    return [
        (key, value is not None, value if isinstance(value, int | float) else 0.0, str(value))
        for key, value in values
    ]
