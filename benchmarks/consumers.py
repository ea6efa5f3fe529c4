"""What should read a restored filter: RePr with each choice of ``consumers``, by final validation accuracy.

    python benchmarks/consumers.py --pack pictures.npz --cifar-jpeg cifar10-jpeg.tar.xz
    python benchmarks/consumers.py --data pictures.npz --out benchmarks/consumers.md

The net is three 3×3 convolutions of 32 filters and a linear layer, without pooling (the paper's C³(32)), with
batch norms and without norms. SGD with momentum 0.9, batch 128, no augmentation, no weight decay. For each
seed all choices begin with the same weights and see the same batches, so differences are paired by seed. The
test split is not used: the validation split is a part of the training split.

Each run takes one process, and ``--processes`` runs train at a time. After ``--minutes`` no run begins, those
under way are broken off, and the table counts the runs that are finished. A run counts as collapsed if
its validation accuracy at the end is below 15 %, with ten classes.

A machine with ``torch``, ``numpy``, ``scipy`` and what ``import regrow`` needs can train; CIFAR-10 needs
Pillow too. Packing needs ``regrow[study]``: digits come from scikit-learn, Fashion-MNIST from torchvision or
Debian's dataset-fashion-mnist, and CIFAR-10 from an archive of its pictures saved as JPEG in train/CLASS/.
"""

from __future__ import annotations

import argparse
import functools
import io
import multiprocessing
import platform
import shlex
import sys
import tarfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from torch import Tensor, nn

import regrow

CONSUMERS = ("keep", "zero", "init")
FILTERS, BATCH, MOMENTUM = 32, 128, 0.9
COLLAPSED = 0.15
# Pictures that train, pictures that validate.
SIZES = {"digits": (1257, 540), "fashion-mnist": (20_000, 5_000), "cifar10": (45_000, 5_000)}
# Epochs: all, full, sub, cycles.
EPOCHS = {"digits": (60, 10, 5, 3), "fashion-mnist": (24, 4, 2, 3), "cifar10": (70, 20, 10, 2)}
RATES = ("constant 0.01", "constant 0.003", "0.01, annealed after the last restore")


@dataclass(frozen=True)
class Setting:
    """What a row of the table compares."""

    data: str
    norms: bool
    rate: str


@dataclass(frozen=True)
class Run:
    """One training run; its accuracy is on the validation split after the last epoch."""

    setting: Setting
    consumers: str
    seed: int
    accuracy: float
    loss: float
    seconds: float


SETTINGS = [
    Setting("cifar10", False, RATES[0]),
    *(
        Setting(data, norms, rate)
        for data in ("fashion-mnist", "digits")
        for norms in (False, True)
        for rate in RATES
    ),
]


def pack(out: Path, data_dir: Path, cifar_jpeg: Path | None) -> None:
    """Write the pictures of ``SIZES``, uint8, to one file; CIFAR-10 stays JPEG, which is smaller."""
    from regrow.study.sources import digits, fashion_mnist

    arrays: dict[str, np.ndarray] = {}
    for name, source in (("digits", digits()), ("fashion-mnist", fashion_mnist(data_dir))):
        some = source.train.take(torch.arange(sum(SIZES[name])))
        arrays[f"{name} pixels"], arrays[f"{name} labels"] = some.pixels.numpy(), some.labels.numpy()
    if cifar_jpeg is not None:
        with tarfile.open(cifar_jpeg) as archive:
            files = sorted((f for f in archive if "/train/" in f.name and f.isfile()), key=lambda f: f.name)
            found = {file.name: archive.extractfile(file) for file in files}
            jpegs = [stream.read() for stream in found.values() if stream is not None]
        classes = sorted({name.split("/")[-2] for name in found})
        arrays["cifar10 labels"] = np.array([classes.index(name.split("/")[-2]) for name in found])
        arrays["cifar10 jpegs"] = np.frombuffer(b"".join(jpegs), np.uint8)
        arrays["cifar10 lengths"] = np.array([len(jpeg) for jpeg in jpegs])
    np.savez_compressed(out, **arrays)  # type: ignore[arg-type]
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {', '.join(arrays)}")


def pixels_of(arrays: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    if name != "cifar10":
        return np.asarray(arrays[f"{name} pixels"])
    from PIL import Image

    jpegs, ends = arrays["cifar10 jpegs"].tobytes(), np.cumsum(arrays["cifar10 lengths"])
    starts = ends - arrays["cifar10 lengths"]
    pictures = [Image.open(io.BytesIO(jpegs[a:b])) for a, b in zip(starts, ends, strict=True)]
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]).transpose(0, 3, 1, 2)


