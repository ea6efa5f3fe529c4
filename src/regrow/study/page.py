"""Render the HTML page of a report from records in memory."""

from __future__ import annotations

import base64
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.study import analyse_figures, compare, drawing, figures, pruned, published, words
from regrow.study.analyse_summary import Analyses, correlation_text, criterion_curves, final_table
from regrow.study.compare import METHOD_SETTINGS, MethodSummary
from regrow.study.compute import equal_compute
from regrow.study.drawing import NARROW, WIDE
from regrow.study.figures import Series
from regrow.study.paired import Spread
from regrow.study.pruned import CurveSet
from regrow.study.records import RunRecord
from regrow.study.templates import environment, resource
from regrow.study.variants import variant_styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAPS = 3
# Methods that draw filters anew one by one.
_REPLACING = ("continual-backprop", "redo")
# With more methods than this, the page begins with one sentence about all of them.
_FEW = 3


@dataclass(frozen=True)
class Content:
    """The content of a page.

    Attributes:
        title: the heading.
        summaries: the methods, the baseline first.
        runs: finished and unfinished, by method and seed.
        groups: {run folder: method or variant}, of ``runs``.
        rows: ``report.run_rows`` of ``runs``.
        curves: accuracy–pruned curves.
        outdated: runs whose curve was measured with weights that they no longer have.
        left_out: {folder or file: why it could not be read}.
        home: the folder of the page.
        numbers: {name: its number among the variants of its method}; the others are numbered here.
        published: {method or variant: the published test accuracy of such a run}, where there is one.
        analyses: what ``regrow analyse`` and the runs have left in their folders.
    """

    title: str
    summaries: Sequence[MethodSummary]
    runs: Sequence[RunRecord]
    groups: Mapping[Path, str]
    rows: Sequence[Mapping[str, Any]]
    curves: Sequence[CurveSet]
    outdated: Sequence[RunRecord]
    left_out: Mapping[str, str]
    home: Path
    numbers: Mapping[str, int] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    analyses: Analyses = field(default_factory=Analyses)


def render(content: Content) -> str:
    """The page as HTML."""
    from markupsafe import Markup

    templates = environment()
    templates.filters.update(
        label=words.label,
        mention=words.mention,
        percent=words.percent,
        signed=words.signed,
        interval=words.interval,
        p_value=words.p_value,
        duration=words.duration,
        flops=words.flops,
        count=lambda number: words.flops(Spread(number, None)),
        estimate=pruned.percent,
        area=pruned.area,
        setting=_setting,
        correlation=correlation_text,
        sentence=_sentence,
        # "95 %" and "n = 3" must not be split at the end of a line.
        unbroken=lambda text: text.replace(" %", "\u00a0%").replace("n = ", "n\u00a0=\u00a0"),
    )
    templates.globals.update(bounds=words.bounds, markers=drawing.MARKERS)
    source = resource("report.html.j2")
    summaries, runs, home = content.summaries, content.runs, content.home
    finished = [run for run in runs if run.result is not None]
    series = _series(content)
    drawings = _drawings(series, summaries, content.curves)
    drawings |= _analysis_drawings(content.analyses, series)
    return templates.from_string(source).render(
        css=Markup(resource("page.css")),
        title=content.title,
        baseline=summaries[0].baseline,
        measure=summaries[0].measure,
        tasks=max(len(each.tasks) for each in summaries),
        compared=any(each.difference for each in summaries),
        equal=any(each.at_equal_compute for each in summaries),
        counted=any(each.flops for each in summaries),
        best=any(each.best_test_accuracy for each in summaries),
        published=content.published,
        publication=published.source(),
        overview=compare.overview(summaries) if summaries[-1].compared > _FEW else None,
        headlines=compare.headline(summaries).split("\n"),
        summaries=summaries,
        series=series,
        styles={each.method: each.style for each in series},
        rows=[
            {**row, "planned": run.config.get("epochs")} for row, run in zip(content.rows, runs, strict=True)
        ],
        figures={
            name: (Markup(_uri(draw, WIDE)), Markup(_uri(draw, NARROW))) for name, draw in drawings.items()
        },
        pruned=content.curves,
        readings=[
            reading for reading in pruned.READINGS if any(reading in each.readings for each in content.curves)
        ],
        outdated=[near(run.folder, home) for run in content.outdated],
        left_out=content.left_out,
        maps=[
            {"method": each.method, "shown": min(_MAPS, len(each.runs)), "runs": len(each.runs)}
            for each in _mapped(series)
        ],
        what_happened=_what_happened(finished),
        cuts=[
            {"method": each.method, "runs": len(each.runs), **shares, **_remarks(each.runs)}
            for each in series
            if (shares := cut_shares(each.runs)) is not None
        ],
        replaced=[
            {"method": each.method, "runs": len(each.runs), **counts, "notes": _remarks(each.runs)["notes"]}
            for each in series
            if (counts := replaced_counts(each.runs)) is not None
        ],
        analyses=content.analyses,
        agreements=final_table(content.analyses.found),
        unanalysed=[near(run.folder, home) for run in content.analyses.outdated],
        settings=_settings(series),
        environments=_environments(finished, home),
        commands=sorted({run.environment["command"] for run in finished}),
        again=shlex.quote(f"{near(finished[-1].folder, home)}/config.yaml"),
        regrow=finished[0].environment["regrow"],
    )


