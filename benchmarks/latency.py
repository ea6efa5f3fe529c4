"""The time that a cut saves: networks cut by regrow and by Torch-Pruning to the same MACs, and the uncut net.

    python benchmarks/latency.py --out benchmarks/latency.md

Torch-Pruning (``BasePruner``, alias ``MagnitudePruner``, L2 importance, the defaults) takes a share of the
channels away; regrow cuts to the multiply-accumulates that this leaves. Weights are random, because the time
depends on how many filters of each layer are removed, and not on which. All forms of a network, in both
memory formats, with norms as they are and folded, take turns, pass by pass, in one process; a ratio compares
a pass with the uncut network's pass of the same turn.
"""

from __future__ import annotations

import argparse
import copy
import platform
import shlex
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch_pruning
import torchvision
from torch import Tensor, nn

import regrow
from regrow.pruning.cost import activation_bytes, count_macs, count_parameters, weight_bytes
from regrow.shipping.fold import fold_norms
from regrow.study.records import environment

NETS = {
    "ResNet-18": torchvision.models.resnet18,
    "ResNet-50": torchvision.models.resnet50,
    "MobileNetV2": torchvision.models.mobilenet_v2,
    "DenseNet-121": torchvision.models.densenet121,
}
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
# Arguments of ``prune`` beside its defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "regrow": {"round_to": 1},
    "regrow, multiples of 8": {"round_to": 8},
    "regrow, multiples of 16": {"round_to": 16},
    "regrow, individually": {"coupled": "individually", "round_to": 1},
    "regrow, individually, multiples of 8": {"coupled": "individually", "round_to": 8},
}


@dataclass
class Variant:
    """One network to time: how it was made, and a folded copy of it."""

    name: str
    model: nn.Module
    folded: nn.Module
    norms: tuple[int, int]  # folded, left


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = NETS[name](weights=None)
    return model.eval()


