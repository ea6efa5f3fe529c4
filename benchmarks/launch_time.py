"""Four digits runs, two at a time, beside the same four one after another: one thread each, alternating.

    python benchmarks/launch_time.py --out benchmarks/launch_time.md

Each time is that of a whole process that trains two methods with two seeds, from its start to its end. It
includes the start of the workers and all imports, but not the report.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import regrow
from regrow.study.config import make_config
from regrow.study.live import LiveTable
from regrow.study.local import run_local
from regrow.study.plan import Job
from regrow.study.records import environment

LIMIT = 0.6


def train_four(folder: Path, *, workers: int, epochs: int) -> None:
    settings = [
        {"method": method, "seed": seed, "epochs": epochs, "threads": 1}
        for seed in (0, 1)
        for method in ("standard", "repr")
    ]
    jobs = [
        Job(make_config(each), folder / f"{each['method']}-seed{each['seed']}", "new") for each in settings
    ]
    with LiveTable(jobs, folder) as shown:
        failed = run_local(jobs, shown, workers=workers)
    if failed:
        raise SystemExit(f"a run failed: {failed}")


def seconds(workers: int, epochs: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--train", folder, "--workers", str(workers)]
        begun = time.perf_counter()
        subprocess.run([*command, "--epochs", str(epochs)], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - begun


def spread(values: list[float], places: int) -> str:
    low, middle, high = (
        f"{value:.{places}f}" for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (n)")
    parser.add_argument("--epochs", type=int, default=60, help="of each run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--train", type=Path, help="train the four runs here, once, and stop")
    parser.add_argument("--workers", type=int, default=1, help="with --train: how many at a time")
    arguments = parser.parse_args()
    if arguments.train is not None:
        train_four(arguments.train, workers=arguments.workers, epochs=arguments.epochs)
        return
    times: dict[int, list[float]] = {1: [], 2: []}
    for number in range(arguments.rounds + 1):
        # The first round warms up; the order turns, so that neither always comes first.
        for workers in (1, 2) if number % 2 else (2, 1):
            taken = seconds(workers, arguments.epochs)
            if number:
                times[workers].append(taken)
            print(f"round {number}, {workers} at a time: {taken:.1f} s", flush=True)
    ratios = [two / one for one, two in zip(times[1], times[2], strict=True)]
    where = environment("cpu", 1)
    lines = [
        "# Two processes beside one: four digits runs",
        "",
        f"`python benchmarks/launch_time.py --rounds {arguments.rounds} --epochs {arguments.epochs}`: n = "
        f"{arguments.rounds} rounds, alternating. Four runs of the vanilla net on the digits (standard "
        f"training and RePr, two seeds, {arguments.epochs} epochs), one thread each, from the start of the "
        "process to its end. Ratios are paired within a round: median (lowest to highest).",
        "",
        f"{where['processor']}, {where['cores']} cores; Python {platform.python_version()}, torch "
        f"{where['torch']}, regrow {regrow.__version__}.",
        "",
        "| one after another, s | two at a time, s | ratio | limit |",
        "|---|---|---|---|",
        f"| {spread(times[1], 1)} | {spread(times[2], 1)} | {spread(ratios, 3)} | {LIMIT} |",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
