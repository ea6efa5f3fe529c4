"""Training steps of several kinds beside each other, for ``gpu.py``: what trains, and what times it."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import regrow
from regrow.study.models import build_model
from regrow.surgery.layers import apply_plan
from regrow.surgery.plan import CutPlan

KINDS = ("plain", "full", "sub, compact", "sub, masked", "sub", "Bridgeout", "born small")
LONG = 10**6  # a phase that does not end
Step = Callable[[], object]


@dataclass(frozen=True)
class Net:
    """A network, its batch, and the settings of ``build_model``, or a function that builds it."""

    name: str
    batch: int
    size: int
    classes: int
    family: str | Callable[[], nn.Module]
    depth: int | None = None

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        if not isinstance(self.family, str):
            return self.family()
        size = (self.size, self.size)
        return build_model(self.family, classes=self.classes, channels=3, size=size, depth=self.depth)


NETS = (
    Net("vanilla net, 3×32", 128, 32, 10, "convnet"),
    Net("ResNet-20", 128, 32, 10, "resnet", 20),
    Net("VGG-16", 128, 32, 10, "vgg"),
    Net("ResNet-50", 64, 224, 1000, torchvision.models.resnet50),
)
SMOKE_NETS = (Net("vanilla net, 3×32", 2, 8, 10, "convnet"),)


class Training:
    """A network in channels-last order, its optimizer, and one batch of random pictures on ``device``."""

    def __init__(self, net: Net, device: torch.device, plan: CutPlan | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(net.batch, 3, net.size, net.size, generator=generator)
        self.images = images.to(device, memory_format=torch.channels_last)
        self.labels = torch.randint(net.classes, (net.batch,), generator=generator).to(device)
        model = net.build()
        if plan is not None:
            apply_plan(model, plan)
        self.model: Any = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        self.cycle: regrow.RePr | None = None
        self.bfloat16 = False

    def step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        rounded = torch.autocast(self.images.device.type, torch.bfloat16) if self.bfloat16 else None
        with rounded or contextlib.nullcontext():
            loss = nn.functional.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss

    def begin(self, *, full: int, **settings: Any) -> None:
        """Put RePr on the network: 30 % of the ranked filters are dropped after ``full`` steps of it."""
        self.cycle = regrow.RePr(
            self.model, self.optimizer, fraction=0.3, full=full, sub=LONG, cycles=1,
            example_inputs=self.images[:1], **settings,
        )  # fmt: skip

    def drop(self) -> list[str]:
        """Let RePr drop filters now; the notes of the event."""
        assert self.cycle is not None
        event = self.cycle.step()
        assert event is not None
        return event.notes


def trainings(net: Net, device: torch.device) -> tuple[dict[str, Training], list[str]]:
    """A training of each kind, and what RePr notes at the drop where it leaves filters out."""
    made = {kind: Training(net, device) for kind in KINDS[:-1]}
    made["full"].begin(full=LONG)
    notes: list[str] = []
    for kind, settings in (
        ("sub, compact", {"compact": True}),
        ("sub, masked", {"compact": False}),
        ("sub", {}),
    ):
        made[kind].begin(full=1, **settings)
        said = made[kind].drop()
        notes = said if kind == "sub, compact" else notes
    regrow.add_bridgeout(made["Bridgeout"].model)
    cycle = made["sub, compact"].cycle
    assert cycle is not None
    plan = (cycle.state_dict()["sub_phase"] or {}).get("plan")
    if plan is not None:
        made["born small"] = Training(net, device, CutPlan.from_dict(plan))
    return made, notes


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(step: Step, times: int, device: torch.device) -> float:
    """Of one step, over ``times`` steps in a row; on a GPU by events around them."""
    wait(device)
    if device.type != "cuda":
        begun = time.perf_counter()
        for _ in range(times):
            step()
        return 1e3 * (time.perf_counter() - begun) / times
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times


def in_turns(
    steps: dict[str, Step], device: torch.device, rounds: int, until: float, block: float = 60.0
) -> dict[str, list[float]]:
    """Milliseconds of a step of each kind, round by round; the kinds take turns in random order.

    Args:
        rounds: at most; fewer if ``time.monotonic()`` reaches ``until``, and one at least.
        block: milliseconds that the steps of one kind last in a round, 5 to 50 steps; 0: one step.
    """
    long: dict[str, int] = {}
    for kind, step in steps.items():
        for _ in range(3):  # allocates, chooses kernels, judges
            step()
        long[kind] = max(5, min(50, round(block / milliseconds(step, 3, device)))) if block else 1
    shuffler = random.Random(0)
    taken: dict[str, list[float]] = {kind: [] for kind in steps}
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        for kind in shuffler.sample(list(steps), len(steps)):
            taken[kind].append(milliseconds(steps[kind], long[kind], device))
    return taken


def launches(step: Step, device: torch.device) -> int:
    """The kernels and copies that one step launches; on a CPU the operations that it calls."""
    on_gpu = device.type == "cuda"
    wait(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
            step()
            wait(device)
    events = profiled.events() or []
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    return sum(event.device_type == kind and not event.name.startswith("Optimizer.") for event in events)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def ratios(taken: dict[str, list[float]], one: str, to: str) -> dict[str, float]:
    """The spread of the ratios within a round."""
    return spread([a / b for a, b in zip(taken[one], taken[to], strict=True)])
