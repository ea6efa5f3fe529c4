"""Accuracy right after a cut, against multiply-accumulates.

    python benchmarks/reconstruction.py --weights FOLDER --pictures CIFAR10.npz

A trained CIFAR ResNet loses filters until a share of its operations is left. Nothing is trained, and the
images that make up for the loss have no labels. The script prints a row for each way, and writes all to
reconstruction.json beside itself.

The weights of ResNet-20 and ResNet-56 are those of pytorch_resnet_cifar10 (BSD-2-Clause) as safetensors, and
the pictures a npz file with train_images, train_labels, test_images, test_labels of the original CIFAR-10.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.cluster import KMeans
from torch import Tensor, nn

import regrow
from regrow.compensation.reconstruct import reconstruct
from regrow.pruning.cost import count_macs
from regrow.structure.norms import own_norms
from regrow.study.records import environment

HERE = Path(__file__).parent
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Batches = list[Tensor]


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


def trained(depth: int, folder: Path) -> nn.Module:
    """ResNet-``depth`` with the weights in ``folder``."""
    net = ResNet(depth)
    weights = load_file(folder / f"cifar10-resnet{depth}.safetensors")
    net.load_state_dict({name.removeprefix("module."): values for name, values in weights.items()})
    return net.eval()


def pictures(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test pictures, normalised, and their labels; training pictures in a random order."""
    file = np.load(path)
    mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, DEVIATION))
    x, test = (
        (torch.tensor(file[f"{part}_images"]).float() / 255 - mean) / deviation for part in ("train", "test")
    )
    y, labels = (torch.tensor(file[f"{part}_labels"]).long() for part in ("train", "test"))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order], y[order], test, labels


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """In per cent."""
    net.eval()
    right = sum(int((net(x[i : i + 500]).argmax(1) == y[i : i + 500]).sum()) for i in range(0, len(y), 500))
    return 100 * right / len(y)


def keep_at(net: nn.Module, macs: float, batches: Batches, **settings: Any) -> dict[str, Tensor]:
    """The filters that ``prune`` keeps where ``macs`` of the multiply-accumulates are left."""
    cut = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = regrow.prune(
            cut, macs=macs, example_inputs=batches[0][:1], calibration=batches, compensate=False,
            round_to=1, **settings,
        )  # fmt: skip
    keep = {}
    for name, gone in report["dropped"].items():
        layer: Any = net.get_submodule(name)
        keep[name] = torch.ones(layer.out_channels, dtype=torch.bool)
        keep[name][gone] = False
    return keep


def without(
    net: nn.Module, keep: dict[str, Tensor], batches: Batches, how: str, like: nn.Module | None = None
) -> nn.Module:
    """A copy of ``net`` without some filters, which are made up for in one of the ways.

    Args:
        like: the network whose outputs least squares aims at; None for ``net``.
    """
    cut, example = copy.deepcopy(net), batches[0][:1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "least-squares" and like is not None:
            regrow.read_as(cut, keep, "removed", example_inputs=example)
            gone = {name: (~mask).nonzero().flatten().tolist() for name, mask in keep.items()}
            reconstruct(like, cut, gone, own_norms(like, example), batches)
            return cut
        if how in ("means", "least-squares"):
            regrow.compensate(cut, keep, batches, example_inputs=example, method=how)
            return cut
        regrow.read_as(cut, keep, "removed", example_inputs=example)
        if how == "re-estimated":
            regrow.reestimate_norms(cut, batches)
        elif how == "matched":
            regrow.match_norms(cut, net, batches)
    return cut


CHOICES: dict[str, dict[str, Any]] = {
    "l2, equal shares, individually": {"criterion": "l2", "scope": "layer", "coupled": "individually"},
    "l2, equal shares, jointly": {"criterion": "l2", "scope": "layer", "coupled": "jointly"},
    "reconstruction, own shares, individually": {
        "criterion": "reconstruction", "scope": "balanced", "coupled": "individually",
    },
    "reconstruction, own shares, jointly": {
        "criterion": "reconstruction", "scope": "balanced", "coupled": "jointly",
    },
}  # fmt: skip
HOWS = ("removed", "re-estimated", "means", "matched", "least-squares")
ROWS = [
    *((next(iter(CHOICES)), how) for how in HOWS),
    *((choice, "least-squares") for choice in list(CHOICES)[1:]),
]


def through_torch_pruning(net: nn.Module, macs: float, batches: Batches, isomorphic: bool) -> nn.Module:
    """A copy cut by Torch-Pruning in the inner channels of blocks: where shortcuts are padded, it adds up the
    wrong channels once the streams are cut."""
    import torch_pruning

    example = batches[0][:1]

    def cut_to(share: float) -> tuple[nn.Module, float]:
        cut = copy.deepcopy(net)
        kept = [
            module
            for name, module in cut.named_modules()
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and ".conv1" not in name)
        ]
        pruner = torch_pruning.pruner.BasePruner(
            cut,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=share,
            global_pruning=isomorphic,
            isomorphic=isomorphic,
            ignored_layers=kept,
        )
        pruner.step()
        return cut, count_macs(cut, example) / count_macs(net, example)

    low, high = 0.0, 0.97
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (low, middle) if cut_to(middle)[1] <= macs else (middle, high)
    return cut_to(high)[0].eval()


