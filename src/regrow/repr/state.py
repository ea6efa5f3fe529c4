"""The saved state of a RePr: its schedule, and whether a state fits the settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regrow.given import kind_of
from regrow.short import line, short

VERSION = 1
# Settings that states of earlier releases lack, with the values that these releases had.
_EARLIER = {"rows": "orthogonal"}


def phase_at(settings: Mapping[str, Any], step: int) -> str:
    """``"full"``, ``"sub"`` or ``"done"``: the phase after ``step`` calls of ``RePr.step``."""
    length = settings["full"] + settings["sub"]
    if step >= length * settings["cycles"]:
        return "done"
    return "full" if step % length < settings["full"] else "sub"


def check_state(state: Any, settings: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless ``state`` is of a RePr with ``settings``; tensors are not checked."""
    if not isinstance(state, Mapping):
        raise ValueError(f"not a state of RePr, what cycle.state_dict() gives, but {kind_of(state)}.")
    missing = {"version", "settings", "step", "highest_rate", "sub_phase"} - set(state)
    if missing:
        raise ValueError(f"not a state of RePr: {', '.join(sorted(missing))} missing.")
    if type(state["version"]) is not int or state["version"] != VERSION:
        raise ValueError(
            f"this regrow reads RePr states of version {VERSION}, got {short(state['version'])}."
        )
    theirs = state["settings"]
    if not isinstance(theirs, Mapping):
        raise ValueError(f"not a state of RePr: its settings are {kind_of(theirs)}.")
    theirs = {**_EARLIER, **theirs}
    other = [
        f"{key}={short(theirs.get(key))} (here {short(ours)})"
        for key, ours in settings.items()
        if not isinstance(theirs.get(key), bool | int | float | str | list) or theirs[key] != ours
    ]
    if other:
        raise ValueError(
            f"the state was saved with other settings: {line(', '.join(other), 400)}. Build RePr with "
            "the same ones."
        )
    step, rate, sub = state["step"], state["highest_rate"], state["sub_phase"]
    copies = state.get("copies", {})  # states of earlier releases have none
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**63:
        raise ValueError(f"step in a state of RePr is a number of calls, got {short(step)}.")
    if not isinstance(rate, int | float) or not 0 <= rate < float("inf"):
        raise ValueError(f"highest_rate in a state of RePr is a learning rate, got {short(rate)}.")
    if not isinstance(copies, Mapping) or not all(type(value) is bool for value in copies.values()):
        raise ValueError(f"copies in a state of RePr says yes or no of slots, got {short(copies)}.")
    if sub is not None and not isinstance(sub, Mapping):
        raise ValueError(f"sub_phase in a state of RePr is a mapping, got {short(sub)}.")
    phase = phase_at(settings, step)
    if (phase == "sub") != bool(sub):
        raise ValueError(
            f"after {step} calls RePr is in its {phase} phase, and the state has {'a' if sub else 'no'} sub "
            "phase."
        )
