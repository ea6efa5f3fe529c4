"""How long it takes to cut half of a network's channels: Torch-Pruning and regrow in turns, in one process.

    python benchmarks/cut_time.py --out benchmarks/cut_time.md

Torch-Pruning's pruner is made and stepped (``BasePruner``, L2 importance, its defaults); regrow's ``score``,
``select`` and ``cut`` read the structure, plan, and confirm the plan by forward passes on a copy. Each takes
a fresh copy of the network, with random weights, and one picture of 224×224.
"""

from __future__ import annotations

import argparse
import copy
import platform
import shlex
import statistics
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
        regrow.prune(model, macs=0.3, example_inputs=x, compensate=False)


def seconds(act: Callable[[nn.Module, Tensor], None], model: nn.Module, x: Tensor) -> float:
    model = copy.deepcopy(model)
    begun = time.perf_counter()
    act(model, x)
    return time.perf_counter() - begun


def row(name: str, x: Tensor, rounds: int) -> str:
    model = build(name)
    theirs, ours = [], []
    for turn in range(rounds + 1):
        pair = seconds(lambda m, x: torch_pruned(m, x, 0.5), model, x), seconds(cut_half, model, x)
        if turn:  # the first one imports and allocates
            theirs.append(pair[0])
            ours.append(pair[1])
    ratio = statistics.median(b / a for a, b in zip(theirs, ours, strict=True))
    cells = [torch.get_num_threads(), name, spread(theirs), spread(ours), f"{ratio:.2f}"]
    return f"| {' | '.join(map(str, cells))} | {seconds(prune_half, model, x):.1f} |"


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11, help="timed cuts of each network by each")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for name in NETS:
            rows.append(row(name, x, arguments.rounds))
            print(rows[-1], flush=True)
    where = environment("cpu", arguments.threads[0])
    lines = [
        "# How long a cut takes",
        "",
        f"`{shlex.join(['python', 'benchmarks/cut_time.py', *sys.argv[1:]])}`. Half of the channels of each "
        f"layer, in turns, n = {arguments.rounds} after one that does not count. Torch-Pruning "
        f"{version('torch-pruning')}: `BasePruner` (L2 importance, its defaults) made and stepped. regrow: "
        "`score`, `select` and `cut`, which reads the structure, plans, and, as Torch-Pruning does not, "
        "confirms the plan by forward passes on a copy. One picture of 224×224. Seconds, median "
        "(lowest–highest), and the median of the ratios of a turn. Last, n = 1: the whole of "
        "`prune(model, macs=0.3)`, with its search and its own timing of both networks.",
        "",
        f"{where['processor']}, {where['cores']} cores; Python {platform.python_version()}, torch "
        f"{torch.__version__}, torchvision {torchvision.__version__}, regrow {regrow.__version__}.",
        "",
        "| threads | network | Torch-Pruning | regrow | regrow : Torch-Pruning | `prune` |",
        "|--:|---|--:|--:|--:|--:|",
        *rows,
    ]
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
