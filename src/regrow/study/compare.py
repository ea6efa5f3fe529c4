"""Paired statistics over seeds: what a method changes, how sure that is, and what it costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from regrow.study.records import RunRecord

_REPR = frozenset(
    {"fraction", "criterion", "consumers", "scope", "floor", "exclude", "skip_first", "compact"}
)
# The settings a method brings with it: methods may differ in these. The lengths of the cycle are not among
# them: the learning rate of every method, standard training too, follows them.
METHOD_SETTINGS: Mapping[str, frozenset[str]] = {
    "standard": frozenset(),
    "repr": _REPR,
    "bridgeout": frozenset({"p", "q", "reestimate"}),
    "targeted-bridgeout": frozenset({"p", "q", "target_fraction", "reestimate"}),
    "dropout": frozenset({"p"}),
    "targeted-dropout": frozenset({"p", "target_fraction"}),
}
# Every method regularises by weight decay too, and standard training by nothing else: a fair comparison
# gives each the strength that suits it, and the report shows it.
STRENGTHS = frozenset({"weight_decay"})
_LABELS = {
    "standard": "Standard training",
    "repr": "RePr",
    "bridgeout": "Bridgeout",
    "targeted-bridgeout": "Targeted Bridgeout",
    "dropout": "Dropout",
    "targeted-dropout": "Targeted dropout",
}
_MISSING = object()


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (ddof 1) over seeds; no deviation for a single seed."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Paired:
    """Differences other − baseline over the seeds both have, with a 95 % t interval of their mean.

    ``low`` and ``high`` are None for a single seed.
    """

    differences: Mapping[int, float]
    mean: float
    low: float | None
    high: float | None

    @property
    def n(self) -> int:
        return len(self.differences)

    @property
    def gains(self) -> int:
        """The number of seeds with a difference above 0."""
        return sum(difference > 0 for difference in self.differences.values())

    @property
    def verdict(self) -> str:
        """ "gain" or "loss" when the whole interval is on that side of 0, else "no gain shown"."""
        if self.low is not None and self.low > 0:
            return "gain"
        if self.high is not None and self.high < 0:
            return "loss"
        return "no gain shown"


@dataclass(frozen=True)
class MethodSummary:
    """One method over its finished runs.

    Accuracies are fractions, as in the records; ``difference`` is in percentage points of test accuracy,
    and None for the baseline itself or without a shared seed; ``seconds`` is training time;
    ``time_ratio`` the median over shared seeds of training time over the baseline's.
    """

    method: str
    baseline: str
    seeds: tuple[int, ...]
    test_accuracy: Spread
    validation_accuracy: Spread
    difference: Paired | None
    seconds: Spread
    time_ratio: float | None

    @property
    def n(self) -> int:
        return len(self.seeds)

    @property
    def verdict(self) -> str:
        if self.method == self.baseline:
            return "baseline"
        return "nothing to pair with" if self.difference is None else self.difference.verdict


def paired(baseline: Mapping[int, float], other: Mapping[int, float]) -> Paired:
    """Compare two {seed: value} over the seeds both have.

    Raises:
        ValueError: they share no seed, or a value is NaN or infinite.
    """
    seeds = sorted(baseline.keys() & other.keys())
    if not seeds:
        raise ValueError(
            f"no seed is in both: {sorted(baseline)} and {sorted(other)}. Run both with the same seeds."
        )
    differences = {seed: other[seed] - baseline[seed] for seed in seeds}
    if not all(math.isfinite(difference) for difference in differences.values()):
        raise ValueError(f"values to compare must be finite, got differences {differences}.")
    over_seeds = spread(list(differences.values()))
    if over_seeds.deviation is None:
        return Paired(differences, over_seeds.mean, None, None)
    from scipy.special import stdtrit  # scipy.stats.t.ppf, at a quarter of its import time

    n = len(seeds)
    half = float(stdtrit(n - 1, 0.975)) * over_seeds.deviation / math.sqrt(n)
    return Paired(differences, over_seeds.mean, over_seeds.mean - half, over_seeds.mean + half)


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation (ddof 1) of one or more values."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def check_comparable(runs: Sequence[RunRecord]) -> None:
    """Raise ``ValueError`` when a difference between ``runs`` would not be the methods'.

    Runs of one method may differ in the seed only; runs of two methods also in ``METHOD_SETTINGS`` and
    ``STRENGTHS``. A method may have each seed once.
    """
    first_of: dict[str, RunRecord] = {}
    seen: dict[tuple[str, int], RunRecord] = {}
    for run in runs:
        twin = seen.setdefault((run.method, run.seed), run)
        if twin is not run:
            raise ValueError(
                f"{twin.folder} and {run.folder} are both {run.method!r} with seed {run.seed}: leave one out."
            )
        first = first_of.setdefault(run.method, run)
        _check_same(first, run, besides={"seed"})
        own = METHOD_SETTINGS.values()
        _check_same(runs[0], run, besides={"seed", "method"}.union(STRENGTHS, *own))


def summarise(runs: Sequence[RunRecord], baseline: str = "standard") -> list[MethodSummary]:
    """Each method over its finished runs, the baseline first; unfinished runs are left out.

    Raises:
        ValueError: no run is finished, or the runs are not comparable (see :func:`check_comparable`).
    """
    finished = [run for run in runs if run.result is not None]
    if not finished:
        raise ValueError(
            f"none of the {len(runs)} runs is finished (has a result.json): there is nothing to compare yet."
        )
    check_comparable(finished)
    # A stable sort: the baseline leads, the others stay in the order given.
    methods = sorted(dict.fromkeys(run.method for run in finished), key=lambda method: method != baseline)
    reference = _results(finished, baseline)
    return [_summary(method, baseline, _results(finished, method), reference) for method in methods]


def label(method: str) -> str:
    """The name of ``method`` as people write it."""
    return _LABELS.get(method, method)


def mention(method: str) -> str:
    """The name of ``method`` inside a sentence."""
    return "standard training" if method == "standard" else label(method)


def headline(summaries: Sequence[MethodSummary]) -> str:
    """What was found: one line of plain sentences per method that is compared with the baseline.

    Without such a method, one line per method with its accuracy.
    """
    compared = [_comparison(each, each.difference) for each in summaries if each.difference is not None]
    if compared:
        return "\n".join(compared)
    lines = [
        f"{label(summary.method)}: {percent(summary.test_accuracy)} test accuracy "
        f"({_seeds(summary.n)}), with no run of another method to compare with."
        for summary in summaries
    ]
    return "\n".join(lines)


def table(summaries: Sequence[MethodSummary]) -> Table:
    """The methods as a table for the terminal, 80 columns wide at most with the usual names."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("method", overflow="fold")
    for column in ("n", "test accuracy", "points [95 % interval]", "time", "×"):
        shown.add_column(column, justify="right", no_wrap=True)
    for summary in summaries:
        difference = summary.difference
        cells = [
            label(summary.method),
            str(summary.n),
            percent(summary.test_accuracy),
            summary.verdict if difference is None else f"{signed(difference.mean)} {interval(difference)}",
            duration(summary.seconds),
            "" if summary.time_ratio is None else f"{summary.time_ratio:.2f}",
        ]
        # Text, not str: a method's name is not markup.
        shown.add_row(*map(Text, cells))
    return shown