@functools.cache
def pictures(path: Path, name: str, device: str, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pictures and labels, validation pictures and labels; normalised, on the device."""
    with np.load(path) as arrays:
        pixels, labels = torch.from_numpy(pixels_of(arrays, name)), torch.from_numpy(arrays[f"{name} labels"])
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    trained, validated = (int(share * size) for size in SIZES[name])
    order = order[: trained + validated]
    x, y = pixels[order].float().to(device), labels[order].to(device)
    mean, std = x[:trained].mean((0, 2, 3), keepdim=True), x[:trained].std((0, 2, 3), keepdim=True)
    x = (x - mean) / std
    return x[:trained], y[:trained], x[trained:], y[trained:]


def make(x: Tensor, norms: bool) -> nn.Module:
    layers: list[nn.Module] = []
    channels = x.shape[1]
    for _ in range(3):
        layers += [
            nn.Conv2d(channels, FILTERS, 3, padding=1),
            *([nn.BatchNorm2d(FILTERS)] * norms),
            nn.ReLU(),
        ]
        channels = FILTERS
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(FILTERS * x.shape[2] * x.shape[3], 10)).to(x.device)


def train(
    setting: Setting, consumers: str, seed: int, *, path: Path, device: str, share: float, until: float
) -> Run | None:
    """Train one net; None if ``until`` (of ``time.time``) comes first."""
    if time.time() > until:
        return None
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    x, y, x_val, y_val = pictures(path, setting.data, device, share)
    begun = time.perf_counter()
    torch.manual_seed(seed)
    model = make(x, setting.norms)
    every, full, sub, cycles = EPOCHS[setting.data]
    steps = len(x) // BATCH
    restored = cycles * (full + sub) * steps
    rate = 0.003 if "0.003" in setting.rate else 0.01
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=MOMENTUM)
    scheduler = None
    if "annealed" in setting.rate:
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (every * steps - step) / (every * steps - restored))
        )
    cycle = regrow.RePr(
        model, optimizer, fraction=0.3, full=full, sub=sub, cycles=cycles, consumers=consumers, seed=seed,
        example_inputs=x[:1],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for _ in range(every):
        if time.time() > until:
            return None
        order = torch.randperm(len(x), generator=generator)[: steps * BATCH].to(device).view(steps, BATCH)
        for batch in order:
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        cycle.step()
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(part) for part in x_val.split(1000)])
    accuracy = (logits.argmax(1) == y_val).double().mean().item()
    loss = nn.functional.cross_entropy(logits, y_val).item()
    return Run(setting, consumers, seed, accuracy, loss, time.perf_counter() - begun)


def interval(values: list[float]) -> str:
    """The mean and its 95 % t interval, in points."""
    if not values:
        return "–"
    mean = 100 * float(np.mean(values))
    if len(values) < 2:
        return f"{mean:+.2f}"
    half = 100 * scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def rows(runs: list[Run]) -> Iterator[str]:
    for setting in SETTINGS:
        found = {c: {r.seed: r for r in runs if (r.setting, r.consumers) == (setting, c)} for c in CONSUMERS}
        for consumers, of_seed in found.items():
            if not of_seed:
                continue
            paired = sorted(of_seed.keys() & found["keep"].keys())
            differences = [of_seed[s].accuracy - found["keep"][s].accuracy for s in paired]
            yield " | ".join(
                [
                    f"| {setting.data}",
                    "batch norm" if setting.norms else "none",
                    setting.rate,
                    consumers,
                    str(len(of_seed)),
                    interval([run.accuracy for run in of_seed.values()]).replace("+", ""),
                    str(sum(run.accuracy < COLLAPSED for run in of_seed.values())),
                    "" if consumers == "keep" else f"{interval(differences)} (n = {len(paired)}) |",
                ]
            ).rstrip() + (" |" if consumers == "keep" else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pack", type=Path, metavar="OUT.npz", help="write the pictures to one file, and stop"
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="Fashion-MNIST's, to pack it")
    parser.add_argument("--cifar-jpeg", type=Path, metavar="ARCHIVE", help="CIFAR-10's, to pack it")
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="what --pack has written")
    parser.add_argument("--sets", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--consumers", nargs="+", choices=CONSUMERS, default=CONSUMERS)
    parser.add_argument("--seeds", type=int, default=6, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the pictures, to try the script")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=5.5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.pack:
        pack(arguments.pack, arguments.data_dir, arguments.cifar_jpeg)
        return
    if arguments.data is None:
        parser.error("give --data, the file that --pack has written")
    until = time.time() + 60 * arguments.minutes
    held = np.load(arguments.data).files
    given = [s for s in SETTINGS if s.data in arguments.sets and f"{s.data} labels" in held]
    # The longest runs begin first. "init" on CIFAR-10 would take as long as all of Fashion-MNIST.
    planned = [
        (setting, consumers, seed)
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds)
        for setting in given
        for consumers in arguments.consumers
        if (setting.data, consumers) != ("cifar10", "init")
    ]
    runs: list[Run] = []
    begun = time.perf_counter()
    work = functools.partial(
        train, path=arguments.data, device=arguments.device, share=arguments.share, until=until
    )
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(work, *run) for run in planned]):
            if (run := done.result()) is not None:
                runs.append(run)
                print(f"{len(runs)}/{len(planned)}", asdict(run), flush=True)
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "CPU"
    command = shlex.join(["python", "benchmarks/consumers.py", *sys.argv[1:]])
    lines = [
        "# What reads a restored filter",
        "",
        f"`{command}`: {len(runs)} of {len(planned)} runs finished, {arguments.processes} at a time, in "
        f"{time.perf_counter() - begun:.0f} s. Three convolutions of {FILTERS} filters without pooling, and "
        f"a linear layer; SGD, momentum {MOMENTUM}, batch {BATCH}, no augmentation, no weight decay; RePr "
        "drops 30 % of the ranked filters. Epochs (all, full, sub, cycles) and pictures (training, "
        "validation): "
        + "; ".join(f"{name} {EPOCHS[name]}, {SIZES[name]}" for name in arguments.sets)
        + ". CIFAR-10: JPEG copies. Accuracy on the validation split after the last epoch, in %, and paired "
        "differences to `keep` in points, with 95 % t intervals over n seeds. Collapsed: below 15 %.",
        "",
        f"{card}; Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"regrow {regrow.__version__}.",
        "",
        "| data | norms | learning rate | consumers | n | validation % | collapsed | difference to keep |",
        "|---|---|---|---|--:|--:|--:|--:|",
        *rows(runs),
    ]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
