"""Figures of an analysis, in the style of ``figures``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from regrow.study.analyse_summary import KINDS, PUBLISHED, Between, Curve, sorted_drops, starving
from regrow.study.drawing import COLORS, INK, Style, printable
from regrow.study.figures import SHADE
from regrow.study.words import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regrow.study.records import RunRecord

Found = Sequence[tuple["RunRecord", Mapping[str, Any]]]
_TITLES = {"pearson": "values (Pearson)", "spearman": "ranks (Spearman)"}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.3, 1.3)))
_LONGEST = 22
# Beyond so many rows and columns the cells of a heat map have no numbers.
_NUMBERED = 9


def agreement_curves(curves: Sequence[Curve], phases: Sequence[tuple[int, int]], width: float) -> Figure:
    """Correlation of each criterion with the oracle over training, by value and by rank.

    Args:
        curves: of one method.
        phases: first and last epochs of the sub phases, which are shaded.
        width: inches.
    """
    from matplotlib.figure import Figure

    beside = width > 6
    shape = (1, 2) if beside else (2, 1)
    columns = 6 if beside else 2
    rows = -(-(len(curves) + 1) // columns)
    height = (3.3 if beside else 5.2) + 0.2 * rows
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False, sharex=True, sharey=True).ravel()
    for index, (axes, kind) in enumerate(zip(panels, KINDS, strict=True)):
        for first, last in phases:
            axes.axvspan(first - 0.5, last + 0.5, color=SHADE, linewidth=0, zorder=0)
        axes.axhline(0, color=INK, linewidth=0.7)
        axes.axhline(
            PUBLISHED[kind], color=COLORS[0], linewidth=0.9, linestyle=(0, (4, 3)), label="ortho, published"
        )
        for number, curve in enumerate(curves):
            values = np.array(curve.of(kind), dtype=float)
            axes.plot(
                curve.epochs,
                values,
                color=COLORS[number % len(COLORS)],
                linestyle=_DASHES[number // len(COLORS) % len(_DASHES)],
                linewidth=2.2 if curve.criterion == "ortho" else 1.3,
                zorder=3 if curve.criterion == "ortho" else 2,
                marker="o",
                markersize=4 if len(curve.epochs) == 1 else 2.5,
                label=printable(curve.criterion, _LONGEST),
            )
        axes.set_title(_TITLES[kind], fontsize=9, loc="left")
        axes.locator_params(axis="x", integer=True)
        axes.set_ylim(-1.03, 1.03)
        if beside or index == 1:
            axes.set_xlabel("epoch")
        if not beside or index == 0:
            axes.set_ylabel("correlation with the oracle")
    lines = [line for line in panels[0].get_lines() if not str(line.get_label()).startswith("_")]
    figure.legend(handles=lines, loc="outside lower left", ncols=columns, frameon=False, fontsize=8)
    return figure


def layer_maps(found: Mapping[str, tuple[RunRecord, Mapping[str, Any]]], width: float) -> Figure:
    """Canonical correlation between the layers of a network: one heat map for each method's run."""
    from matplotlib.figure import Figure

    beside = width > 6
    count = len(found)
    shape = (1, count) if beside else (count, 1)
    layers = max(len(analysis["layers"]["layers_a"]) for _, analysis in found.values())
    side = min(1.6 + 0.4 * layers, 4.2, width / count) if beside else min(1.9 + 0.3 * layers, width)
    figure = Figure(figsize=(width, side + 0.5 if beside else (side + 0.3) * count), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False).ravel()
    for axes, (method, (run, analysis)) in zip(panels, found.items(), strict=True):
        alike = analysis["layers"]
        _heat(axes, alike["mean"], alike["layers_a"], numbers=side > 0.42 * layers + 0.7)
        axes.set_title(f"{printable(label(method), _LONGEST)}, seed {run.seed}", fontsize=9, loc="left")
    _bar(figure, list(panels))
    return figure


def run_map(between: Between, width: float) -> Figure:
    """Canonical correlation between runs, the mean over their layers: one heat map."""
    from matplotlib.figure import Figure

    side = min(width, 1.6 + 0.42 * len(between.runs), 6.5)
    figure = Figure(figsize=(min(width, side + 1.6), side), layout="constrained")
    axes = figure.subplots()
    names = [f"{printable(label(method), _LONGEST)} {seed}" for method, seed in between.runs]
    _heat(axes, between.mean, names, numbers=True)
    _bar(figure, [axes])
    return figure


