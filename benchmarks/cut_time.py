"""How long it takes to cut half of a network's channels: Torch-Pruning and regrow in turns, in one process.

    python benchmarks/cut_time.py --out benchmarks/cut_time.md

Torch-Pruning's pruner is made and stepped (``BasePruner``, L2 importance, its defaults); regrow's ``score``,
``select`` and ``cut`` read the structure, plan, and confirm the plan by forward passes on a copy. Each takes
a fresh copy of the network, with random weights, and one picture of 224×224; Python's garbage from the cut
before is collected first. The place that a process's memory happens to have moves its times by a tenth and
more, so the table gives the median of several processes.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import regrow
from latency import NETS, build, torch_pruned
from regrow.study.records import environment


def cut_half(model: nn.Module, x: Tensor) -> None:
    keep = regrow.select(regrow.score(model, "l2"), 0.5, scope="layer")
    regrow.cut(model, keep, example_inputs=x)


def prune_half(model: nn.Module, x: Tensor) -> None:
    """The whole of ``prune``, with its search and its own timing of both networks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        regrow.prune(model, macs=0.3, round_to=1, example_inputs=x, compensate=False)


def seconds(act: Callable[[nn.Module, Tensor], None], model: nn.Module, x: Tensor) -> float:
    model = copy.deepcopy(model)
    gc.collect()
    begun = time.perf_counter()
    act(model, x)
    return time.perf_counter() - begun


def measure(name: str, threads: int, rounds: int) -> dict[str, float]:
    """Medians of this process."""
    torch.set_num_threads(threads)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    model = build(name)
    theirs, ours = [], []
    for turn in range(rounds + 1):
        pair = seconds(lambda m, x: torch_pruned(m, x, 0.5), model, x), seconds(cut_half, model, x)
        if turn:  # the first one imports and allocates
            theirs.append(pair[0])
            ours.append(pair[1])
    return {
        "theirs": statistics.median(theirs),
        "ours": statistics.median(ours),
        "ratio": statistics.median(b / a for a, b in zip(theirs, ours, strict=True)),
        "prune": seconds(prune_half, model, x),
    }


def row(name: str, threads: int, processes: int, rounds: int) -> str:
    from tqdm import tqdm  # gpu.py takes this file's functions to machines without it

    command = [sys.executable, __file__, "--one", name, "--threads", str(threads), "--rounds", str(rounds)]
    found: list[dict[str, float]] = []
    for _ in tqdm(range(processes), desc=f"{name}, {threads} threads", disable=None):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))

    def spread(what: str) -> str:
        values = [measured[what] for measured in found]
        return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"

    prune = statistics.median(measured["prune"] for measured in found)
    return f"| {threads} | {name} | {' | '.join(map(spread, ('theirs', 'ours', 'ratio')))} | {prune:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=7, help="one after another (n)")
    parser.add_argument("--rounds", type=int, default=7, help="counted cuts by each, in each process")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=list(NETS), help="measure in this process, and print JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.threads[0], arguments.rounds)))
        return
    rows = []
    for threads in arguments.threads:
        for name in NETS:
            rows.append(row(name, threads, arguments.processes, arguments.rounds))
            print(rows[-1], flush=True)
    where = environment("cpu", arguments.threads[0])
    lines = [
        "# How long a cut takes",
        "",
        f"`{shlex.join(['python', 'benchmarks/cut_time.py', *sys.argv[1:]])}`. Half of the channels of each "
        f"layer. n = {arguments.processes} processes, in each {arguments.rounds} turns after one that does "
        f"not count, and their median. Torch-Pruning {version('torch-pruning')}: `BasePruner` (L2 "
        "importance, its defaults) made and stepped. regrow: `score`, `select` and `cut`, which reads the "
        "structure, plans, and, as Torch-Pruning does not, confirms the plan by forward passes on a copy. "
        "One picture of 224×224. Seconds, and the ratio within a turn: median (lowest–highest) of the "
        "processes. Last, once a process: the whole of `prune(model, macs=0.3, round_to=1)`, with its search "
        "and its own timing of both networks.",
        "",
        f"{where['processor']}, {where['cores']} cores; Python {platform.python_version()}, torch "
        f"{torch.__version__}, torchvision {torchvision.__version__}, regrow {regrow.__version__}.",
        "",
        "| threads | network | Torch-Pruning, s | regrow, s | regrow : Torch-Pruning | `prune`, s |",
        "|--:|---|--:|--:|--:|--:|",
        *rows,
    ]
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
