"""Accuracy–pruned curves over seeds: means, areas and paired margins, from records alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.study.compare import group_of
from regrow.study.paired import Paired, paired, spread
from regrow.study.records import RunRecord, curve_paths, read_curve, weights_hash
from regrow.study.words import interval, label, signed

if TYPE_CHECKING:
    from rich.table import Table

# The order of the paper and of regrow.compensation.compensate.READINGS, without importing torch.
READINGS = ("zeroed", "removed", "compensated")
_HALF = 0.5
_COLUMNS = 10
# A curve record with the method, or the variant, and the seed of its run.
_Record = tuple[str, int, dict[str, Any]]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error (ddof 1); no error for a single seed."""

    mean: float
    error: float | None


@dataclass(frozen=True)
class Curve:
    """One method in one reading: the accuracy (0 to 1) of each seed at each fraction, ascending."""

    method: str
    reading: str
    fractions: tuple[float, ...]
    accuracies: dict[int, tuple[float, ...]]

    @property
    def n(self) -> int:
        return len(self.accuracies)

    @property
    def points(self) -> tuple[Estimate, ...]:
        """At each fraction, over the seeds."""
        return tuple(estimate(values) for values in zip(*self.accuracies.values(), strict=True))

    @property
    def half_means(self) -> dict[int, float] | None:
        """Each seed's mean accuracy over the fractions from 0 to 50 %; None if 0 or 50 % was not measured.

        It is the plain mean of the points, as in the published margins, so their spacing counts.
        """
        if not {0, _HALF} <= set(self.fractions):
            return None
        upto = self.fractions.index(_HALF) + 1
        return {seed: sum(values[:upto]) / upto for seed, values in self.accuracies.items()}

    @property
    def areas(self) -> dict[int, float] | None:
        """Each seed's area under the whole curve by the trapezoid rule; None for a single point.

        The unit is accuracy times fraction: a perfect curve from 0 to 0.9 has 0.9.
        """
        if len(self.fractions) < 2:
            return None
        steps = [(right - left) / 2 for left, right in pairwise(self.fractions)]
        return {
            seed: sum(step * (a + b) for step, (a, b) in zip(steps, pairwise(values), strict=True))
            for seed, values in self.accuracies.items()
        }

    @property
    def mean_0_50(self) -> Estimate | None:
        return None if self.half_means is None else estimate(self.half_means.values())

    @property
    def area(self) -> Estimate | None:
        return None if self.areas is None else estimate(self.areas.values())


@dataclass(frozen=True)
class CurveSet:
    """The curves of runs measured in the same way, by reading and method, the baseline first."""

    split: str
    criterion: str
    scope: str
    baseline: str
    chance: float
    curves: tuple[Curve, ...]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(curve.method for curve in self.curves))

    @property
    def readings(self) -> list[str]:
        return list(dict.fromkeys(curve.reading for curve in self.curves))

    def curve(self, method: str, reading: str) -> Curve | None:
        return next((c for c in self.curves if (c.method, c.reading) == (method, reading)), None)

    def margin(self, method: str, reading: str, over: str | None = None) -> Paired | None:
        """The mean over 0–50 % of ``method`` minus that of ``over`` (the baseline), in percentage points.

        It is paired over the seeds that both have; None if there are none, or for a method with itself.
        """
        mine, others = self.curve(method, reading), self.curve(over or self.baseline, reading)
        if mine is None or others is None or mine is others:
            return None
        if mine.half_means is None or others.half_means is None:
            return None
        if not mine.half_means.keys() & others.half_means.keys():
            return None
        return paired(_points(others.half_means), _points(mine.half_means))


@dataclass(frozen=True)
class Measured:
    """The curve records of some runs.

    Attributes:
        records: (run, record) for the records of the weights that the run has now.
        outdated: the runs with records of other weights, because they were trained again since.
        broken: {file that cannot be read: why}.
    """

    records: list[tuple[RunRecord, dict[str, Any]]]
    outdated: list[RunRecord]
    broken: dict[Path, str]


