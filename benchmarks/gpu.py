"""RePr, Bridgeout, cuts and deployed networks on one GPU, in less than ten minutes, with the tests on it.

    PYTHONPATH=src python benchmarks/gpu.py --out /tmp/gpu
    PYTHONPATH=src python benchmarks/gpu.py --out /tmp/gpu --device cpu --smoke    # a trial of the script

It needs PyTorch, torchvision, numpy, safetensors and torch-pruning (pytest and hypothesis for the tests), and
no network: all data are random. ``gpu.json`` and ``gpu.md`` in the folder are written anew whenever something
has been measured, so a run that is cut off keeps what it has. Each part has its share of the time. A part
that fails says why, and the next one begins.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import regrow
from gpu_steps import (
    KINDS,
    NETS,
    SMOKE_NETS,
    Net,
    Training,
    in_turns,
    launches,
    ratios,
    spread,
    trainings,
    wait,
)

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 9
Times = dict[str, list[float]]
# (kind, beside what, at most, in which nets)
EVERYWHERE = tuple(net.name for net in (*NETS, *SMOKE_NETS))
AIMS = (
    ("Bridgeout", "plain", 1.05, EVERYWHERE),
    ("full", "plain", 1.02, EVERYWHERE),
    ("sub", "plain", 1.0, EVERYWHERE),
    ("sub", "born small", 1.05, ("VGG-16", "ResNet-50")),
)
CUT = ("ResNet-18", "ResNet-50", "MobileNetV2", "DenseNet-121")


class Report:
    """What has been measured, in a folder."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
        self.data: dict[str, Any] = {
            "command": " ".join(sys.argv), "device": name, "python": platform.python_version(),
            "torch": torch.__version__, "cuda": torch.version.cuda, "regrow": regrow.__version__,
            "parts": {},
        }  # fmt: skip
        self.tables: dict[str, list[str]] = {}

    def put(self, part: str, data: Any, table: list[str]) -> None:
        """Replace what is known of ``part``, and write everything."""
        self.data["parts"][part] = data
        self.tables[part] = table
        (self.folder / "gpu.json").write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        lines = [f"# On a GPU: {self.data['device']}", "", f"`{self.data['command']}`", ""]
        lines.append(f"Python {self.data['python']}, torch {self.data['torch']}, CUDA {self.data['cuda']}.")
        for name, rows in self.tables.items():
            lines += ["", f"## {name}", "", *rows]
        (self.folder / "gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


class Part:
    """One part of the run: its device, its end in ``time.monotonic()``, and where its results go."""

    def __init__(self, name: str, report: Report, device: torch.device, until: float, smoke: bool) -> None:
        self.name, self.report, self.device, self.until, self.smoke = name, report, device, until, smoke
        self.data: dict[str, Any] = {}
        self.heads: list[str] = []
        self.rows: list[str] = []

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until

    def columns(self, *heads: str) -> None:
        self.heads = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]

    def row(self, key: str, data: Any, *cells: str) -> None:
        self.data[key] = data
        self.rows.append(f"| {' | '.join((key, *cells))} |")
        self.write()

    def failed(self, key: str) -> None:
        """Record the error that is being handled."""
        self.data[f"{key}: failed"] = traceback.format_exc()
        last = traceback.format_exc().strip().splitlines()[-1]
        self.rows.append(f"| {key} | failed: {last[:300].replace('|', '/')} |")
        traceback.print_exc()
        self.write()

    def skipped(self, key: str) -> None:
        self.row(key, None, "no time was left")

    def write(self) -> None:
        print(f"{self.name}: {self.rows[-1]}", flush=True)
        self.report.put(self.name, self.data, [*self.heads, *self.rows])


def timed(part: Part, steps: dict[str, Any], until: float | None = None, block: float = 60) -> Times:
    """``in_turns`` until the end of the part, or ``until``; a trial has two rounds of one step."""
    until = part.until if until is None else until
    return in_turns(steps, part.device, *((2, until, 0) if part.smoke else (ROUNDS, until, block)))


def shown(found: dict[str, float]) -> str:
    return f"**{found['median']:.3f}** ({found['low']:.3f}–{found['high']:.3f})"


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


# --- 1: steps --------------------------------------------------------------------------------------------


def steps(part: Part) -> None:
    part.columns("net", "plain, ms", *(f"{kind} : plain" for kind in KINDS[1:]), "kernels", "aims missed")
    nets = SMOKE_NETS if part.smoke else NETS
    for number, net in enumerate(nets):
        here = time.monotonic() + (part.until - time.monotonic()) / (len(nets) - number)
        try:
            step_rows(part, net, here)
        except Exception:
            part.failed(net.name)
        if part.device.type == "cuda":
            torch.cuda.empty_cache()


