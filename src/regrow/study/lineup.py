"""The order, names and colours of the runs in a report or figure, and its title and baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.study.config import RunConfig
from regrow.study.recorded import Recorded, find_recorded
from regrow.study.records import RunRecord
from regrow.study.regimes import described
from regrow.study.typed import Mistyped
from regrow.study.variants import fits, known_numbers, variant_names, variant_numbers
from regrow.study.words import label
from regrow.suggest import nearest


@dataclass(frozen=True)
class Lineup:
    """Runs as a report shows them.

    Attributes:
        runs: by method or variant, then seed.
        names: {run folder: name of its method or variant}.
        numbers: {name: its number among the variants of its method}, for its colour.
        baseline: the name that the others are compared with.
        title: of the report.
        left_out: {record of a comparison or study: why it cannot be read}.
    """

    runs: list[RunRecord]
    names: dict[Path, str]
    numbers: dict[str, int]
    baseline: str
    title: str
    left_out: dict[Path, str]


def line_up(runs: Sequence[RunRecord], baseline: str | None = None) -> Lineup:
    """Line ``runs`` up as the comparison or study that trained them has recorded it.

    Runs that no record names follow, by method and settings. So the result does not depend on the order of
    ``runs``, nor on the names of their folders.

    Args:
        runs: some of them finished.
        baseline: the method or variant that the others are compared with (default: the recorded one, else
            standard training, else the first).

    Raises:
        Mistyped: no finished run has the method or variant ``baseline``, or several variants do.
    """
    finished = [run for run in runs if run.result is not None]
    recorded, left_out = find_recorded(run.folder for run in finished)
    folders = {run.folder.resolve() for run in finished}
    # Two comparisons of a study may share a run.
    whole = [each for each in recorded if folders <= each.names.keys()]
    recorded = whole[:1] or recorded
    names = variant_names({run.folder: run.config for run in runs})
    if whole:
        names |= _recorded_names(finished, whole[0])
    settings = {names[run.folder]: run.config for run in runs}
    here = {folder.resolve(): name for folder, name in names.items()}
    numbers = variant_numbers(settings, known_numbers(recorded, here, settings))
    places = {run: place for place, run in enumerate(run for each in recorded for run in each.names)}
    first = dict.fromkeys(settings, len(places))
    for run in runs:
        name = names[run.folder]
        first[name] = min(first[name], places.get(run.folder.resolve(), len(places)))
    # Only the runs that no record names are sorted by what follows the place.
    order = {name: (first[name], settings[name]["method"], numbers[name], name) for name in settings}
    ordered = sorted(runs, key=lambda run: (order[names[run.folder]], run.seed, str(run.folder)))
    there = list(dict.fromkeys(names[run.folder] for run in ordered if run.result is not None))
    chosen = (
        _default(there, here, settings, recorded) if baseline is None else _find(baseline, there, settings)
    )
    return Lineup(ordered, names, numbers, chosen, _title(finished, recorded), left_out)


def title_of(settings: Mapping[str, Any]) -> str:
    """The title of a report on runs with ``settings``: ``"convnet on digits"``."""
    names = ("model", "regime", "tasks", "data", "second_data")
    model, regime, tasks, data, second = (
        settings.get(name, RunConfig.model_fields[name].default) for name in names
    )
    return f"{model} on {described(regime, tasks, data=data, second_data=second)}"


def _recorded_names(runs: Sequence[RunRecord], recorded: Recorded) -> dict[Path, str]:
    """The names of ``runs`` in ``recorded``; none if one of them was trained again with other settings."""
    names = {run.folder: recorded.names[run.folder.resolve()] for run in runs}
    return names if all(fits(names[run.folder], run.config) for run in runs) else {}


def _default(
    there: Sequence[str],
    here: Mapping[Path, str],
    settings: Mapping[str, Mapping[str, Any]],
    recorded: Sequence[Recorded],
) -> str:
    for each in recorded:
        for folder, name in each.names.items():
            if name == each.baseline and here.get(folder) in there:
                return here[folder]
    if not there or any(settings[name]["method"] == "standard" for name in there):
        return "standard"
    return there[0]


def _find(baseline: str, there: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> str:
    """The name in ``there`` that a person means by ``baseline``: itself, its label or its method."""
    if baseline in there:
        return baseline
    meant = [name for name in there if baseline in (label(name), settings[name]["method"])]
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise Mistyped(
            f"{baseline!r} has {len(meant)} variants here: say which is the baseline, one of "
            f"{', '.join(map(repr, meant))}."
        )
    if baseline in settings:
        raise Mistyped(f"{baseline!r} has no finished run, so nothing can be compared with it.")
    raise Mistyped(f"no run here is of the baseline {baseline!r}{nearest(baseline, there)}")


def _title(finished: Sequence[RunRecord], recorded: Sequence[Recorded]) -> str:
    titles = {each.title for each in recorded}
    if len(titles) == 1 and (title := titles.pop()) is not None:
        return title
    return title_of(finished[0].config if finished else {})