def read_measured(runs: Sequence[RunRecord]) -> Measured:
    """Read every curve record in the folders of ``runs``; a malformed one is listed, and raises nothing."""
    measured = Measured([], [], {})
    for run in runs:
        found = []
        for path in curve_paths(run.folder):
            try:
                found.append(read_curve(path))
            except ValueError as error:
                measured.broken[path] = str(error)
        weights = weights_hash(run.folder) if found else None
        # Weights that were deleted to save room count as unchanged.
        current = [record for record in found if weights in (None, record["weights"])]
        measured.records.extend((run, record) for record in current)
        if len(current) < len(found):
            measured.outdated.append(run)
    return measured


def curve_sets(
    runs: Sequence[RunRecord],
    *,
    baseline: str = "standard",
    variants: Mapping[Path, str] | None = None,
    fractions: Collection[float] | None = None,
    readings: Collection[str] | None = None,
) -> list[CurveSet]:
    """The curve records in the folders of ``runs``, grouped by split, criterion and scope.

    This is :func:`sets_of` for all records in the folders.

    Raises:
        ValueError: a record that is malformed.
    """
    measured = read_measured(runs)
    if measured.broken:
        raise ValueError(next(iter(measured.broken.values())))
    return sets_of(measured, baseline=baseline, variants=variants, fractions=fractions, readings=readings)


def sets_of(
    measured: Measured,
    *,
    baseline: str = "standard",
    variants: Mapping[Path, str] | None = None,
    fractions: Collection[float] | None = None,
    readings: Collection[str] | None = None,
) -> list[CurveSet]:
    """The records of ``measured``, grouped by split, criterion and scope.

    A curve has the fractions that all runs of its reading have, so that means compare like with like.

    Args:
        measured: of comparable runs (see ``compare.check_comparable``).
        baseline: the method that margins are taken over; the first method if no run has it.
        variants: {run's folder: name of its variant}. Default: the method.
        fractions, readings: the ones to keep. Default: all.
    """
    found: dict[tuple[str, str, str], list[_Record]] = {}
    for run, record in measured.records:
        key = (record["split"], record["criterion"], record["scope"])
        found.setdefault(key, []).append((group_of(run, variants), run.seed, record))
    sets = [_curve_set(key, each, baseline, fractions, readings) for key, each in sorted(found.items())]
    return [each for each in sets if each.curves]


def estimate(values: Collection[float]) -> Estimate:
    """Mean and standard error (ddof 1) of one or more values."""
    over_seeds = spread(list(values))
    deviation = over_seeds.deviation
    return Estimate(over_seeds.mean, None if deviation is None else deviation / math.sqrt(len(values)))


def curve_rows(curves: CurveSet) -> list[dict[str, Any]]:
    """One JSON-able row per reading and method; accuracies are fractions, errors standard errors."""
    return [
        {
            "reading": each.reading,
            "method": each.method,
            "n": each.n,
            "seeds": sorted(each.accuracies),
            "fractions": list(each.fractions),
            "accuracy": [point.mean for point in each.points],
            "accuracy_error": [point.error for point in each.points],
            "mean_0_50": each.mean_0_50.mean if each.mean_0_50 else None,
            "mean_0_50_error": each.mean_0_50.error if each.mean_0_50 else None,
            "area": each.area.mean if each.area else None,
            "area_error": each.area.error if each.area else None,
            "by_seed": {str(seed): list(values) for seed, values in sorted(each.accuracies.items())},
        }
        for each in curves.curves
    ]


def margin_rows(curves: CurveSet) -> list[dict[str, Any]]:
    """One JSON-able row per reading and pair of methods: the paired margin in points of ``mean_0_50``."""
    return [
        {
            "reading": reading,
            "method": method,
            "over": over,
            "points": margin.mean,
            "low": margin.low,
            "high": margin.high,
            "pairs": margin.n,
            "gains": margin.gains,
            "verdict": margin.verdict,
        }
        for reading in curves.readings
        for method in curves.methods
        for over in curves.methods
        if (margin := curves.margin(method, reading, over)) is not None
    ]


def to_dict(curves: CurveSet) -> dict[str, Any]:
    """All numbers of ``curves``, JSON-able."""
    return {
        "split": curves.split,
        "criterion": curves.criterion,
        "scope": curves.scope,
        "baseline": curves.baseline,
        "chance": curves.chance,
        "curves": curve_rows(curves),
        "margins": margin_rows(curves),
    }