def torch_pruned(model: nn.Module, x: Tensor, channels: float) -> None:
    """Cut ``model`` in place with Torch-Pruning; the classifier's outputs stay."""
    outputs = [each for each in model.modules() if isinstance(each, nn.Linear)][-1:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_pruning.pruner.BasePruner(
            model,
            x,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=channels,
            ignored_layers=outputs,
        ).step()


def variants(name: str, x: Tensor, channels: float, wanted: list[str]) -> list[Variant]:
    """The uncut network, Torch-Pruning's, and regrow's of the same MACs."""
    whole = build(name)
    made = {"uncut": whole, "Torch-Pruning": build(name)}
    torch_pruned(made["Torch-Pruning"], x, channels)
    share = count_macs(made["Torch-Pruning"], x) / count_macs(whole, x)
    for setting in wanted:
        begun = time.perf_counter()
        made[setting] = model = build(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = regrow.prune(model, macs=share, example_inputs=x, compensate=False, **SETTINGS[setting])
        reached, seconds = report["target"]["reached"], time.perf_counter() - begun
        print(f"  {setting}: {reached:.3f} of {share:.3f}, {seconds:.1f} s", flush=True)
    found = []
    for kind, model in made.items():
        folded, record = fold_norms(model, example_inputs=x)
        assert record["difference"] < 1e-4, record["difference"]
        found.append(Variant(kind, model, folded, (len(record["folded"]), len(record["left"]))))
    return found


Key = tuple[str, bool, str]  # variant, folded, memory format
Times = dict[Key, list[float]]  # seconds, turn by turn
BASE = ("uncut", False, "contiguous")


@torch.inference_mode()
def timed(found: list[Variant], x: Tensor, rounds: int) -> Times:
    inputs = {label: x.contiguous(memory_format=form) for label, form in FORMATS.items()}
    models: dict[Key, Any] = {}
    for label, form in FORMATS.items():
        for variant in found:
            for folded, model in ((False, variant.model), (True, variant.folded)):
                models[variant.name, folded, label] = copy.deepcopy(model).to(memory_format=form)
    times: Times = {key: [] for key in models}
    for turn in range(rounds + 2):
        for key, model in models.items():
            begun = time.perf_counter()
            model(inputs[key[2]])
            if turn >= 2:  # the first two warm up
                times[key].append(time.perf_counter() - begun)
    return times


def ratios(times: Times, key: Key) -> list[float]:
    """The time of each turn, in units of the time of the uncut network as it is."""
    return [mine / theirs for mine, theirs in zip(times[key], times[BASE], strict=True)]


def cell(times: Times, key: Key) -> str:
    milliseconds = 1e3 * statistics.median(times[key])
    shown = f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}"
    found = ratios(times, key)
    return f"{shown} · **{statistics.median(found):.2f}** ({min(found):.2f}–{max(found):.2f})"


def latency_table(found: list[Variant], batches: dict[str, Times]) -> list[str]:
    columns = [(batch, form) for batch in batches for form in FORMATS]
    lines = [
        "| network | norms | " + " | ".join(f"{batch}, {form}" for batch, form in columns) + " |",
        "|---|---|" + "--:|" * len(columns),
    ]
    for variant in found:
        for folded in (False, True):
            cells = [cell(batches[batch], (variant.name, folded, form)) for batch, form in columns]
            lines.append(f"| {variant.name} | {'folded' if folded else 'as is'} | {' | '.join(cells)} |")
    return lines


def short_row(name: str, found: list[Variant], x: Tensor, batch: str, times: Times) -> str:
    """A row: each network with norms folded, in its faster memory format; Torch-Pruning's also as it is."""

    def best(variant: str) -> str:
        form = min(FORMATS, key=lambda form: statistics.median(times[variant, True, form]))
        middle = statistics.median(ratios(times, (variant, True, form)))
        return f"**{middle:.2f}**{' (channels last)' if form == 'channels last' else ''}"

    share = count_macs(found[1].model, x) / count_macs(found[0].model, x)
    plain = statistics.median(ratios(times, ("Torch-Pruning", False, "contiguous")))
    cells = [f"{share:.2f}", f"**{plain:.2f}**", *(best(variant.name) for variant in found[1:])]
    return f"| {name}, {batch} | {' | '.join(cells)} |"


def size_table(found: list[Variant], x: Tensor) -> list[str]:
    base = found[0].model
    before = count_macs(base, x), count_parameters(base)
    lines = [
        "| network | MACs | parameters | weights, MB | activations, MB | norms folded, left |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for variant in found:
        macs, parameters = count_macs(variant.model, x), count_parameters(variant.model)
        weights, activations = weight_bytes(variant.model) / 1e6, activation_bytes(variant.model, x) / 1e6
        lines.append(
            f"| {variant.name} | {macs / 1e6:.0f} M · **{macs / before[0]:.3f}** | "
            f"{parameters / 1e6:.2f} M · {parameters / before[1]:.2f} | {weights:.1f} | {activations:.1f} | "
            f"{variant.norms[0]}, {variant.norms[1]} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--channels", type=float, default=0.5, help="share that Torch-Pruning takes away")
    parser.add_argument("--size", type=int, default=224, help="of the picture in a batch of 1")
    parser.add_argument("--batch", type=int, default=32, help="the larger batch")
    parser.add_argument("--batch-size", type=int, default=112, help="of the pictures in the larger batch")
    parser.add_argument("--rounds", type=int, default=15, help="timed passes of each network, batch of 1")
    parser.add_argument("--batch-rounds", type=int, default=5, help="the same, larger batch")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    begun = time.perf_counter()

    def tell(what: str) -> None:
        print(f"{time.perf_counter() - begun:4.0f} s  {what}", flush=True)

    most = arguments.threads[0]
    torch.set_num_threads(most)
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1, 3, arguments.size, arguments.size, generator=generator)
    side = arguments.batch_size
    many = torch.randn(arguments.batch, 3, side, side, generator=generator)
    labels = {"1": (one, arguments.rounds), str(arguments.batch): (many, arguments.batch_rounds)}
    sections: list[str] = []
    short: list[str] = []
    for name in arguments.nets:
        tell(name)
        found = variants(name, one, arguments.channels, arguments.settings)
        sections += ["", f"## {name}", "", *size_table(found, one)]
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            batches = {}
            for label, (x, rounds) in labels.items():
                batches[label] = timed(found, x, rounds)
                tell(f"{name}, {threads} threads, batch of {label}")
                if threads == most:
                    short.append(short_row(name, found, one, f"batch of {label}", batches[label]))
                    print(short[-1], flush=True)
            sections += ["", f"Threads: {threads}.", "", *latency_table(found, batches)]
        torch.set_num_threads(most)
    where = environment("cpu", most)
    lines = [
        "# What a cut buys on the clock",
        "",
        f"`{shlex.join(['python', 'benchmarks/latency.py', *sys.argv[1:]])}`. Torch-Pruning "
        f"{version('torch-pruning')} (`BasePruner`, L2 importance, its defaults) takes "
        f"{100 * arguments.channels:g} % of the channels away; regrow cuts to the multiply-accumulates that "
        "this leaves: `prune(model, macs=…, round_to=1)`, or with what the row names. Random weights.",
        "",
        "Ratios are to the uncut network as it is, contiguous, in the same turn with as many threads: median "
        f"(lowest–highest) of n = {arguments.rounds} turns for one picture of {arguments.size}×"
        f"{arguments.size}, n = {arguments.batch_rounds} for {arguments.batch} pictures of {side}×{side}. "
        "*Folded*: batch norms folded into convolutions by `fold_norms`, in the uncut network and "
        "Torch-Pruning's too. Activations: most bytes alive at one time in a pass over one picture.",
        "",
        f"{where['processor']}, {where['cores']} cores; Python {platform.python_version()}, torch "
        f"{torch.__version__}, torchvision {torchvision.__version__}, regrow {regrow.__version__}.",
        "",
        "## In short",
        "",
        f"{most} threads; ratios to the uncut network as it is. But for the first column of Torch-Pruning, "
        "all with norms folded and in the memory format that is faster for them.",
        "",
        "| network | MACs | Torch-Pruning, as is | Torch-Pruning | " + " | ".join(arguments.settings) + " |",
        "|---|--:|--:|" + "--:|" * (1 + len(arguments.settings)),
        *short,
        *sections,
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
