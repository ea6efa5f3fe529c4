"""Refuse settings that somebody gave and no run would use: RePr's for dropout. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from regrow.study.compare import METHOD_SETTINGS
from regrow.study.config import RunConfig
from regrow.study.names import unjoined

# {setting: the setting that decides whether it is used, and the values of that one with which it is used}.
# The learning rate of all methods follows the lengths of RePr's cycles, so that a comparison is fair; but
# somebody who gives them to a run of another method expects cycles.
USED_WITH: Mapping[str, tuple[str, tuple[str, ...]]] = {
    **{
        key: ("method", tuple(method for method, own in METHOD_SETTINGS.items() if key in own))
        for key in dict.fromkeys(key for own in METHOD_SETTINGS.values() for key in sorted(own))
    },
    **dict.fromkeys(
        ("full", "sub", "cycles"),
        ("method", tuple(method for method in METHOD_SETTINGS if "repr" in method.split("+"))),
    ),
    "momentum": ("optimizer", ("sgd",)),
    "second_data": ("regime", ("new-domain",)),
}


def check_used(
    given: Mapping[str, Any], configs: Iterable[RunConfig], spelled: Callable[[str], str] = repr
) -> None:
    """Raise ``ValueError`` for a setting in ``given`` that none of ``configs`` uses, even at its default.

    Args:
        given: the settings that somebody wrote; those that are None do not count.
        configs: of all runs that they are for.
        spelled: how the person wrote a setting's name.
    """
    configs = list(configs)
    for key, (decides, values) in USED_WITH.items():
        if given.get(key) is None:
            continue
        chosen = list(dict.fromkeys(getattr(config, decides) for config in configs))
        if not set(values) & set(chosen):
            known = unjoined(values)
            several = "s" if len(known) > 1 else ""
            raise ValueError(
                f"{spelled(key)} belongs to the {decides}{several} {_listed(known)}, and would be ignored "
                f"with {_listed(chosen)}: leave it out, or choose another {decides}."
            )


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