def tables(curves: CurveSet) -> list[Table]:
    """Tables for the terminal: accuracy by fraction, and one number for each curve with its margin.

    80 columns wide at most with the usual names. Of more than ten fractions every second (third, …) is shown.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    by_fraction = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    by_fraction.add_column("cut", overflow="fold")
    for fraction in _shown(curves.curves[0].fractions):
        by_fraction.add_column(f"{100 * fraction:.3g} %", justify="right", no_wrap=True)
    summary = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    summary.add_column("", overflow="fold")
    summary.add_column("n", justify="right")
    summary.add_column("mean, 0–50 %", justify="right", no_wrap=True)
    summary.add_column("area", justify="right", no_wrap=True)
    several = len(curves.methods) > 1
    if several:
        summary.add_column(f"points over {label(curves.baseline)}", justify="right")
    for reading in curves.readings:
        for table in (by_fraction, summary):
            table.add_row(Text(reading, style="bold"))
        for each in curves.curves:
            if each.reading != reading:
                continue
            name = f" {label(each.method)}"
            numbers = dict(zip(each.fractions, each.points, strict=True))
            shown = [numbers.get(fraction) for fraction in _shown(curves.curves[0].fractions)]
            accuracies = ["" if point is None else f"{100 * point.mean:.1f}" for point in shown]
            by_fraction.add_row(*map(Text, [name, *accuracies]))
            margin = curves.margin(each.method, reading)
            points = "" if margin is None else f"{signed(margin.mean, 1)} {interval(margin, 1)}".strip()
            cells = [name, str(each.n), percent(each.mean_0_50), area(each.area)]
            summary.add_row(*map(Text, [*cells, points] if several else cells))
    return [by_fraction, summary]


def heading(curves: CurveSet) -> str:
    """A line that says what the numbers of ``curves`` are."""
    which = "in each layer" if curves.scope == "layer" else "over the whole network"
    return f"{curves.split} accuracy, %, with the filters of lowest {curves.criterion} {which} cut"


def percent(value: Estimate | None) -> str:
    """A fraction as "87.83 ± 0.42 %"; without ± for a single seed, a dash for None."""
    if value is None:
        return "—"
    return f"{100 * value.mean:.2f}{'' if value.error is None else f' ± {100 * value.error:.2f}'} %"


def area(value: Estimate | None) -> str:
    """As "0.512 ± 0.004"."""
    if value is None:
        return "—"
    return f"{value.mean:.3f}{'' if value.error is None else f' ± {value.error:.3f}'}"


def _shown(fractions: Sequence[float]) -> Sequence[float]:
    return fractions[:: max(1, math.ceil(len(fractions) / _COLUMNS))]


def _points(means: dict[int, float]) -> dict[int, float]:
    return {seed: 100 * mean for seed, mean in means.items()}


def _curve_set(
    key: tuple[str, str, str],
    found: Sequence[_Record],
    baseline: str,
    fractions: Collection[float] | None,
    readings: Collection[str] | None,
) -> CurveSet:
    methods = list(dict.fromkeys(method for method, _, _ in found))
    baseline = baseline if baseline in methods else methods[0]
    methods.sort(key=lambda method: method != baseline)  # stable: the others stay in their order
    by_reading: dict[str, list[tuple[str, int, dict[float, float]]]] = {}
    for method, seed, record in found:
        for reading in dict.fromkeys(point["reading"] for point in record["points"]):
            values = {p["fraction"]: p["accuracy"] for p in record["points"] if p["reading"] == reading}
            if readings is None or reading in readings:
                by_reading.setdefault(reading, []).append((method, seed, values))
    curves = []
    for reading in sorted(by_reading, key=lambda name: (*READINGS, name).index(name)):
        shared = set.intersection(*(set(values) for _, _, values in by_reading[reading]))
        wanted = tuple(sorted(shared if fractions is None else shared & set(fractions)))
        for method in methods if wanted else []:
            accuracies = {
                seed: tuple(values[fraction] for fraction in wanted)
                for of_method, seed, values in by_reading[reading]
                if of_method == method
            }
            if accuracies:
                curves.append(Curve(method, reading, wanted, accuracies))
    split, criterion, scope = key
    return CurveSet(split, criterion, scope, baseline, 1 / found[0][2]["classes"], tuple(curves))
