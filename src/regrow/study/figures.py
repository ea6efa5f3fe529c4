"""Draw the figures with matplotlib, wide for a page and narrow for a phone."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from regrow.analysis.off_map import off_map as map_of
from regrow.study.compute import spent
from regrow.study.drawing import COLORS, INK, Style, printable
from regrow.study.paired import Paired
from regrow.study.sequences import compared_accuracy, measure, switches, tasks_of
from regrow.study.words import label, prefixed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regrow.study.compute import EqualCompute, Unit
    from regrow.study.pruned import CurveSet
    from regrow.study.records import RunRecord
    from regrow.study.sequences import TaskPoint

_FAINT, SHADE, _ALIVE = "#d5d5d2", "#ecebe6", "#dfe9f0"
_LONGEST = 26
# The name of a variant takes two lines of that length: what tells it from others may stand anywhere in it.
_LONGEST_NAME = 52
# With more seeds than this, no single seeds are drawn.
_SINGLE = 12


@dataclass(frozen=True)
class Series:
    """One method as it is drawn: its finished runs and its style."""

    method: str
    style: Style
    runs: Sequence[RunRecord]

    @property
    def color(self) -> str:
        return self.style.color


def sub_phases(run: RunRecord) -> list[tuple[int, int]]:
    """First and last epoch of each stretch of epochs trained with the sub-network."""
    found: list[tuple[int, int]] = []
    for epoch in run.epochs:
        number = epoch["epoch"]
        if epoch["phase"] != "sub":
            continue
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def off_map(run: RunRecord) -> NDArray[np.bool_]:
    """Which filter was off in which epoch: bool [filters of all layers in record order, epochs].

    A filter dropped after epoch a and restored after epoch b is off in epochs a+1 to b.
    """
    sizes: dict[str, int] = run.result["filters"] if run.result is not None else {}
    last = run.epochs[-1]["epoch"] if run.epochs else 0
    return map_of(run.events, sizes, last, time="epoch")


def dots(series: Sequence[Series], differences: Mapping[str, Paired], width: float) -> Figure:
    """Test accuracy of every run by method, and beside it the paired differences with their interval."""
    from matplotlib.figure import Figure

    compared = [each for each in series if each.method in differences]
    row, frame = 0.42, 0.75
    heights = [row * len(series) + frame] + ([row * len(compared) + frame] if compared else [])
    beside = width > 6 and bool(compared)
    figure = Figure(figsize=(width, max(heights) if beside else sum(heights)), layout="constrained")
    if beside:
        panels = figure.subplots(1, 2, squeeze=False, width_ratios=[1.25, 1]).ravel()
    else:
        panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights).ravel()
    _accuracy_dots(panels[0], series)
    if compared:
        shown = series if beside else compared
        _difference_dots(panels[1], shown, differences)
        if beside:
            panels[1].tick_params(axis="y", labelleft=False)
    return figure


def task_curves(series: Sequence[Series], tasks: Mapping[str, Sequence[TaskPoint]], width: float) -> Figure:
    """Test accuracy at the end of each task by method, and beside it the paired differences.

    Lines are means over the seeds, bars their 95 % t intervals.

    Args:
        series: the methods.
        tasks: {method: its tasks}.
        width: inches.
    """
    from matplotlib.figure import Figure

    compared = [each for each in series if any(point.difference for point in tasks[each.method])]
    beside = width > 6 and bool(compared)
    panels = 2 if compared else 1
    shape = (1, panels) if beside else (panels, 1)
    height = 3.4 if beside or not compared else 5.4
    figure = Figure(figsize=(width, height), layout="constrained")
    upper, *lower = figure.subplots(*shape, squeeze=False).ravel()
    for axes, shown in ((upper, series), *((axes, compared) for axes in lower)):
        for place, each in enumerate(shown):
            # Methods stand beside each other, so that no bar covers another one.
            shift = min(0.06, 0.6 / len(shown)) * (place - (len(shown) - 1) / 2)
            _task_line(axes, each, tasks[each.method], shift, differences=axes is not upper)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlim(0.5, max(len(tasks[each.method]) for each in shown) + 0.5)
        axes.set_xlabel("task")
    upper.set_ylabel("test accuracy, %")
    upper.set_ylim(top=min(101.0, upper.get_ylim()[1]))  # an interval may end beyond what is possible
    for axes in lower:
        axes.axhline(0, color=COLORS[0], linewidth=0.9)
        axes.set_ylabel("difference, points")
    return figure


def learning_curves(series: Sequence[Series], width: float) -> Figure:
    """Validation accuracy by epoch, over a strip with the learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 0.3 * width + 1.9), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[7, 1])
    _shade(upper, series, width)
    _shade(lower, series, None)
    _curves(upper, series, "validation_accuracy", scale=100)
    _mark_switches(upper, series)
    _mark_switches(lower, series)
    upper.set_ylabel("validation accuracy, %")
    upper.set_ylim(bottom=_focus(series))
    upper.tick_params(axis="x", length=0)
    for each in series:
        epochs, values = _by_epoch(each, "learning_rate")
        lower.plot(
            epochs, values[0], color=each.color, linestyle=each.style.line, linewidth=1, drawstyle="steps-mid"
        )
    lower.set_ylim(bottom=0)
    lower.margins(x=0.01)
    lower.locator_params(axis="y", nbins=2)
    lower.set_ylabel("rate" if width < 6 else "learning\nrate")
    lower.set_xlabel("epoch")
    return figure


