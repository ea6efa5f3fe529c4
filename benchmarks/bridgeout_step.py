"""One training step of VGG-16 with Batch Bridgeout on all convolutions beside the plain step.

    python benchmarks/bridgeout_step.py --out benchmarks/bridgeout_step.md

The three kinds of step (plain, Bridgeout as it is, Bridgeout compiled) take turns in one process, and each
ratio is of steps of one round. Memory is what PyTorch's allocator held at most during a step, read from a
profile of one step.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import regrow
from regrow.bridgeout_noise import pool
from regrow.study.models import build_model
from regrow.study.records import environment

FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


class Trainee:
    """VGG-16, plain or with Bridgeout, and its optimizer."""

    def __init__(self, memory_format: torch.memory_format, kind: str) -> None:
        torch.manual_seed(0)
        model = build_model("vgg", classes=10, channels=3, size=(32, 32))
        self.model = model.to(memory_format=memory_format)  # type: ignore[call-overload]
        self.layers = []
        if kind != "plain":
            self.layers = regrow.add_bridgeout(self.model, compiled=kind == "compiled")["layers"]
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
        )

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Seconds that one step takes."""
        begun = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()
        return time.perf_counter() - begun


def peak_bytes(trainee: Trainee, images: Tensor, labels: Tensor) -> int:
    """The most that the allocator held during one step, above what it held at its begin."""
    # What a step takes is counted, whether from the pool or instead of the gradients of the step before.
    trainee.optimizer.zero_grad(set_to_none=True)
    pool.clear()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainee.step(images, labels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        peak = max(peak, held)
    return peak


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def rows(name: str, rounds: int, batch: int) -> list[str]:
    """Two lines of the table, for one memory format."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator).to(memory_format=FORMATS[name])
    labels = torch.randint(10, (batch,), generator=generator)
    trainees = {kind: Trainee(FORMATS[name], kind) for kind in ("plain", "as it is", "compiled")}
    times: dict[str, list[float]] = {kind: [] for kind in trainees}
    shuffler = random.Random(0)
    for number in range(rounds + 1):
        # The first round warms up; the order is random, so that none always follows another.
        for kind in shuffler.sample(list(trainees), 3):
            taken = trainees[kind].step(images, labels)
            if number:
                times[kind].append(taken)
    plain_peak = peak_bytes(trainees["plain"], images, labels)
    lines = []
    for kind in ("as it is", "compiled"):
        trainee = trainees[kind]
        ratios = [b / a for a, b in zip(times["plain"], times[kind], strict=True)]
        modules = dict(trainee.model.named_modules())
        weights = sum(modules[layer].weight.nbytes for layer in trainee.layers)  # type: ignore[union-attr, misc]
        extra = peak_bytes(trainee, images, labels) - plain_peak
        lines.append(
            f"| {name} | {kind} | {spread(times['plain'])} | {spread(times[kind])} | {spread(ratios)} | "
            f"{extra / 2**20:.1f} MiB, {extra / weights:.2f} × the {weights / 2**20:.1f} MiB |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds of steps (n)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = environment("cpu", arguments.threads)
    lines = [
        "# One training step with Batch Bridgeout, beside the plain step",
        "",
        f"`python benchmarks/bridgeout_step.py --rounds {arguments.rounds} --batch {arguments.batch} "
        f"--threads {arguments.threads}`: VGG-16 with batch norm, {arguments.batch} pictures of 32×32, SGD "
        f"with Nesterov momentum, p = 0.3 and q = 1.5 on all convolutions; n = {arguments.rounds} rounds "
        "of one step of each, in random order. Median (lowest to highest); ratios are within a round. Extra "
        "memory: how much higher the peak of a step is, beside the memory of the perturbed weights.",
        "",
        f"{where['processor']}, {where['cores']} cores, {torch.get_num_threads()} threads; Python "
        f"{platform.python_version()}, torch {torch.__version__}, regrow {regrow.__version__}.",
        "",
        "| memory format | Bridgeout | plain, s | Bridgeout, s | ratio | extra memory : weights |",
        "|---|---|---|---|---|---|",
    ]
    for name in FORMATS:
        lines += rows(name, arguments.rounds, arguments.batch)
        print("\n".join(lines[-2:]), flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
