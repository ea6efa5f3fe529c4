"""What the zeroed reading needs: vary steps, decay, noise and width one at a time, on validation pictures.

    python benchmarks/bridgeout_needs.py runs/needs --jobs 2

Each row is one training with one seed. The script has its own training loop (no run folders), so that the
schedule of the rate and the layers can be anything. Results that are in the folder are not trained again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import regrow
from regrow.study import records
from regrow.study.data import load_data
from regrow.study.images import Images

FRACTIONS = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
SIX, FIVE = "32,32,M,64,64,M,128,128", "64,M,128,128,M,256,256"
PICTURES, BATCH, RATE, SEED = 20_000, 128, 0.1, 100


@dataclass(frozen=True)
class Setting:
    """One training. ``schedule``: "step" (the paper's, × 0.2 four times) or "hold" (60 %, then a cosine)."""

    method: str
    decay: float
    p: float = 0.3
    q: float = 1.5
    target_fraction: float = 1.0
    schedule: str = "step"
    epochs: int = 15
    net: str = SIX


SETTINGS = {
    "bp_5e-4": Setting("backprop", 5e-4),
    "do_.3_5e-4": Setting("dropout", 5e-4),
    "bo_.3_1.5_5e-4": Setting("bridgeout", 5e-4),
    "bp_5e-3": Setting("backprop", 5e-3),
    "do_.3_5e-3": Setting("dropout", 5e-3),
    "bo_.3_1.5_5e-3": Setting("bridgeout", 5e-3),
    "bo_.5_1.5_5e-3": Setting("bridgeout", 5e-3, p=0.5),
    "bo_.3_1_5e-3": Setting("bridgeout", 5e-3, q=1.0),
    "bo_.3_1.5_t.75_5e-3": Setting("bridgeout", 5e-3, target_fraction=0.75),
    "c_bo_.1_1.5_5e-3": Setting("bridgeout", 5e-3, p=0.1, schedule="hold"),
    "c_bo_.1_1_5e-3": Setting("bridgeout", 5e-3, p=0.1, q=1.0, schedule="hold"),
    "c_bp_1e-2": Setting("backprop", 1e-2, schedule="hold"),
    "c_bo_.1_1_1e-2": Setting("bridgeout", 1e-2, p=0.1, q=1.0, schedule="hold"),
    "w_bp_5e-3": Setting("backprop", 5e-3, epochs=12, net=FIVE),
    "w_bo_.3_1.5_5e-3": Setting("bridgeout", 5e-3, epochs=12, net=FIVE),
    "w_bo_.1_1_5e-3": Setting("bridgeout", 5e-3, p=0.1, q=1.0, epochs=12, net=FIVE),
    "w_bp_1e-2": Setting("backprop", 1e-2, epochs=12, net=FIVE),
}


def factor(schedule: str, share: float) -> float:
    """The learning rate after ``share`` of the steps, as a part of the highest."""
    if schedule == "step":
        return 0.2 ** sum(share >= drop for drop in (0.26, 0.52, 0.7, 0.87))
    return 1 if share < 0.6 else 0.5 * (1 + math.cos(math.pi * (share - 0.6) / 0.4))


def pictures(images: Images) -> tuple[Tensor, Tensor]:
    """14×14, roughly normalised."""
    return (F.avg_pool2d(images.pixels.float() / 255, 2) - 0.286) / 0.33, images.labels


def network(setting: Setting) -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = 1
    for entry in setting.net.split(","):
        if entry == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        filters = int(entry)
        conv = nn.Conv2d(inputs, filters, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out")
        layers += [conv, nn.BatchNorm2d(filters), nn.ReLU()]
        if setting.method == "dropout":
            layers.append(nn.Dropout(setting.p))
        inputs = filters
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def train(setting: Setting) -> dict[str, Any]:
    """Train and measure one setting: mean accuracies in per cent at ``FRACTIONS``, by reading."""
    splits = load_data("fashion-mnist", train_size=PICTURES)
    (x, y), validation = pictures(splits.train), pictures(splits.validation)
    torch.manual_seed(SEED)
    net: nn.Module = network(setting).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if setting.method == "bridgeout":
        noise = {"p": setting.p, "q": setting.q, "target_fraction": setting.target_fraction}
        regrow.add_bridgeout(net, **noise, seed=SEED)
    optimizer = torch.optim.SGD(
        net.parameters(), RATE, momentum=0.9, nesterov=True, weight_decay=setting.decay
    )
    each = len(x) // BATCH
    steps, step, loss = each * setting.epochs, 0, torch.zeros(())
    begun = time.time()
    decayed = 0.0
    for _ in range(setting.epochs):
        net.train()
        order = torch.randperm(len(x))
        total = 0.0
        for chosen in order[: each * BATCH].split(BATCH):
            rate = RATE * factor(setting.schedule, step / steps)
            optimizer.param_groups[0]["lr"] = rate
            decayed += rate * setting.decay
            batch = x[chosen]
            if torch.rand(()) < 0.5:
                batch = batch.flip(3)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(batch.contiguous(memory_format=torch.channels_last)), y[chosen])
            loss.backward()
            optimizer.step()
            step += 1
            total += loss.item()
    seconds = time.time() - begun
    if setting.method == "bridgeout":
        regrow.remove_bridgeout(net)
    return {
        "seconds": seconds, "steps": steps, "decayed": decayed, "loss": total / each,
        **readings(net.eval(), x, validation),
    }  # fmt: skip


def readings(net: nn.Module, x: Tensor, validation: tuple[Tensor, Tensor]) -> dict[str, list[float]]:
    calibration = [x[start : start + 128] for start in range(0, 512, 128)]
    settled = copy.deepcopy(net)
    regrow.reestimate_norms(settled, calibration)
    found: dict[str, list[float]] = {}
    for name, base, reading in (
        ("zeroed as trained", net, "zeroed"),
        ("zeroed", settled, "zeroed"),
        ("removed", net, "removed"),
        ("compensated", net, "compensated"),
    ):
        found[name] = []
        for fraction in FRACTIONS:
            pruned = copy.deepcopy(base if fraction or reading != "compensated" else settled)
            if fraction:
                keep = regrow.select(regrow.score(base, "l2"), fraction=fraction, scope="layer", floor=0.0)
                regrow.read_as(pruned, keep, reading, example_inputs=x[:1], calibration=calibration)
            found[name].append(accuracy(pruned, *validation))
    return found


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    net.eval()
    return 100 * float((torch.cat([net(part) for part in x.split(1000)]).argmax(1) == y).float().mean())


def row(setting: Setting, found: dict[str, Any]) -> str:
    noise = "—" if setting.method == "backprop" else f"{setting.p:g}"
    if setting.method == "bridgeout":
        noise += f" / {setting.q:g}" + (
            "" if setting.target_fraction == 1 else f" / {setting.target_fraction:g}"
        )
    names = ("zeroed as trained", "zeroed", "removed", "compensated")
    means = [f"{sum(found[name][:6]) / 6:.1f}" for name in names]
    points = ", ".join(f"{value:.0f}" for value in found["zeroed"])
    cells = [
        "six" if setting.net == SIX else "five, wide", setting.method, noise, f"{setting.decay:g}",
        setting.schedule, f"{found['decayed']:.2f}", f"{found['loss']:.2f}",
        f"{found['zeroed as trained'][0]:.1f}", f"{found['zeroed'][0]:.1f}", *means, points,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("home", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", choices=SETTINGS, help="train this one, and write no table")
    arguments = parser.parse_args()
    if arguments.only:
        torch.set_num_threads(1)
        found = train(SETTINGS[arguments.only])
        records.write_json(arguments.home / f"{arguments.only}.json", found)
        return
    missing = [name for name in SETTINGS if not (arguments.home / f"{name}.json").exists()]
    command = [sys.executable, __file__, str(arguments.home), "--only"]
    run = partial(subprocess.run, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(run, ([*command, name] for name in missing)))
    heads = [
        "net", "training", "p / q / target", "weight decay", "rate", "decay in all", "loss",
        "uncut, as trained", "uncut", "zeroed, as trained", "zeroed", "removed", "compensated",
        "zeroed at 0, 10, … 70 %",
    ]  # fmt: skip
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name, setting in SETTINGS.items():
        found = json.loads((arguments.home / f"{name}.json").read_text(encoding="utf-8"))
        print(row(setting, found))


if __name__ == "__main__":
    main()