def _heat(axes: Axes, mean: Sequence[Sequence[float | None]], names: Sequence[str], *, numbers: bool) -> None:
    values = np.array(mean, dtype=float)
    axes.imshow(values, cmap="cividis", vmin=0, vmax=1, interpolation="none")
    places = range(0, len(names), max(1, len(names) // 24))
    shown = [printable(names[place], _LONGEST) for place in places]
    axes.set_yticks(places, shown, fontsize=7.5)
    axes.set_xticks(places, shown, fontsize=7.5, rotation=45, ha="right", rotation_mode="anchor")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if numbers and len(names) <= _NUMBERED:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if math.isfinite(value):
                    color = "white" if value < 0.5 else "black"
                    axes.text(
                        column, row, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=color
                    )


def _bar(figure: Figure, panels: Sequence[Axes]) -> None:
    bar = figure.colorbar(panels[-1].images[0], ax=list(panels), shrink=0.7, pad=0.02, aspect=18)
    bar.outline.set_visible(False)
    bar.set_label("mean canonical correlation", fontsize=8)
    bar.ax.tick_params(labelsize=7.5, length=0)


def drop_one_curves(found: Mapping[str, Found], looks: Mapping[str, Style], width: float) -> Figure:
    """Accuracy when each filter is dropped alone, filters sorted by it: a line for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 0.2 * width + 1.9), layout="constrained")
    axes = figure.subplots()
    for method, those in found.items():
        lines, whole = sorted_drops(those)
        style = looks[method]
        at = 100 * (np.arange(len(lines)) + 0.5) / len(lines)
        axes.axhline(100 * whole, color=style.color, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.plot(
            at,
            100 * lines,
            color=style.color,
            linestyle=style.line,
            marker=style.marker,
            markersize=4.5,
            markevery=max(1, len(at) // 8),
            linewidth=1.7,
        )
    axes.set_xlabel("filters, sorted, %")
    axes.set_ylabel("accuracy without it, %")
    axes.margins(x=0.01)
    return figure


def gradient_curves(
    gradients: Mapping[str, Sequence[list[dict[str, Any]]]], looks: Mapping[str, Style], width: float
) -> Figure:
    """Gradient of regrown rows over that of kept rows, by step after each restore; the first is darkest."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(width, 0.2 * width + 1.9), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color=INK, linewidth=0.9)
    highest = 1.0
    for method, runs in gradients.items():
        style, curves = looks[method], starving(runs)
        for number, steps, ratios in curves:
            values = np.array(ratios, dtype=float)
            axes.plot(
                steps,
                values,
                color=style.color,
                linestyle=style.line,
                marker=style.marker,
                markersize=3.5,
                alpha=1 - 0.6 * (number - 1) / max(1, len(curves)),
                linewidth=1.5,
            )
            highest = max(highest, float(np.nanmax(values, initial=0)))
    axes.set_xscale("log")
    # The figures' style draws no mathematical signs, in which matplotlib writes powers of ten.
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_ylim(bottom=0, top=1.08 * highest)
    axes.set_xlabel("step after the restore")
    axes.set_ylabel("gradient, regrown / kept")
    axes.margins(x=0.02)
    return figure


def filter_pictures(first: Mapping[str, Any], color: str, width: float) -> Figure:
    """The filters of the first layer at three moments, each as a small picture; regrown ones are framed."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    moments = first["moments"]
    count = len(moments[0]["filters"])
    columns = min(count, 32 if width > 6 else 12)
    rows = -(-count // columns)
    cell = min(0.45, (width - 0.3) / columns)
    figure = Figure(figsize=(width, len(moments) * (rows * cell + 0.32)), layout="constrained")
    panels = figure.subplots(len(moments), 1, squeeze=False).ravel()
    for axes, moment in zip(panels, moments, strict=True):
        pictures = [_picture(values, first["shape"]) for values in moment["filters"]]
        for place, picture in enumerate(pictures):
            row, column = divmod(place, columns)
            # One picture is 1 wide, with a margin around it.
            extent = (column + 0.08, column + 0.92, row + 0.92, row + 0.08)
            axes.imshow(picture, vmin=0, vmax=1, interpolation="none", extent=extent, aspect="auto")
        for place in first["regrown"]:
            row, column = divmod(place, columns)
            axes.add_patch(Rectangle((column + 0.02, row + 0.02), 0.96, 0.96, fill=False, ec=color, lw=1.6))
        axes.set_xlim(0, columns)
        axes.set_ylim(rows, 0)
        axes.set_aspect("equal", anchor="NW")
        axes.set_axis_off()
        axes.set_title(f"{moment['moment']}, after epoch {moment['epoch']}", fontsize=9, loc="left")
    return figure


def _picture(values: Sequence[float], shape: Sequence[int]) -> Any:
    """A filter [channels, height, width] as a picture [height, width, 3] with 0 as mid-gray; filters of
    other than three channels in gray, as their mean."""
    weight = np.array(values, dtype=float).reshape(shape[0], *(shape[1:] if len(shape) == 3 else (1, -1)))
    weight = 0.5 + 0.5 * weight / (np.abs(weight).max() or 1.0)
    colours = weight if len(weight) == 3 else weight.mean(axis=0, keepdims=True).repeat(3, axis=0)
    return np.moveaxis(colours, 0, -1)
