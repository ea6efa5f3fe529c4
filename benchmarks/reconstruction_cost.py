"""What reconstruction costs: memory and processor time, beside bare forward passes over the same pictures.

    python benchmarks/reconstruction_cost.py

Each measurement has a process of its own, whose highest resident memory is taken, less what was resident
before. The weights and the pictures are random, since neither changes the cost. ``l2`` chose 30 % of the
filters of each layer. The time is processor time, so other processes on the machine change it little.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import torchvision

import regrow
from cifar_nets import build
from regrow.study.records import environment

HERE = Path(__file__).parent
EACH = 64  # pictures in a batch
NETS = {
    "resnet20": (lambda: build("resnet20"), 32),
    "resnet56": (lambda: build("resnet56"), 32),
    "resnet18": (torchvision.models.resnet18, 224),
    "resnet50": (torchvision.models.resnet50, 224),
}
WAYS = {
    "batches": f"forward, {EACH} at a time",
    "whole": "forward, all at once",
    "reconstruction": "reconstruction",
}


def measure(name: str, images: int, way: str) -> dict[str, float]:
    """Memory in GB and processor seconds of one of ``WAYS``, in this process."""
    torch.manual_seed(0)
    make, side = NETS[name]
    net = make().eval()
    x = torch.randn(images, 3, side, side)
    keep = regrow.select(regrow.score(net, "l2"), 0.3, scope="layer")
    cut = copy.deepcopy(net)
    before, start = _resident(), time.process_time()
    if way == "reconstruction":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            regrow.compensate(cut, keep, list(x.split(EACH)), example_inputs=x[:1])
    else:
        with torch.no_grad():
            for some in x.split(EACH if way == "batches" else images):
                net(some)
    return {"memory": _resident() - before, "seconds": time.process_time() - start}


def _resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    """Measure, print and write reconstruction_cost.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--one", choices=list(WAYS), help="measure this alone, and print it as JSON")
    parser.add_argument("--out", type=Path, default=HERE / "reconstruction_cost.md")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.nets[0], arguments.images, arguments.one)))
        return
    threads = torch.get_num_threads()
    lines = [
        "# What reconstruction costs", "",
        f"`python benchmarks/reconstruction_cost.py --nets {' '.join(arguments.nets)}`: "
        f"{arguments.images} pictures in batches of {EACH}, l2, 30 % of the filters of each layer. "
        "Memory is the highest that was resident, less what was before; time is processor time. "
        "One process each.",
        "",
        f"{environment('cpu', threads)['processor']}, {threads} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, regrow {regrow.__version__}.",
        "",
        f"| net | pictures | {' | '.join(f'{way}, GB | …, s' for way in WAYS.values())} |",
        f"|---|---|{'--:|' * 2 * len(WAYS)}",
    ]  # fmt: skip
    for name in arguments.nets:
        cells = []
        for way in WAYS:
            command = [sys.executable, __file__, "--nets", name, "--images", str(arguments.images)]
            done = subprocess.run([*command, "--one", way], check=True, capture_output=True, text=True)
            found = json.loads(done.stdout)
            cells += [f"{found['memory']:.2f}", f"{found['seconds']:.0f}"]
            print(name, way, found, flush=True)
        lines.append(f"| {name} | {NETS[name][1]}×{NETS[name][1]} | {' | '.join(cells)} |")
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
