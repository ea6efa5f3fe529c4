"""One self-contained HTML page about finished runs, and its numbers as JSON and CSV beside it."""

from __future__ import annotations

import base64
import csv
import io
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.study import compare, figures, pruned
from regrow.study.compare import METHOD_SETTINGS, MethodSummary, summarise
from regrow.study.figures import NARROW, WIDE, Series
from regrow.study.pruned import CurveSet, curve_sets
from regrow.study.records import VERSION, RunRecord, write_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAPS = 3


def write_report(
    runs: Sequence[RunRecord],
    path: str | Path,
    *,
    title: str = "What regrowing filters did",
    baseline: str = "standard",
) -> Path:
    """Write the page to ``path``, and ``results.json`` and ``results.csv`` into the same folder.

    Unfinished runs are listed as such and left out of every number.

    Args:
        runs: as ``find_runs`` gives them.
        path: the page, ending in ``.html``.
        title: the page's heading.
        baseline: the method the others are compared with.

    Returns:
        ``path``.

    Raises:
        ValueError: ``path`` does not end in .html, no run is finished, or the runs are not comparable.
    """
    path = Path(path)
    if path.suffix != ".html" or path.is_dir():
        raise ValueError(f"the report is one HTML page: write {path / 'report.html'} instead of {path}.")
    summaries = summarise(runs, baseline)
    order = {each.method: place for place, each in enumerate(summaries)}
    runs = sorted(runs, key=lambda run: (order.get(run.method, len(order)), run.method, run.seed))
    rows = run_rows(runs, summaries, path.parent)
    finished = [run for run in runs if run.result is not None]
    curves = curve_sets(finished, baseline=baseline)
    page = _render(runs, summaries, rows, curves, title, baseline, path.parent)
    methods = method_rows(summaries)
    write_json(
        path.parent / "results.json",
        {
            "version": VERSION,
            "title": title,
            "baseline": baseline,
            "methods": methods,
            "runs": rows,
            "curves": [pruned.to_dict(each) for each in curves],
        },
    )
    write_text(path.parent / "results.csv", _csv(rows, methods))
    write_text(path, page)
    return path


def run_rows(
    runs: Sequence[RunRecord], summaries: Sequence[MethodSummary], home: Path
) -> list[dict[str, Any]]:
    """One flat row per run, finished or not: accuracies are fractions, differences percentage points."""
    differences = {each.method: each.difference.differences for each in summaries if each.difference}
    return [
        {
            "method": run.method,
            "seed": run.seed,
            "finished": run.result is not None,
            "test_accuracy": result.get("test_accuracy"),
            "validation_accuracy": result.get("validation_accuracy"),
            "difference_points": differences.get(run.method, {}).get(run.seed) if result else None,
            "train_seconds": result.get("train_seconds"),
            "epochs": len(run.epochs),
            "parameters": result.get("parameters"),
            "folder": _near(run.folder, home),
        }
        for run in runs
        for result in [run.result or {}]
    ]


def method_rows(summaries: Sequence[MethodSummary]) -> list[dict[str, Any]]:
    """One flat row per method: means, standard deviations (ddof 1), the paired difference and its cost."""
    return [
        {
            "method": each.method,
            "n": each.n,
            "seeds": list(each.seeds),
            "test_accuracy": each.test_accuracy.mean,
            "test_accuracy_sd": each.test_accuracy.deviation,
            "validation_accuracy": each.validation_accuracy.mean,
            "validation_accuracy_sd": each.validation_accuracy.deviation,
            "difference_points": each.difference.mean if each.difference else None,
            "difference_low": each.difference.low if each.difference else None,
            "difference_high": each.difference.high if each.difference else None,
            "pairs": each.difference.n if each.difference else None,
            "gains": each.difference.gains if each.difference else None,
            "verdict": each.verdict,
            "train_seconds": each.seconds.mean,
            "train_seconds_sd": each.seconds.deviation,
            "time_ratio": each.time_ratio,
        }
        for each in summaries
    ]


