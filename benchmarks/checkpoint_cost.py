"""What a checkpoint, the records and the progress bar cost, as shares of an epoch, in turns in one run.

    python benchmarks/checkpoint_cost.py --out benchmarks/checkpoint_cost.md

Each round trains an epoch of ResNet-20 on Fashion-MNIST with the reference loop's own function, then
writes what the loop writes after it: the records of the epoch and a checkpoint, each timed on its own.
The progress bar is drawn to a terminal in memory. Its cost is the time of the calls that the epoch makes, and
of as many redrawings as the bar's own thread does in that time, all charged to the epoch.
The checkpoint is that of a run's last epoch, which holds the records of 200 epochs, and there are two older
ones. It is written to the disk of the folder given with ``--folder``.
"""

from __future__ import annotations

import argparse
import io
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import regrow
from regrow.criteria.score import overlap
from regrow.study import progress as progress_module
from regrow.study import records
from regrow.study.building import build, load_splits, make_optimizer, make_scheduler
from regrow.study.checkpoints import from_bytes, to_bytes, write_checkpoint
from regrow.study.config import make_config
from regrow.study.feeding import Batches
from regrow.study.methods.method import Method
from regrow.study.progress import Progress
from regrow.study.ranks import Ranks
from regrow.study.snapshot import random_state, state_of
from regrow.study.steps import Step, train_epoch

EPOCHS = 200


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def drawn_bar() -> Progress:
    """A progress bar that takes a buffer for a terminal, so that it is drawn wherever this runs."""
    real = progress_module.Console
    progress_module.Console = lambda **_: Console(file=io.StringIO(), force_terminal=True, width=120)  # type: ignore[assignment,misc]
    try:
        return Progress()
    finally:
        progress_module.Console = real  # type: ignore[misc]


def measure(
    folder: Path, *, rounds: int, train_size: int, threads: int
) -> tuple[dict[str, list[float]], int]:
    data = {"data": "fashion-mnist", "train_size": train_size}
    config = make_config({**data, "model": "resnet", "depth": 20, "threads": threads, "device": "cpu"})
    splits = load_splits(config)
    torch.manual_seed(0)
    model = build(config, splits).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(model, config)
    batches = Batches(
        splits.train, batch_size=config.batch_size, mean=splits.mean, std=splits.std, augmentation="shift"
    )
    steps = len(batches)
    scheduler = make_scheduler(optimizer, config, steps)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step = Step(model, optimizer, scaler)
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    line: dict[str, Any] = {
        "version": records.VERSION,
        "epoch": 1,
        "phase": "full",
        "learning_rate": 0.1,
        "train_loss": 1.23456789,
        "train_accuracy": 0.56789,
        "validation_loss": 1.23456789,
        "validation_accuracy": 0.56789,
        "overlap": 1.0,
        "alive": 688,
        "filters": 688,
        "seconds": 60.123456,
        "flops": 10**13,
    }
    quiet = Progress(quiet=True)
    quiet.start("run", steps)
    times: dict[str, list[float]] = {name: [] for name in ("epoch", "checkpoint", "records", "progress")}

    def write_records() -> None:
        line["overlap"] = sum(float(overlap(convolution.weight).sum()) for convolution in convolutions)
        records.append_line(records.epochs_path(folder), line)

    def checkpoint(number: int) -> None:
        state = {
            "epoch": number,
            "epochs": [line] * EPOCHS,
            "events": [],
            "trained": state_of(model, optimizer, scheduler, scaler, Method()),
            "random": [from_bytes(to_bytes(random_state()))],
        }
        write_checkpoint(folder, number, state)

    def show(epoch: float) -> float:
        with drawn_bar() as bar:
            bar.start("run", steps)
            begun = time.perf_counter()
            for step in range(0, steps, 16):
                bar.advance(min(16, steps - step), 1.2345)
            bar.epoch(1, EPOCHS, 1.2345, 0.5)
            calls = time.perf_counter() - begun
            redrawing = seconds(lambda: [bar._bar.refresh() for _ in range(20)]) / 20
            return calls + redrawing * epoch * bar._bar.live.refresh_per_second

    for number in range(rounds + 1):  # the first round warms up
        epoch = seconds(lambda n=number: train_epoch(step, batches, n, scheduler, Ranks(), quiet))
        taken = {
            "epoch": epoch,
            "checkpoint": seconds(lambda n=number: checkpoint(n + 1)),
            "records": seconds(write_records),
            "progress": show(epoch),
        }
        if number:
            for name, value in taken.items():
                times[name].append(value)
    return times, max(path.stat().st_size for path in folder.glob("checkpoint-*"))


def cell(times: list[float], unit: float = 1000, digits: int = 1) -> str:
    median, low, high = (unit * f(times) for f in (statistics.median, min, max))
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (n)")
    parser.add_argument("--train-size", type=int, default=54000, help="pictures per epoch; 54,000 are all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    where = records.environment("cpu", given.threads)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        times, size = measure(
            Path(folder), rounds=given.rounds, train_size=given.train_size, threads=given.threads
        )
    shares = {
        name: [part / epoch for part, epoch in zip(times[name], times["epoch"], strict=True)]
        for name in ("checkpoint", "records", "progress")
    }
    both = [a + b for a, b in zip(shares["records"], shares["progress"], strict=True)]
    lines = [
        "# What checkpoints, records and progress cost",
        "",
        f"`python benchmarks/checkpoint_cost.py --rounds {given.rounds} --train-size {given.train_size} "
        f"--threads {given.threads}`: n = {given.rounds} epochs of ResNet-20 on {given.train_size} pictures "
        "of Fashion-MNIST (batches of 128, SGD), each followed by what it writes. Checkpoint: "
        f"{size / 1e6:.2f} MB with the records of {EPOCHS} epochs, written through to the disk. Progress: a "
        "bar in a terminal; none is drawn elsewhere. Shares are paired within a round: median (lowest to "
        "highest).",
        "",
        f"{where['processor']}, {where['cores']} cores, {given.threads} threads; Python "
        f"{platform.python_version()}, torch {torch.__version__}, regrow {regrow.__version__}.",
        "",
        "| | ms | share of an epoch, % | limit, % |",
        "|---|---|---|---|",
        f"| epoch | {cell(times['epoch'], digits=0)} | | |",
        f"| checkpoint | {cell(times['checkpoint'])} | {cell(shares['checkpoint'], 100, 3)} | 2 |",
        f"| records | {cell(times['records'])} | {cell(shares['records'], 100, 3)} | |",
        f"| progress | {cell(times['progress'])} | {cell(shares['progress'], 100, 3)} | |",
        f"| records and progress | | {cell(both, 100, 3)} | 1 |",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
