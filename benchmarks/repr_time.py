"""How long a whole RePr run takes, beside the least time possible, and beside standard training.

    python benchmarks/repr_time.py --out benchmarks/repr_time.md

Each round trains four copies of a net for the same number of batches, epoch by epoch in turn:

- standard: plain PyTorch, no regrow code at all;
- limit: the same, with the sub phases spent in a net born at the size of RePr's sub-network (the cut of
  that round, made outside the clock);
- RePr: the whole run, from reading the structure to the last restore;
- masked: RePr with ``compact=False``.

Two epochs full to one epoch sub, 30 % of the ranked filters. The ratios include costs that do not grow with
the length of an epoch (reading the structure, drop, restore). These are also listed beside the ratios,
because an epoch here is shorter than one of real training.
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
from regrow.indexing import channels_last
from regrow.study.models import build_model
from regrow.study.records import environment
from regrow.surgery.layers import apply_plan
from regrow.surgery.plan import CutPlan

NETS = {"vanilla net": ("convnet", {}), "ResNet-20": ("resnet", {"depth": 20})}
FULL, SUB = 2, 1
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
VARIANTS = ("standard", "limit", "RePr", "masked")
PARTS = ("structure", "drop", "restore")
REMARK = (
    "With channels last a net born that small is no faster on two cores, for PyTorch's batch norm takes",
    "several times as long at widths that are not a multiple of 16 (its threads wait for each other);",
    "RePr's sub phase computes such norms differently (`regrow/repr/batch_norm.py`), and so takes less than",
    "that *limit*.",
)

Batches = list[tuple[Tensor, Tensor]]
Training = tuple[nn.Module, torch.optim.Optimizer]


def make(name: str, images: Tensor, plan: CutPlan | None = None) -> Training:
    """The net and its optimizer, in the memory format of ``images``."""
    torch.manual_seed(0)
    family, options = NETS[name]
    height, width = images.shape[2:]
    model = build_model(family, classes=10, channels=3, size=(height, width), **options)
    if channels_last(images):
        model = model.to(memory_format=torch.channels_last)
    if plan is not None:
        apply_plan(model, plan)
    return model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def epoch(training: Training, batches: Batches) -> None:
    model, optimizer = training
    model.train()
    for images, labels in batches:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def one_round(name: str, cycles: int, batches: Batches, turn: int) -> dict[str, float]:
    """Seconds of each variant's whole run, and of RePr's parts."""
    images = batches[0][0]
    trainings = {variant: make(name, images) for variant in VARIANTS}
    taken = dict.fromkeys((*VARIANTS, *PARTS), 0.0)
    schedules: dict[str, regrow.RePr] = {}

    def attach(variant: str) -> None:
        model, optimizer = trainings[variant]
        schedules[variant] = regrow.RePr(
            model, optimizer, fraction=0.3, full=FULL, sub=SUB, cycles=cycles, compact=variant == "RePr",
            example_inputs=images[:1],
        )  # fmt: skip

    for variant in ("RePr", "masked"):
        taken[variant] += (built := seconds(lambda v=variant: attach(v)))
        if variant == "RePr":
            taken["structure"] = built
    small: Training | None = None
    for number in range(cycles * (FULL + SUB)):
        # The order turns, so that no variant always follows the same one.
        first = (number + turn) % len(VARIANTS)
        for variant in VARIANTS[first:] + VARIANTS[:first]:
            training = small if variant == "limit" and small is not None else trainings[variant]
            taken[variant] += seconds(lambda t=training: epoch(t, batches))
            if variant in schedules:
                before = schedules[variant].phase
                stepped = seconds(schedules[variant].step)
                taken[variant] += stepped
                if variant == "RePr" and schedules[variant].phase != before:
                    taken["drop" if before == "full" else "restore"] += stepped / cycles
        state = schedules["RePr"].state_dict()["sub_phase"]
        small = None if state is None else make(name, images, CutPlan.from_dict(state["plan"]))
    return taken


def ratio(rounds: list[dict[str, float]], one: str, to: str) -> str:
    ratios = [taken[one] / taken[to] for taken in rounds]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def row(name: str, memory: str, rounds: list[dict[str, float]]) -> str:
    plain = [taken["standard"] for taken in rounds]
    pairs = (("limit", "standard"), ("RePr", "limit"), ("RePr", "standard"), ("masked", "standard"))
    fixed = [f"{1000 * statistics.median(taken[part] for taken in rounds):.0f}" for part in PARTS]
    cells = [
        name,
        memory,
        str(len(rounds)),
        f"{statistics.median(plain):.2f} ({min(plain):.2f} to {max(plain):.2f})",
        *(ratio(rounds, one, to) for one, to in pairs),
        *fixed,
    ]
    return f"| {' | '.join(cells)} |"


def random_batches(steps: int, batch: int, size: int, memory: str) -> Batches:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(batch, 3, size, size, generator=generator).to(memory_format=FORMATS[memory]),
            torch.randint(10, (batch,), generator=generator),
        )
        for _ in range(steps)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (n)")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=[40, 20], help="batches per epoch of the vanilla net, ResNet-20"
    )
    parser.add_argument("--cycles", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = environment("cpu", arguments.threads)
    epochs = arguments.cycles * (FULL + SUB)
    vanilla, residual = arguments.steps
    lines = [
        "# A whole RePr run: beside what is possible, and beside standard training",
        "",
        f"`python benchmarks/repr_time.py --rounds {arguments.rounds} --steps {vanilla} {residual} --cycles "
        f"{arguments.cycles} --threads {arguments.threads}`: n rounds; in each, four copies of the net train "
        f"{epochs} epochs ({FULL} full to {SUB} sub) in turn, epoch by epoch, of {vanilla} (ResNet-20: "
        f"{residual}) batches of {arguments.batch} pictures of {arguments.size}×{arguments.size}; SGD with "
        "Nesterov momentum; 30 % of the ranked filters. Ratios are within a round: median (lowest to "
        "highest).",
        "",
        "*limit*: the sub phase in a net born at the size of the sub-network. A residual net of that size "
        "needs a layer that adds its filters at their places; there it is the net that `regrow.cut` makes. "
        "*RePr*: all of it, with reading the structure, scoring, planning, cutting and restoring. *masked*: "
        "the same with `compact=False`. The last three columns do not grow with the length of an epoch: per "
        "run, per drop and per restore.",
        "",
        f"{where['processor']}, {where['cores']} cores, {arguments.threads} threads; Python "
        f"{platform.python_version()}, torch {torch.__version__}, regrow {regrow.__version__}.",
        "",
        "| net | memory format | n | standard, s | limit : standard | RePr : limit | RePr : standard | "
        "masked : standard | structure, ms | drop, ms | restore, ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, steps in zip(NETS, arguments.steps, strict=True):
        for memory in FORMATS:
            batches = random_batches(steps, arguments.batch, arguments.size, memory)
            one_round(name, arguments.cycles, batches[:2], 0)  # warms up, and imports torch-pruning
            turns = range(arguments.rounds)
            rounds = [one_round(name, arguments.cycles, batches, turn) for turn in turns]
            lines.append(row(name, memory, rounds))
            print(lines[-1], flush=True)
    lines += ["", *REMARK]
    text = "\n".join(lines) + "\n"
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