def cut_shares(runs: Sequence[RunRecord]) -> dict[str, Any] | None:
    """What was dropped when, over the seeds of one method, or None when nothing ever was.

    Returns:
        ``events``: [(cycle, epoch)] of the drops; ``rows``: per layer ``name``, ``filters`` and
        ``shares``, for each event (mean, lowest, highest) share of the layer's filters dropped over the
        runs that have the event. The last row is all layers together.
    """
    drops = [
        {
            (event["cycle"], event["epoch"]): event["filters"]
            for event in run.events
            if event["kind"] == "drop"
        }
        for run in runs
    ]
    events = sorted(set().union(*drops))
    if not events or runs[0].result is None:
        return None
    sizes: dict[str, int] = runs[0].result["filters"]
    rows = []
    for name, layers in [*((name, [name]) for name in sizes), ("all layers", list(sizes))]:
        filters = sum(sizes[layer] for layer in layers)
        shares = []
        for event in events:
            found = [
                sum(len(set(one[event].get(layer, []))) for layer in layers) / max(1, filters)
                for one in drops
                if event in one
            ]
            shares.append((sum(found) / len(found), min(found), max(found)))
        rows.append({"name": name, "filters": filters, "shares": shares})
    return {"events": events, "rows": rows}


def _render(
    runs: Sequence[RunRecord],
    summaries: Sequence[MethodSummary],
    rows: Sequence[Mapping[str, Any]],
    curves: Sequence[CurveSet],
    title: str,
    baseline: str,
    home: Path,
) -> str:
    import jinja2
    from markupsafe import Markup

    finished = [run for run in runs if run.result is not None]
    series = [
        Series(
            method=each.method,
            color=figures.COLORS[index % len(figures.COLORS)],
            runs=sorted((run for run in finished if run.method == each.method), key=lambda run: run.seed),
        )
        for index, each in enumerate(summaries)
    ]
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: figures.printable(value) if type(value) is str else value,
    )
    environment.filters.update(
        label=compare.label,
        mention=compare.mention,
        percent=compare.percent,
        signed=compare.signed,
        interval=compare.interval,
        duration=compare.duration,
        estimate=pruned.percent,
        area=pruned.area,
        setting=_setting,
        # "95 %" and "n = 3" are not to be torn apart at the end of a line.
        unbroken=lambda text: text.replace(" %", "\u00a0%").replace("n = ", "n\u00a0=\u00a0"),
    )
    source = resources.files("regrow.study").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=title,
        baseline=baseline,
        has_baseline=any(each.method == baseline for each in summaries),
        headlines=compare.headline(summaries).split("\n"),
        summaries=summaries,
        series=series,
        colors={each.method: each.color for each in series},
        rows=[{**row, "planned": run.config.get("epochs")} for row, run in zip(rows, runs, strict=True)],
        figures={
            name: (Markup(_uri(draw, WIDE)), Markup(_uri(draw, NARROW)))
            for name, draw in _drawings(series, summaries, curves).items()
        },
        pruned=curves,
        readings=[reading for reading in pruned.READINGS if any(reading in each.readings for each in curves)],
        outdated=[_near(run.folder, home) for run in pruned.outdated(finished)],
        maps=[
            {"method": each.method, "shown": min(_MAPS, len(each.runs)), "runs": len(each.runs)}
            for each in _mapped(series)
        ],
        cuts=[
            {"method": each.method, "runs": len(each.runs), **shares, **_remarks(each.runs)}
            for each in series
            if (shares := cut_shares(each.runs)) is not None
        ],
        settings=_settings(series),
        environments=_environments(finished, home),
        commands=sorted({run.environment["command"] for run in finished}),
        again=shlex.quote(f"{_near(finished[-1].folder, home)}/config.yaml"),
        regrow=finished[0].environment["regrow"],
    )


