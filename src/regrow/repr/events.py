"""What ``RePr.step`` has done: a drop, a restore, or both at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """A drop or restore that ``RePr.step`` carried out, or a restart, which is both at once.

    Attributes:
        kind: ``"drop"``, ``"restore"``, or ``"restart"`` (with ``sub=0``).
        step: the number of calls of ``step``, this one included.
        cycle: number of the cycle, from 1.
        filters: {qualified name: indices of the filters}, without the layers that have no such filter.
        least_covered: on restore and restart, the layers whose null space was too small for the new rows,
            which then took the directions that the existing rows cover least.
        notes: one sentence for each thing that could not be done as asked.
    """

    kind: str
    step: int
    cycle: int
    filters: dict[str, list[int]]
    least_covered: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The event as plain JSON-able data."""
        return asdict(self)


def regrown(events: Iterable[Event | Mapping[str, Any]]) -> dict[str, dict[int, int]]:
    """When each filter was regrown last: {qualified name: {index of the filter: step}}.

    Args:
        events: what ``RePr.step`` has returned, None included, or these events as ``to_dict`` gives them.
    """
    found: dict[str, dict[int, int]] = {}
    for event in events:
        plain = event.to_dict() if isinstance(event, Event) else event
        if plain and plain["kind"] in ("restore", "restart"):
            for name, indices in plain["filters"].items():
                found.setdefault(name, {}).update(dict.fromkeys(indices, plain["step"]))
    return found
