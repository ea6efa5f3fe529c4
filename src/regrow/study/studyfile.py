"""Read and check a study's file, and expand it into a grid of runs. Imports no PyTorch."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from regrow.short import line, short
from regrow.study.compare import METHOD_SETTINGS
from regrow.study.config import RunConfig, make_config
from regrow.study.identity import WHERE, normalised, own_settings, run_key
from regrow.study.names import DATA_NAMES, METHOD_ALIASES, unjoined
from regrow.study.seeds import MOST_RUNS, seeds_of
from regrow.study.unused import check_used
from regrow.study.yamls import read_yaml
from regrow.suggest import nearest

_KEYS = ("name", "methods", "models", "data", "seeds", "settings")
_METHODS: tuple[str, ...] = get_args(RunConfig.model_fields["method"].annotation)
# Settings that have their own key at the top of the file.
_ELSEWHERE = {"method": "methods", "model": "models", "data": "data", "seed": "seeds"}
_SHARED = [key for key in RunConfig.model_fields if key not in _ELSEWHERE]

_Options = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Wanted:
    """One run of a study.

    ``comparison`` holds the settings that all runs of one comparison share.
    """

    config: RunConfig
    comparison: RunConfig


@dataclass(frozen=True)
class Study:
    """A study's name, its file, and its runs: by comparison, then seed, then method, the baseline first."""

    name: str
    text: bytes
    runs: tuple[Wanted, ...]


def read_study(path: Path, name: str | None = None) -> Study:
    """The study in the YAML file ``path``; ``docs/study.md`` describes the format.

    Args:
        path: the file.
        name: of the study, where the file does not give it (default: the file's name).

    Raises:
        ValueError: the file is not there, is not YAML, or does not describe a study; the message names
            the key, and the nearest known one.
    """
    try:
        if path.is_dir():
            raise FileNotFoundError
        content, text = read_yaml(path)
    except FileNotFoundError:
        raise ValueError(f"there is no study file {line(path)}.") from None
    try:
        return Study(_name(content, name or path.stem), text, _expand(content))
    except ValueError as error:
        raise ValueError(f"{line(path)}: {error}") from None


def _name(content: object, default: str) -> str:
    _check_mapping(content)
    assert isinstance(content, dict)
    name = content.get("name", default)
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]{0,99}", name):
        raise ValueError(
            f"name must be a folder name of at most 100 letters, digits, . _ + and -, got {short(name)}."
        )
    return name


def _check_mapping(content: object) -> None:
    if not isinstance(content, dict):
        raise ValueError("a study is a mapping: methods: [standard, repr] and seeds: 0-4, at the least.")
    for key in content:
        if key in _SHARED:
            raise ValueError(f"{short(key)} is a setting of the runs: write it under settings.")
        if key not in _KEYS:
            raise ValueError(f"unknown key {short(key)}{nearest(str(key), _KEYS)}")
    for key in ("methods", "seeds"):
        if content.get(key) is None:
            example = {"methods": "methods: [standard, repr]", "seeds": "seeds: 0-4"}[key]
            raise ValueError(f"there is no {key!r}: write {example}, say.")


def _expand(content: Mapping[str, Any]) -> tuple[Wanted, ...]:
    seeds = seeds_of(content["seeds"])
    methods = _options(content["methods"], "methods")
    models = _options(content.get("models") or RunConfig.model_fields["model"].default, "models")
    data = _options(content.get("data") or RunConfig.model_fields["data"].default, "data")
    settings = content.get("settings") or {}
    _check_settings(settings, "settings")
    for kind, known in (("methods", _METHODS), ("data", DATA_NAMES)):
        for name in {"methods": methods, "data": data}[kind]:
            if name not in known:
                raise ValueError(f"{kind}: unknown {short(name)}{nearest(name, known)}")
    methods = _by_one_name(methods)
    for method, own in methods.items():
        _check_own(method, own)
    grids = [
        (base | {"data": each_data, "model": model})
        for each_data, base_data in data.items()
        for model, base_model in models.items()
        for base in [_merged(settings, (f"data: {each_data}", base_data), (f"models: {model}", base_model))]
    ]
    own_points = sum(_points(own) for own in methods.values())
    count = sum(map(_points, grids)) * own_points * len(seeds)
    if count > MOST_RUNS:
        raise ValueError(
            f"this is a grid of {count:,} runs; {MOST_RUNS:,} are the most. Make several studies."
        )
    comparisons: dict[str, tuple[RunConfig, list[dict[str, Any]]]] = {}
    for shared in itertools.chain.from_iterable(map(_product, grids)):
        comparison = normalised(make_config({**shared, "method": "standard", "seed": 0}))
        comparisons.setdefault(run_key(comparison), (comparison, []))[1].append(shared)
    runs = tuple(
        Wanted(config, comparison)
        for comparison, shared in comparisons.values()
        for config in _runs(shared, methods, seeds)
    )
    every = [each.config for each in runs]
    check_used(settings, every, "settings: {!r}".format)
    for kind, options in (("models", models), ("data", data)):
        for name, own in options.items():
            theirs = [each for each in every if name in (each.model, each.data)]
            check_used(own, theirs, f"{kind}: {name}: {{!r}}".format)
    return runs