def _drawings(
    series: Sequence[Series], summaries: Sequence[MethodSummary], curves: Sequence[CurveSet]
) -> dict[str, Callable[[float], Figure]]:
    differences = {each.method: each.difference for each in summaries if each.difference}
    drawings: dict[str, Callable[[float], Figure]] = {"dots": partial(figures.dots, series, differences)}
    colors = {each.method: each.color for each in series}
    for index, each_set in enumerate(curves):
        drawings[f"pruned {index}"] = partial(figures.pruned_curves, each_set, colors)
    trained = [each for each in series if any(run.epochs for run in each.runs)]
    if trained:
        drawings["curves"] = partial(figures.learning_curves, trained)
        drawings["overlap"] = partial(figures.overlap_curves, trained)
    for each in _mapped(series):
        drawings[f"map {each.method}"] = partial(figures.filter_map, each.runs[:_MAPS], each.color)
    return drawings


def _mapped(series: Sequence[Series]) -> list[Series]:
    """The methods that ever dropped a filter."""
    return [each for each in series if any(run.events and run.epochs for run in each.runs)]


def _uri(draw: Callable[[float], Figure], width: float) -> str:
    picture = figures.svg(draw, width).encode("utf-8", errors="replace")
    return "data:image/svg+xml;base64," + base64.b64encode(picture).decode()


def _remarks(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """The notes of the events and the layers regrown along the least covered directions, with counts."""
    notes: dict[str, int] = {}
    layers: dict[str, int] = {}
    for run in runs:
        for event in run.events:
            for note in event["notes"]:
                notes[str(note)] = notes.get(str(note), 0) + 1
            for layer in event.get("least_covered", []):
                layers[str(layer)] = layers.get(str(layer), 0) + 1
    restores = sum(event["kind"] == "restore" for run in runs for event in run.events)
    return {"notes": notes, "least_covered": layers, "restores": restores}


def _settings(series: Sequence[Series]) -> dict[str, Any]:
    """Settings all methods share, and those that belong to a method or differ, {key: [value of each]}."""
    configs = [each.runs[0].config for each in series]
    keys = [
        key
        for key in dict.fromkeys(key for config in configs for key in config)
        if key not in ("version", "method", "seed")
    ]
    owned = frozenset().union(*METHOD_SETTINGS.values())
    shared = {
        key: configs[0].get(key)
        for key in keys
        if key not in owned and all(config.get(key) == configs[0].get(key) for config in configs)
    }
    differing = {
        key: [
            "—"
            if key in owned and key not in METHOD_SETTINGS.get(config["method"], owned)
            else _setting(config.get(key, "—"))
            for config in configs
        ]
        for key in keys
        if key not in shared
    }
    used = {key: values for key, values in differing.items() if set(values) != {"—"}}
    return {"shared": shared, "differing": used}


def _setting(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else str(value)


def _environments(runs: Sequence[RunRecord], home: Path) -> dict[str, list[tuple[str, str]]]:
    """{key: [(value, which runs)]}: one value where all runs agree."""
    found: dict[str, list[tuple[str, str]]] = {}
    for key in runs[0].environment:
        if key in ("version", "command"):
            continue
        folders: dict[str, list[str]] = {}
        for run in runs:
            folders.setdefault(_setting(run.environment.get(key)), []).append(_near(run.folder, home))
        found[key] = [
            (value, "" if len(folders) == 1 else ", ".join(where)) for value, where in folders.items()
        ]
    return found


def _near(folder: Path, home: Path) -> str:
    """``folder`` as seen from the report; its name alone when it lies elsewhere."""
    folder, home = folder.resolve(), home.resolve()
    return folder.relative_to(home).as_posix() if folder.is_relative_to(home) else folder.name


def _csv(runs: Sequence[Mapping[str, Any]], methods: Sequence[Mapping[str, Any]]) -> str:
    """One table; ``level`` tells a run's row from a method's."""
    keys = list(dict.fromkeys(key for row in [*runs, *methods] for key in row if key != "seeds"))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["level", *keys])
    for level, rows in (("run", runs), ("method", methods)):
        writer.writerows([level, *(_cell(row.get(key)) for key in keys)] for row in rows)
    return text.getvalue()


def _cell(value: object) -> object:
    # A spreadsheet would run a name that starts like a formula.
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
