"""Tables for the terminal that show the report of ``prune``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from regrow.pruning.report import count, latency_name, layer_rows, milliseconds, share, size, whole_rows

if TYPE_CHECKING:
    from rich.table import Table


def prune_tables(report: Mapping[str, Any]) -> list[Table]:
    """The filters of each layer, the network's cost and accuracy, before and after, its time deployed, and
    last the network uncut, cut, and cut and reconstructed, where the report has that.

    Args:
        report: what ``regrow.prune`` returned, or prune.json.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    layers, whole = (
        Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)) for _ in range(2)
    )
    for table, (head, *rows) in ((layers, layer_rows(report)), (whole, whole_rows(report))):
        table.add_column(head[0], overflow="fold")
        for column in head[1:4]:
            table.add_column(column, justify="right", no_wrap=True)
        for column in head[4:]:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
    deployed = report.get("deployed")
    networks = report.get("networks")
    return [
        layers,
        whole,
        *([deployed_table(deployed)] if deployed else []),
        *([networks_table(networks, latency_name(report))] if networks else []),
    ]


def networks_table(rows: Sequence[Mapping[str, Any]], latency: str) -> Table:
    """What a cut costs in accuracy, without and with making up for it, and what it saves.

    Args:
        rows: ``networks`` of prune.json. The accuracy is that on test pictures, if all rows have it, else
            that on validation pictures.
        latency: the head of the column of median times.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    tested = all(row["test_accuracy"] is not None for row in rows)
    kind = "test" if tested else "validation"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("network", overflow="fold")
    for column in (f"{kind} accuracy", "multiply-accumulates", latency, "file size"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [f"{row[f'{kind}_accuracy']:.2%}", count(row["macs"])]
        cells += [milliseconds(row["latency"]), size(row["file_size"])]
        table.add_row(*map(Text, [row["network"], *cells]))
    return table


def deployed_table(record: Mapping[str, Any]) -> Table:
    """The time of each network, as it is and deployed, for each batch, its accuracy, and how far its outputs
    are off as a share of the largest.

    Args:
        record: what ``regrow.compare_latency`` returned.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows, batches = record["rows"], list(map(str, record["batches"]))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(form_of(record), overflow="fold")
    for batch in batches:
        table.add_column(f"batch of {batch}", justify="right", no_wrap=True)
        table.add_column("left", justify="right", no_wrap=True)
    judged = rows[0]["accuracy"] is not None
    if judged:
        table.add_column("accuracy", justify="right", no_wrap=True)
    table.add_column("off by", justify="right", no_wrap=True)
    for row in rows:
        cells = [f"{row['network']}, deployed" if row["deployed"] else row["network"]]
        for batch in batches:
            median = row["latency"][batch]["median"]
            cells += [
                milliseconds(median),
                share({"before": rows[0]["latency"][batch]["median"], "after": median}),
            ]
        cells += [f"{row['accuracy']:.2%}"] if judged else []
        table.add_row(*map(Text, [*cells, "" if row["difference"] is None else f"{row['difference']:.1e}"]))
    return table


def form_of(record: Mapping[str, Any]) -> str:
    """How networks were deployed: "float16, graph"."""
    modes = dict.fromkeys(row["mode"] for row in record["rows"] if row["deployed"])
    return ", ".join(filter(None, [record["form"]["dtype"], *modes]))
