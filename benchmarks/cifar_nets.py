"""Nets for pictures of 32×32, and what trains them: for ``reconstruction.py``.

    python benchmarks/cifar_nets.py --pictures FOLDER --nets vgg16 mobilenetv2 --out weights --device cuda

FOLDER holds CIFAR-10 as pictures, train/CLASS/* and test/CLASS/*. Each net is trained on all training
pictures, and written as safetensors. The weights of ResNet-20 and ResNet-56 are those of
pytorch_resnet_cifar10 (BSD-2-Clause) as safetensors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regrow.study.models import build_model

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESNETS = {"resnet20": 20, "resnet56": 56}
TRAINED_HERE: dict[str, dict[str, Any]] = {
    "vgg16": {"epochs": 20, "batch": 128, "rate": 0.1},
    "mobilenetv2": {"epochs": 10, "batch": 128, "rate": 0.1},
}


class Block(nn.Module):
    """Two convolutions on a shortcut that is padded with zeros where the width grows."""

    def __init__(self, inputs: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, filters, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.more = filters - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(x + y)


class ResNet(nn.Module):
    """The ResNet of the CIFAR family with ``depth`` layers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        for stage, (inputs, filters) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            first = Block(inputs, filters, 1 if stage == 1 else 2)
            rest = [Block(filters, filters, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.linear(x.mean((2, 3)))


def build(name: str) -> nn.Module:
    """The net without trained weights.

    Args:
        name: ``resnet20``, ``resnet56``; ``vgg16``: of half the usual width, with norms; ``mobilenetv2``:
            torchvision's of half the width, of whose strides the second and the third are 1.
    """
    if name in RESNETS:
        return ResNet(RESNETS[name])
    if name == "vgg16":
        return build_model("vgg", classes=10, channels=3, size=(32, 32), width=0.5)
    net = torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.5)
    layers = [each for each in net.modules() if isinstance(each, nn.Conv2d) and each.stride == (2, 2)]
    for layer in layers[1:3]:
        layer.stride = (1, 1)
    return net


def groups(name: str, net: nn.Module) -> list[tuple[list[tuple[nn.Module, nn.Module]], nn.Module, str]]:
    """Where filters can be merged: layers with their norms, whose channels are the same; what reads them; and
    the name of the first of the layers."""
    modules = dict(net.named_modules())
    if name in RESNETS:
        blocks = [(at, each) for at, each in modules.items() if isinstance(each, Block)]
        return [([(each.conv1, each.bn1)], each.conv2, f"{at}.conv1") for at, each in blocks]
    if name == "vgg16":
        steps = [(at, each) for at, each in modules.items() if hasattr(each, "conv")]
        return [
            ([(one.conv, one.norm)], following.conv, f"{at}.conv")
            for (at, one), (_, following) in itertools.pairwise(steps)
        ]
    blocks = [(at, each.conv) for at, each in modules.items() if len(getattr(each, "conv", ())) == 4]
    return [([(b[0][0], b[0][1]), (b[1][0], b[1][1])], b[2], f"{at}.conv.0.0") for at, b in blocks]


def trained(name: str, folder: Path) -> nn.Module:
    """The net with the weights in ``folder``."""
    net = build(name)
    weights = load_file(folder / f"cifar10-{name}.safetensors")
    net.load_state_dict({key.removeprefix("module."): values for key, values in weights.items()})
    return net.eval()


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """The pictures below ``folder``: uint8 [n, 3, 32, 32], and labels by the order of the classes' names."""
    found = {}
    for part in ("train", "test"):
        classes = sorted(path.name for path in (folder / part).iterdir() if path.is_dir())
        paths = [path for name in classes for path in sorted((folder / part / name).iterdir())]
        images = [np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1) for path in paths]
        found[f"{part}_images"] = np.stack(images)
        found[f"{part}_labels"] = np.array([classes.index(path.parent.name) for path in paths])
    return found


def pictures(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test pictures, normalised, and their labels; training pictures in a random order.

    Args:
        path: a folder of pictures, of whose test pictures every fifth is taken; or an npz file with
            ``train_images``, ``train_labels``, ``test_images`` and ``test_labels``.
    """
    file = read_folder(path) if path.is_dir() else np.load(path)
    mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, DEVIATION))
    x, test = (
        (torch.tensor(file[f"{part}_images"]).float() / 255 - mean) / deviation for part in ("train", "test")
    )
    y, labels = (torch.tensor(file[f"{part}_labels"]).long() for part in ("train", "test"))
    if path.is_dir():
        test, labels = test[::5], labels[::5]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order], y[order], test, labels


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """In per cent."""
    net.eval()
    right = sum(int((net(x[i : i + 500]).argmax(1) == y[i : i + 500]).sum()) for i in range(0, len(y), 500))
    return 100 * right / len(y)


def train(
    net: nn.Module, x: Tensor, y: Tensor, *, epochs: int, rate: float, batch: int, decay: float
) -> nn.Module:
    """SGD with momentum and a rate that rises and falls; pictures are shifted and mirrored at random."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=decay, nesterov=True)
    steps = epochs * -(-len(y) // batch)

    def triangle(step: int) -> float:
        return min((step + 1) / (0.2 * steps), (steps - step) / (0.8 * steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, triangle)
    net.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for _ in range(epochs):
        for index in torch.randperm(len(y), generator=generator).split(batch):
            taken = x[index.to(x.device)]
            if torch.rand((), generator=generator) < 0.5:
                taken = taken.flip(3)
            across, down = torch.randint(0, 9, (2,), generator=generator).tolist()
            taken = F.pad(taken, (4, 4, 4, 4))[:, :, down : down + 32, across : across + 32]
            taken = taken.to(memory_format=torch.channels_last)
            optimizer.zero_grad()
            F.cross_entropy(net(taken), y[index.to(y.device)]).backward()
            optimizer.step()
            schedule.step()
    net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return net.eval()


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", default=list(TRAINED_HERE), choices=TRAINED_HERE)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    x, y, test, labels = (each.to(arguments.device) for each in pictures(arguments.pictures))
    for name in arguments.nets:
        torch.manual_seed(0)
        begun = time.perf_counter()
        net = build(name).to(arguments.device)
        train(net, x, y, **TRAINED_HERE[name], decay=5e-4)
        about = {
            "net": name, **TRAINED_HERE[name], "accuracy": round(accuracy(net, test, labels), 2),
            "seconds": round(time.perf_counter() - begun, 1), "torch": torch.__version__,
        }  # fmt: skip
        print(json.dumps(about), flush=True)
        weights = {key: tensor.cpu().contiguous() for key, tensor in net.state_dict().items()}
        save_file(weights, arguments.out / f"cifar10-{name}.safetensors")


if __name__ == "__main__":
    main()