def _runs(shared: list[dict[str, Any]], methods: _Options, seeds: list[int]) -> Iterator[RunConfig]:
    """The runs of one comparison, each once: settings that a method does not use make no further run."""
    variants = [
        {**each, **own, "method": method}
        for method, options in methods.items()
        for each in shared
        for own in _product(options)
    ]
    seen = set()
    for seed in seeds:
        for variant in variants:
            config = normalised(make_config({**variant, "seed": seed}))
            key = run_key(config)
            if key not in seen:
                seen.add(key)
                yield config


def _options(value: object, where: str) -> _Options:
    """Names, a list of names, or names with settings of their own, as {name: settings}."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        if not all(isinstance(name, str) for name in value):
            raise ValueError(f"{where} takes names, such as [a, b], got {short(value)}.")
        twice = [name for name, times in Counter(value).items() if times > 1]
        if twice:
            raise ValueError(f"{where} names {line(', '.join(twice))} twice.")
        value = dict.fromkeys(value)
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError(
            f"{where} takes a name, a list of names, or names with settings, got {short(value)}."
        )
    if not value:
        raise ValueError(f"{where} is empty: name one at least.")
    options = {name: {} if settings is None else settings for name, settings in value.items()}
    for name, settings in options.items():
        _check_settings(settings, f"{where}: {line(name, 80)}")
    return options


def _by_one_name(methods: _Options) -> _Options:
    named: _Options = {}
    for method, options in methods.items():
        name = METHOD_ALIASES.get(method, method)
        if name in named:
            raise ValueError(f"methods names {name} twice: {method} is another name of it.")
        named[name] = options
    return named


def _check_settings(settings: object, where: str) -> None:
    if not isinstance(settings, dict):
        raise ValueError(f"{where} takes settings, such as {{epochs: 30}}, got {short(settings)}.")
    for key, value in settings.items():
        if key in _ELSEWHERE:
            raise ValueError(
                f"{where}: {key!r} has its place at the top of the file, as {_ELSEWHERE[key]!r}."
            )
        if key not in _SHARED:
            raise ValueError(f"{where}: unknown setting {short(key)}{nearest(str(key), _SHARED)}")
        values = _values(key, value)
        if key in WHERE and isinstance(value, list):
            raise ValueError(f"{where}: {key} only says where a run is trained, so it cannot vary.")
        if not values:
            raise ValueError(f"{where}: {key} is an empty list: give it a value, or leave it out.")
        if len(values) > MOST_RUNS:
            raise ValueError(f"{where}: {key} has {len(values):,} values; {MOST_RUNS:,} are the most.")
        # 1, 1.0 and True are equal in Python, and are different values of a setting.
        known = set()
        for each in values:
            if (written := repr(each)) in known:
                raise ValueError(f"{where}: {key} has {short(each)} twice.")
            known.add(written)


def _check_own(method: str, own: Mapping[str, Any]) -> None:
    allowed = own_settings(method)
    for key in own:
        if key not in allowed:
            others = unjoined(other for other, theirs in METHOD_SETTINGS.items() if key in theirs)
            raise ValueError(
                f"methods: {method}: {short(key)} "
                + (
                    f"belongs to {', '.join(others)}, and {method} would ignore it"
                    if others
                    else "must be the same for all methods of a comparison: write it under settings"
                )
                + f". Settings that {method} may have for itself: {', '.join(sorted(allowed))}."
            )


def _merged(shared: Mapping[str, Any], *parts: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
    (one, first), (other, second) = parts
    for key in first.keys() & second.keys():
        raise ValueError(f"{key!r} is set under {one} and under {other}: say it once.")
    return {**shared, **first, **second}


def _values(key: str, value: object) -> list[Any]:
    """The values of a setting: the items of a list, unless the setting is a list itself."""
    if not isinstance(value, list):
        return [value]
    one_value = key == "exclude" and not any(isinstance(each, list) for each in value)
    return [value] if one_value else value


def _points(settings: Mapping[str, Any]) -> int:
    return math.prod(len(_values(key, value)) for key, value in settings.items())


def _product(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the values of ``settings``."""
    axes = [_values(key, value) for key, value in settings.items()]
    for values in itertools.product(*axes):
        yield dict(zip(settings, values, strict=True))
