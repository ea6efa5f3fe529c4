"""Time per epoch of RePr beside plain training of the same net, alternating in one run.

    python benchmarks/epoch_time.py --out benchmarks/epoch_time.md

Each round trains, in turn, one epoch of every variant: plain PyTorch (no regrow code at all), the same
net with RePr in its full phase (nothing dropped), and with RePr in its sub phase (30 % of the filters
dropped). Drop and restore are timed on their own, as is the reading of the structure when RePr is built.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import regrow
from regrow.study.models import build_model
from regrow.study.records import environment

NETS = {"vanilla net": ("convnet", {}), "ResNet-20": ("resnet", {"depth": 20})}


def make(name: str, size: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    family, options = NETS[name]
    model = build_model(family, classes=10, channels=3, size=(size, size), **options)
    return model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
    model.train()
    for images, labels in batches:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def attach(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]
) -> regrow.RePr:
    return regrow.RePr(model, optimizer, full=1, sub=1, cycles=99, example_inputs=batches[0][0][:1])


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def measure(name: str, *, rounds: int, steps: int, batch: int, size: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randn(batch, 3, size, size, generator=generator),
            torch.randint(10, (batch,), generator=generator),
        )
        for _ in range(steps)
    ]
    plain, full, sub = (make(name, size) for _ in range(3))
    built: list[regrow.RePr] = []
    times: dict[str, list[float]] = {
        "build": [seconds(lambda m=m, o=o: built.append(attach(m, o, batches))) for m, o in (full, sub)]
    }
    built[1].step()  # dropped from here on
    for variant in ("plain", "full", "sub", "restore", "drop"):
        times[variant] = []
    for number in range(rounds + 1):
        # The first round warms up; the order turns, so that no variant always follows the same one.
        variants = [("plain", plain), ("full", full), ("sub", sub)]
        for variant, (model, optimizer) in variants[number % 3 :] + variants[: number % 3]:
            taken = seconds(lambda m=model, o=optimizer: epoch(m, o, batches))
            if number:
                times[variant].append(taken)
        times["restore"].append(seconds(built[1].step))
        times["drop"].append(seconds(built[1].step))
    return times


def ratio(times: list[float], to: list[float]) -> str:
    ratios = [a / b for a, b in zip(times, to, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds (n)")
    parser.add_argument("--steps", type=int, default=20, help="batches per epoch")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = environment("cpu", arguments.threads)
    lines = [
        "# Time per epoch: RePr beside plain training",
        "",
        f"`python benchmarks/epoch_time.py --rounds {arguments.rounds} --steps {arguments.steps} "
        f"--threads {arguments.threads}`: n = {arguments.rounds} rounds, alternating, of {arguments.steps} "
        f"batches of {arguments.batch} pictures of {arguments.size}×{arguments.size}; SGD with Nesterov "
        "momentum; 30 % of the ranked filters dropped and held dead by masks. Ratios are paired within a "
        "round: median (lowest to highest).",
        "",
        f"{where['processor']}, {where['cores']} cores, {arguments.threads} threads; Python "
        f"{platform.python_version()}, torch {torch.__version__}, regrow {regrow.__version__}.",
        "",
        "| net | plain, s per epoch | RePr full : plain | RePr sub : plain | build, s | drop, ms | "
        "restore, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in NETS:
        times = measure(
            name, rounds=arguments.rounds, steps=arguments.steps, batch=arguments.batch, size=arguments.size
        )
        drop, restore = (1000 * statistics.median(times[event]) for event in ("drop", "restore"))
        lines.append(
            f"| {name} | {statistics.median(times['plain']):.3f} ({min(times['plain']):.3f} to "
            f"{max(times['plain']):.3f}) | {ratio(times['full'], times['plain'])} | "
            f"{ratio(times['sub'], times['plain'])} | {min(times['build']):.2f} | {drop:.1f} | "
            f"{restore:.1f} |"
        )
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
