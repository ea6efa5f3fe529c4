"""A plan of a cut: what it leaves of each layer, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any


class PlanUnfit(ValueError):
    """A plan names layers, channels or shapes that a model does not have, or holds no such thing."""


class NoPlan(ValueError):
    """No cut of a model can be confirmed."""


@dataclass(frozen=True)
class CutPlan:
    """What a cut leaves of each layer. Narrowing applies it for a while, surgery for good.

    Keys are qualified names; a layer that is not named stays whole. Indices are ascending.

    Attributes:
        rows: convolution → the filters that it still computes.
        columns: ungrouped convolution or linear layer → the input channels that it still reads.
        channels: norm or PReLU → the channels that remain of its parameters and statistics.
        groups: grouped convolution → its new number of groups.
        placed: layer → (width, positions): its narrow output is put at these channels of a tensor of zeros,
            ``width`` wide.
        picked: layer → the channels that it reads of the arriving input.
        spread: norm or convolution → the channels whose weight and bias remain; the layer computes with all
            channels, and the weights of the others are 0.
        masked: convolution → why it still computes its dropped filters, which are held at 0.
    """

    rows: dict[str, list[int]] = field(default_factory=dict)
    columns: dict[str, list[int]] = field(default_factory=dict)
    channels: dict[str, list[int]] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    placed: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    picked: dict[str, list[int]] = field(default_factory=dict)
    spread: dict[str, list[int]] = field(default_factory=dict)
    masked: dict[str, str] = field(default_factory=dict)

    def layers(self) -> list[str]:
        """The layers that the plan changes."""
        parts = (self.rows, self.columns, self.channels, self.groups, self.placed, self.picked, self.spread)
        return list(dict.fromkeys(name for part in parts for name in part))

    def check(self) -> None:
        """Raise ``PlanUnfit`` if a part holds something else than it should."""
        _check_values({part.name: getattr(self, part.name) for part in fields(self)})

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-able data."""
        data: dict[str, Any] = {part.name: dict(getattr(self, part.name)) for part in fields(self)}
        data["placed"] = {name: [width, list(at)] for name, (width, at) in self.placed.items()}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CutPlan:
        """The plan that ``to_dict`` wrote.

        Raises:
            PlanUnfit: a part is missing or unknown, or holds something else than it should.
        """
        names = [part.name for part in fields(cls)]
        if not isinstance(data, Mapping) or set(data) != set(names):
            raise PlanUnfit(f"a cut plan has the parts {', '.join(names)}; got {shown(data)}.")
        _check_values(data)
        placed = {name: (width, list(at)) for name, (width, at) in data["placed"].items()}
        return cls(**{**{part: dict(data[part]) for part in names}, "placed": placed})


def _check_values(data: Mapping[str, Any]) -> None:
    for part, values in data.items():
        if not isinstance(values, Mapping):
            raise PlanUnfit(f"{part!r} of a cut plan maps names to values, got {shown(values)}.")
        for name, value in values.items():
            if not isinstance(name, str) or not _KINDS.get(part, _indices)(value):
                raise PlanUnfit(f"{part!r} of a cut plan cannot hold {shown(value)} for {shown(name)}.")


def shown(value: Any) -> str:
    """``repr(value)``, shortened: a plan from a file may hold anything."""
    text = repr(sorted(map(str, value)) if isinstance(value, Mapping) else value)
    return text if len(text) < 80 else f"{text[:77]}…"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _indices(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    plain = set(map(type, value)) == {int}  # the usual case, in a tenth of the time
    return min(value) >= 0 if plain else all(map(_whole, value))


_KINDS: dict[str, Callable[[Any], bool]] = {
    "groups": _whole,
    "placed": lambda value: (
        isinstance(value, tuple | list) and len(value) == 2 and _whole(value[0]) and _indices(value[1])
    ),
    "masked": lambda value: isinstance(value, str),
}
