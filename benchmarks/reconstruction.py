"""Accuracy right after a cut, against multiply-accumulates.

    python benchmarks/reconstruction.py --weights FOLDER --pictures CIFAR10.npz

A trained net loses filters until a share of its operations is left. Nothing is trained, and the images that
make up for the loss have no labels. The script prints a row for each way, and writes all to a file;
``--table FILES`` makes reconstruction.md of such files. ``cifar_nets.py`` says where the weights are from,
and which pictures are read.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

import regrow
from cifar_nets import RESNETS, TRAINED_HERE, accuracy, groups, pictures, train, trained
from regrow.compensation.reconstruct import reconstruct
from regrow.pruning.cost import count_macs
from regrow.structure.norms import own_norms
from regrow.study.records import environment

HERE = Path(__file__).parent
Batches = list[Tensor]


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
IMAGES = 512  # of the tables by shares
RATES = (0.01, 0.001)  # at which one epoch of training begins
HOWS = ("removed", "re-estimated", "means", "matched", "least-squares")
ROWS = [
    *((next(iter(CHOICES)), how) for how in HOWS),
    *((choice, "least-squares") for choice in list(CHOICES)[1:]),
]


def through_torch_pruning(
    name: str, net: nn.Module, macs: float, batches: Batches, isomorphic: bool
) -> nn.Module:
    """A copy cut by Torch-Pruning; of a ResNet only the inner channels of blocks: where shortcuts are padded,
    it adds up the wrong channels once the streams are cut."""
    import torch_pruning

    example = batches[0][:1]

    def cut_to(share: float) -> tuple[nn.Module, float]:
        cut = copy.deepcopy(net)
        kept = [
            module
            for at, module in cut.named_modules()
            if isinstance(module, nn.Linear)
            or (name in RESNETS and isinstance(module, nn.Conv2d) and ".conv1" not in at)
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


def merged(name: str, net: nn.Module, macs: float, batches: Batches) -> tuple[nn.Module, dict[str, Tensor]]:
    """Model folding (Wang et al., ICLR 2025): similar filters become their mean, which the next layer reads
    by the sum of their weights. Every layer that can be folded keeps the same share of its filters. Returns
    the network and the filters that stay.
    """
    example = batches[0][:1]

    def folded_to(share: float) -> tuple[nn.Module, dict[str, Tensor], float]:
        folded = copy.deepcopy(net)
        keep = {at: fold(layers, reader, share) for layers, reader, at in groups(name, folded)}
        cut = copy.deepcopy(folded)
        regrow.cut(cut, keep, example_inputs=example)
        return folded, keep, count_macs(cut, example) / count_macs(net, example)

    low, high = 0.02, 1.0
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if folded_to(middle)[2] <= macs else (low, middle)
    return folded_to(low)[:2]


@torch.no_grad()
def fold(layers: list[tuple[Any, Any]], reader: Any, share: float) -> Tensor:
    """Merge the filters of ``layers``, whose channels are the same, until ``share`` is left; which stay."""
    parts = []
    for layer, norm in layers:
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        parts += [layer.weight.flatten(1) * scale[:, None], norm.bias[:, None]]
    rows = torch.cat(parts, 1).cpu().numpy()
    clusters = max(1, round(share * len(rows)))
    found = KMeans(clusters, n_init=4, random_state=0).fit(rows)
    keep = torch.zeros(len(rows), dtype=torch.bool)
    for label in range(clusters):
        those = torch.tensor(found.labels_ == label).nonzero().flatten()
        keep[those[0]] = True
        for layer, norm in layers:
            for tensor in (layer.weight, *norm.parameters(), norm.running_mean, norm.running_var):
                tensor[those[0]] = tensor[those].mean(0)
        reader.weight[:, those[0]] = reader.weight[:, those].sum(1)
    return keep


def fine_tuned(net: nn.Module, x: Tensor, y: Tensor) -> tuple[nn.Module, float]:
    """``net`` after one epoch over the first 4,000 training pictures, and which of ``RATES`` was best on the
    next 1,000."""
    ways = {
        rate: train(copy.deepcopy(net), x[:4000], y[:4000], epochs=1, rate=rate, batch=64, decay=1e-4)
        for rate in RATES
    }
    rate = max(RATES, key=lambda each: accuracy(ways[each], x[4000:5000], y[4000:5000]))
    return ways[rate], rate


def measure(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way and share of the multiply-accumulates."""
    net = trained(name, arguments.weights).to(arguments.device)
    x, y, test, labels = (each.to(arguments.device) for each in pictures(arguments.pictures))
    batches = list(x[: arguments.images].split(128))
    rows: list[dict[str, Any]] = []
    inner = ", inner channels" if name in RESNETS else ""

    def note(
        macs: float, choice: str, how: str, net: nn.Module, seconds: float, keep: dict[str, Tensor] | None
    ) -> None:
        row = {
            "net": name, "macs": macs, "choice": choice, "how": how, "images": arguments.images,
            "accuracy": accuracy(net, test, labels), "tests": len(labels), "seconds": seconds,
        }  # fmt: skip
        if arguments.tune:
            cut = copy.deepcopy(net)
            if keep:
                regrow.cut(cut, keep, example_inputs=batches[0][:1])
            tuned, row["rate"] = fine_tuned(cut, x, y)
            row["tuned"] = accuracy(tuned, test, labels)
        rows.append(row)
        print(*row.values(), sep=" | ", flush=True)

    note(1.0, "", "uncut", net, 0.0, None)
    for macs in arguments.macs:
        keeps: dict[str, dict[str, Tensor]] = {}
        for choice, how in ROWS:
            if arguments.quick and how != "least-squares":
                continue
            begun = time.perf_counter()
            if choice not in keeps:
                keeps[choice] = keep_at(net, macs, batches, **CHOICES[choice])
            keep = keeps[choice]
            made = without(net, keep, batches, how)
            note(macs, choice, how, made, time.perf_counter() - begun, keep)
        if not arguments.quick:
            begun = time.perf_counter()
            folded, keep = merged(name, net, macs, batches)
            for how in ("removed", "re-estimated", "least-squares"):
                made = without(folded, keep, batches, how, net)
                note(macs, "k-means, inner channels", how, made, time.perf_counter() - begun, keep)
        for isomorphic in () if arguments.quick else (False, True):
            choice = "Torch-Pruning, " + ("isomorphic" if isomorphic else "magnitude") + inner
            begun = time.perf_counter()
            cut = through_torch_pruning(name, net, macs, batches, isomorphic)
            note(macs, choice, "removed", cut, time.perf_counter() - begun, None)
            regrow.reestimate_norms(cut, batches)
            note(macs, choice, "re-estimated", cut, time.perf_counter() - begun, None)
    return rows