def step_rows(part: Part, net: Net, until: float) -> None:
    made, notes = trainings(net, part.device)
    for left, bfloat16 in ((2, False), (1, True)):
        key = f"{net.name}, {'bf16' if bfloat16 else 'TF32'}"
        for training in made.values():
            training.bfloat16 = bfloat16
        end = time.monotonic() + (until - time.monotonic()) / left
        taken = timed(part, {kind: training.step for kind, training in made.items()}, end)
        found = {kind: ratios(taken, kind, "plain") for kind in made}
        kernels = {kind: launches(training.step, part.device) for kind, training in made.items()}
        missed = [
            f"{one} : {to} ≤ {most} is {middle:.3f}"
            for one, to, most, where in AIMS
            if net.name in where and {one, to} <= made.keys()
            and (middle := ratios(taken, one, to)["median"]) > most
        ]  # fmt: skip
        part.row(
            key,
            {"milliseconds": taken, "ratios": found, "kernels": kernels, "missed": missed, "notes": notes},
            f"{statistics.median(taken['plain']):.3f} (n = {len(taken['plain'])})",
            *(shown(found[kind]) if kind in found else "no plan" for kind in KINDS[1:]),
            ", ".join(f"{kind} {count}" for kind, count in kernels.items()),
            "; ".join(missed) or "none",
        )


# --- 2: cuts -----------------------------------------------------------------------------------------------


def cuts(part: Part) -> None:
    from cut_time import cut_half, seconds
    from latency import build, torch_pruned

    part.columns("half of the channels", "Torch-Pruning, s", "regrow, s", "regrow : Torch-Pruning", "n")
    size = 32 if part.smoke else 224
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(part.device)

    def theirs(model: nn.Module, x: Tensor) -> None:
        torch_pruned(model, x, 0.5)
        wait(part.device)

    def ours(model: nn.Module, x: Tensor) -> None:
        cut_half(model, x)
        wait(part.device)

    for name in CUT[:1] if part.smoke else CUT:
        if part.over:
            part.skipped(name)
            continue
        try:
            model = build(name).to(part.device)
            taken: dict[str, list[float]] = {"Torch-Pruning": [], "regrow": []}
            for turn in range(2 if part.smoke else 6):
                pair = seconds(theirs, model, x), seconds(ours, model, x)
                if turn:  # the first one imports and allocates
                    for kind, value in zip(taken, pair, strict=True):
                        taken[kind].append(value)
                    if part.over:
                        break
            found = ratios(taken, "regrow", "Torch-Pruning")
            times = (f"{statistics.median(values):.3f}" for values in taken.values())
            part.row(name, {"seconds": taken, "ratio": found}, *times, shown(found), str(found["n"]))
        except Exception:
            part.failed(name)


# --- 3: latency --------------------------------------------------------------------------------------------


def deployed_forms(model: nn.Module, x: Tensor, part: Part, key: str) -> dict[str, Callable[[], object]]:
    """Passes of the uncut network, of the cut one, and of the forms that it can be deployed in."""
    from cut_time import cut_half

    small = copy.deepcopy(model)
    cut_half(small, x[:1])
    folded, _ = regrow.fold_norms(small, example_inputs=x)
    folded = folded.to(memory_format=torch.channels_last)
    rounded, half = copy.deepcopy(folded).half(), x.half()
    forms: dict[str, Callable[[], object]] = {
        "uncut": lambda: model(x), "cut": lambda: small(x), "folded": lambda: folded(x),
    }  # fmt: skip
    if part.device.type == "cuda":
        forms["half"] = lambda: rounded(half)
    if hasattr(regrow, "deploy"):
        for name, settings in {"deploy": {}, "deploy, half": {"dtype": torch.float16}}.items():
            if part.device.type != "cuda" and settings:
                continue
            try:
                made, _ = regrow.deploy(small, example_inputs=x, **settings)
                forms[name] = lambda made=made: made(x)  # type: ignore[misc]
            except Exception:
                part.failed(f"{key}, {name}")
    elif part.device.type == "cuda":
        graph = capture(lambda: rounded(half))
        forms["half, graph"] = graph.replay
    return forms


