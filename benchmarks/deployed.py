"""What a cut saves in use: networks uncut, cut by regrow and cut by Torch-Pruning, as they are and deployed.

    python benchmarks/deployed.py --out benchmarks/deployed.md
    python benchmarks/deployed.py --weights cifar10-resnet56.safetensors --data cifar10.npz --device cuda

Torch-Pruning (``BasePruner``, L2 importance, its defaults) takes a share of the channels away; regrow cuts
to the multiply-accumulates that this leaves. Torch-Pruning's network is treated alike in all else: its batch
norms take their statistics from the same pictures, and ``deploy`` makes the same form of it. Neither is
trained after the cut.

``--weights`` takes CIFAR-10 ResNets of the authors of akamaster/pytorch_resnet_cifar10 as safetensors, and
``--data`` an .npz with train_images, test_images [n, 3, 32, 32] (uint8), train_labels and test_labels, such
as torchvision's CIFAR-10 gives. The networks of ``--nets`` are torchvision's, with random weights: time only.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import shlex
import sys
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import regrow
from regrow.pruning.cost import count_macs
from regrow.study.records import environment

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 500
CALIBRATION = 512


class Block(nn.Module):
    """A block whose shortcut, where the picture is halved, skips pixels and pads with channels of zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        stages = [
            nn.Sequential(
                *[Block(a if i == 0 else b, b, b // a if i == 0 else 1) for i in range((depth - 2) // 6)]
            )
            for a, b in ((16, 16), (16, 32), (32, 64))
        ]
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


@dataclass
class Case:
    """A network with what it is tried on: pictures to time and calibrate with, and to judge by, if any."""

    name: str
    model: nn.Module
    pictures: Tensor
    test: list[tuple[Tensor, Tensor]] | None


def trained(path: Path, data: Path, device: str) -> Case:
    weights = load_file(path)
    blocks = sum(name.startswith("layer1.") and name.endswith(".conv1.weight") for name in weights)
    depth = 6 * blocks + 2
    model = CifarResNet(depth)
    model.load_state_dict(weights)
    stored = np.load(data)
    mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, DEVIATION))

    def part(name: str) -> Tensor:
        return ((torch.from_numpy(stored[f"{name}_images"]).float() / 255 - mean) / deviation).to(device)

    labels = torch.from_numpy(stored["test_labels"]).long().to(device)
    test = list(zip(part("test").split(BATCH), labels.split(BATCH), strict=True))
    shuffled = torch.randperm(len(stored["train_images"]), generator=torch.Generator().manual_seed(0))
    pictures = part("train")[shuffled[:CALIBRATION].to(device)]
    return Case(
        f"ResNet-{depth}, CIFAR-10, {len(labels)} test pictures", model.eval().to(device), pictures, test
    )


def untrained(name: str, size: int, device: str) -> Case:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    pictures = torch.randn(32, 3, size, size)
    with torch.no_grad():  # statistics of norms that do not let the numbers grow
        for _ in range(3):
            model(pictures[:, :, : min(size, 64), : min(size, 64)])
    title = f"{name}, random weights, {size}×{size} pixels"
    return Case(title, model.eval().to(device), pictures.to(device), None)


def torch_pruned(case: Case, channels: float) -> nn.Module | None:
    """Torch-Pruning's cut with norms of the same pictures; None if it fails."""
    model = copy.deepcopy(case.model)
    outputs = [each for each in model.modules() if isinstance(each, nn.Linear)][-1:]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch_pruning.pruner.BasePruner(
                model,
                case.pictures[:1],
                importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=channels,
                ignored_layers=outputs,
            ).step()
            with torch.no_grad():
                model.eval()(case.pictures[:2])
        regrow.reestimate_norms(model, [case.pictures])
    except Exception as error:  # it may raise anything on a network that it does not know
        print(f"  Torch-Pruning fails on {case.name}: {str(error).splitlines()[0]}", flush=True)
        return None
    return model


