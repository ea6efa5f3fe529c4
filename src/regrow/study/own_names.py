"""Which tensors of a file are a network's own: those with its names, maybe behind a prefix or in a dict."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

_FIRST = ("state_dict", "model")  # the usual names, which settle it where several dicts fit
_USUAL = [(key,) for key in _FIRST]
_DEPTH = 3


@dataclass(frozen=True)
class Part:
    """A part of a file.

    Attributes:
        where: the keys that lead to its dict; empty for the file itself.
        prefix: what its names begin with in the file.
        state: its tensors, by the names behind ``prefix``.
        others: names in the same dict that do not begin with ``prefix``.
    """

    where: tuple[str, ...]
    prefix: str
    state: dict[str, Any]
    others: list[str]

    @property
    def place(self) -> str:
        """How a person would write it: ``ema``, ``state_dict.net``."""
        return ".".join(filter(None, (*self.where, self.prefix.removesuffix("."))))


def parts_for(content: Mapping[str, Any], expected: Mapping[str, Any]) -> list[Part]:
    """The parts of ``content`` that fit a network best: one, or several that all have its names and shapes.

    Args:
        content: what was read: a state dict, or a dict that has one somewhere in it.
        expected: the network's ``state_dict()``.

    Returns:
        Empty if there is no dict with tensors. Names as they are come before prefixes, and "state_dict" and
        "model" before other dicts.
    """
    whole = (len(expected), len(expected))
    found: list[tuple[tuple[int, int], Part]] = []
    for where, state in _states(content, ()):
        counts = _prefixes(state, expected) or {"": (0, 0)}
        fitting = [prefix for prefix, count in counts.items() if count == whole]
        if "" in fitting:
            fitting = [""]
        for prefix in fitting or [max(counts, key=lambda each: counts[each])]:
            found.append((counts[prefix], _part(where, prefix, state)))
    if not found:
        return []
    found.sort(key=lambda each: each[1].where[:1] not in _USUAL)
    best = max(count for count, _ in found)
    parts = [part for count, part in found if count == best]
    if best != whole:
        return parts[:1]
    usual = parts[0].where[:1] in _USUAL
    return [part for part in parts if part.where == parts[0].where] if usual else parts


def _states(content: Mapping[str, Any], where: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The dicts in ``content``, and itself, that have a tensor: (the keys that lead there, the dict)."""
    if all(isinstance(key, str) for key in content):
        if any(isinstance(value, Tensor) for value in content.values()) or not (content or where):
            yield where, content
        for key in sorted(content, key=lambda key: _FIRST.index(key) if key in _FIRST else len(_FIRST)):
            if isinstance(content[key], Mapping) and len(where) < _DEPTH:
                yield from _states(content[key], (*where, key))


def _prefixes(state: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """{prefix: how many names of ``expected`` there are behind it with the same shape, with any shape}."""
    counts: dict[str, tuple[int, int]] = {}
    for name, value in state.items():
        parts = name.split(".")
        for start in range(len(parts)):
            behind = ".".join(parts[start:])
            if behind in expected:
                shaped, named = counts.get(prefix := name[: -len(behind)], (0, 0))
                counts[prefix] = shaped + same_shape(value, expected[behind]), named + 1
    return counts


def same_shape(value: Any, expected: Any) -> bool:
    """Whether both are tensors of one shape, or not both have a shape, as in a lazy layer."""
    both = all(isinstance(each, Tensor) and not is_lazy(each) for each in (value, expected))
    return not both or value.shape == expected.shape


def _part(where: tuple[str, ...], prefix: str, state: Any) -> Part:
    if not prefix:
        return Part(where, "", state, [])
    own: dict[str, Any] = OrderedDict(
        (name.removeprefix(prefix), value) for name, value in state.items() if name.startswith(prefix)
    )
    if (described := getattr(state, "_metadata", None)) is not None:  # the versions of layers
        own._metadata = {  # type: ignore[attr-defined]
            f"{name}.".removeprefix(prefix).removesuffix("."): value
            for name, value in described.items()
            if f"{name}.".startswith(prefix)
        }
    return Part(where, prefix, own, [name for name in state if not name.startswith(prefix)])