@torch.no_grad()
def latency(part: Part) -> None:
    from latency import build

    part.columns("network, batch", "uncut, ms", "others : uncut")
    nets = CUT[:1] if part.smoke else CUT[:3]
    for name in nets:
        for batch in (2,) if part.smoke else (1, 32):
            key = f"{name}, {batch}"
            if part.over:
                part.skipped(key)
                continue
            try:
                model = build(name).to(part.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
                size = 32 if part.smoke else 224
                x = torch.randn(batch, 3, size, size).to(part.device, memory_format=torch.channels_last)
                with torch.enable_grad():
                    forms = deployed_forms(model, x, part, key)
                taken = timed(part, forms, block=30)
                found = {form: ratios(taken, form, "uncut") for form in forms}
                kernels = {form: launches(work, part.device) for form, work in forms.items()}
                part.row(
                    key, {"milliseconds": taken, "ratios": found, "kernels": kernels},
                    f"{statistics.median(taken['uncut']):.3f}",
                    ", ".join(f"{form} {shown(found[form])}" for form in forms if form != "uncut"),
                )  # fmt: skip
            except Exception:
                part.failed(key)


# --- 4: tests ----------------------------------------------------------------------------------------------


def tests(part: Part) -> None:
    """The tests that run on a device, without those that need a package which is not there."""
    part.columns("tests on the device", "result")
    chosen = ["tests/criteria/test_score.py"] if part.smoke else ["tests"]
    command = [
        sys.executable, "-m", "pytest", *chosen, "-m", "devices or cuda", "-p", "no:cacheprovider",
        "--tb=short", "--continue-on-collection-errors", "-rfE",
    ]  # fmt: skip
    command += [] if part.device.type == "cpu" else ["-k", "not cpu"]
    paths = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    wanted = "" if part.device.type == "cpu" else str(part.device)
    limit = max(10.0, part.until - time.monotonic())
    log = part.report.folder / "tests.txt"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths, "REGROW_TEST_DEVICE": wanted},
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        ended = ""
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            ended = f" (stopped after {limit:.0f} s)"
            process.send_signal(signal.SIGINT)  # it prints what failed
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    summary = (lines[-1] if lines else "nothing was printed") + ended
    bad = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    part.row("summary", {"summary": summary, "failed": bad}, summary)
    for line in [line for line in bad if "::" in line][:40]:
        part.row(line.split(" - ")[0], line, line.partition(" - ")[2].replace("|", "/")[:200])
    if files := [line.split()[1] for line in bad if "::" not in line]:
        part.row("not read, as a package is not there", files, ", ".join(files))
    if not part.smoke:
        example = subprocess.run(
            [sys.executable, "examples/ddp.py"], cwd=ROOT, env={**os.environ, "PYTHONPATH": paths},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        said = (example.stdout + example.stderr).strip().splitlines() or ["nothing was printed"]
        part.row("DDP over nccl, one process", said, said[-1].replace("|", "/")[:200])


# --- 5: compiled, and captured in a graph ------------------------------------------------------------------


def compiled(part: Part) -> None:
    part.columns("ResNet-20", "ratio", "what else")
    net = SMOKE_NETS[0] if part.smoke else NETS[1]
    works: dict[str, Callable[[Part, Net], None]] = {
        "Bridgeout : plain": compiled_bridgeout, "sub : full": compiled_sub_phase,
    }  # fmt: skip
    if part.device.type == "cuda":
        works["graph"] = captured
        works["reduce-overhead"] = reduced_overhead
    for key, work in works.items():
        if part.over:
            part.skipped(key)
            continue
        try:
            torch._dynamo.reset()
            work(part, net)
        except Exception:
            part.failed(key)


def backend(part: Part) -> dict[str, Any]:
    return {"backend": "eager"} if part.smoke else {}


def graphs_compiled() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def compiled_sub_phase(part: Part, net: Net) -> None:
    """The steps of a compiled net in its sub phase beside those of one in its full phase."""
    from torch._dynamo.utils import counters

    counters.clear()
    made = {kind: Training(net, part.device) for kind in ("full", "sub")}
    made["full"].begin(full=10**6)
    made["sub"].begin(full=1)
    for training in made.values():
        training.model.compile(**backend(part))
        training.step()
    before = graphs_compiled()
    made["sub"].drop()
    made["sub"].step()
    made["sub"].step()
    again = graphs_compiled() - before
    steps = {kind: training.step for kind, training in made.items()}
    taken = timed(part, steps)
    found = ratios(taken, "sub", "full")
    later = graphs_compiled() - before - again
    breaks = sum(counters["graph_break"].values())
    part.row(
        "sub : full, torch.compile",
        {"milliseconds": taken, "ratio": found, "compiled at the drop": again, "later": later},
        shown(found), f"graphs compiled at the drop: {again}, later: {later}; graph breaks: {breaks}",
    )  # fmt: skip


def compiled_bridgeout(part: Part, net: Net) -> None:
    made = {kind: Training(net, part.device) for kind in ("plain", "Bridgeout")}
    regrow.add_bridgeout(made["Bridgeout"].model)
    for training in made.values():
        training.model.compile(**backend(part))
        training.step()
    before = graphs_compiled()
    taken = timed(part, {kind: each.step for kind, each in made.items()})
    found = ratios(taken, "Bridgeout", "plain")
    again = graphs_compiled() - before
    part.row(
        "Bridgeout : plain, torch.compile",
        {"milliseconds": taken, "ratio": found, "recompilations": again},
        shown(found), f"recompilations: {again}",
    )  # fmt: skip


def one_layer(device: torch.device) -> tuple[nn.Module, Tensor]:
    """A convolution with Bridgeout, and a picture of one bright pixel: the output is w̃, mirrored."""
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 64, 3, bias=False).to(device)
    regrow.add_bridgeout(layer, p=0.5)
    picture = torch.zeros(1, 1, 5, 5)
    picture[0, 0, 2, 2] = 1
    return layer, picture.to(device)


