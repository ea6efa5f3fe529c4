"""Training steps per second on a GPU, launched kernel by kernel beside captured in a CUDA graph.

    python benchmarks/gpu_loop.py --out benchmarks/gpu_loop.md

The net is C3(32), the pictures are random, 32×32 in colour, shifted and mirrored. Each round trains an epoch
both ways, in turn: augmentation, schedule and the reading of losses are in the time; evaluation and
checkpoints are timed on their own. RePr is measured in its full phase and in its sub phase. With
`--device cpu` nothing is captured.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import regrow
from regrow.study.captured import CapturedStep
from regrow.study.checkpoints import to_bytes
from regrow.study.config import RunConfig, make_config
from regrow.study.data import Splits
from regrow.study.images import Images
from regrow.study.parts import DTYPES, Parts
from regrow.study.progress import Progress
from regrow.study.ranks import Ranks
from regrow.study.records import environment
from regrow.study.snapshot import state_of
from regrow.study.steps import Step, evaluate, train_epoch

METHODS: dict[str, dict[str, Any]] = {
    "standard": {},
    "RePr, full phase": {"method": "repr", "full": 1, "sub": 1, "cycles": 1},
    "RePr, sub phase": {"method": "repr", "full": 1, "sub": 1, "cycles": 1},
    "Bridgeout": {"method": "bridgeout", "p": 0.1},
    "dropout": {"method": "dropout", "p": 0.1},
    "standard, AdamW": {"optimizer": "adamw"},
}


class Said(logging.Handler):
    """Keeps what the log ``regrow`` tells."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def random_images(count: int, side: int, seed: int) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.randint(10, (count,), generator=generator))


def prepared(config: RunConfig, splits: Splits, device: torch.device, *, captured: bool, sub: bool) -> Parts:
    """The parts of a run, in the sub phase if asked for, with the one kind of step or the other."""
    parts = Parts(config, splits, device, Ranks())
    if sub:
        parts.method.after_epoch()
    if not captured:
        dtype = DTYPES[config.precision]
        parts.step = Step(parts.wrapped, parts.optimizer, parts.scaler, dtype)
        for group in parts.optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = False  # as without a graph
    return parts


def seconds(work: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def epoch(parts: Parts, number: int) -> None:
    quiet = Progress(quiet=True)
    quiet.start("run", len(parts.train))
    train_epoch(parts.step, parts.train, number, parts.scheduler, Ranks(), quiet)


def weights(parts: Parts) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}


def measure(
    name: str, splits: Splits, device: torch.device, *, rounds: int, precision: str
) -> dict[str, Any]:
    settings = {"precision": precision, "augmentation": "shift-flip", "width": 32, "epochs": rounds + 2}
    config = make_config({**settings, **METHODS[name]})
    sub = name.endswith("sub phase")
    kinds = [False, True] if device.type == "cuda" else [False]
    runs = {kind: prepared(config, splits, device, captured=kind, sub=sub) for kind in kinds}
    rates: dict[bool, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind in kinds if number % 2 else kinds[::-1]:
            taken = seconds(lambda k=kind, n=number: epoch(runs[k], n), device)
            if number:  # the first round warms up, and captures
                rates[kind].append(len(runs[kind].train) / taken)
    found: dict[str, Any] = {"rates": rates, "same": {}}
    for kind in kinds:  # two runs from the same seed
        ends = []
        for _ in range(2):
            run = prepared(config, splits, device, captured=kind, sub=sub)
            epoch(run, 0)
            ends.append(weights(run))
        found["same"][kind] = all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    last = runs[kinds[-1]]
    found["captured"] = isinstance(last.step, CapturedStep) and last.step._graph is not None
    found["evaluation"] = 1000 * seconds(lambda: evaluate(last.model, last.validation), device)
    found["checkpoint"] = 1000 * seconds(lambda: to_bytes(state_of(*last.trained)), device)
    return found


def spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (n)")
    parser.add_argument("--steps", type=int, default=351, help="batches per epoch")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--only", choices=list(METHODS), action="append", help="this method; may be given again"
    )
    parser.add_argument("--free", action="store_true", help="let cuDNN add in any order")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.backends.cudnn.deterministic = not arguments.free
    train = random_images(128 * arguments.steps, arguments.side, 0)
    splits = Splits(
        train, random_images(5000, arguments.side, 1), random_images(100, arguments.side, 2),
        tuple(map(str, range(10))), (0.5,) * 3, (0.25,) * 3,
    )  # fmt: skip
    said = Said()
    logging.getLogger("regrow").addHandler(said)
    logging.getLogger("regrow").setLevel(logging.INFO)
    where = environment(arguments.device, torch.get_num_threads())
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else where["processor"]
    lines = [
        "# Training steps per second: captured in a CUDA graph beside kernel by kernel",
        "",
        f"`python benchmarks/gpu_loop.py --rounds {arguments.rounds} --steps {arguments.steps} --precision "
        f"{arguments.precision}{' --free' if arguments.free else ''}`: n = {arguments.rounds} rounds, "
        f"alternating, each an epoch of {arguments.steps} batches of 128 pictures of {arguments.side}×"
        f"{arguments.side}; C3(32), {arguments.precision}. Median (lowest to highest). “Same” says whether "
        "two runs from one seed had the same weights after an epoch, bit for bit.",
        "",
        f"{card}; Python {platform.python_version()}, torch {torch.__version__}, regrow "
        f"{regrow.__version__}.",
        "",
        "| method | kernel by kernel, steps/s | same | captured, steps/s | same | ratio | evaluation of "
        "5,000, ms | checkpoint, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in arguments.only or METHODS:
        found = measure(name, splits, device, rounds=arguments.rounds, precision=arguments.precision)
        eager, quick = found["rates"][False], found["rates"].get(True, [])
        ratio = f"{statistics.median(q / e for q, e in zip(quick, eager, strict=True)):.2f}" if quick else "–"
        same = ["–" if found["same"].get(kind) is None else "yes" if found["same"][kind] else "no"
                for kind in (False, True)]  # fmt: skip
        shown = spread(quick) if found["captured"] or not quick else f"not captured: {spread(quick)}"
        lines.append(
            f"| {name} | {spread(eager)} | {same[0]} | {shown} | {same[1]} | {ratio} | "
            f"{found['evaluation']:.1f} | {found['checkpoint']:.1f} |"
        )
        print(lines[-1], flush=True)
    lines += ["", *(f"The log said: {line}." for line in dict.fromkeys(said.lines))] if said.lines else []
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
