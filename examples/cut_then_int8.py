"""Cut a small ResNet to half of its multiply-accumulates, and quantise it: 8-bit integers by onnxruntime.

Usage: python cut_then_int8.py [SEED] [DATA]   (DATA: digits, the default, or fashion-mnist)
"""

import copy
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

import regrow
from regrow.study.data import load_data

STEPS, RATE = 700, 0.1
CALIBRATION = 1000  # pictures, for the cut and for the 8 bits
PASSES = 201  # of each file, in turns


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, width, 1, stride) if inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


def make() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Block(16, 16),
        Block(16, 32, stride=2), Block(32, 64, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    model.train()
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        falling.step()


class Pictures(CalibrationDataReader):
    """Gives onnxruntime the calibration pictures, from which it takes the range of each activation."""

    def __init__(self, name: str, pictures: Tensor) -> None:
        self.batches: Iterator[Tensor] = iter(pictures.split(64))
        self.name = name

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch.numpy()}


def quantise(path: Path, name: str, pictures: Tensor) -> Path:
    """Write the network of the file ``path``, whose input is ``name``, in 8 bits; return the new file."""
    prepared, small = path.with_suffix(".prepared.onnx"), path.with_suffix(".int8.onnx")
    quant_pre_process(path, prepared)  # folds norms into convolutions, and infers shapes
    quantize_static(
        prepared,
        small,
        Pictures(name, pictures),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,  # on x86 its default, QInt8, is slower than float
    )
    return small


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def answers(network: onnxruntime.InferenceSession, images: Tensor) -> np.ndarray:
    """The class that the network gives each picture."""
    name = network.get_inputs()[0].name
    return np.concatenate([network.run(None, {name: x.numpy()})[0].argmax(1) for x in images.split(256)])


def times(networks: list[onnxruntime.InferenceSession], images: Tensor) -> list[str]:
    """Milliseconds of a pass of each network, in turns: median (first to third quartile)."""
    given = {networks[0].get_inputs()[0].name: images.numpy()}
    taken: list[list[float]] = [[] for _ in networks]
    for turn in range(PASSES + 5):
        for network, found in zip(networks, taken, strict=True):
            start = time.perf_counter()
            network.run(None, given)
            if turn >= 5:  # the first ones warm up
                found.append(1000 * (time.perf_counter() - start))
    return ["{1:.3f} ({0:.3f}–{2:.3f})".format(*statistics.quantiles(found)) for found in taken]


def main() -> None:
    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime's advice to do what is done here
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    data = sys.argv[2] if len(sys.argv) > 2 else "digits"
    torch.manual_seed(seed)
    splits = load_data(data)
    images, unseen = (part.pixels.float() / 255 for part in (splits.train, splits.test))
    labels, calibration = splits.test.labels.numpy(), images[:CALIBRATION]

    uncut = make()
    train(uncut, images, splits.train.labels)
    reconstructed, cut = copy.deepcopy(uncut), copy.deepcopy(uncut)
    report = regrow.prune(
        reconstructed, macs=0.5, round_to=8, example_inputs=images[:2], calibration=[calibration]
    )
    keep = {
        name: torch.ones(len(cut.get_submodule(name).weight), dtype=torch.bool) for name in report["dropped"]
    }
    for name, dropped in report["dropped"].items():
        keep[name][dropped] = False
    regrow.cut(cut, keep, example_inputs=images[:2])

    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, model in {"uncut": uncut, "cut": cut, "cut and reconstructed": reconstructed}.items():
            files[name] = Path(folder) / f"{name.replace(' ', '-')}.onnx"
            record = regrow.export_onnx(model, files[name], example_inputs=images[:2])
            if name != "cut":
                files[f"{name}, int8"] = quantise(files[name], record["inputs"][0], calibration)
        networks = [session(path) for path in files.values()]
        found = [answers(network, unseen) for network in networks]
        one, many = times(networks, unseen[:1]), times(networks, unseen[:16])
        print(f"{data}, seed {seed}: {len(labels)} test pictures; ms of one thread: median (quartiles)")
        print(f"{'':<27} {'accuracy':>8} {'as uncut':>8} {'kB':>5}  {'1 picture':<21}  16 pictures")
        for (name, path), given, *ms in zip(files.items(), found, one, many, strict=True):
            right, same = (given == labels).mean(), (given == found[0]).mean()
            kilobytes = path.stat().st_size / 1000
            print(f"{name:<27} {right:>8.2%} {same:>8.2%} {kilobytes:>5.0f}  {ms[0]:<21}  {ms[1]}")


if __name__ == "__main__":
    main()