def percent(accuracy: Spread) -> str:
    """A fraction as "88.10 ± 0.42 %"; without ± for a single seed."""
    tail = "" if accuracy.deviation is None else f" ± {100 * accuracy.deviation:.2f}"
    return f"{100 * accuracy.mean:.2f}{tail} %"


def signed(value: float, places: int = 2) -> str:
    """A number with its sign, a true minus sign, and no minus before zero."""
    return f"{round(value, places) + 0.0:+.{places}f}".replace("-", "−")


def interval(difference: Paired, places: int = 2) -> str:
    """The interval as "[−0.30, +2.70]", or nothing for a single seed."""
    if difference.low is None or difference.high is None:
        return ""
    return f"[{signed(difference.low, places)}, {signed(difference.high, places)}]"


def duration(seconds: Spread) -> str:
    """Time in the unit that suits its size, as "12.1 ± 0.3 s", "4.2 min" or "5.0 h"."""
    size, unit = (1, "s") if seconds.mean < 120 else (60, "min") if seconds.mean < 7200 else (3600, "h")
    tail = "" if seconds.deviation is None else f" ± {seconds.deviation / size:.1f}"
    return f"{seconds.mean / size:.1f}{tail} {unit}"


def _summary(
    method: str,
    baseline: str,
    results: Mapping[int, Mapping[str, Any]],
    reference: Mapping[int, Mapping[str, Any]],
) -> MethodSummary:
    shared = [] if method == baseline else sorted(results.keys() & reference.keys())
    ratios = [
        results[seed]["train_seconds"] / reference[seed]["train_seconds"]
        for seed in shared
        if reference[seed]["train_seconds"] > 0
    ]
    return MethodSummary(
        method=method,
        baseline=baseline,
        seeds=tuple(sorted(results)),
        test_accuracy=spread([result["test_accuracy"] for result in results.values()]),
        validation_accuracy=spread([result["validation_accuracy"] for result in results.values()]),
        difference=paired(_points(reference), _points(results)) if shared else None,
        seconds=spread([result["train_seconds"] for result in results.values()]),
        time_ratio=statistics.median(ratios) if ratios else None,
    )