def error(accuracy: float, count: int) -> str:
    """The standard error of an accuracy in per cent on ``count`` pictures."""
    return f"{(accuracy * (100 - accuracy) / count) ** 0.5:.1f}"


def page(found: dict[str, Any]) -> str:
    """The rows as tables in Markdown, one for each network and number of images."""
    lines = [
        "# Accuracy right after a cut",
        "",
        "Accuracy in % on test pictures of CIFAR-10, against the share of multiply-accumulates that is left.",
        "Nothing was trained, except in the rows that say so, and the images have no labels. The rows that",
        "say so had one epoch of 4,000 training pictures with their labels, at a rate that falls from",
        f"{RATES[0]} or {RATES[1]} to 0, whichever was better on the next 1,000 training pictures (660 for",
        "the ResNets). The uncut networks had been trained on all these pictures.",
        "VGG-16 and MobileNetV2 have half their usual width. `python benchmarks/reconstruction.py --weights",
        "FOLDER --pictures CIFAR10 --nets NET` measures the rows of a network, `--tune` those with training",
        "too, and `--images 128 --quick` those of another number of images. Machine: "
        f"{found['machine']}, {found['threads']} thread, torch {found['torch']}, regrow {found['regrow']}.",
    ]
    for net in dict.fromkeys(row["net"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["net"] == net]
        lines += of_shares(net, [row for row in rows if row["images"] == IMAGES])
        lines += of_images(net, [row for row in rows if row["how"] == "least-squares"])
    return "\n".join(lines) + "\n"


def of_shares(net: str, rows: list[dict[str, Any]]) -> list[str]:
    """The table of a network: a column for each share of the multiply-accumulates."""
    shares = sorted({row["macs"] for row in rows if row["macs"] < 1}, reverse=True)
    whole = next(row for row in rows if row["how"] == "uncut")
    uncut, tests = whole["accuracy"], whole["tests"]
    trained_on = f", and {whole['tuned']:.1f} after one epoch of training" if "tuned" in whole else ""
    lines = [
        "",
        f"## {net}, {IMAGES} images, uncut {uncut:.1f}{trained_on}",
        "",
        f"{tests:,} test pictures: a standard error of {error(uncut, tests)} to {error(50, tests)}.",
        "",
        *head([f"{share:g}" for share in shares]),
    ]
    for choice, how in ways(rows):
        cells = {row["macs"]: row for row in rows if (row["choice"], row["how"]) == (choice, how)}
        shown = [f"{cells[share]['accuracy']:.1f}" if share in cells else "" for share in shares]
        tuned = [
            f"{cells[share]['tuned']:.1f}" if "tuned" in cells.get(share, ()) else "" for share in shares
        ]
        lines.append(f"| {choice} | {how} | " + " | ".join(shown) + " |")
        if any(tuned):
            lines.append(f"| | … and one epoch of training | {' | '.join(tuned)} |")
    return lines


def of_images(net: str, rows: list[dict[str, Any]]) -> list[str]:
    """The table of a network at the share where there are several numbers of images: a column for each."""
    macs = {row["macs"] for row in rows if row["images"] != IMAGES}
    if len(macs) != 1:
        return []
    rows = [row for row in rows if row["macs"] in macs]
    counts = sorted({row["images"] for row in rows})
    lines = [
        "",
        f"### {net} at {macs.pop():g}, by the number of images",
        "",
        *head([f"{n:,}" for n in counts]),
    ]
    for choice, how in ways([row for row in rows if row["images"] != IMAGES]):
        cells = {row["images"]: row for row in rows if (row["choice"], row["how"]) == (choice, how)}
        shown = [f"{cells[count]['accuracy']:.1f}" if count in cells else "" for count in counts]
        lines.append(f"| {choice} | {how} | " + " | ".join(shown) + " |")
    return lines


def head(columns: list[str]) -> list[str]:
    """The two lines above the rows of a table."""
    return [f"| which filters | made up for | {' | '.join(columns)} |", "|---|---|" + "--:|" * len(columns)]


def ways(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Which filters were chosen and how they were made up for, each pair once, in the order of ``rows``."""
    return list(dict.fromkeys((row["choice"], row["how"]) for row in rows if row["how"] != "uncut"))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--table", type=Path, nargs="+", help="make the table of such files, and nothing else"
    )
    parser.add_argument("--weights", type=Path, help="folder of cifar10-NET.safetensors")
    parser.add_argument("--pictures", type=Path, help="CIFAR-10: a folder of pictures, or an npz file")
    parser.add_argument("--nets", nargs="+", default=list(RESNETS), choices=[*RESNETS, *TRAINED_HERE])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument(
        "--tune", action="store_true", help="train one epoch at two rates too, and measure again"
    )
    parser.add_argument("--quick", action="store_true", help="least squares alone")
    parser.add_argument("--out", type=Path, default=HERE / "reconstruction.json", help="for the rows")
    arguments = parser.parse_args()
    if arguments.table:
        found = [json.loads(path.read_text()) for path in arguments.table]
        rows = [row for each in found for row in each["rows"]]
        (HERE / "reconstruction.md").write_text(page({**found[0], "rows": rows}))
        return
    rows = [row for name in arguments.nets for row in measure(name, arguments)]
    about = {"torch": torch.__version__, "regrow": regrow.__version__, "threads": torch.get_num_threads()}
    machine = environment("cpu", torch.get_num_threads())["processor"]
    if torch.device(arguments.device).type == "cuda":
        machine = torch.cuda.get_device_name(arguments.device)
    found = {"machine": machine, **about, "rows": rows}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
