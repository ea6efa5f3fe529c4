"""What ``prune`` returns: plain data that prints as the tables that the command shows. No PyTorch here."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

Rows = list[list[str]]
_SHOWN = {"layers", "left_out", "masked", "parameters", "macs", "latency", "memory"}


class Report(dict[str, Any]):
    """The report of ``prune``: a dict, and ``str`` of it is a table of layers and one of the whole network.

    A copy is such a report too. Pickled it becomes an ``OrderedDict``, which ``torch.load`` reads with
    ``weights_only=True``.
    """

    def __copy__(self) -> Report:
        return Report(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Report:
        return Report(copy.deepcopy(dict(self), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.items())

    def __str__(self) -> str:
        if not self.keys() >= _SHOWN:  # a part of a report
            return repr(self)
        tables = (as_text(layer_rows(self), notes=True), as_text(whole_rows(self)))
        return "\n\n".join(tables)


def layer_rows(report: Mapping[str, Any]) -> Rows:
    """The filters of each layer before and after, and a note where there is one; first the head."""
    notes = {
        **report["left_out"],
        **{name: f"at 0, not cut: {why}" for name, why in report["masked"].items()},
    }
    return [
        ["filters of", "before", "after", "left", ""],
        *(
            [name, str(pair["before"]), str(pair["after"]), share(pair), notes.get(name, "")]
            for name, pair in report["layers"].items()
        ),
    ]


def whole_rows(report: Mapping[str, Any]) -> Rows:
    """The cost of the network before and after, and its accuracy where known; the first row is the head."""
    rows = [["", "before", "after", "left"]]
    for name, pair, show in (
        ("parameters", report["parameters"], count),
        ("multiply-accumulates", report["macs"], count),
        ("weights", report["memory"]["weights"], size),
        ("activations at their peak", report["memory"]["activations"], size),
    ):
        rows.append([name, show(pair["before"]), show(pair["after"]), share(pair)])
    latency = report["latency"]
    medians = {when: latency[when]["median"] for when in ("before", "after")}
    rows.append([f"{latency_name(report)}, median", *map(milliseconds, medians.values()), share(medians)])
    spread = [
        f"{milliseconds(latency[when]['lowest'])} – {milliseconds(latency[when]['highest'])}"
        for when in medians
    ]
    rows.append(["  lowest – highest", *spread, ""])
    for name, key in (("validation accuracy", "accuracy"), ("test accuracy", "test_accuracy")):
        if pair := report.get(key):
            points = f"{100 * (pair['after'] - pair['before']):+.2f} points".replace("-", "−")
            rows.append([name, *(f"{pair[when]:.2%}" for when in medians), points])
    return rows


def as_text(rows: Sequence[Sequence[str]], *, notes: bool = False) -> str:
    """A table as text, with a line under its head: the first column to the left, the others to the right.

    Args:
        notes: the last column is one of notes, to the left as well.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = (0, len(widths) - 1) if notes else (0,)
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "─" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def latency_name(report: Mapping[str, Any]) -> str:
    """What the report's latency is of: "latency", or "latency deployed"."""
    deployed = report.get("settings", {}).get("deployed")
    return "latency deployed" if deployed else "latency"


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
