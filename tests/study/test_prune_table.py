"""The report of ``prune`` for the terminal, without torch."""

import subprocess
import sys

import pytest
from rich.console import Console

from cut_reports import LATENCY
from regrow.pruning.report import Report, count, milliseconds, share, size
from regrow.study.prune_table import prune_tables

REPORT = {
    "layers": {
        "a": {"before": 64, "after": 32},
        "b": {"before": 8, "after": 8},
        "c": {"before": 9, "after": 6},
    },
    "left_out": {"b": "excluded"},
    "masked": {"c": "not confirmed"},
    "parameters": {"before": 11_700_000, "after": 5_850_000},
    "macs": {"before": 2_000, "after": 500},
    "latency": {"before": LATENCY, "after": LATENCY | {"median": 0.001}},
    "memory": {
        "weights": {"before": 46_800_000, "after": 23_400_000},
        "activations": {"before": 524_288, "after": 524_288},
    },
    "accuracy": {"before": 0.923, "after": 0.91, "images": 359},
    "test_accuracy": None,
}


def shown(report: dict, width: int = 80) -> list[str]:
    console = Console(width=width)
    with console.capture() as capture:
        for table in prune_tables(report):
            console.print(table)
    return [" ".join(line.split()) for line in capture.get().splitlines()]


def timed(network: str, deployed: bool, first: float, second: float, accuracy: float | None) -> dict:
    latency = {"1": LATENCY | {"median": first}, "32": LATENCY | {"median": second}}
    mode = "graph" if deployed else "eager"
    row = {"network": network, "deployed": deployed, "mode": mode, "latency": latency, "accuracy": accuracy}
    return row | {"difference": 0.0123 if deployed else None}


@pytest.mark.parametrize("accuracy", [0.912, None])
def test_the_table_of_the_deployed_network(accuracy: float | None) -> None:
    rows = [timed("before", False, 0.002, 0.02, accuracy), timed("after", True, 0.0005, 0.004, accuracy)]
    record = {"batches": [1, 32], "form": {"dtype": "float16"}, "rows": rows}
    lines = shown(REPORT | {"deployed": record, "settings": {"deployed": record["form"]}})
    judged = "" if accuracy is None else " 91.20%"
    assert f"before 2 ms 100 % 20 ms 100 %{judged}" in lines
    assert f"after, deployed 0.5 ms 25 % 4 ms 20 %{judged} 1.2e-02" in lines
    assert lines[-4].startswith("float16, graph batch of 1 left batch of 32 left")
    assert "latency deployed, median 2 ms 1 ms 50 %" in lines
    assert not any("deployed" in line for line in shown(REPORT))


def test_every_number_with_its_unit():
    lines = shown(REPORT)
    for line in (
        "a 64 32 50 %",
        "b 8 8 100 % excluded",
        "c 9 6 66.7 % at 0, not cut: not confirmed",
        "parameters 11.7 M 5.85 M 50 %",
        "multiply-accumulates 2 k 500 25 %",
        "weights 46.8 MB 23.4 MB 50 %",
        "activations at their peak 524 kB 524 kB 100 %",
        "latency, median 2 ms 1 ms 50 %",
        "lowest – highest 1.5 ms – 12.5 ms 1.5 ms – 12.5 ms",
        "validation accuracy 92.30% 91.00% −1.30 points",
    ):
        assert line in lines, (line, lines)
    assert not any("test accuracy" in line for line in lines)


@pytest.mark.parametrize("settings", [{}, {"settings": {"deployed": {"dtype": "float16"}}}])
def test_the_report_prints_as_the_command_shows_it(settings: dict) -> None:
    report = Report(REPORT | settings)
    console = Console(width=200)
    with console.capture() as capture:
        for table in prune_tables(report):
            console.print(table)
    command = [line.rstrip() for line in capture.get().splitlines()]
    assert [line for line in str(report).splitlines() if line] == command


NETWORKS = [
    ("uncut", 0.977, 0.986, 203_072, 0.002, 79_616),
    ("cut", 0.607, 0.529, 100_084, 0.001, 41_064),
    ("cut and reconstructed", 0.9765, 0.985, 100_084, 0.001, 41_064),
]
KEYS = ("network", "validation_accuracy", "test_accuracy", "macs", "latency", "file_size")


def test_the_last_table_sets_the_cut_beside_the_reconstructed() -> None:
    rows = [dict(zip(KEYS, row, strict=True)) for row in NETWORKS]
    lines = shown(REPORT | {"networks": rows})
    assert lines[-5] == "network test accuracy multiply-accumulates latency file size"
    assert lines[-3:] == [
        "uncut 98.60% 203 k 2 ms 79.6 kB",
        "cut 52.90% 100 k 1 ms 41.1 kB",
        "cut and reconstructed 98.50% 100 k 1 ms 41.1 kB",
    ]
    rows[1]["test_accuracy"] = None
    lines = shown(REPORT | {"networks": rows, "settings": {"deployed": {}, "criterion": "l2"}}, width=100)
    assert lines[-5].startswith("network validation accuracy")
    assert lines[-2] == "cut 60.70% 100 k 1 ms 41.1 kB"
    assert "deployed" not in lines[-5]
    deployed = shown(REPORT | {"networks": rows, "settings": {"deployed": {"dtype": None}}}, width=100)
    assert "multiply-accumulates latency deployed file size" in deployed[-5]
    for nothing in (REPORT, REPORT | {"networks": None}):
        assert not any("reconstructed" in line for line in shown(nothing))


def test_names_are_shown_as_they_are():
    report = {**REPORT, "layers": {"[red]a[/]": {"before": 4, "after": 2}}, "left_out": {}, "masked": {}}
    assert "[red]a[/] 4 2 50 %" in shown(report)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count(999), "999"),
        (count(1234), "1.23 k"),
        (count(4.1e9), "4.1 G"),
        (size(12), "12 B"),
        (size(44_700_000), "44.7 MB"),
        (milliseconds(0.0012345), "1.23 ms"),
        (share({"before": 0, "after": 0}), "—"),
    ],
)
def test_three_digits(text, expected):
    assert text == expected


def test_it_needs_no_torch():
    code = "import regrow.study.prune_table, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