def overlap_curves(series: Sequence[Series], width: float) -> Figure:
    """Sum of overlap over training, with a dashed line at each restore."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 0.2 * width + 1.7), layout="constrained")
    axes = figure.subplots()
    _shade(axes, series, width)
    _curves(axes, series, "overlap", scale=1)
    for each in series:
        restored = [e for run in each.runs for e in run.events if e["kind"] in ("restore", "restart")]
        for epoch in sorted({event["epoch"] for event in restored}):
            axes.axvline(epoch + 0.5, color=each.color, linewidth=0.9, linestyle=(0, (3, 2)))
    axes.set_ylabel("sum of overlap")
    axes.set_xlabel("epoch")
    return figure


def compute_curves(series: Sequence[Series], equal: EqualCompute | None, width: float) -> Figure:
    """Validation accuracy against the cost of training so far: time, and FLOPs if all records have them.

    Means over the seeds at each epoch; the last epoch has a marker. A dashed line is the mean of the
    budgets in ``equal``.
    """
    from matplotlib.figure import Figure

    trained = [run for each in series for run in each.runs if run.epochs]
    units: list[Unit] = ["seconds"]
    if all(spent(run, "flops") is not None for run in trained):
        units.append("flops")
    beside = width > 6
    shape = (1, len(units)) if beside else (len(units), 1)
    height = 3.4 if beside else 2.5 * len(units) + 0.3
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False, sharey=True).ravel()
    for index, (axes, unit) in enumerate(zip(panels, units, strict=True)):
        budgets = equal.budgets.values() if equal is not None and equal.unit == unit else ()
        _compute_panel(axes, series, unit, float(np.mean([*budgets])) if budgets else None)
        if not beside or index == 0:
            axes.set_ylabel("validation accuracy, %")
    panels[0].set_ylim(bottom=_focus(series))
    return figure


def filter_map(runs: Sequence[RunRecord], color: str, width: float) -> Figure:
    """Which filter was off when: one panel per run, rows are filters by layer, columns are epochs."""
    from matplotlib.figure import Figure

    height = min(8.0, max(1.6, 0.028 * off_map(runs[0]).shape[0]))
    beside = width > 6
    shape = (1, len(runs)) if beside else (len(runs), 1)
    figure = Figure(figsize=(width, (height + 0.7) * shape[0]), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False, sharex=True, sharey=True).ravel()
    for index, (axes, run) in enumerate(zip(panels, runs, strict=True)):
        _map_panel(axes, run, color, height)
        axes.set_title(f"seed {run.seed}", fontsize=9, loc="left")
        if beside or index == len(runs) - 1:
            axes.set_xlabel("epoch")
    return figure


def pruned_curves(curves: CurveSet, looks: Mapping[str, Style], width: float, *, key: bool = False) -> Figure:
    """Accuracy against the filters cut: a panel per reading, a line per method, ± standard error as a band.

    Args:
        curves: what to draw.
        looks: {method: how to draw it}.
        width: inches.
        key: whether the figure itself says which colour is which method.
    """
    from matplotlib.figure import Figure

    readings = curves.readings
    beside = width > 6
    shape = (1, len(readings)) if beside else (len(readings), 1)
    height = 3.1 if beside else 2.1 * len(readings) + 0.4
    names = [printable(label(method), _LONGEST_NAME) for method in curves.methods]
    # A letter takes about 0.075 inches, and a line of the key 0.22 inches.
    columns = max(1, min(len(names) + 1, int(width / (0.9 + 0.075 * max(map(len, names))))))
    rows = -(-(len(names) + 1) // columns)
    figure = Figure(figsize=(width, height + (0.1 + 0.22 * rows) * key), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False, sharex=True, sharey=True).ravel()
    for index, (axes, reading) in enumerate(zip(panels, readings, strict=True)):
        for method in curves.methods:
            _pruned_line(axes, curves, method, reading, looks[method])
        axes.axhline(100 * curves.chance, color=INK, linewidth=0.6, linestyle=(0, (4, 3)), label="chance")
        axes.set_title(printable(reading, _LONGEST), fontsize=9, loc="left")
        axes.margins(x=0.02)
        if beside or index == len(readings) - 1:
            axes.set_xlabel("filters cut, %")
        if not beside or index == 0:
            axes.set_ylabel(f"{curves.split} accuracy, %")
    # A limit that is set before the last panel is drawn would cut its curves off.
    panels[0].set_ylim(bottom=0)
    if key:
        lines = [line for line in panels[0].get_lines() if not line.get_label().startswith("_")]
        figure.legend(handles=lines, loc="outside upper left", ncols=columns, frameon=False)
    return figure


def _pruned_line(axes: Axes, curves: CurveSet, method: str, reading: str, style: Style) -> None:
    curve = curves.curve(method, reading)
    look: Any = {"color": style.color, "linestyle": style.line, "marker": style.marker, "markersize": 3.5}
    name = printable(label(method), _LONGEST_NAME)
    if curve is None:
        # An empty line gives the method its place in the key.
        axes.plot([], [], linewidth=1.7, label=name, **look)
        return
    cut = 100 * np.array(curve.fractions)
    means = 100 * np.array([point.mean for point in curve.points])
    errors = 100 * np.array([point.error or 0 for point in curve.points])
    axes.fill_between(cut, means - errors, means + errors, color=style.color, alpha=0.18, linewidth=0)
    axes.plot(cut, means, linewidth=1.7, label=name, **look)


def _compute_panel(axes: Axes, series: Sequence[Series], unit: Unit, budget: float | None) -> None:
    drawn = []
    for each in series:
        found = [(cost, run) for run in each.runs if run.epochs and (cost := spent(run, unit))]
        if not found:
            continue
        # Runs of a method have the same epochs, except for epochs that a damaged record has lost.
        epochs = min(len(cost) for cost, _ in found)
        costs = np.array([cost[:epochs] for cost, _ in found], dtype=float)
        values = np.array(
            [[epoch["validation_accuracy"] for epoch in run.epochs[:epochs]] for _, run in found], dtype=float
        )
        drawn.append((each, costs, 100 * values))
    largest = max((float(costs.mean(axis=0)[-1]) for _, costs, _ in drawn), default=1.0)
    size, name = _unit(unit, largest)
    for each, costs, values in drawn:
        known = np.isfinite(values).any(axis=0)
        if not known.any():
            continue
        at, values = costs.mean(axis=0)[known] / size, values[:, known]
        if len(values) > 1:
            low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
            axes.fill_between(at, low, high, color=each.color, alpha=_band(series), linewidth=0)
        means = np.nanmean(values, axis=0)
        axes.plot(at, means, color=each.color, linestyle=each.style.line, linewidth=1.7)
        axes.plot(at[-1:], means[-1:], color=each.color, marker=each.style.marker, markersize=6.5)
    if budget is not None:
        axes.axvline(budget / size, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlim(left=0)
    axes.set_xlabel(name)


def _unit(unit: Unit, largest: float) -> tuple[float, str]:
    """The number to divide costs by, and the name of the axis."""
    if unit == "flops":
        size, prefix = prefixed(largest)
        return size, f"training so far, {prefix}FLOPs"
    size, name = (1.0, "s") if largest < 120 else (60.0, "min") if largest < 7200 else (3600.0, "h")
    return size, f"training so far, {name}"


def _task_line(
    axes: Axes, series: Series, tasks: Sequence[TaskPoint], shift: float, *, differences: bool
) -> None:
    """The means and intervals of a method by task: of accuracy in %, or of the differences in points."""
    look: Any = {"color": series.color, "linestyle": series.style.line, "marker": series.style.marker}
    drawn = []
    for task, point in enumerate(tasks, start=1):
        found = point.difference
        if not differences:
            low, high = point.interval or (None, None)
            scale = 100.0
            mean = point.accuracy.mean
        elif found is not None:
            mean, low, high, scale = found.mean, found.low, found.high, 1.0
        else:
            continue
        drawn.append((task + shift, scale * mean))
        if low is not None and high is not None:
            axes.plot(
                [task + shift] * 2, [scale * low, scale * high], color=series.color, linewidth=1.6, alpha=0.55
            )
    axes.plot(*zip(*drawn, strict=True), linewidth=1.4, markersize=5, **look)


def _accuracy_dots(axes: Axes, series: Sequence[Series]) -> None:
    from matplotlib.collections import LineCollection

    values = [
        {run.seed: 100 * compared_accuracy(run.result) for run in each.runs if run.result} for each in series
    ]
    joins = [
        [(above[seed], row), (below[seed], row + 1)]
        for row, (above, below) in enumerate(pairwise(values))
        for seed in above.keys() & below.keys()
    ]
    axes.add_collection(LineCollection(sorted(joins), colors=_FAINT, linewidths=0.8, zorder=1))
    width = _width([number for found in values for number in found.values()])
    for row, (each, found) in enumerate(zip(series, values, strict=True)):
        numbers = list(found.values())
        rows = row + stacked(numbers, width, 0.09, 0.3)
        look: Any = {"color": each.color, "marker": each.style.marker, "linewidths": 0}
        axes.scatter(numbers, rows, s=22, alpha=0.75, zorder=3, **look)
        axes.plot([np.mean(numbers)] * 2, [row - 0.36, row + 0.36], color=each.color, linewidth=2, zorder=4)
    _name_rows(axes, series)
    tasks = max((tasks_of(run.result or {}) for each in series for run in each.runs), default=1)
    axes.set_xlabel(f"{measure(tasks)}, %")


def _difference_dots(axes: Axes, series: Sequence[Series], differences: Mapping[str, Paired]) -> None:
    axes.axvline(0, color=COLORS[0], linewidth=0.9)
    width = _width([number for found in differences.values() for number in found.differences.values()])
    for row, each in enumerate(series):
        if each.method not in differences:
            continue
        found = differences[each.method]
        numbers = list(found.differences.values())
        rows = row + 0.28 + stacked(numbers, width, 0.06, 0.14)
        look: Any = {"color": each.color, "marker": each.style.marker, "linewidths": 0}
        axes.scatter(numbers, rows, s=16, alpha=0.6, zorder=3, **look)
        if found.low is not None and found.high is not None:
            axes.plot([found.low, found.high], [row, row], color=each.color, linewidth=1.8, zorder=4)
        axes.scatter([found.mean], [row], s=42, zorder=5, **look)
    _name_rows(axes, series)
    axes.set_xlabel("difference, points")


def stacked(values: Sequence[float], width: float, step: float, most: float) -> NDArray[np.float64]:
    """Offsets that keep dots within ``width`` of each other apart: 0, ±``step``, … to ±``most``."""
    counts: dict[int, int] = {}
    offsets = []
    for value in values:
        place = round(value / width)
        count = counts[place] = counts.get(place, -1) + 1
        offset = step * ((count + 1) // 2)
        offsets.append(min(offset, most) * (1 if count % 2 else -1))
    return np.array(offsets)


def _width(values: Sequence[float]) -> float:
    """How much of an axis that spans ``values`` one dot covers."""
    return (max(values) - min(values)) / 60 or 1.0


def _name_rows(axes: Axes, series: Sequence[Series]) -> None:
    names = [printable(label(each.method), _LONGEST_NAME) for each in series]
    axes.set_yticks(range(len(series)), ["\n".join(textwrap.wrap(name, _LONGEST)) for name in names])
    axes.set_ylim(len(series) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.08)


def _by_epoch(series: Series, key: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Epoch numbers [epochs] and the values of ``key`` [runs, epochs], NaN where there is none."""
    found = [{epoch["epoch"]: epoch[key] for epoch in run.epochs} for run in series.runs]
    epochs = sorted(set().union(*found))
    values = np.array([[one.get(epoch) for epoch in epochs] for one in found], dtype=float)
    return np.array(epochs, dtype=np.int64), values.reshape(len(found), len(epochs))