def merged(net: nn.Module, macs: float, batches: Batches) -> tuple[nn.Module, dict[str, Tensor]]:
    """Model folding (Wang et al., ICLR 2025): similar filters of a block's first layer become their mean,
    which the next layer reads by the sum of their weights. Returns the network and the filters that stay.
    """
    folded, example = copy.deepcopy(net), batches[0][:1]
    blocks = [(name, each) for name, each in folded.named_modules() if isinstance(each, Block)]
    inside = 0
    for _, block in blocks:
        side = 32 * 16 // block.conv2.out_channels
        inside += side**2 * (block.conv1.weight.numel() + block.conv2.weight.numel())
    share = (1 - macs) * count_macs(net, example) / inside
    keep = {}
    for name, block in blocks:
        count = block.conv1.out_channels
        scale = block.bn1.weight / (block.bn1.running_var + block.bn1.eps).sqrt()
        rows = torch.cat([block.conv1.weight.flatten(1) * scale[:, None], block.bn1.bias[:, None]], 1)
        clusters = max(1, count - round(share * count))
        means = KMeans(clusters, n_init=4, random_state=0).fit(rows.detach().numpy())
        alive = keep[f"{name}.conv1"] = torch.zeros(count, dtype=torch.bool)
        for label in range(clusters):
            those = torch.tensor(means.labels_ == label).nonzero().flatten()
            alive[those[0]] = True
            with torch.no_grad():
                for tensor in (block.conv1.weight, *block.bn1.parameters(), block.bn1.running_mean):
                    tensor[those[0]] = tensor[those].mean(0)
                block.bn1.running_var[those[0]] = block.bn1.running_var[those].mean()
                block.conv2.weight[:, those[0]] = block.conv2.weight[:, those].sum(1)
    return folded, keep