def _results(runs: Sequence[RunRecord], method: str) -> dict[int, dict[str, Any]]:
    return {run.seed: run.result for run in runs if run.method == method and run.result is not None}


def _points(results: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
    return {seed: 100 * result["test_accuracy"] for seed, result in results.items()}


def _check_same(one: RunRecord, other: RunRecord, besides: set[str]) -> None:
    keys = [key for key in (one.config | other.config) if key not in besides]
    differing = [
        f"{key} is {one.config.get(key, 'not set')!r} and {other.config.get(key, 'not set')!r}"
        for key in keys
        if one.config.get(key, _MISSING) != other.config.get(key, _MISSING)
    ]
    if differing:
        raise ValueError(
            f"{one.folder} and {other.folder} cannot be compared: {'; '.join(differing)}. Compare runs that "
            f"differ in {'the seed' if 'method' not in besides else 'method and seed'} only."
        )


def _comparison(summary: MethodSummary, difference: Paired) -> str:
    values = [value for value in (difference.mean, difference.low, difference.high) if value is not None]
    # One decimal, unless that turns the sign the verdict rests on into a zero.
    places = next((p for p in (1, 2) if all(value == 0 or round(value, p) != 0 for value in values)), 3)
    if difference.low is None or difference.high is None:
        certainty = f"{_seeds(difference.n)}, too few for an interval"
    else:
        certainty = (
            f"95 % interval {signed(difference.low, places)} to {signed(difference.high, places)}, "
            f"{_seeds(difference.n)}"
        )
    relation = "over" if difference.mean >= 0 else "against"
    verdict = {"gain": "a gain", "loss": "a loss"}.get(difference.verdict, difference.verdict)
    cost = "" if summary.time_ratio is None else f" It took {summary.time_ratio:.2f} × the training time."
    return (
        f"{label(summary.method)}: {signed(difference.mean, places)} points test accuracy {relation} "
        f"{mention(summary.baseline)} ({certainty}): {verdict}.{cost}"
    )


def _seeds(n: int) -> str:
    return f"n = {n} seed{'' if n == 1 else 's'}"
