"""States of this room's classes: what ``state_dict`` gives, and its checks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from regrow.given import kind_of
from regrow.short import line, short

VERSION = 1


def check_saved(state: Any, of: str, settings: Mapping[str, Any], parts: Collection[str]) -> None:
    """Raise ``ValueError`` unless ``state`` is of the class ``of`` with ``settings``, and has ``parts``."""
    if not isinstance(state, Mapping):
        raise ValueError(f"not a state of {of}, as its state_dict() gives it, but {kind_of(state)}.")
    if missing := {"version", "settings", *parts} - set(state):
        raise ValueError(f"not a state of {of}: {', '.join(sorted(missing))} missing.")
    if type(state["version"]) is not int or state["version"] != VERSION:
        raise ValueError(
            f"this regrow reads {of} states of version {VERSION}, got {short(state['version'])}."
        )
    theirs = state["settings"]
    if not isinstance(theirs, Mapping):
        raise ValueError(f"not a state of {of}: its settings are {kind_of(theirs)}.")
    other = [
        f"{key}={short(theirs.get(key))} (here {short(ours)})"
        for key, ours in settings.items()
        if not isinstance(theirs.get(key), bool | int | float | str) or theirs[key] != ours
    ]
    if other:
        raise ValueError(
            f"the state was saved with other settings: {line(', '.join(other), 400)}. Build {of} with the "
            "same ones."
        )


def whole_number(value: Any, name: str, of: str) -> int:
    """``value`` of a state. Raises ``ValueError`` unless it is a count."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"{name} in a state of {of} is a count, got {short(value)}.")
    return value


def answers(value: Any, of: str) -> dict[str, bool]:
    """``copies`` of a state: which slots hold copies. Raises ``ValueError`` where it is something else."""
    if not isinstance(value, Mapping) or not all(
        isinstance(key, str) and type(each) is bool for key, each in value.items()
    ):
        raise ValueError(f"copies in a state of {of} says yes or no of slots, got {short(value)}.")
    return dict(value)
