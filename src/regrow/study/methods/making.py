"""The method of a run from its name, which may join several by ``+``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from regrow.study.methods.method import Given, Method, Several
from regrow.study.methods.noisy import BRIDGEOUTS, Noisy
from regrow.study.methods.regrown import Regrown

# Standard training and dropout need nothing here.
_MAKERS: Mapping[str, Callable[[Given], Method]] = {
    "repr": Regrown,
    **dict.fromkeys(BRIDGEOUTS, Noisy),
}


def make_method(given: Given) -> Several:
    """The method that ``given.config`` names. Raises ``ValueError`` where it cannot work on the network."""
    names = given.config.method.split("+")
    return Several([_MAKERS[name](given) for name in names if name in _MAKERS])
