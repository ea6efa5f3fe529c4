"""One training step of VGG-16 and ResNet-20 with Batch Bridgeout on all convolutions beside the plain step.

    python benchmarks/bridgeout_step.py --out benchmarks/bridgeout_step.md
    python benchmarks/bridgeout_step.py --device cuda

VGG-16 has large layers, so its noise costs memory; ResNet-20 has small ones, so its noise costs launches.
The three kinds of step (plain, Bridgeout as it is, Bridgeout compiled) take turns in one process, and each
ratio compares steps of one round. The place that a process's memory happens to have moves its ratios by 2 %,
so the table gives the median of several processes. Memory is the most that PyTorch's allocator held during a
step, read from a profile of one step, or on a GPU from PyTorch's own count. On a GPU ``compiled`` changes
nothing, and is left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import regrow
from regrow.noise.groups import pool
from regrow.study.models import build_model
from regrow.study.records import environment

FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
MODELS = {"VGG-16": "vgg", "ResNet-20": "resnet"}


def kinds(device: str) -> list[str]:
    return ["plain", "as it is", *(["compiled"] if device == "cpu" else [])]


class Trainee:
    """A model, plain or with Bridgeout, and its optimizer."""

    def __init__(self, name: str, memory_format: torch.memory_format, kind: str, device: str) -> None:
        torch.manual_seed(0)
        model = build_model(MODELS[name], classes=10, channels=3, size=(32, 32)).to(device)
        self.model = model.to(memory_format=memory_format)  # type: ignore[call-overload]
        self.layers = []
        if kind != "plain":
            self.layers = regrow.add_bridgeout(self.model, compiled=kind == "compiled")["layers"]
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
        )

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Seconds that one step takes."""
        if images.is_cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begun


def peak_bytes(trainee: Trainee, images: Tensor, labels: Tensor) -> int:
    """The most that the allocator held during one step, above what it held at its beginning."""
    # Without old gradients and a filled pool, all memory that the step takes is counted.
    trainee.optimizer.zero_grad(set_to_none=True)
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainee.step(images, labels)
        return torch.cuda.max_memory_allocated() - before
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


def measure(
    model: str, name: str, rounds: int, batch: int, threads: int, device: str
) -> dict[str, dict[str, float]]:
    """Measure a model in one memory format in this process: by kind of step, medians over the rounds, and
    memory."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator).to(device, memory_format=FORMATS[name])
    labels = torch.randint(10, (batch,), generator=generator).to(device)
    steps = kinds(device)
    trainees = {kind: Trainee(model, FORMATS[name], kind, device) for kind in steps}
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    shuffler = random.Random()
    for number in range(rounds + 2):
        # Two rounds warm up; the order is random, so that none always follows another.
        for kind in shuffler.sample(steps, len(steps)):
            taken = trainees[kind].step(images, labels)
            if number > 1:
                times[kind].append(taken)
    peaks = {kind: peak_bytes(trainee, images, labels) for kind, trainee in trainees.items()}
    noisy = trainees["as it is"]
    modules = dict(noisy.model.named_modules())
    weights = sum(modules[layer].weight.nbytes for layer in noisy.layers)  # type: ignore[union-attr, misc]
    return {
        kind: {
            "seconds": statistics.median(times[kind]),
            "ratio": statistics.median(b / a for a, b in zip(times["plain"], times[kind], strict=True)),
            "extra": peaks[kind] - peaks["plain"],
            "weights": weights,
        }
        for kind in steps
    }


def rows(model: str, name: str, arguments: argparse.Namespace) -> list[str]:
    """Lines of the table, for one model in one memory format."""
    command = [sys.executable, __file__, "--one", model, name, "--rounds", str(arguments.rounds)]
    command += ["--batch", str(arguments.batch), "--threads", str(arguments.threads)]
    command += ["--device", arguments.device]
    steps = kinds(arguments.device)
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in steps}
    for _ in tqdm(range(arguments.processes), desc=f"{model}, {name}", disable=None):
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for kind, measured in json.loads(answer.splitlines()[-1]).items():
            found[kind].append(measured)

    def spread(kind: str, what: str) -> str:
        values = [measured[what] for measured in found[kind]]
        return f"{statistics.median(values):.4f} ({min(values):.4f} to {max(values):.4f})"

    def memory(kind: str) -> str:
        extra = statistics.median(measured["extra"] for measured in found[kind])
        weights = found[kind][0]["weights"]
        return f"{extra / 2**20:.1f} MiB, {extra / weights:.2f} × the {weights / 2**20:.1f} MiB"

    return [
        f"| {model} | {name} | {kind} | {spread('plain', 'seconds')} | {spread(kind, 'seconds')} | "
        f"{spread(kind, 'ratio')} | {memory(kind)} |"
        for kind in steps[1:]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=11, help="one after another (n)")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds of steps in each")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--one", nargs=2, metavar=("MODEL", "FORMAT"), help="measure in this process, and print JSON"
    )
    arguments = parser.parse_args()
    if arguments.one:
        given = arguments.rounds, arguments.batch, arguments.threads, arguments.device
        print(json.dumps(measure(*arguments.one, *given)))
        return
    where = environment(arguments.device, arguments.threads)
    place = where["processor"]
    if arguments.device != "cpu":
        place = f"{torch.cuda.get_device_name()}, {place}"
    lines = [
        "# One training step with Batch Bridgeout, beside the plain step",
        "",
        f"`python benchmarks/bridgeout_step.py --processes {arguments.processes} --rounds {arguments.rounds} "
        f"--batch {arguments.batch} --threads {arguments.threads} --device {arguments.device}`: VGG-16 with "
        "batch norm and ResNet-20, "
        f"{arguments.batch} pictures of 32×32, SGD with Nesterov momentum, p = 0.3 and q = 1.5 on all "
        f"convolutions. n = {arguments.processes} processes, in each {arguments.rounds} rounds of one step "
        "of each kind, in random order. Ratios are within a round, of which a process gives the median; the "
        "table has the median (lowest to highest) of the processes. Extra memory: how much higher the peak "
        "of a step is, beside the memory of the perturbed weights.",
        "",
        f"{place}, {where['cores']} cores, {arguments.threads} threads; Python "
        f"{platform.python_version()}, torch {torch.__version__}, regrow {regrow.__version__}.",
        "",
        "| model | memory format | Bridgeout | plain, s | Bridgeout, s | ratio | extra memory : weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for name in FORMATS:
            more = rows(model, name, arguments)
            lines += more
            print("\n".join(more), flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