def _curves(axes: Axes, series: Sequence[Series], key: str, scale: float) -> None:
    """Draw each method's mean line, a band from its lowest to its highest seed, and faint single seeds."""
    from matplotlib.collections import LineCollection

    for index, each in enumerate(series):
        epochs, values = _by_epoch(each, key)
        known = np.isfinite(values).any(axis=0)
        numbers, epochs = scale * values[:, known], epochs[known]
        if 1 < len(numbers) <= _SINGLE:
            lines = [np.column_stack([epochs, one]) for one in numbers]
            axes.add_collection(LineCollection(lines, colors=each.color, linewidths=0.6, alpha=0.35))
        if len(numbers) > 1:
            low, high = np.nanmin(numbers, axis=0), np.nanmax(numbers, axis=0)
            axes.fill_between(epochs, low, high, color=each.color, alpha=_band(series), linewidth=0)
        axes.plot(
            epochs,
            np.nanmean(numbers, axis=0),
            color=each.color,
            linestyle=each.style.line,
            marker=each.style.marker,
            markersize=4.5,
            # Each method has its markers at other epochs, so that methods with equal curves can both be seen.
            markevery=(index * max(1, len(epochs) // 40), max(1, len(epochs) // 6)),
            linewidth=1.7,
        )
    axes.locator_params(axis="x", integer=True)
    axes.margins(x=0.01)


def _band(series: Sequence[Series]) -> float:
    """The opacity of a band, which is lower the more bands there are to overlap."""
    return min(0.13, 0.5 / len(series))


def _mark_switches(axes: Axes, series: Sequence[Series]) -> None:
    """Draw a thin line where the next task begins."""
    for epoch in sorted({epoch for each in series for run in each.runs for epoch in switches(run)}):
        axes.axvline(epoch + 0.5, color=INK, linewidth=0.6, linestyle=(0, (1, 2)), zorder=0.5)


def _focus(series: Sequence[Series]) -> float | None:
    """A lower end of the accuracy axis that leaves out the steep first tenth of training."""
    lowest = []
    for each in series:
        _, values = _by_epoch(each, "validation_accuracy")
        late = values[:, values.shape[1] // 10 :]
        if np.isfinite(late).any():
            lowest.append(100 * float(np.nanmin(late)))
    return None if not lowest else max(0.0, min(lowest) - 2)


def _shade(axes: Axes, series: Sequence[Series], width: float | None) -> None:
    """Shade the sub phases; number them above the axes where ``width`` (inches) leaves room."""
    with_phases = [(each, sub_phases(each.runs[0])) for each in series if sub_phases(each.runs[0])]
    for each, phases in with_phases:
        shared = all(other == phases for _, other in with_phases)
        for number, (first, last) in enumerate(phases, start=1):
            color, alpha = (SHADE, 1.0) if shared else (each.color, 0.1)
            axes.axvspan(first - 0.5, last + 0.5, color=color, alpha=alpha, linewidth=0, zorder=0)
            if width is None or not shared or each is not with_phases[0][0]:
                continue
            points = 62 * width * (last - first + 1) / each.runs[0].epochs[-1]["epoch"]
            text = f"sub {number}" if points > 26 else str(number) if points > 8 else ""
            axes.text(
                (first + last) / 2,
                1.01,
                text,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=8,
                color="#6a6a66",
            )


def _map_panel(axes: Axes, run: RunRecord, color: str, height: float) -> None:
    from matplotlib.colors import ListedColormap

    off = off_map(run)
    rows, epochs = off.shape
    axes.imshow(
        off,
        cmap=ListedColormap([_ALIVE, color]),
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="none",
        extent=(0.5, epochs + 0.5, rows - 0.5, -0.5),
    )
    sizes: dict[str, int] = run.result["filters"] if run.result is not None else {}
    ticks: list[float] = []
    names: list[str] = []
    start = 0
    for layer, size in sizes.items():
        middle = start + (size - 1) / 2
        # The names of layers that are thinner than a line of text would overlap.
        if not ticks or (middle - ticks[-1]) * height * 72 / rows > 9:
            ticks.append(middle)
            names.append(printable(layer, _LONGEST))
        start += size
        if start < rows:
            axes.axhline(start - 0.5, color="white", linewidth=1.2 if len(sizes) < 30 else 0.4)
    axes.set_yticks(ticks, names, fontsize=8)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.locator_params(axis="x", integer=True)