def cut_shares(runs: Sequence[RunRecord]) -> dict[str, Any] | None:
    """The shares of filters that the seeds of one method dropped; None if nothing was dropped.

    Returns:
        ``events``: [(cycle, epoch)] of the drops; ``rows``: per layer ``name``, ``filters`` and
        ``shares``, which has for each event the mean, lowest and highest share of the layer's filters
        dropped, over the runs that have the event. The last row is all layers together. ``at_once``: whether
        every event restored the filters that it dropped.
    """
    drops = [
        {
            (event["cycle"], event["epoch"]): event["filters"]
            for event in run.events
            if event["kind"] in ("drop", "restart")
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
    at_once = not any(event["kind"] == "drop" for run in runs for event in run.events)
    return {"events": events, "rows": rows, "at_once": at_once}


def replaced_counts(runs: Sequence[RunRecord]) -> dict[str, Any] | None:
    """How many filters the seeds of one method drew anew one by one; None if its method does no such thing.

    Returns:
        ``rows``: per layer in which any was drawn anew ``name``, ``filters`` and ``counts``, the mean, lowest
        and highest number over the runs. A filter that was drawn anew after two epochs counts twice. The
        last row is all layers together.
    """
    if runs[0].result is None or runs[0].method.split("+")[0] not in _REPLACING:
        return None
    counts: list[Counter[str]] = []
    for run in runs:
        counts.append(Counter())
        for event in run.events:
            if event["kind"] == "replace":
                counts[-1].update({name: len(indices) for name, indices in event["filters"].items()})
    sizes: dict[str, int] = runs[0].result["filters"]
    layers = [name for name in sizes if any(each[name] for each in counts)]
    rows = []
    for row, names in [*((name, [name]) for name in layers), ("all layers", [*sizes])]:
        found = [sum(each[name] for name in names) for each in counts]
        rows.append(
            {
                "name": row,
                "filters": sum(sizes[name] for name in names),
                "counts": (sum(found) / len(found), min(found), max(found)),
            }
        )
    return {"rows": rows}


def _what_happened(runs: Sequence[RunRecord]) -> str:
    """The heading over the tables of ``cut_shares`` and ``replaced_counts``."""
    cut = any(event["kind"] == "drop" for run in runs for event in run.events)
    anew = any(event["kind"] == "restart" for run in runs for event in run.events)
    anew |= any(run.method.split("+")[0] in _REPLACING for run in runs)
    return ("What was cut or drawn anew" if cut else "What was drawn anew") if anew else "What was cut when"


def _series(content: Content) -> list[Series]:
    runs: dict[str, list[RunRecord]] = {each.method: [] for each in content.summaries}
    for run in content.runs:
        if run.result is not None:
            runs[content.groups[run.folder]].append(run)
    styles = variant_styles({name: of_name[0].config for name, of_name in runs.items()}, content.numbers)
    return [Series(name, styles[name], of_name) for name, of_name in runs.items()]


def _drawings(
    series: Sequence[Series], summaries: Sequence[MethodSummary], curves: Sequence[CurveSet]
) -> dict[str, Callable[[float], Figure]]:
    differences = {each.method: each.difference for each in summaries if each.difference}
    drawings: dict[str, Callable[[float], Figure]] = {"dots": partial(figures.dots, series, differences)}
    looks = {each.method: each.style for each in series}
    for index, each_set in enumerate(curves):
        drawings[f"pruned {index}"] = partial(figures.pruned_curves, each_set, looks)
    if summaries[0].tasks:
        tasks = {each.method: each.tasks for each in summaries}
        drawings["tasks"] = partial(figures.task_curves, series, tasks)
    trained = [each for each in series if any(run.epochs for run in each.runs)]
    if trained:
        # The epochs of different tasks have no common validation pictures.
        equal = (
            None
            if summaries[0].tasks
            else equal_compute({each.method: {run.seed: run for run in each.runs} for each in series})
        )
        drawings["curves"] = partial(figures.learning_curves, trained)
        drawings["compute"] = partial(figures.compute_curves, trained, equal)
        drawings["overlap"] = partial(figures.overlap_curves, trained)
    for each in _mapped(series):
        drawings[f"map {each.method}"] = partial(figures.filter_map, each.runs[:_MAPS], each.color)
    return drawings


def _analysis_drawings(analyses: Analyses, series: Sequence[Series]) -> dict[str, Callable[[float], Figure]]:
    drawings: dict[str, Callable[[float], Figure]] = {}
    looks = {each.method: each.style for each in series}
    found = analyses.found
    for method, those in found.items():
        curves = criterion_curves(those)
        if any(len(curve.epochs) > 1 for curve in curves):
            drawings[f"agreement {method}"] = partial(
                analyse_figures.agreement_curves, curves, figures.sub_phases(those[0][0])
            )
        framed = [one["first_layer"] for _, one in those if one["first_layer"]]
        if framed:
            drawings[f"pictures {method}"] = partial(
                analyse_figures.filter_pictures, framed[0], looks[method].color
            )
    if found:
        firsts = {method: those[0] for method, those in [*found.items()][:_MAPS]}
        drawings["layers"] = partial(analyse_figures.layer_maps, firsts)
        drawings["drop one"] = partial(analyse_figures.drop_one_curves, found, looks)
    if analyses.between is not None:
        drawings["runs"] = partial(analyse_figures.run_map, analyses.between)
    if analyses.gradients:
        drawings["gradients"] = partial(analyse_figures.gradient_curves, analyses.gradients, looks)
    return drawings


def _mapped(series: Sequence[Series]) -> list[Series]:
    """The methods that ever left a filter out for a while."""
    return [
        each
        for each in series
        if any(run.epochs and any(event["kind"] == "drop" for event in run.events) for run in each.runs)
    ]


def _uri(draw: Callable[[float], Figure], width: float) -> str:
    picture = drawing.svg(draw, width).encode("utf-8", errors="replace")
    return "data:image/svg+xml;base64," + base64.b64encode(picture).decode()


def _remarks(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """The notes of the events and the layers regrown along the least covered directions, with counts."""
    notes: dict[str, int] = {}
    layers: dict[str, int] = {}
    for run in runs:
        for event in run.events:
            for note in event["notes"]:
                notes[str(note)] = notes.get(str(note), 0) + 1
            least_covered = event.get("least_covered")
            for layer in least_covered if isinstance(least_covered, list) else []:
                layers[str(layer)] = layers.get(str(layer), 0) + 1
    restores = sum(event["kind"] in ("restore", "restart") for run in runs for event in run.events)
    return {"notes": notes, "least_covered": layers, "restores": restores}


def _settings(series: Sequence[Series]) -> dict[str, Any]:
    """``shared``: the settings that all methods share; ``differing``: {key: [value of each method]}."""
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


def _sentence(text: str) -> str:
    """``text`` with a capital letter; "tasks 2 to 5" in it is not split at the end of a line."""
    whole = re.sub(r"tasks? \d+( to \d+)?", lambda found: found[0].replace(" ", "\u00a0"), text)
    return whole[:1].upper() + whole[1:]


def _setting(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else str(value)


def _environments(runs: Sequence[RunRecord], home: Path) -> dict[str, list[tuple[str, str]]]:
    """{key: [(value, names of its runs)]}; one value without names if all runs agree."""
    found: dict[str, list[tuple[str, str]]] = {}
    for key in runs[0].environment:
        if key in ("version", "command"):
            continue
        folders: dict[str, list[str]] = {}
        for run in runs:
            folders.setdefault(_setting(run.environment.get(key)), []).append(near(run.folder, home))
        found[key] = [
            (value, "" if len(folders) == 1 else ", ".join(where)) for value, where in folders.items()
        ]
    return found


def near(folder: Path, home: Path) -> str:
    """The path of ``folder`` below ``home``; its name alone if it lies elsewhere."""
    folder, home = folder.resolve(), home.resolve()
    return folder.relative_to(home).as_posix() if folder.is_relative_to(home) else folder.name
