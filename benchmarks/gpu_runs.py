"""Runs per minute when several share one GPU: `regrow study --jobs 1, 2, 4 and 8`, counted.

    python benchmarks/gpu_runs.py --out benchmarks/gpu_runs.md

Each run is a process of its own that trains C3(32) on random pictures of Fashion-MNIST's size, with its
start, its evaluations and its checkpoints in the time. Standard training, RePr and Bridgeout take turns.
"""

from __future__ import annotations

import argparse
import platform
import struct
import tempfile
import time
from pathlib import Path

import torch

import regrow
from regrow.study.config import make_config
from regrow.study.local import run_local
from regrow.study.plan import Job
from regrow.study.records import environment, read_run

METHODS = ("standard", "repr", "bridgeout")


class Quiet:
    def started(self, job: Job) -> None:
        pass

    def finished(self, job: Job, error: str | None) -> None:
        if error is not None:
            raise SystemExit(f"{job.folder.name} failed: {error}")

    def tick(self) -> None:
        pass


def write_pictures(folder: Path, train: int, test: int) -> None:
    """Random pictures in the files of Fashion-MNIST."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", train), ("t10k", test)):
        pixels = torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=generator)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        for name, values in ((f"{part}-images-idx3-ubyte", pixels), (f"{part}-labels-idx1-ubyte", labels)):
            head = struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
            (raw / name).write_bytes(head + values.numpy().tobytes())


def minutes(
    folder: Path, data: Path, device: str, *, runs: int, workers: int, epochs: int
) -> tuple[float, float]:
    """How long ``runs`` runs take, ``workers`` at a time; and for how many seconds one of them trained."""
    settings = {
        "data": "fashion-mnist", "data_dir": str(data), "device": device, "epochs": epochs, "width": 32,
        "precision": "bfloat16" if device != "cpu" else "float32", "p": 0.1, "augmentation": "shift",
    }  # fmt: skip
    jobs = []
    for number in range(runs):
        own = {"method": METHODS[number % len(METHODS)], "seed": number}
        config = make_config({**settings, **own})
        jobs.append(Job(config, folder / f"{config.method}-seed{number}", "new"))
    begun = time.perf_counter()
    run_local(jobs, Quiet(), workers=workers)
    taken = (time.perf_counter() - begun) / 60
    results = [read_run(job.folder).result for job in jobs]
    return taken, sum(result["train_seconds"] for result in results if result) / runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", default="1,2,4,8", help="at a time, with commas between")
    parser.add_argument("--runs", type=int, default=8, help="for each number of workers")
    parser.add_argument("--epochs", type=int, default=5, help="of each run")
    parser.add_argument("--pictures", type=int, default=60_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    counts = [int(each) for each in arguments.workers.split(",")]
    rows: list[tuple[int, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        place, data = Path(folder), Path(folder) / "data"
        write_pictures(data, arguments.pictures, 1000)
        minutes(place / "first", data, arguments.device, runs=1, workers=1, epochs=1)  # starts the server
        for workers in counts:
            taken, trained = minutes(
                place / f"at-{workers}", data, arguments.device, runs=arguments.runs, workers=workers,
                epochs=arguments.epochs,
            )  # fmt: skip
            rows.append((workers, arguments.runs / taken, trained))
            print(f"{workers} at a time: {rows[-1][1]:.2f} runs per minute", flush=True)
    where = environment(arguments.device, 1)
    # Only now: this process's own context would take some of the GPU's memory.
    card = torch.cuda.get_device_name(arguments.device) if arguments.device != "cpu" else where["processor"]
    lines = [
        "# Runs per minute when several share one GPU",
        "",
        f"`python benchmarks/gpu_runs.py --runs {arguments.runs} --epochs {arguments.epochs} --pictures "
        f"{arguments.pictures}`: {arguments.runs} runs of C3(32) for each row, once, on pictures of 28×28; "
        "standard training, RePr and Bridgeout take turns. A run's start and end are in the time.",
        "",
        f"{card}, {where['cores']} CPU cores; Python {platform.python_version()}, torch {where['torch']}, "
        f"regrow {regrow.__version__}.",
        "",
        "| at a time | runs per minute | beside one at a time | training of one run, s |",
        "|---|---|---|---|",
        *(
            f"| {workers} | {rate:.2f} | {rate / rows[0][1]:.2f} | {trained:.1f} |"
            for workers, rate, trained in rows
        ),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
