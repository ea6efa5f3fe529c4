"""What feeding costs, as a share of a training epoch of the vanilla net: `python benchmarks/feeding.py`.

Epochs with and without feeding alternate in one process: one trains on `Batches(...)`, whose share is
timed inside the loop, the other on the same number of batches made beforehand. The pictures are random.
An epoch ends after at most 20 batches, so the draws made once per epoch weigh more than in a real one.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn

from regrow.study.feeding import Batches
from regrow.study.images import Images
from regrow.study.models import build_model

EPOCHS = 7
MOST_BATCHES = 20
THREADS = 2
DATA = {
    "digits": (1079, 1, 8),
    "Fashion-MNIST-sized": (54000, 1, 28),
    "CIFAR-sized": (45000, 3, 32),
}


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[float, float]:
    """Train one epoch; return its seconds, and how many of these it waited for batches."""
    waited = 0.0
    started = asked = time.perf_counter()
    for pictures, labels in batches:
        waited += time.perf_counter() - asked
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pictures), labels).backward()
        optimizer.step()
        asked = time.perf_counter()
    return time.perf_counter() - started, waited


def measure(count: int, channels: int, side: int) -> dict[str, list[float]]:
    """The times of every epoch, in milliseconds, and feeding's share of them, in percent."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, channels, side, side), dtype=torch.uint8, generator=generator)
    images = Images(pixels, torch.randint(10, (count,), generator=generator))
    flat = [0.5] * channels
    batches = Batches(images, batch_size=128, mean=flat, std=flat, augmentation="shift-flip")
    prepared = list(islice(batches.epoch(0), MOST_BATCHES))
    model = build_model("convnet", classes=10, channels=channels, size=(side, side))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    rows: dict[str, list[float]] = {"fed": [], "prepared": [], "feeding": [], "share": []}
    for epoch in range(EPOCHS + 1):
        fed, feeding = train(model, optimizer, islice(batches.epoch(epoch), MOST_BATCHES))
        ready, _ = train(model, optimizer, prepared)
        if epoch > 0:  # the first one warms up
            for name, value in zip(
                rows, (1e3 * fed, 1e3 * ready, 1e3 * feeding, 100 * feeding / fed), strict=True
            ):
                rows[name].append(value)
    return rows


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def main() -> None:
    torch.set_num_threads(THREADS)
    print(f"{platform.platform()}, {platform.machine()}, {THREADS} threads; torch {torch.__version__}")
    print(f"convnet 3 × 32, batch 128, shift-flip; median (min–max) of n = {EPOCHS} epochs")
    print(f"{'data':20} {'fed epoch, ms':>24} {'prepared, ms':>24} {'feeding, ms':>20} {'share, %':>18}")
    for name, shape in DATA.items():
        rows = measure(*shape)
        print(
            f"{name:20} {spread(rows['fed'], 1):>24} {spread(rows['prepared'], 1):>24} "
            f"{spread(rows['feeding'], 2):>20} {spread(rows['share'], 2):>18}"
        )


if __name__ == "__main__":
    main()
