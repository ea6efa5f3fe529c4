"""Standard training against RePr on three tasks, and each trained network cut to 70 % of its arithmetic.

    python benchmarks/tasks/run.py --out runs/tasks
    python benchmarks/tasks/run.py --out runs/tasks --table benchmarks/tasks.md

The first command trains, cuts and measures; every finished part is a line of ``results.jsonl``, and is not
done again. The second command writes the page and its picture.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import regrow
from regrow.study.records import environment
from regrow.study.sources import default_folder, fashion_mnist
from scenes import Scenes, compose
from tasks import TASKS, Task

METHODS = ("standard", "repr")
SEEDS = range(3)
TRYING = 100  # the seed of the runs that choose the learning rate
RATES = (1e-3, 3e-3)
WIDTH = 12
EPOCHS = 12
REPR = {"fraction": 0.3, "full": 2, "sub": 1, "cycles": 3}  # the last restore is after 9 epochs
HELD = 9  # epochs at the full rate, which then falls to 0
HELD_OUT = 10_000  # training garments that are for validation scenes alone
MACS = 0.7
CALIBRATION = 512
SETTINGS = (
    f"Both methods train for {EPOCHS} epochs with AdamW, and the rate falls to 0 in the last "
    f"{EPOCHS - HELD}. RePr drops {100 * REPR['fraction']:.0f} % of the filters by `ortho` {REPR['cycles']} "
    f"times, after {REPR['full']} epochs each, for {REPR['sub']} epoch: its last restore is after {HELD} "
    "epochs. Scenes for training, validation and test have garments that no other of them has. Test scenes "
    "were used once, except for RePr's segmentation. A fault of regrow had left channels silent there: it "
    "was mended, and the networks were trained again with nothing else changed."
)


def splits(task: Task) -> dict[str, Scenes]:
    """Scenes for training, validation and test, of garments that no other split has."""
    train = fashion_mnist(default_folder()).train
    few = len(train) - HELD_OUT
    return {
        "train": compose(train.pixels[:few], train.labels[:few], task.scenes, 1),
        "validation": compose(train.pixels[few:], train.labels[few:], 500, 2),
        "test": test_scenes(1000),
    }


def test_scenes(count: int) -> Scenes:
    """The first test scenes."""
    test = fashion_mnist(default_folder()).test
    assert test is not None
    return compose(test.pixels, test.labels, count, 3)


def trained(task: Task, scenes: Scenes, method: str, seed: int, rate: float) -> tuple[nn.Module, list[Any]]:
    """A trained network in evaluation mode, and the events of RePr."""
    torch.manual_seed(seed)
    net = task.build(WIDTH)
    optimizer = torch.optim.AdamW(net.parameters(), rate, weight_decay=1e-4)
    cycle = None
    if method == "repr":
        example = task.training_inputs(scenes, torch.arange(2))
        cycle = regrow.RePr(net, optimizer, example_inputs=example, seed=seed, **REPR)
    shuffled = torch.Generator().manual_seed(seed)
    events = []
    for epoch in range(EPOCHS):
        net.train()
        batches = torch.randperm(len(scenes), generator=shuffled).split(task.batch)
        for number, at in enumerate(batches):
            falls = (epoch + number / len(batches) - HELD) / (EPOCHS - HELD)
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, 1 - falls)
            optimizer.zero_grad()
            task.loss(net, scenes, at).backward()
            optimizer.step()
        if cycle is not None and (event := cycle.step()) is not None:
            events.append(event.to_dict())
    if cycle is not None:
        cycle.remove()
    return net.eval(), events


def measured_cuts(task: Task, net: nn.Module, splits: dict[str, Scenes]) -> dict[str, Any]:
    """The metric on the test scenes, uncut, and cut to the same share of the arithmetic in some ways."""
    some = splits["train"]
    example = task.inputs(some, torch.arange(8))
    calibration = [task.inputs(some, torch.arange(CALIBRATION))]
    row: dict[str, Any] = {"uncut": task.measure(net, splits["test"])}
    began = time.perf_counter()
    small = copy.deepcopy(net)
    report = regrow.prune(small, macs=MACS, example_inputs=example, calibration=calibration)
    row["seconds"] = time.perf_counter() - began
    row |= {key: report[key] for key in ("macs", "parameters", "layers", "left_out", "masked")}
    row["compensation"] = {key: report["compensation"][key] for key in ("layers", "unfolded")}
    row["reconstructed"] = task.measure(small, splits["test"])
    keep = kept(net, report["dropped"])
    for way in ("removed", "means"):
        small = copy.deepcopy(net)
        if way == "means":
            regrow.compensate(small, keep, calibration, example_inputs=example, method="means")
        regrow.cut(small, keep, example_inputs=example)
        row[way] = task.measure(small, splits["test"])
    small = copy.deepcopy(net)
    regrow.prune(small, macs=MACS, example_inputs=example, compensate=False)
    row["l2"] = task.measure(small, splits["test"])
    return row


def kept(net: nn.Module, dropped: dict[str, list[int]]) -> dict[str, Tensor]:
    """The report's ``dropped``, as ``cut`` takes it."""
    keep = {}
    for name, gone in dropped.items():
        layer: Any = net.get_submodule(name)
        keep[name] = torch.ones(layer.out_channels, dtype=torch.bool)
        keep[name][gone] = False
    return keep