def fine_tuned(net: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """``net`` after one epoch over the training pictures, flipped and shifted at random."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    net.train()
    order = torch.randperm(len(y), generator=generator).split(64)
    for step, index in enumerate(order):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / len(order))
        pictures = x[index]
        if torch.rand((), generator=generator) < 0.5:
            pictures = pictures.flip(3)
        across, down = torch.randint(0, 9, (2,), generator=generator).tolist()
        pictures = F.pad(pictures, (4, 4, 4, 4))[:, :, down : down + 32, across : across + 32]
        optimizer.zero_grad()
        F.cross_entropy(net(pictures), y[index]).backward()
        optimizer.step()
    return net.eval()


def measure(depth: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way and share of the multiply-accumulates."""
    net = trained(depth, arguments.weights)
    x, y, test, labels = pictures(arguments.pictures)
    batches = list(x[: arguments.images].split(128))
    rows: list[dict[str, Any]] = []

    def note(macs: float, choice: str, how: str, cut: nn.Module, seconds: float) -> None:
        row = {
            "net": f"ResNet-{depth}", "macs": macs, "choice": choice, "how": how, "images": arguments.images,
            "accuracy": accuracy(cut, test, labels), "seconds": seconds,
        }  # fmt: skip
        if arguments.tune:
            row["tuned"] = accuracy(fine_tuned(cut, x, y), test, labels)
        rows.append(row)
        print(*row.values(), sep=" | ", flush=True)

    note(1.0, "", "uncut", copy.deepcopy(net), 0.0)
    for macs in arguments.macs:
        keeps: dict[str, dict[str, Tensor]] = {}
        for choice, how in ROWS:
            if arguments.quick and how != "least-squares":
                continue
            begun = time.perf_counter()
            if choice not in keeps:
                keeps[choice] = keep_at(net, macs, batches, **CHOICES[choice])
            note(macs, choice, how, without(net, keeps[choice], batches, how), time.perf_counter() - begun)
        if not arguments.quick:
            begun = time.perf_counter()
            folded, keep = merged(net, macs, batches)
            for how in ("removed", "re-estimated", "least-squares"):
                cut = without(folded, keep, batches, how, net)
                note(macs, "k-means, inner channels", how, cut, time.perf_counter() - begun)
        for isomorphic in () if arguments.quick else (False, True):
            choice = "Torch-Pruning, " + ("isomorphic" if isomorphic else "magnitude") + ", inner channels"
            begun = time.perf_counter()
            cut = through_torch_pruning(net, macs, batches, isomorphic)
            note(macs, choice, "removed", copy.deepcopy(cut), time.perf_counter() - begun)
            regrow.reestimate_norms(cut, batches)
            note(macs, choice, "re-estimated", cut, time.perf_counter() - begun)
    return rows


def page(found: dict[str, Any]) -> str:
    """The rows as tables in Markdown, one for each network and number of images."""
    lines = [
        "# Accuracy right after a cut",
        "",
        "Accuracy in % on 932 test pictures of CIFAR-10 (standard error 1 to 1.6 points), against the share",
        "of multiply-accumulates that is left. Nothing was trained; the images have no labels. Machine: "
        f"{found['machine']}, {found['threads']} threads, torch {found['torch']}, regrow {found['regrow']}.",
    ]
    kinds = dict.fromkeys((row["net"], row["images"]) for row in found["rows"])
    for net, images in kinds:
        rows = [row for row in found["rows"] if (row["net"], row["images"]) == (net, images)]
        shares = sorted({row["macs"] for row in rows if row["macs"] < 1}, reverse=True)
        uncut = next(row["accuracy"] for row in rows if row["how"] == "uncut")
        lines += ["", f"## {net}, {images} images, uncut {uncut:.1f}", ""]
        lines.append("| which filters | made up for | " + " | ".join(f"{share:g}" for share in shares) + " |")
        lines.append("|---|---|" + "--:|" * len(shares))
        for choice, how in dict.fromkeys(
            (row["choice"], row["how"]) for row in rows if row["how"] != "uncut"
        ):
            cells = {row["macs"]: row for row in rows if (row["choice"], row["how"]) == (choice, how)}
            shown = [f"{cells[share]['accuracy']:.1f}" if share in cells else "" for share in shares]
            tuned = [f"{cells[share]['tuned']:.1f}" for share in shares if "tuned" in cells.get(share, ())]
            lines.append(f"| {choice} | {how} | " + " | ".join(shown) + " |")
            if tuned:
                lines.append(f"| | … and one epoch of training | {' | '.join(tuned)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--table", type=Path, nargs="+", help="make the table of such files, and nothing else"
    )
    parser.add_argument("--weights", type=Path, help="folder of cifar10-resnet20.safetensors …")
    parser.add_argument("--pictures", type=Path, help="npz file of CIFAR-10's pictures")
    parser.add_argument("--nets", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--macs", type=float, nargs="+", default=[0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--tune", action="store_true", help="train one epoch too, and measure again")
    parser.add_argument("--quick", action="store_true", help="least squares alone")
    parser.add_argument("--out", type=Path, default=HERE / "reconstruction.json")
    arguments = parser.parse_args()
    if arguments.table:
        found = [json.loads(path.read_text()) for path in arguments.table]
        rows = [row for each in found for row in each["rows"]]
        (HERE / "reconstruction.md").write_text(page({**found[0], "rows": rows}))
        return
    rows = [row for depth in arguments.nets for row in measure(depth, arguments)]
    about = {"torch": torch.__version__, "regrow": regrow.__version__, "threads": torch.get_num_threads()}
    found = {"machine": environment("cpu", torch.get_num_threads())["processor"], **about, "rows": rows}
    arguments.out.write_text(json.dumps(found, indent=1))
    (HERE / "reconstruction.md").write_text(page(found))


if __name__ == "__main__":
    main()
