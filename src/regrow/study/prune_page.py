"""One self-contained HTML page about a cut: what ``prune`` was asked and did. Imports no PyTorch.

The page shows the numbers of the report and computes none but shares of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regrow.pruning.report import count, latency_name, milliseconds, share, size, whole_rows
from regrow.study.prune_table import form_of
from regrow.study.records import write_text
from regrow.study.templates import environment, resource

WEIGHTS_FILE = "pruned.safetensors"
_UNITS = {"macs": "multiply-accumulates", "params": "parameters", "latency": "latency"}
_LOOKS = {"uncut": "uncut", "cut": "plain", "cut and reconstructed": "result"}
# A pass that took longer than so many times the slower network's median is drawn at the edge.
_LONGEST = 2.5


def write_prune_page(report: Mapping[str, Any], path: str | Path, *, weights: str = WEIGHTS_FILE) -> Path:
    """Write the page to ``path``, whole or not at all.

    Args:
        report: what ``regrow.prune`` returned, or prune.json.
        path: the page, ending in ``.html``.
        weights: the path of the file with the smaller network's weights, as the page is to show it.

    Returns:
        ``path``.

    Raises:
        ValueError: ``path`` does not end in .html.
    """
    path = Path(path)
    if path.suffix != ".html" or path.is_dir():
        raise ValueError(f"the page is one HTML file: write {path / 'report.html'} instead of {path}.")
    write_text(path, prune_page(report, weights))
    return path


def prune_page(report: Mapping[str, Any], weights: str = WEIGHTS_FILE) -> str:
    """The page as HTML; the arguments are those of ``write_prune_page``."""
    from markupsafe import Markup

    templates = environment()
    templates.filters.update(count=count, size=size, milliseconds=milliseconds)
    source, settings = report.get("source", {}), report["settings"]
    record = report["compensation"]
    reconstruction = reconstruction_rows(report)
    return templates.from_string(resource("prune.html.j2")).render(
        css=Markup(resource("page.css")),
        name=name_of(source),
        asked=asked(report),
        whole=summary_rows(report),
        networks=network_rows(report),
        layers=layer_bars(report),
        alone=left_alone(report),
        masked=report["masked"],
        record=record,
        reconstruction=reconstruction,
        untouched=[row["name"] for row in reconstruction if row["how"] == "nothing"],
        latency=latency_bars(report),
        latency_name=latency_name(report),
        deployed=report.get("deployed"),
        form=form_of(report["deployed"]) if report.get("deployed") else None,
        curve=curve(report),
        tried=sorted(report.get("tried", ()), key=lambda row: row["filters"]),
        filters=report["filters"],
        kind=report["target"]["kind"],
        settings={name: _setting(value) for name, value in settings.items()},
        environment={
            name: _setting(value)
            for name, value in report.get("environment", {}).items()
            if name not in ("version", "command")
        },
        command=report.get("environment", {}).get("command"),
        source={name: _setting(value) for name, value in source.items()},
        load=loading(source, weights),
    )


def name_of(source: Mapping[str, Any]) -> str:
    """The network as the command names it."""
    return str(next((source[key] for key in ("run", "model", "function") if key in source), "the network"))


def asked(report: Mapping[str, Any]) -> tuple[str, str]:
    """A sentence on what was asked for, and one on what came out."""
    kind, value, reached = (report["target"][key] for key in ("kind", "value", "reached"))
    filters = report["filters"]
    gone = f"{filters['before'] - filters['after']:,} of {filters['before']:,} ranked filters are gone"
    if kind == "fraction" and isinstance(value, Mapping):
        shares = ", ".join(f"{_percent(part)} of {name}" for name, part in value.items())
        return f"Asked: remove filters of some layers ({shares}).", f"Reached: {gone}."
    if kind == "fraction":
        return f"Asked: remove {_percent(value)} of the filters.", f"Reached: {gone} ({_percent(reached)})."
    if kind == "max_drop":
        cost = f"{reached:.2f} points were lost" if reached >= 0 else f"{-reached:.2f} points were gained"
        return (
            f"Asked: remove as many filters as cost at most {_points(value)} of validation accuracy.",
            f"Reached: {cost}; {gone}.",
        )
    unit = _UNITS[kind]
    verb = "is" if kind == "latency" else "are"
    return (
        f"Asked: leave at most {_percent(value)} of the {unit}.",
        f"Reached: {_percent(reached)} {verb} left; {gone}.",
    )


def summary_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Accuracy, cost and file size before and after, as the command prints them; accuracy first."""
    rows = whole_rows(report)[1:]
    if networks := report.get("networks"):
        pair = {"before": networks[0]["file_size"], "after": networks[-1]["file_size"]}
        rows.append(["file", size(pair["before"]), size(pair["after"]), share(pair)])
    return sorted(rows, key=lambda row: not row[0].endswith("accuracy"))


def network_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The network uncut, cut, and cut and reconstructed, where the report has that."""
    return [
        {
            "network": row["network"],
            "validation": _accuracy(row["validation_accuracy"]),
            "test": _accuracy(row["test_accuracy"]),
            "macs": count(row["macs"]),
            "latency": milliseconds(row["latency"]),
            "file": size(row["file_size"]),
        }
        for row in report.get("networks") or ()
    ]


def layer_bars(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each layer of the report: filters before and after, and their bars as shares of the widest layer."""
    widest = max((pair["before"] for pair in report["layers"].values()), default=1) or 1
    return [
        {
            "name": name,
            **pair,
            "left": share(pair),
            "bars": (pair["before"] / widest, pair["after"] / widest),
            "note": report["left_out"].get(name, ""),
        }
        for name, pair in report["layers"].items()
    ]