def networks(case: Case, channels: float) -> dict[str, nn.Module]:
    whole, x = case.model, case.pictures[:1]
    theirs = torch_pruned(case, channels)
    share = count_macs(theirs, x) / count_macs(whole, x) if theirs is not None else (1 - channels) ** 2
    ours = copy.deepcopy(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        regrow.prune(ours, macs=share, example_inputs=x, calibration=[case.pictures], criterion="l2")
    return {"uncut": whole, "regrow's cut": ours} | (
        {"Torch-Pruning's cut": theirs} if theirs is not None else {}
    )


def table(record: dict[str, Any], sizes: dict[str, float]) -> list[str]:
    """A line for each network as it is and deployed; times as shares of the uncut network's as it is."""
    batches = list(map(str, record["batches"]))
    lines = [
        "| network | MACs | runs | "
        + " | ".join(f"batch of {n}, ms" for n in batches)
        + " | accuracy | off by |",
        "|---|--:|---|" + "--:|" * (len(batches) + 2),
    ]
    first = record["rows"][0]["latency"]
    for row in record["rows"]:
        cells = []
        for batch in batches:
            found, base = row["latency"][batch], first[batch]["median"]
            low, high = (1e3 * found[key] for key in ("lowest", "highest"))
            cells.append(
                f"{1e3 * found['median']:.3g} ({low:.3g}–{high:.3g}) · **{found['median'] / base:.2f}**"
            )
        how = f"deployed, {row['mode']}" if row["deployed"] else "as it is"
        accuracy = "—" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
        off = "" if row["difference"] is None else f"{row['difference']:.1e}"
        name = row["network"]
        lines.append(f"| {name} | {sizes[name]:.2f} | {how} | {' | '.join(cells)} | {accuracy} | {off} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", nargs="*", type=Path, default=[], help="safetensors of CIFAR ResNets")
    parser.add_argument("--data", type=Path, help="their pictures")
    parser.add_argument("--nets", nargs="*", default=["resnet18", "mobilenet_v2"], help="of torchvision")
    parser.add_argument("--size", type=int, default=224, help="pictures of --nets")
    parser.add_argument("--channels", type=float, default=0.3, help="share that Torch-Pruning takes away")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"], help="to deploy in")
    parser.add_argument("--mode", default="auto", help="as regrow.deploy takes it")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", type=Path, help="write all numbers there too")
    arguments = parser.parse_args()
    if arguments.weights and arguments.data is None:
        parser.error("--weights needs --data, the pictures")
    torch.set_num_threads(arguments.threads)
    begun = time.perf_counter()
    cases = [trained(path, arguments.data, arguments.device) for path in arguments.weights]
    cases += [untrained(name, arguments.size, arguments.device) for name in arguments.nets]
    sections: list[str] = []
    records: dict[str, Any] = {}
    for case in cases:
        print(f"{time.perf_counter() - begun:4.0f} s  {case.name}", flush=True)
        found = networks(case, arguments.channels)
        macs = {name: count_macs(model, case.pictures[:1]) for name, model in found.items()}
        sizes = {name: each / macs["uncut"] for name, each in macs.items()}
        sections += ["", f"## {case.name}"]
        for dtype in arguments.dtypes:
            record = regrow.compare_latency(
                found,
                example_inputs=case.pictures,
                batches=arguments.batches,
                validation=case.test,
                dtype=getattr(torch, dtype),
                mode=arguments.mode,
                tolerance=math.inf,  # the last column says it
            )
            records[f"{case.name}, {dtype}"] = record
            sections += ["", f"Deployed in {dtype}:", "", *table(record, sizes)]
            print("\n".join(sections[-len(record["rows"]) - 2 :]), flush=True)
    # Paths name where the files lie on one machine: their last part says what they are.
    command = [Path(each).name if "/" in each else each for each in sys.argv[1:]]
    where = environment(arguments.device, arguments.threads)
    gpu = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else ""
    lines = [
        "# What a cut saves in use",
        "",
        f"`{shlex.join(['python', 'benchmarks/deployed.py', *command])}`. Torch-Pruning "
        f"{version('torch-pruning')} (`BasePruner`, L2 importance, its defaults) takes "
        f"{100 * arguments.channels:g} % of the channels away; regrow cuts to the multiply-accumulates "
        "(MACs, as a share) that this leaves. Both have batch-norm statistics of the same "
        f"{CALIBRATION} pictures, and neither is trained after the cut.",
        "",
        "*Deployed*: as `regrow.deploy` makes it, with batch norms folded and in channels-last order. Times: "
        "median (lowest–highest) of 5 to 200 passes, all networks in turn; bold: the share of the uncut "
        "network's time as it is. *Off by*: the largest difference of an output, as a share of the largest.",
        "",
        f"{gpu or where['processor']}, {where['cores']} cores, {arguments.threads} threads; Python "
        f"{platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"regrow {regrow.__version__}.",
        *sections,
    ]
    text = "\n".join(lines) + "\n"
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
