"""One self-contained HTML page about finished runs, and its numbers as JSON and CSV beside it."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regrow.interrupts import uninterrupted
from regrow.study import pruned
from regrow.study.analyse_summary import read_analyses
from regrow.study.compare import MethodSummary, group_of, summarise
from regrow.study.lineup import title_of
from regrow.study.page import Content, near, render
from regrow.study.paired import Paired
from regrow.study.published import published_accuracy
from regrow.study.records import VERSION, RunRecord, write_json, write_text

_SIGNS = ("=", "+", "-", "−", "@", "|")  # "|" as in the old way to start another program


def write_report(
    runs: Sequence[RunRecord],
    path: str | Path,
    *,
    title: str | None = None,
    baseline: str = "standard",
    variants: Mapping[Path, str] | None = None,
    numbers: Mapping[str, int] | None = None,
    left_out: Mapping[Path, str] | None = None,
) -> Path:
    """Write the page to ``path``, and ``results.json`` and ``results.csv`` into the same folder.

    Unfinished runs are listed as such and left out of every number.

    Args:
        runs: as ``gather`` or ``find_runs`` gives them; ``line_up`` gives the values of the other arguments.
        path: the page, ending in ``.html``.
        title: the page's heading (default: model and data).
        baseline: the method, or the name of the variant, that the others are compared with.
        variants: {run's folder: name to group and show the run by}. Default: its method.
        numbers: {name: its number among the variants of its method}, for its colour. Default: by settings.
        left_out: {folder of a run that could not be read: why}, to be named on the page.

    Returns:
        ``path``.

    Raises:
        ValueError: ``path`` does not end in .html, no run is finished, or the runs are not comparable.
    """
    path = Path(path)
    if path.suffix != ".html" or path.is_dir():
        raise ValueError(f"the report is one HTML page: write {path / 'report.html'} instead of {path}.")
    summaries = summarise(runs, baseline, variants)
    baseline = summaries[0].baseline
    order = {each.method: place for place, each in enumerate(summaries)}
    groups = {run.folder: group_of(run, variants) for run in runs}
    runs = sorted(
        runs, key=lambda run: (order.get(groups[run.folder], len(order)), groups[run.folder], run.seed)
    )
    measured = pruned.read_measured([run for run in runs if run.result is not None])
    analyses = read_analyses(
        {
            each.method: [run for run in runs if run.result is not None and groups[run.folder] == each.method]
            for each in summaries
        }
    )
    title = title_of(runs[0].config) if title is None else title
    content = Content(
        title=title,
        summaries=summaries,
        runs=runs,
        groups=groups,
        rows=run_rows(runs, summaries, path.parent, variants),
        curves=pruned.sets_of(measured, baseline=baseline, variants=variants),
        outdated=measured.outdated,
        left_out={
            near(each, path.parent): why.replace(str(each), near(each, path.parent))
            for each, why in {**(left_out or {}), **measured.broken, **analyses.broken}.items()
        },
        home=path.parent,
        numbers=numbers or {},
        published={
            groups[run.folder]: accuracy
            for run in runs
            if run.result is not None and (accuracy := published_accuracy(run.config)) is not None
        },
        analyses=analyses,
    )
    page = render(content)
    methods = method_rows(summaries, content.published)
    results = {
        "version": VERSION,
        "title": title,
        "baseline": baseline,
        "methods": methods,
        "compared": summaries[0].measure,
        "tasks": task_rows(summaries),
        "runs": content.rows,
        "curves": [pruned.to_dict(each) for each in content.curves],
        "left_out": content.left_out,
    }
    with uninterrupted():
        write_json(path.parent / "results.json", results)
        write_text(path.parent / "results.csv", _csv(content.rows, methods))
        write_text(path, page)
    return path


def run_rows(
    runs: Sequence[RunRecord],
    summaries: Sequence[MethodSummary],
    home: Path,
    variants: Mapping[Path, str] | None = None,
) -> list[dict[str, Any]]:
    """One flat row per run, finished or not: accuracies are fractions, differences percentage points."""
    differences = {each.method: each.difference.differences for each in summaries if each.difference}
    return [
        {
            "method": method,
            "seed": run.seed,
            "finished": run.result is not None,
            "test_accuracy": result.get("test_accuracy"),
            "mean_accuracy_after_switch": result.get("mean_accuracy_after_switch"),
            "validation_accuracy": result.get("validation_accuracy"),
            "best_epoch": result.get("best_epoch"),
            "best_validation_accuracy": result.get("best_validation_accuracy"),
            "best_test_accuracy": result.get("best_test_accuracy"),
            "difference_points": differences.get(method, {}).get(run.seed) if result else None,
            "train_seconds": result.get("train_seconds"),
            "train_flops": result.get("train_flops"),
            "epochs": len(run.epochs),
            "parameters": result.get("parameters"),
            "folder": near(run.folder, home),
        }
        for run in runs
        for method, result in [(group_of(run, variants), run.result or {})]
    ]


def method_rows(summaries: Sequence[MethodSummary], published: Mapping[str, float]) -> list[dict[str, Any]]:
    """One flat row per method: means, standard deviations (ddof 1), the paired difference and its cost."""
    return [
        {
            "method": each.method,
            "n": each.n,
            "seeds": list(each.seeds),
            "test_accuracy": each.test_accuracy.mean,
            "test_accuracy_sd": each.test_accuracy.deviation,
            "mean_accuracy_after_switch": each.after_switch.mean if each.after_switch else None,
            "mean_accuracy_after_switch_sd": each.after_switch.deviation if each.after_switch else None,
            "validation_accuracy": each.validation_accuracy.mean,
            "validation_accuracy_sd": each.validation_accuracy.deviation,
            **_interval("difference", each.difference),
            "bootstrap_low": each.bootstrap[0] if each.bootstrap else None,
            "bootstrap_high": each.bootstrap[1] if each.bootstrap else None,
            "pairs": each.difference.n if each.difference else None,
            "gains": each.difference.gains if each.difference else None,
            "losses": each.difference.losses if each.difference else None,
            "ties": each.difference.ties if each.difference else None,
            "sign_p": each.sign_p,
            "p": each.difference.p if each.difference else None,
            "p_corrected": each.adjusted_p,
            "published_accuracy": published.get(each.method),
            "verdict": each.verdict,
            "seeds_needed": each.needed,
            "train_seconds": each.seconds.mean,
            "train_seconds_sd": each.seconds.deviation,
            "time_ratio": each.time_ratio,
            "train_flops": each.flops.mean if each.flops else None,
            "train_flops_sd": each.flops.deviation if each.flops else None,
            "flops_ratio": each.flops_ratio,
            "equal_compute_in": each.unit,
            **_at_equal_compute(each),
            **_at_best(each),
        }
        for each in summaries
    ]


def task_rows(summaries: Sequence[MethodSummary]) -> list[dict[str, Any]]:
    """One flat row per method and task of a sequence: test accuracy at its end, and the paired difference."""
    return [
        {
            "method": each.method,
            "task": task,
            "n": point.n,
            "test_accuracy": point.accuracy.mean,
            "test_accuracy_sd": point.accuracy.deviation,
            "test_accuracy_low": point.interval[0] if point.interval else None,
            "test_accuracy_high": point.interval[1] if point.interval else None,
            **_interval("difference", point.difference),
            "p": point.difference.p if point.difference else None,
        }
        for each in summaries
        for task, point in enumerate(each.tasks, start=1)
    ]


def _at_equal_compute(summary: MethodSummary) -> dict[str, Any]:
    reached, difference = summary.at_equal_compute, summary.difference_at_equal_compute
    return {
        "equal_compute_accuracy": reached.mean if reached else None,
        "equal_compute_accuracy_sd": reached.deviation if reached else None,
        **_interval("equal_compute", difference),
        "equal_compute_pairs": difference.n if difference else None,
    }


def _at_best(summary: MethodSummary) -> dict[str, Any]:
    accuracy, difference = summary.best_test_accuracy, summary.difference_at_best
    return {
        "best_epoch": summary.best_epoch.mean if summary.best_epoch else None,
        "best_test_accuracy": accuracy.mean if accuracy else None,
        "best_test_accuracy_sd": accuracy.deviation if accuracy else None,
        **_interval("best", difference),
        "best_pairs": difference.n if difference else None,
    }


def _interval(name: str, difference: Paired | None) -> dict[str, Any]:
    """The mean and the 95 % t interval of a difference in points, by keys that begin with ``name``."""
    return {
        f"{name}_points": difference.mean if difference else None,
        f"{name}_low": difference.low if difference else None,
        f"{name}_high": difference.high if difference else None,
    }


def _csv(runs: Sequence[Mapping[str, Any]], methods: Sequence[Mapping[str, Any]]) -> str:
    """One table, in which the column ``level`` tells the rows of runs from those of methods."""
    keys = list(dict.fromkeys(key for row in [*runs, *methods] for key in row if key != "seeds"))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["level", *keys])
    for level, rows in (("run", runs), ("method", methods)):
        writer.writerows([level, *(_cell(row.get(key)) for key in keys)] for row in rows)
    return text.getvalue()


def _cell(value: object) -> object:
    """``value``, with an apostrophe before a text that a spreadsheet would run as a formula.

    Spreadsheets skip what is invisible before the sign, and take its full-width form for it.
    """
    if not isinstance(value, str):
        return value
    letters = unicodedata.normalize("NFKC", value)
    first = next((letter for letter in letters if unicodedata.category(letter)[0] not in "CZ"), None)
    return f"'{value}" if first in _SIGNS or value.startswith(("\t", "\r", "\n")) else value
