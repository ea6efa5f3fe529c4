"""The analyses of the runs of a report, gathered from their folders. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from regrow.study import analysed, records
from regrow.study.records import RunRecord

# Of `ortho` with the oracle (RePr, arXiv 1811.07275).
PUBLISHED = {"pearson": 0.38, "spearman": 0.58}
KINDS = tuple(PUBLISHED)


@dataclass(frozen=True)
class Curve:
    """One criterion of one method over training: means over the seeds that have the epoch.

    Attributes:
        epochs: with weights, ascending.
        pearson, spearman: of each of them; NaN where no seed has a correlation.
    """

    criterion: str
    epochs: Sequence[int]
    pearson: Sequence[float]
    spearman: Sequence[float]

    def of(self, kind: str) -> Sequence[float]:
        return self.pearson if kind == "pearson" else self.spearman


@dataclass(frozen=True)
class Between:
    """Canonical correlations between runs: ``runs`` as (method, seed), ``mean`` [runs][runs]."""

    runs: Sequence[tuple[str, int]]
    mean: Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Analyses:
    """What a report shows of the analyses of its finished runs.

    Attributes:
        found: {method: (run, its ``analysis.json``)}, of the weights that the run has now.
        gradients: {method: the lines of ``gradients.jsonl`` of each of its runs}.
        between: the correlations between runs; None if there are none.
        outdated: runs that were trained again since they were analysed.
        broken: {file: why it cannot be read}.
    """

    found: Mapping[str, Sequence[tuple[RunRecord, dict[str, Any]]]] = field(default_factory=dict)
    gradients: Mapping[str, Sequence[list[dict[str, Any]]]] = field(default_factory=dict)
    between: Between | None = None
    outdated: Sequence[RunRecord] = ()
    broken: Mapping[Path, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.found or self.gradients or self.between or self.outdated)


def read_analyses(groups: Mapping[str, Sequence[RunRecord]]) -> Analyses:
    """Read the analyses of finished runs, {method or variant: its runs}. Damaged files are named in it."""
    found: dict[str, list[tuple[RunRecord, dict[str, Any]]]] = {}
    gradients: dict[str, list[list[dict[str, Any]]]] = {}
    outdated: list[RunRecord] = []
    broken: dict[Path, str] = {}
    for method, runs in groups.items():
        for run in runs:
            try:
                analysis = analysed.read_analysis(run.folder)
            except ValueError as error:
                broken[analysed.analysis_path(run.folder)], analysis = str(error), None
            if analysis is not None and analysis["weights"] != records.weights_hash(run.folder):
                outdated.append(run)
            elif analysis is not None:
                found.setdefault(method, []).append((run, analysis))
            try:
                lines = analysed.read_gradients(run.folder)
            except ValueError as error:
                broken[analysed.gradients_path(run.folder)], lines = str(error), []
            if any(line["steps"] for line in lines):
                gradients.setdefault(method, []).append(lines)
    between = _between(groups, broken)
    return Analyses(found, gradients, between, outdated, broken)


def _between(groups: Mapping[str, Sequence[RunRecord]], broken: dict[Path, str]) -> Between | None:
    """Of the folder that most of the runs lie in and that has an analysis."""
    parents: dict[Path, list[tuple[str, RunRecord]]] = {}
    for method, runs in groups.items():
        for run in runs:
            parents.setdefault(run.folder.parent, []).append((method, run))
    for parent, those in sorted(parents.items(), key=lambda each: -len(each[1])):
        if len(those) < 2 or records.config_path(parent).exists():
            continue
        try:
            record = analysed.read_between(parent)
        except ValueError as error:
            broken[analysed.analysis_path(parent)], record = str(error), None
        if record is None:
            continue
        places = {each["folder"]: (place, each["weights"]) for place, each in enumerate(record["runs"])}
        shown = [
            (method, run, places[run.folder.name][0])
            for method, run in those
            if run.folder.name in places and places[run.folder.name][1] == records.weights_hash(run.folder)
        ]
        if len(shown) > 1:
            mean = record["mean"]
            return Between(
                [(method, run.seed) for method, run, _ in shown],
                [[mean[row][column] for _, _, column in shown] for _, _, row in shown],
            )
    return None


def criterion_curves(found: Sequence[tuple[RunRecord, Mapping[str, Any]]]) -> list[Curve]:
    """The criteria of one method over training, in the order of the records."""
    values: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for _, analysis in found:
        for moment in analysis["moments"]:
            for criterion, each in moment["criteria"].items():
                at = values.setdefault(criterion, {}).setdefault(int(moment["epoch"]), [])
                at.append((_number(each["pearson"]), _number(each["spearman"])))
    curves = []
    for criterion, by_epoch in values.items():
        epochs = sorted(by_epoch)
        means = [[_mean([pair[place] for pair in by_epoch[epoch]]) for epoch in epochs] for place in (0, 1)]
        curves.append(Curve(criterion, epochs, *means))
    return curves


def final_table(found: Mapping[str, Sequence[tuple[RunRecord, Mapping[str, Any]]]]) -> list[dict[str, Any]]:
    """Rows of the correlations of the final weights: ``criterion``, and ``values`` [method](pearson,
    spearman), None where there is none."""
    last: dict[str, dict[str, tuple[float | None, float | None]]] = {}
    for method, those in found.items():
        ends = [(run, {**analysis, "moments": analysis["moments"][-1:]}) for run, analysis in those]
        for curve in criterion_curves(ends):
            # Runs of a method end after the same number of epochs.
            last.setdefault(curve.criterion, {})[method] = (
                _known(curve.pearson[-1]),
                _known(curve.spearman[-1]),
            )
    return [
        {"criterion": criterion, "values": [of.get(method, (None, None)) for method in found]}
        for criterion, of in last.items()
    ]


def sorted_drops(found: Sequence[tuple[RunRecord, Mapping[str, Any]]]) -> tuple[np.ndarray, float]:
    """Accuracies with each filter dropped alone, ascending, mean over the runs [filters], and the accuracy
    of the whole networks."""
    each = [
        np.sort(np.array([value for layer in analysis["drop_one"].values() for value in layer], dtype=float))
        for _, analysis in found
    ]
    filters = min(map(len, each))
    lines = np.mean([line[:filters] for line in each], axis=0)
    return lines, float(np.mean([analysis["accuracy"] for _, analysis in found]))


def starving(runs: Sequence[list[dict[str, Any]]]) -> list[tuple[int, list[int], list[float]]]:
    """The gradients of regrown rows over those of kept rows after each restore, as medians over the runs.

    Returns:
        For each number of a restore, from 1: (number, steps, ratios), NaN where no run has a number.
    """
    found = []
    for place in range(max(map(len, runs), default=0)):
        by_step: dict[int, list[float]] = {}
        for lines in runs:
            if place < len(lines):
                for step, ratio in zip(*analysed.ratios(lines[place]), strict=True):
                    by_step.setdefault(step, []).append(_number(ratio))
        steps = sorted(by_step)
        found.append((place + 1, steps, [_median(by_step[step]) for step in steps]))
    return [each for each in found if each[1]]


def correlation_text(value: float | None) -> str:
    """A correlation with two decimals and a true minus sign; a dash where there is none."""
    if value is None:
        return "—"
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", "−")


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.median(known)) if known else float("nan")
