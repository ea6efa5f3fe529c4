"""Compare methods over seeds: how much each changes, how sure that is, and what it costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.study.compute import EqualCompute, Unit, equal_compute
from regrow.study.names import WHERE
from regrow.study.paired import (
    Paired,
    Spread,
    bootstrap_interval,
    holm,
    paired,
    seeds_needed,
    sign_test,
    spread,
    verdict,
)
from regrow.study.sequences import TaskPoint, compared_accuracy, measure, task_points, tasks_of
from regrow.study.words import duration, interval, label, mention, p_value, percent, signed

if TYPE_CHECKING:
    from rich.table import Table

    from regrow.study.records import RunRecord

_RESTART = frozenset(
    {"fraction", "criterion", "consumers", "rows", "scope", "floor", "exclude", "skip_first"}
)
_REPR = _RESTART | {"compact"}
_DISTILLATION = frozenset({"teacher", "temperature", "distillation_weight"})
_BRIDGEOUT = frozenset({"p", "q", "reestimate"})
_ORTHOGONAL, _GENERATIONS = frozenset({"orthogonal"}), frozenset({"generations"})
# The settings that belong to one method, in which methods may differ. The lengths of the cycle are not among
# them: the learning rate of every method, standard training too, follows them.
METHOD_SETTINGS: Mapping[str, frozenset[str]] = {
    "standard": frozenset(),
    "repr": _REPR,
    "bridgeout": _BRIDGEOUT,
    "targeted-bridgeout": _BRIDGEOUT | {"target_fraction"},
    "dropout": frozenset({"p"}),
    "targeted-dropout": frozenset({"p", "target_fraction"}),
    "orthogonal-loss": _ORTHOGONAL,
    "distillation": _DISTILLATION,
    "dsd": frozenset({"fraction"}),
    "ban": _GENERATIONS | {"temperature", "distillation_weight"},
    "shrink-and-perturb": _GENERATIONS | {"shrink", "perturb"},
    "continual-backprop": frozenset({"replacement_rate", "maturity"}),
    "later-layer-forgetting": _GENERATIONS | {"last"},
    "knowledge-evolution": _GENERATIONS | {"fixed"},
    "restart": _GENERATIONS | _RESTART,
    "new-head": _GENERATIONS,
    "last-layers": _GENERATIONS | {"last"},
    "from-scratch": _GENERATIONS,
    "redo": _GENERATIONS | {"dormant"},
    "shrink-and-perturb+new-head": _GENERATIONS | {"shrink", "perturb"},
    "continual-backprop+new-head": _GENERATIONS | {"replacement_rate", "maturity"},
    "restart+new-head": _GENERATIONS | _RESTART,
    "restart+last-layers": _GENERATIONS | _RESTART | {"last"},
    "restart+shrink-and-perturb+new-head": _GENERATIONS | _RESTART | {"shrink", "perturb"},
    "redo+new-head": _GENERATIONS | {"dormant"},
    "repr+orthogonal-loss": _REPR | _ORTHOGONAL,
    "repr+distillation": _REPR | _DISTILLATION,
    "repr+orthogonal-loss+distillation": _REPR | _ORTHOGONAL | _DISTILLATION,
    "repr+bridgeout": _REPR | _BRIDGEOUT,
}
# Every method regularises by weight decay too, and standard training by nothing else: a fair comparison
# gives each the strength that suits it, and the report shows it.
STRENGTHS = frozenset({"weight_decay"})
_MISSING = object()
# More tasks than these do not fit into a terminal.
_TASKS = 8


@dataclass(frozen=True)
class MethodSummary:
    """One method, or one variant of it, over its finished runs.

    Accuracies are fractions, as in the records; differences are in percentage points. Paired values are
    None for the baseline itself, and for a method that shares no seed with it.

    Attributes:
        method: the name of the group of runs: the method, or the variant's name.
        baseline: the name of the group that it is compared with.
        test_accuracy: after the last epoch.
        difference: the paired difference in ``accuracy``.
        bootstrap: 95 % bootstrap interval of the mean of ``difference``; None for fewer than three seeds.
        adjusted_p: p value of ``difference``, corrected by Holm's method over all comparisons.
        compared: the number of methods that are compared with the baseline.
        sign_p: two-sided p value of the sign test of ``difference``.
        needed: as :func:`seeds_needed` of ``difference``.
        seconds, time_ratio: training time, and the median over shared seeds of its ratio to the baseline's.
        flops, flops_ratio: the same for training FLOPs; None if the record of a run lacks them.
        unit: the unit of equal compute; None if compute could not be compared.
        at_equal_compute: best validation accuracy within the compute of the cheapest run of the seed.
        difference_at_equal_compute: the paired difference in that accuracy. These three are None for runs
            with several tasks, because they are not validated by the same pictures in all epochs.
        after_switch: of runs with several tasks, the mean test accuracy of each over all tasks but the first.
        tasks: each task of runs with several.
        best_test_accuracy: of the weights of the epoch that validated best; None if a run's record lacks it,
            and for runs with several tasks.
        best_epoch: its number.
        difference_at_best: the paired difference in ``best_test_accuracy``.
    """

    method: str
    baseline: str
    seeds: tuple[int, ...]
    test_accuracy: Spread
    validation_accuracy: Spread
    seconds: Spread
    difference: Paired | None = None
    bootstrap: tuple[float, float] | None = None
    adjusted_p: float | None = None
    compared: int = 1
    sign_p: float | None = None
    needed: int | None = None
    time_ratio: float | None = None
    flops: Spread | None = None
    flops_ratio: float | None = None
    unit: Unit | None = None
    at_equal_compute: Spread | None = None
    difference_at_equal_compute: Paired | None = None
    best_test_accuracy: Spread | None = None
    best_epoch: Spread | None = None
    difference_at_best: Paired | None = None
    after_switch: Spread | None = None
    tasks: tuple[TaskPoint, ...] = ()

    @property
    def n(self) -> int:
        return len(self.seeds)

    @property
    def accuracy(self) -> Spread:
        """The accuracy that is compared: ``after_switch``, or for a single task ``test_accuracy``."""
        return self.after_switch or self.test_accuracy

    @property
    def measure(self) -> str:
        """What ``accuracy`` is: "test accuracy", or its mean over some tasks."""
        return measure(len(self.tasks) or 1)

    @property
    def verdict(self) -> str:
        """ "gain" or "loss" where ``adjusted_p`` is below 5 %, else "no gain shown"."""
        if self.method == self.baseline:
            return "baseline"
        if self.difference is None:
            return "nothing to pair with"
        return verdict(self.difference.mean, self.adjusted_p)


def check_comparable(runs: Sequence[RunRecord], variants: Mapping[Path, str] | None = None) -> None:
    """Raise ``ValueError`` if a difference between ``runs`` could have another cause than the methods.

    Runs of one method, or of one variant where ``variants`` names them, may differ in the seed only; other
    runs also in the method, ``METHOD_SETTINGS`` and ``STRENGTHS``. A method may have each seed only once.
    """
    first_of: dict[str, RunRecord] = {}
    seen: dict[tuple[str, int], RunRecord] = {}
    for name, of_name in _by_group(runs, variants).items():
        for run in of_name:
            twin = seen.setdefault((name, run.seed), run)
            if twin is not run:
                raise ValueError(
                    f"{twin.folder} and {run.folder} are both {name!r} with seed {run.seed}: leave one out."
                )
            _check_same(first_of.setdefault(name, run), run, besides={"seed"})
            own = METHOD_SETTINGS.values()
            _check_same(runs[0], run, besides={"seed", "method"}.union(STRENGTHS, *own))
    shown: dict[str, str] = {}
    for name in first_of:
        if shown.setdefault(label(name), name) != name:
            raise ValueError(f"two variants would both be shown as {label(name)!r}: rename one.")


def group_of(run: RunRecord, variants: Mapping[Path, str] | None = None) -> str:
    """The name that ``run`` is grouped and shown by: that of its folder in ``variants``, or its method."""
    return run.method if variants is None else variants.get(run.folder, run.method)


def summarise(
    runs: Sequence[RunRecord], baseline: str = "standard", variants: Mapping[Path, str] | None = None
) -> list[MethodSummary]:
    """Summarise each method over its finished runs, the baseline first; unfinished runs are ignored.

    Args:
        runs: the runs.
        baseline: the method, or the name of the variant, that the others are compared with.
        variants: {run's folder: name to group and show the run by}. Default: its method.

    Raises:
        ValueError: no run is finished, the runs are not comparable (see :func:`check_comparable`), or
            ``baseline`` is a method with several variants.
    """
    finished = [run for run in runs if run.result is not None]
    if not finished:
        raise ValueError(
            f"none of the {len(runs)} runs is finished (has a result.json): there is nothing to compare yet."
        )
    check_comparable(finished, variants)
    groups = {
        name: {run.seed: run for run in of_name} for name, of_name in _by_group(finished, variants).items()
    }
    baseline = _baseline(groups, baseline)
    # A stable sort: the baseline leads, the others stay in the order given.
    names = sorted(groups, key=lambda name: name != baseline)
    reference = groups.get(baseline, {})
    differences = {
        name: _difference(_points(reference), _points(groups[name])) if name != baseline else None
        for name in names
    }
    adjusted = holm([each.p if each else None for each in differences.values()])
    compared = sum(each is not None for each in differences.values())
    sequence = any(tasks_of(run.result or {}) > 1 for run in finished)
    equal = None if sequence else equal_compute(groups)
    return [
        _summary(name, baseline, groups, differences[name], p, compared, equal)
        for name, p in zip(names, adjusted, strict=True)
    ]


def headline(summaries: Sequence[MethodSummary]) -> str:
    """The findings: one line of plain sentences per method that is compared with the baseline.

    If no method is, one line per method with its accuracy.
    """
    compared = [_comparison(each, each.difference) for each in summaries if each.difference is not None]
    if compared:
        return "\n".join(compared)
    lines = [
        f"{label(summary.method)}: {percent(summary.accuracy)} {summary.measure} "
        f"({_seeds(summary.n)}), with no run of another method to compare with."
        for summary in summaries
    ]
    return "\n".join(lines)


def overview(summaries: Sequence[MethodSummary]) -> str:
    """One sentence that counts and names the methods that gain and lose; for more than a few methods."""
    compared = [each for each in summaries if each.difference is not None]
    found = []
    for which, one, several in (("gain", "gain", "gains"), ("loss", "loss", "losses")):
        names = [label(each.method) for each in compared if each.verdict == which]
        if names:
            found.append(f"{len(names)} {one if len(names) == 1 else several} ({', '.join(names)})")
    rest = sum(each.verdict == "no gain shown" for each in compared)
    if rest:
        found.append(f"no gain shown for {rest if found else 'any'}")
    baseline = mention(summaries[0].baseline)
    return f"{len(compared)} methods compared with {baseline} in {summaries[0].measure}: {', '.join(found)}."


def table(summaries: Sequence[MethodSummary]) -> Table:
    """The methods as a table for the terminal, 80 columns wide at most with the usual names."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("method", overflow="fold")
    sequence = summaries[0].measure != measure(1)
    accuracy = "after switches" if sequence else "test accuracy"
    for column in ("n", accuracy, "points [95 % interval]", "time", "ratio"):
        shown.add_column(column, justify="right", no_wrap=True)
    for summary in summaries:
        difference = summary.difference
        cells = [
            label(summary.method),
            str(summary.n),
            percent(summary.accuracy),
            summary.verdict if difference is None else f"{signed(difference.mean)} {interval(difference)}",
            duration(summary.seconds),
            "" if summary.time_ratio is None else f"{summary.time_ratio:.2f}",
        ]
        # Text, not str, so that a method's name is not read as markup.
        shown.add_row(*map(Text, cells))
    if sequence:
        shown.caption, shown.caption_justify = f"after switches: {summaries[0].measure}", "left"
    return shown


def best_table(summaries: Sequence[MethodSummary]) -> Table | None:
    """The methods at the epoch that validated best, for the terminal; None where no record has it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not any(each.best_test_accuracy for each in summaries):
        return None
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("best epoch by validation", overflow="fold")
    for column in ("n", "test accuracy", "points [95 % interval]", "epoch"):
        shown.add_column(column, justify="right", no_wrap=True)
    for summary in summaries:
        accuracy, epoch, difference = (
            summary.best_test_accuracy,
            summary.best_epoch,
            summary.difference_at_best,
        )
        cells = [
            label(summary.method),
            str(summary.n),
            "—" if accuracy is None else percent(accuracy),
            f"{signed(difference.mean)} {interval(difference)}"
            if difference
            else "baseline"
            if summary.method == summary.baseline
            else "—",
            "—" if epoch is None else f"{epoch.mean:.0f}",
        ]
        shown.add_row(*map(Text, cells))
    return shown


def task_table(summaries: Sequence[MethodSummary]) -> Table | None:
    """Test accuracy at the end of each task, and below it the points over the baseline; None without tasks.

    Of more than eight tasks eight are shown, from the first to the last.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    count = max((len(each.tasks) for each in summaries), default=0)
    if count < 2:
        return None
    which = sorted({round(place * (count - 1) / (_TASKS - 1)) for place in range(_TASKS)})
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("test accuracy, %", overflow="fold")
    for task in which:
        shown.add_column(f"task {task + 1}" if task == which[0] else str(task + 1), justify="right")
    for summary in summaries:
        points = [summary.tasks[task] if task < len(summary.tasks) else None for task in which]
        shown.add_row(
            Text(label(summary.method)), *(Text(_task_cell(point) if point else "") for point in points)
        )
    return shown


def _task_cell(point: TaskPoint) -> str:
    accuracy = f"{100 * point.accuracy.mean:.1f}"
    return accuracy if point.difference is None else f"{accuracy}\n{signed(point.difference.mean, 1)}"


def _by_group(runs: Sequence[RunRecord], variants: Mapping[Path, str] | None) -> dict[str, list[RunRecord]]:
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(group_of(run, variants), []).append(run)
    return groups


def _baseline(groups: Mapping[str, Mapping[int, RunRecord]], baseline: str) -> str:
    """The group called ``baseline``, or the only one of the method of that name."""
    if baseline in groups:
        return baseline
    of_method = [
        name for name, runs in groups.items() if any(run.method == baseline for run in runs.values())
    ]
    if len(of_method) > 1:
        raise ValueError(
            f"{baseline!r} has {len(of_method)} variants here: say which is the baseline, one of "
            f"{', '.join(map(repr, of_method))}."
        )
    return of_method[0] if of_method else baseline


def _summary(
    name: str,
    baseline: str,
    groups: Mapping[str, Mapping[int, RunRecord]],
    difference: Paired | None,
    adjusted_p: float | None,
    compared: int,
    equal: EqualCompute | None,
) -> MethodSummary:
    mine = {seed: run.result or {} for seed, run in groups[name].items()}
    reference = {seed: run.result or {} for seed, run in groups.get(baseline, {}).items()}
    points = [] if difference is None else list(difference.differences.values())
    has_interval = difference is not None and difference.low is not None
    flops = [result.get("train_flops") for result in mine.values()]
    reached = {} if equal is None else equal.accuracies[name]
    at_baseline = {} if equal is None else equal.accuracies.get(baseline, {})
    tasks = task_points(groups[name], None if name == baseline else groups.get(baseline))
    return MethodSummary(
        method=name,
        baseline=baseline,
        seeds=tuple(sorted(mine)),
        test_accuracy=spread([result["test_accuracy"] for result in mine.values()]),
        validation_accuracy=spread([result["validation_accuracy"] for result in mine.values()]),
        seconds=spread([result["train_seconds"] for result in mine.values()]),
        difference=difference,
        bootstrap=bootstrap_interval(points) if has_interval else None,
        adjusted_p=adjusted_p,
        compared=compared,
        sign_p=None if difference is None else sign_test(difference.gains, difference.losses),
        needed=seeds_needed(points) if has_interval else None,
        time_ratio=None if name == baseline else _ratio(mine, reference, "train_seconds"),
        flops=None if None in flops else spread([count for count in flops if count is not None]),
        flops_ratio=None if name == baseline else _ratio(mine, reference, "train_flops"),
        unit=None if equal is None else equal.unit,
        at_equal_compute=spread(list(reached.values())) if reached else None,
        difference_at_equal_compute=None
        if name == baseline
        else _difference(_hundredfold(at_baseline), _hundredfold(reached)),
        best_test_accuracy=None if tasks else _spread_of(mine, "best_test_accuracy"),
        best_epoch=None if tasks else _spread_of(mine, "best_epoch"),
        difference_at_best=None
        if name == baseline or tasks
        else _difference(_known(reference, "best_test_accuracy"), _known(mine, "best_test_accuracy")),
        after_switch=spread([compared_accuracy(result) for result in mine.values()]) if tasks else None,
        tasks=tasks,
    )


def _difference(baseline: Mapping[int, float], other: Mapping[int, float]) -> Paired | None:
    return paired(baseline, other) if baseline.keys() & other.keys() else None


def _ratio(
    mine: Mapping[int, Mapping[str, Any]], reference: Mapping[int, Mapping[str, Any]], key: str
) -> float | None:
    """The median over shared seeds of the ratio of ``key`` to the baseline's."""
    ratios = [
        mine[seed][key] / reference[seed][key]
        for seed in mine.keys() & reference.keys()
        if mine[seed].get(key) is not None and reference[seed].get(key)
    ]
    return statistics.median(ratios) if ratios else None


def _points(runs: Mapping[int, RunRecord]) -> dict[int, float]:
    return _hundredfold({seed: compared_accuracy(run.result) for seed, run in runs.items() if run.result})


def _known(runs: Mapping[int, Mapping[str, Any]], key: str) -> dict[int, float]:
    """``key`` in percentage points, of the runs whose record has it."""
    return _hundredfold({seed: result[key] for seed, result in runs.items() if result.get(key) is not None})


def _spread_of(runs: Mapping[int, Mapping[str, Any]], key: str) -> Spread | None:
    """Of ``key``; None if the record of a run lacks it."""
    values = [result.get(key) for result in runs.values()]
    return None if None in values else spread([value for value in values if value is not None])


def _hundredfold(fractions: Mapping[int, float]) -> dict[int, float]:
    return {seed: 100 * fraction for seed, fraction in fractions.items()}


def _check_same(one: RunRecord, other: RunRecord, besides: set[str]) -> None:
    settings = [key for key in (one.config | other.config) if key not in besides | WHERE | {"version"}]
    differing = [
        f"{key} is {_shown(one, key)} and {_shown(other, key)}"
        for key in settings
        if one.config.get(key, _MISSING) != other.config.get(key, _MISSING)
        and _setting(one, key) != _setting(other, key)
    ]
    if differing:
        raise ValueError(
            f"{one.folder} and {other.folder} cannot be compared: {'; '.join(differing)}. Compare runs that "
            f"differ in {'the seed' if 'method' not in besides else 'method and seed'} only."
        )


def _setting(run: RunRecord, key: str) -> object:
    """The setting of ``run``, or its default if ``run`` was trained before the setting existed."""
    if key in run.config:
        return run.config[key]
    from regrow.study.config import RunConfig

    field = RunConfig.model_fields.get(key)
    return _MISSING if field is None else field.default


def _shown(run: RunRecord, key: str) -> str:
    value = _setting(run, key)
    return "not set" if value is _MISSING else repr(value)


def _comparison(summary: MethodSummary, difference: Paired) -> str:
    values = [value for value in (difference.mean, difference.low, difference.high) if value is not None]
    # One decimal, unless rounding to it would turn a number into 0 and so hide its sign.
    places = next((p for p in (1, 2) if all(value == 0 or round(value, p) != 0 for value in values)), 3)
    relation = "over" if difference.mean >= 0 else "against"
    found = {"gain": "a gain", "loss": "a loss"}.get(summary.verdict, summary.verdict)
    return (
        f"{label(summary.method)}: {signed(difference.mean, places)} points {summary.measure} {relation} "
        f"{mention(summary.baseline)} ({_certainty(summary, difference, places)}): {found}."
        f"{_plan(summary)}{_cost(summary)}"
    )


def _certainty(summary: MethodSummary, difference: Paired, places: int) -> str:
    seeds = _seeds(difference.n)
    if difference.n == 1:
        return f"{seeds}, too few for an interval"
    if difference.low is None or difference.high is None:
        return f"{seeds} with the same difference each, so no interval"
    corrected = ""
    if summary.compared > 1:
        corrected = f", p {_equals(summary.adjusted_p)} corrected for {summary.compared} comparisons"
    bounds = f"{signed(difference.low, places)} to {signed(difference.high, places)}"
    return f"95 % interval {bounds}, {seeds}{corrected}"


def _equals(p: float | None) -> str:
    shown = p_value(p)
    return shown if shown.startswith("<") else f"= {shown}"


def _plan(summary: MethodSummary) -> str:
    """A sentence on how many seeds would show the difference, if that is more than there are."""
    if summary.verdict != "no gain shown" or summary.needed is None or summary.needed <= summary.n:
        return ""
    return f" A difference of this size would take about {summary.needed:,} seeds to show."


def _cost(summary: MethodSummary) -> str:
    costs = [
        f"{ratio:.2f} × the {what}"
        for ratio, what in ((summary.time_ratio, "training time"), (summary.flops_ratio, "training FLOPs"))
        if ratio is not None
    ]
    return f" It took {' and '.join(costs)}." if costs else ""


def _seeds(n: int) -> str:
    return f"n = {n} seed{'' if n == 1 else 's'}"
