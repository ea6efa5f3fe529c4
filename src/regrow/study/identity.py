"""Whether two sets of settings are the same run, and names for settings that differ. Imports no PyTorch."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from regrow.study import records
from regrow.study.compare import METHOD_SETTINGS, STRENGTHS
from regrow.study.config import RunConfig, make_config
from regrow.study.names import WHERE

_OWNED = frozenset().union(*METHOD_SETTINGS.values())


def own_settings(method: str) -> frozenset[str]:
    """The settings in which a method may differ from the other methods of a comparison."""
    return METHOD_SETTINGS.get(method, frozenset()) | STRENGTHS


def normalised(config: RunConfig) -> RunConfig:
    """``config`` with the settings of other methods at their defaults, because they do not change the run."""
    others = _OWNED - METHOD_SETTINGS.get(config.method, _OWNED)
    return config.model_copy(update={key: RunConfig.model_fields[key].default for key in others})


@functools.lru_cache(maxsize=100_000)
def run_key(config: RunConfig) -> str:
    """A text that is equal for two sets of settings if they are the same run."""
    settings = resolved(normalised(config))
    return json.dumps({key: settings[key] for key in settings.keys() - WHERE}, sort_keys=True)


def resolved(config: RunConfig) -> dict[str, Any]:
    """``config`` as plain data, with cycle lengths, learning rate and generations filled in."""
    cycle = config.cycle
    found = {"full": cycle.full, "sub": cycle.sub, "cycles": cycle.cycles, "lr": config.rate}
    if "generations" in METHOD_SETTINGS.get(config.method, ()):
        found["generations"] = config.rounds.generations
    return {**config.model_dump(mode="json"), **found}


def check_same_run(config: RunConfig, folder: Path) -> None:
    """Raise ``ValueError`` if the run in ``folder``, finished or not, has other settings than ``config``."""
    finished = records.is_finished(folder)
    there = records.read_config(folder)
    with suppress(ValueError):  # settings that this version does not know are compared as they are
        there = resolved(normalised(make_config(there)))
    wanted = resolved(normalised(config))
    unlike = [
        f"{key}={there.get(key)!r} (asked for: {wanted.get(key)!r})"
        for key in sorted({*there, *wanted} - WHERE - {"version"})
        if there.get(key) != wanted.get(key)
    ]
    if unlike:
        raise ValueError(
            f"{folder} holds {'a finished' if finished else 'an unfinished'} run with "
            f"{', '.join(unlike)}. Choose another --out, or pass --rerun to replace it."
        )


def unresolved(config: RunConfig) -> dict[str, Any]:
    """``config`` as plain data, with None for cycle lengths and a learning rate that have their defaults.

    So two settings that differ in their epochs do not differ in the default cycle lengths as well.
    """
    settings, default = (
        resolved(config),
        config.model_copy(update={"full": None, "sub": None, "cycles": None}),
    )
    if default.cycle == config.cycle:
        settings.update(full=None, sub=None, cycles=None)
    if config.model_copy(update={"lr": None}).rate == config.rate:
        settings["lr"] = None
    if config.model_copy(update={"generations": None}).rounds == config.rounds:
        settings["generations"] = None
    return settings


def differing(settings: list[dict[str, Any]]) -> list[str]:
    """The keys in which some of ``settings`` differ, in their order."""
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]


def shown(value: object) -> str:
    """A setting's value as a short text."""
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return format(value, ".10g")
    if isinstance(value, list | tuple):
        return "+".join(map(str, value)) or "none"
    return str(value)


def describe(settings: Mapping[str, Any], keys: list[str]) -> str:
    """The values of ``keys`` for people to read, such as ``"fraction 0.2, skip first no"``."""
    return ", ".join(f"{key.replace('_', ' ')} {shown(settings.get(key))}" for key in keys)
