"""Accuracy–pruned curves of many runs: measure missing points, print the tables, draw the figure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from regrow.interrupts import uninterrupted
from regrow.study import drawing, figures, records
from regrow.study.compare import check_comparable
from regrow.study.counting_bar import counting_bar
from regrow.study.curves import check_curve, measure_run
from regrow.study.lineup import line_up
from regrow.study.pruned import CurveSet, curve_sets, heading, tables, to_dict
from regrow.study.typed import typed
from regrow.study.variants import variant_styles


def run_curves(
    folders: Sequence[Path],
    *,
    fractions: Sequence[float],
    readings: Sequence[str],
    criterion: str,
    scope: str,
    split: str,
    out: Path | None = None,
    rerun: bool = False,
) -> CurveSet:
    """Measure the curve of every run, print the tables, and write curve.json, curve.svg and curve.png.

    Args:
        folders: run folders, or folders that contain run folders; unfinished runs in the latter are left out.
        fractions, readings, criterion, scope, split, rerun: as ``measure_run`` takes them.
        out: where to write (default: the folder given, or the parent folder if several are given).

    Raises:
        ValueError: an argument that is unknown or out of range, no finished run, a run folder given that
            is unfinished, runs that cannot be compared, or as ``measure_run``. Curves that were
            measured before the error stay.
    """
    with typed():
        check_curve(criterion, scope, fractions, readings, split)
    home = _home(folders) if out is None else out
    console = Console()
    shown = line_up(finished_runs(folders, console))
    runs = shown.runs
    check_comparable(runs, shown.names)
    settings: dict[str, Any] = {
        "fractions": fractions, "readings": readings, "criterion": criterion, "scope": scope, "split": split,
    }  # fmt: skip
    bar = counting_bar()
    measured = 0
    with bar:
        task = bar.add_task("", total=len(runs) * len(fractions) * len(readings))
        for run in runs:
            bar.update(task, description=run.folder.name)
            advance = partial(bar.advance, task)
            measured += measure_run(run.folder, rerun=rerun, progress=advance, **settings)
    curves = next(
        each
        for each in curve_sets(
            runs, baseline=shown.baseline, variants=shown.names, fractions=fractions, readings=readings
        )
        if (each.split, each.criterion, each.scope) == (split, criterion, scope)
    )
    looks = variant_styles({shown.names[run.folder]: run.config for run in runs}, shown.numbers)
    draw = partial(figures.pruned_curves, curves, looks, key=True)
    svg, png = drawing.svg(draw, drawing.WIDE), drawing.png(draw, drawing.WIDE)
    with uninterrupted():
        records.write_json(home / "curve.json", {"version": records.VERSION, **to_dict(curves)})
        records.write_text(home / "curve.svg", svg)
        records.write_bytes(home / "curve.png", png)
    console.print(heading(curves), highlight=False, markup=False)
    for table in tables(curves):
        console.print(table)
        console.print()
    rest = "" if measured == len(runs) else ", the others were measured before"
    console.print(
        f"{measured} of {len(runs)} runs measured{rest}. Written: curve.json, curve.svg, curve.png in {home}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return curves


def _home(folders: Sequence[Path]) -> Path:
    parents = {folder.resolve().parent for folder in folders}
    if len(folders) == 1:
        return folders[0]
    if len(parents) > 1:
        raise ValueError("the folders given lie in different places: pass --out FOLDER for the figure.")
    return folders[0].parent


def finished_runs(folders: Sequence[Path], console: Console) -> list[records.RunRecord]:
    """The finished runs in and below ``folders``, each once."""
    found = {run.folder.resolve(): run for folder in folders for run in records.find_runs(folder)}
    for folder in folders:
        run = found.get(folder.resolve())
        if run is not None and run.result is None:
            raise ValueError(f"the run in {folder} is unfinished and has no final weights: finish it first.")
    finished = [run for run in found.values() if run.result is not None]
    if not finished:
        raise ValueError(
            f"none of the {len(found)} runs is finished (has a result.json): there are no weights."
        )
    if left := len(found) - len(finished):
        console.print(f"{left} unfinished of {len(found)} runs left out", highlight=False)
    return finished