def draws_differ(part: Part, key: str, layer: nn.Module, noisy: Callable[[], Tensor]) -> None:
    """Whether eight calls of ``noisy`` drop other weights each time, about half of them."""
    weight = layer.weight.detach().flatten()
    dropped = [(noisy().flip(2, 3).flatten() < weight).tolist() for _ in range(8)]
    shares = spread([sum(each) / len(each) for each in dropped])
    different = len({tuple(each) for each in dropped})
    words = (
        f"{different} of 8 draws differ, {shares['low']:.2f} to {shares['high']:.2f} of the weights dropped"
    )
    part.row(key, {"different": different, "shares": shares}, "right" if different == 8 else "WRONG", words)


@torch.no_grad()
def check_replays(part: Part) -> None:
    layer, picture = one_layer(part.device)
    seen: dict[str, Tensor] = {}
    graph = capture(lambda: seen.update(noisy=layer(picture)))

    def noisy() -> Tensor:
        graph.replay()
        return seen["noisy"].clone()

    draws_differ(part, "a graph's replays draw anew", layer, noisy)


def captured(part: Part, net: Net) -> None:
    check_replays(part)
    made = {kind: Training(net, part.device) for kind in ("eager", "plain", "Bridgeout", "sub")}
    regrow.add_bridgeout(made["Bridgeout"].model)
    made["sub"].begin(full=1)
    made["sub"].drop()
    steps: dict[str, Any] = {"eager": made["eager"].step}
    for kind in ("plain", "Bridgeout", "sub"):
        steps[kind] = capture(made[kind].step).replay
    taken = timed(part, steps)
    for one, to in (("plain", "eager"), ("Bridgeout", "plain"), ("sub", "plain")):
        found = ratios(taken, one, to)
        name = f"{one} : {to if to == 'eager' else 'plain'}, a captured step"
        part.row(name, {"milliseconds": taken, "ratio": found}, shown(found), "")


def reduced_overhead(part: Part, net: Net) -> None:
    layer, picture = one_layer(part.device)
    quick = torch.compile(layer, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(3):
            quick(picture)
        draws_differ(part, "reduce-overhead draws anew", layer, lambda: quick(picture).clone())
    if part.over:
        return
    made = {kind: Training(net, part.device) for kind in ("plain", "Bridgeout")}
    regrow.add_bridgeout(made["Bridgeout"].model)
    for training in made.values():
        training.model.compile(mode="reduce-overhead")
    taken = timed(part, {kind: each.step for kind, each in made.items()})
    found = ratios(taken, "Bridgeout", "plain")
    part.row("Bridgeout : plain, reduce-overhead", {"milliseconds": taken, "ratio": found}, shown(found), "")


# The parts and their shares of the time. Compiling cannot be cut short, and a capture that fails may harm
# what this process does after it: both come last.
PARTS: dict[str, tuple[Callable[[Part], None], float]] = {
    "Steps": (steps, 0.30),
    "Cuts": (cuts, 0.10),
    "Latency": (latency, 0.10),
    "Tests": (tests, 0.20),
    "Compiled and captured": (compiled, 0.30),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder for gpu.json, gpu.md and tests.txt")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for a trial")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: a trial of the script itself")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_float32_matmul_precision("high")  # TF32, as most train; convolutions have it by default
    warnings.filterwarnings("ignore", module="torch")
    report = Report(arguments.out, device)
    left, end = sum(PARTS[name][1] for name in arguments.parts), time.monotonic() + 60 * arguments.minutes
    for name in arguments.parts:
        work, share = PARTS[name]
        until = time.monotonic() + (end - time.monotonic()) * share / left
        left -= share
        part = Part(name, report, device, until, arguments.smoke)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            try:
                work(part)
            except Exception:
                part.failed(name)


if __name__ == "__main__":
    main()