def left_alone(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """{why: layers} of the layers that were not ranked."""
    found: dict[str, list[str]] = {}
    for name, why in report["left_out"].items():
        found.setdefault(why, []).append(name)
    return found


def reconstruction_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What making up for removed filters did in each convolution and in each other layer that it touched.

    ``how``: "least squares", "shift of the mean" or "nothing"; ``why``: the reason for nothing, where the
    record has one; ``error``: the share of the squared error that is left. Empty without a record.
    """
    record = report["compensation"]
    if record is None:
        return []
    names = dict.fromkeys([*report["layers"], *record["layers"], *record["unfolded"]])
    rows = []
    for name in names:
        done = record["layers"].get(name, {})
        how = {"least squares": "least squares", "mean": "shift of the mean"}.get(done.get("how"), "nothing")
        rows.append(
            {
                "name": name,
                "how": how,
                "why": record["unfolded"].get(name, ""),
                "error": _percent(done["error"]) if done.get("error") is not None else "",
            }
        )
    return rows


def latency_bars(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The time of a pass before and after: median, lowest and highest, with places on a common line."""
    times = [report["latency"][when] for when in ("before", "after")]
    slowest = max(time["median"] for time in times)
    end = min(_LONGEST * slowest, max(time["highest"] for time in times)) or 1.0
    return [
        {
            "when": when,
            "median": milliseconds(time["median"]),
            "spread": f"{milliseconds(time['lowest'])} – {milliseconds(time['highest'])}",
            "passes": time.get("passes"),
            "places": [min(1.0, time[key] / end) for key in ("lowest", "median", "highest")],
            "beyond": time["highest"] > end,
        }
        for when, time in zip(("before", "after"), times, strict=True)
    ]


def curve(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Validation accuracy against the share of multiply-accumulates left; None where neither is known.

    The points are the cuts that the search judged, and the networks of the report's last table. Beside a
    search the cut without reconstruction is left out: it lies far below, and would press the others together.
    Places are shares of the picture's width and height.
    """
    points: list[dict[str, Any]] = [
        {"macs": row["macs"], "accuracy": row["accuracy"], "look": "tried", "filters": row["filters"]}
        for row in report.get("tried", ())
        if row["accuracy"] is not None
    ]
    before = report["macs"]["before"]
    if networks := report.get("networks"):
        named = [(row["network"], row["macs"], row["validation_accuracy"]) for row in networks]
    elif report["accuracy"]:
        last = "cut" if report["compensation"] is None else "cut and reconstructed"
        named = [
            (name, report["macs"][when], report["accuracy"][when])
            for name, when in (("uncut", "before"), (last, "after"))
        ]
    else:
        named = []
    points += [
        {"macs": macs / before, "accuracy": accuracy, "look": _LOOKS[name], "name": name}
        for name, macs, accuracy in named
        if accuracy is not None and before and not (points and len(named) > 2 and name == "cut")
    ]
    if not points:
        return None
    ticks = _ticks(min(p["accuracy"] for p in points), max(p["accuracy"] for p in points))
    low, high = ticks[0], ticks[-1]
    for point in points:
        point["x"] = min(1.0, point["macs"])
        point["y"] = (point["accuracy"] - low) / (high - low)
        point["text"] = f"{_percent(point['macs'])} of the multiply-accumulates: {point['accuracy']:.2%}"
    line = sorted((p for p in points if p["look"] in ("tried", "uncut")), key=lambda p: p["x"])
    return {
        "points": points,
        "line": line if any(p["look"] == "tried" for p in points) else [],
        "ticks": [{"y": (tick - low) / (high - low), "text": f"{100 * tick:.4g} %"} for tick in ticks],
        "kinds": {p["look"] for p in points},
    }


def loading(source: Mapping[str, Any], weights: str) -> list[str]:
    """Lines of Python that load the smaller network."""
    if "run" in source:
        made, build = "", f"regrow.load_run({source['run']!r})"
    elif "model" in source:
        made = "from regrow.study.libraries import library_model"
        build = f"library_model({source['model']!r}, {source['weights']!r}).model"
    elif "function" in source:
        home, _, function = source["function"].partition(":")
        made, build = f"from {home} import {function.split('.')[0]}", f"{function}()"
    else:
        made, build = "", "MyNet()  # built as before the cut"
    lines = ["import regrow", made, f"network = {build}", f"small = regrow.load(network, {weights!r})"]
    return [line for line in lines if line]


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round values that enclose ``low`` and ``high``, two accuracies."""
    wanted = max(high - low, 0.01) / 4
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    while last - first < 2:
        if (last + 1) * step <= 1 + 1e-9:
            last += 1
        else:
            first -= 1
    return [round(step * number, 9) for number in range(first, last + 1)]


def _percent(part: float) -> str:
    return f"{100 * part:.3g} %"


def _accuracy(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _points(value: float) -> str:
    return f"{value:g} point{'' if value == 1 else 's'}"


def _setting(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_setting(each)}" for name, each in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else str(value)
