"""Tables for the terminal that show the report of ``prune``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def prune_tables(report: Mapping[str, Any]) -> list[Table]:
    """The filters of each layer, and the network's cost and accuracy, before and after.

    Args:
        report: what ``regrow.prune`` returned, or prune.json.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    layers, whole = (
        Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)) for _ in range(2)
    )
    layers.add_column("filters of", overflow="fold")
    whole.add_column("", overflow="fold")
    for table in (layers, whole):
        for column in ("before", "after", "left"):
            table.add_column(column, justify="right", no_wrap=True)
    layers.add_column("", overflow="fold")
    notes = {
        **report["left_out"],
        **{name: f"at 0, not cut: {why}" for name, why in report["masked"].items()},
    }
    for name, pair in report["layers"].items():
        note = notes.get(name, "")
        cells = [name, str(pair["before"]), str(pair["after"]), share(pair), note]
        layers.add_row(*map(Text, cells))
    for name, pair, show in (
        ("parameters", report["parameters"], count),
        ("multiply-accumulates", report["macs"], count),
        ("weights", report["memory"]["weights"], size),
        ("activations at their peak", report["memory"]["activations"], size),
    ):
        whole.add_row(*map(Text, [name, show(pair["before"]), show(pair["after"]), share(pair)]))
    latency = report["latency"]
    medians = {when: latency[when]["median"] for when in ("before", "after")}
    whole.add_row(
        *map(Text, ["latency, median", *(milliseconds(each) for each in medians.values()), share(medians)])
    )
    spread = [
        f"{milliseconds(latency[when]['lowest'])} – {milliseconds(latency[when]['highest'])}"
        for when in medians
    ]
    whole.add_row(*map(Text, ["  lowest – highest", *spread, ""]))
    for name, key in (("validation accuracy", "accuracy"), ("test accuracy", "test_accuracy")):
        if pair := report.get(key):
            points = 100 * (pair["after"] - pair["before"])
            cells = [name, *(f"{pair[w]:.2%}" for w in medians)]
            whole.add_row(*map(Text, [*cells, f"{points:+.2f} points".replace("-", "−")]))
    return [layers, whole]


def share(pair: Mapping[str, float]) -> str:
    """The share that is left: "48 %"."""
    return f"{100 * pair['after'] / pair['before']:.3g} %" if pair["before"] else "—"


def count(number: float) -> str:
    """A number with three digits: "11.7 M"."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(int(number))


def size(number: float) -> str:
    """Bytes with three digits: "44.7 MB" (10⁶ bytes)."""
    return f"{count(number)}{'' if number >= 1e3 else ' '}B"


def milliseconds(seconds: float) -> str:
    """With three digits: "1.25 ms"."""
    return f"{1e3 * seconds:.3g} ms"
