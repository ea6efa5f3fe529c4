"""The oracle of VGG-16 beside a pass for each filter: ``python benchmarks/oracle.py``.

Both are timed on some filters of each layer, one after the other, and what all 4,224 filters would take is
computed from that. A shared machine is noisy: the time that the processors worked is printed too.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import regrow
from regrow.criteria.apart import losses_without, silent_channels
from regrow.criteria.batches import Batch, loss_of, mean_loss
from regrow.criteria.drop_one import dropped, plain_loss
from regrow.criteria.following import Following, Pass
from regrow.criteria.small_maps import Quick
from regrow.criteria.taken_apart import Parts
from regrow.looking.copies import copied
from regrow.structure.read import read_structure
from regrow.study.models import build_model


def timed(work: Callable[[], Any]) -> tuple[Any, np.ndarray]:
    """The result, and the seconds that the clock and the processors counted."""
    begun, worked = time.perf_counter(), time.process_time()
    result = work()
    return result, np.array([time.perf_counter() - begun, time.process_time() - worked])


def trained(net: nn.Module, pictures: Tensor, labels: Tensor, steps: int) -> nn.Module:
    """``net`` after some steps of SGD on batches of 64, in evaluation mode."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for _ in range(steps):
        chosen = torch.randint(len(pictures), (64,))
        optimizer.zero_grad()
        F.cross_entropy(net(pictures[chosen]), labels[chosen]).backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def measure(net: nn.Module, batches: list[Batch], sample: int) -> tuple[list[str], list[float]]:
    """A row of the table for each layer, and [clock ratio, processor ratio, largest difference]."""
    readers = read_structure(net, batches[0].first(1).inputs)
    quick = Quick()

    def prepare() -> tuple[Parts, list[Pass]]:
        parts = Parts(copied(net, torch.clone), {name: list(found.norms) for name, found in readers.items()})
        return parts, [Pass(parts, batch.inputs, batch.pictures) for batch in batches]

    (parts, passes), ahead = timed(prepare)
    clean = mean_loss(
        [loss_of(F.cross_entropy, each.outputs, b) for each, b in zip(passes, batches, strict=True)], batches
    )
    before = plain_loss(net, batches, F.cross_entropy)
    lines, largest = [], 0.0
    totals = np.stack([ahead, np.zeros(2)])
    for name in readers:
        silent = silent_channels(net, readers, name)
        count = int(net.get_submodule(name).out_channels)  # type: ignore[arg-type]
        filters = torch.randperm(count)[:sample].sort().values
        followings = [Following(parts, name, silent, each, quick) for each in passes]

        def follow(filters: Tensor = filters, followings: list[Following] = followings) -> list[list[Tensor]]:
            return [
                losses_without(following, each, batch, F.cross_entropy, filters)
                for following, each, batch in zip(followings, passes, batches, strict=True)
            ]

        def loop(name: str = name, filters: Tensor = filters) -> float:
            with dropped(net, readers, name, int(filters[0])):
                return plain_loss(net, batches, F.cross_entropy) - before

        follow(filters[:1])  # matrices are made once
        losses, quickly = timed(follow)
        expected, slowly = timed(loop)
        difference = abs(mean_loss([each[0] for each in losses], batches) - clean - expected)
        seconds = np.stack([quickly * count / len(filters), slowly * count])
        totals += seconds
        largest = max(largest, difference)
        ratio = seconds[1] / seconds[0]
        lines.append(
            f"| {name} | {count} | {seconds[0][1]:.1f} | {seconds[1][1]:.0f} | {ratio[1]:.1f} "
            f"| {ratio[0]:.1f} | {difference:.0e} |"
        )
        print(lines[-1], flush=True)
    ratio = totals[1] / totals[0]
    lines.append(
        f"| all | | {totals[0][1]:.0f} | {totals[1][1]:.0f} | **{ratio[1]:.1f}** | **{ratio[0]:.1f}** "
        f"| {largest:.0e} |"
    )
    return lines, [*ratio, largest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 64], help="pictures in a batch")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--sample", type=int, default=4, help="filters of each layer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, help="an .npz of train_images and train_labels, to train on")
    parser.add_argument("--steps", type=int, default=0, help="of training ahead, batches of 64")
    parser.add_argument("--weights", type=Path, help="a state_dict, to measure in place of new weights")
    parser.add_argument("--width", type=float, default=1.0, help="of the net, to try the script")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    net = build_model("vgg", classes=10, channels=3, size=(32, 32), width=arguments.width)
    images, labels = torch.randn(arguments.pictures, 3, 32, 32), torch.randint(10, (arguments.pictures,))
    weights = "random weights and pictures"
    if arguments.data:
        held = np.load(arguments.data)
        every = torch.from_numpy(held["train_images"]).float().div(255).sub(0.47).div(0.25)
        known = torch.from_numpy(held["train_labels"]).long()
        images, labels = every[-arguments.pictures :], known[-arguments.pictures :]
        net = trained(net, every[: -arguments.pictures], known[: -arguments.pictures], arguments.steps)
        weights = f"{arguments.steps} steps of training on {arguments.data.name}"
    if arguments.weights:
        net.load_state_dict(torch.load(arguments.weights, weights_only=True))
        weights = f"weights of {arguments.weights.name}"
    net.eval()
    lines = [
        f"`{shlex.join(['python', 'benchmarks/oracle.py', *sys.argv[1:]])}`: {weights}, "
        f"{arguments.pictures} pictures, {arguments.threads} threads, {arguments.sample} filters of each "
        f"layer quickly and one in the loop; {platform.processor() or platform.machine()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, regrow {regrow.__version__}.",
    ]
    for size in arguments.batch:
        batches = [Batch(x, y, len(x)) for x, y in zip(images.split(size), labels.split(size), strict=True)]
        rows, _ = measure(net, batches, arguments.sample)
        lines += [
            "",
            f"Batches of {size}:",
            "",
            "| layer | filters | regrow, CPU s | loop, CPU s | ratio, CPU | ratio, clock | difference |",
            "|---|--:|--:|--:|--:|--:|--:|",
            *rows,
        ]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