class Results:
    """The finished parts, one line each."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._path = folder, folder / "results.jsonl"
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def find(self, **key: Any) -> dict[str, Any] | None:
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        print({key: row[key] for key in row if isinstance(row[key], str | int | float)}, flush=True)
        return row


def weights_path(results: Results, name: str, method: str, seed: int, rate: float) -> Path:
    """The file of the weights of one training."""
    return results.folder / f"{name}-{method}-{seed}-{rate}.pt"


def loaded(name: str, path: Path) -> nn.Module:
    """The network of a task with the weights of a file, in evaluation mode."""
    net = TASKS[name].build(WIDTH)
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def train_one(results: Results, name: str, data: dict[str, Scenes], **key: Any) -> nn.Module:
    """The network of one training, from its file if it is there."""
    task = TASKS[name]
    path = weights_path(results, name, **key)
    if results.find(part="train", task=name, **key) and path.exists():
        return loaded(name, path)
    began = time.perf_counter()
    net, events = trained(task, data["train"], **key)
    seconds = time.perf_counter() - began
    torch.save(net.state_dict(), path)
    score = task.measure(net, data["validation"])
    results.add(
        {"part": "train", "task": name, **key, "validation": score, "seconds": seconds, "events": events}
    )
    return net


def work(results: Results, name: str) -> None:
    data = splits(TASKS[name])
    if results.find(part="machine") is None:
        results.add({"part": "machine"} | environment("cpu", torch.get_num_threads()))
    for method in METHODS:
        for rate in RATES:
            train_one(results, name, data, method=method, seed=TRYING, rate=rate)
    for seed in SEEDS:
        for method in METHODS:
            key = {"task": name, "method": method, "seed": seed}
            if results.find(part="cut", **key) is None:
                rate = best_rate(results, name, method)
                net = train_one(results, name, data, method=method, seed=seed, rate=rate)
                results.add({"part": "cut", **key} | measured_cuts(TASKS[name], net, data))


def best_rate(results: Results, name: str, method: str) -> float:
    """The rate whose network was best on validation scenes."""
    tried = [row for row in results.rows if row["part"] == "train" and row["seed"] == TRYING]
    of_this = [row for row in tried if row["task"] == name and row["method"] == method]
    return float(max(of_this, key=lambda row: row["validation"])["rate"])


def standard_net(results: Results, name: str) -> nn.Module | None:
    """The first standard network of a task; None before it is trained."""
    row = results.find(part="train", task=name, method="standard", seed=SEEDS[0])
    if row is None:
        return None
    return loaded(name, weights_path(results, name, "standard", SEEDS[0], row["rate"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tasks"), help="for results and weights")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--table", type=Path, help="write this page of the results instead")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = Results(given.out)
    if given.table:
        from page import write

        write(given.table, results, SETTINGS)
        return
    for name in given.tasks:
        work(results, name)


if __name__ == "__main__":
    sys.exit(main())
