"""``regrow analyse``: analyse finished runs with a progress bar, and print what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from regrow.study.analyse import analyse_between, analyse_run, by_parent, check_pictures, work_of
from regrow.study.analyse_summary import Analyses, correlation_text, final_table, read_analyses
from regrow.study.counting_bar import counting_bar
from regrow.study.lineup import line_up
from regrow.study.measure import finished_runs
from regrow.study.records import RunRecord
from regrow.study.typed import typed
from regrow.study.words import label

# Beyond so many runs their correlations with each other would take too much memory, and nobody reads them.
_MOST_RUNS = 24


def run_analyses(folders: Sequence[Path], *, pictures: int, rerun: bool = False) -> Analyses:
    """Analyse every finished run, write ``analysis.json`` into its folder, and print tables.

    Runs that lie in one folder are correlated with each other too, and that folder gets an
    ``analysis.json``.

    Args:
        folders: run folders, or folders that contain run folders; unfinished runs in the latter are left out.
        pictures, rerun: as ``analyse_run`` takes them.

    Raises:
        ValueError: as ``analyse_run``, or there is no finished run. What was analysed before the error stays.
    """
    with typed():
        check_pictures(pictures)
    console = Console()
    runs = finished_runs(folders, console)
    together = [(parent, each) for parent, each in by_parent(runs) if len(each) <= _MOST_RUNS]
    bar = counting_bar()
    done = 0
    with bar:
        task = bar.add_task("", total=sum(map(work_of, runs)) + sum(len(each) for _, each in together))
        advance = partial(bar.advance, task)
        for run in runs:
            bar.update(task, description=run.folder.name)
            done += analyse_run(run, pictures=pictures, rerun=rerun, progress=advance)
        for parent, each in together:
            bar.update(task, description=f"runs in {parent.name}")
            analyse_between(each, parent, pictures=pictures, rerun=rerun, progress=advance)
    found = read_analyses(_by_method(runs))
    for table in tables(found):
        console.print(table)
        console.print()
    rest = "" if done == len(runs) else ", the others were analysed before"
    console.print(
        f"{done} of {len(runs)} runs analysed{rest}. Each run folder has its analysis.json; "
        "`regrow report` draws the figures.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return found


def _by_method(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    shown = line_up(runs)
    found: dict[str, list[RunRecord]] = {}
    for run in shown.runs:
        found.setdefault(shown.names[run.folder], []).append(run)
    return found


def tables(found: Analyses) -> list[Table]:
    """Correlations with the oracle at the end, filters that can be dropped alone, and likeness of runs."""
    methods = [*found.found]
    agreement = _table("correlation with the oracle", [f"{label(m)}: {k}" for m in methods for k in _SHOWN])
    for row in final_table(found.found):
        cells = [correlation_text(value) for pair in row["values"] for value in pair]
        agreement.add_row(*map(Text, [row["criterion"], *cells]))
    alone = _table("one filter dropped", ["accuracy", "without the worst", "filters not needed", "n"])
    for method, those in found.found.items():
        alone.add_row(*map(Text, [label(method), *_alone([analysis for _, analysis in those])]))
    shown = [agreement, alone]
    if found.between is not None:
        alike = _table("likeness of runs (mean SVCCA)", ["same method", "other methods"])
        for method in dict.fromkeys(name for name, _ in found.between.runs):
            same: list[float] = []
            other: list[float] = []
            for one, values in zip(found.between.runs, found.between.mean, strict=True):
                for two, value in zip(found.between.runs, values, strict=True):
                    if one[0] == method and value is not None and one != two:
                        (same if two[0] == method else other).append(value)
            alike.add_row(*map(Text, [label(method), _mean(same), _mean(other)]))
        shown.append(alike)
    return shown


_SHOWN = ("values", "ranks")


def _table(first: str, columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(Text(column), justify="right")
    return table


def _alone(analyses: Sequence[Mapping[str, Any]]) -> list[str]:
    whole = [each["accuracy"] for each in analyses]
    drops = [[value for layer in each["drop_one"].values() for value in layer] for each in analyses]
    unneeded = [
        sum(value >= accuracy - 1e-9 for value in values) / max(1, len(values))
        for accuracy, values in zip(whole, drops, strict=True)
    ]
    count = len(analyses)
    return [
        f"{sum(whole) / count:.1%}",
        f"{sum(map(min, drops)) / count:.1%}",
        f"{sum(unneeded) / count:.0%}",
        str(count),
    ]


def _mean(values: Sequence[float]) -> str:
    return correlation_text(sum(values) / len(values) if values else None)
