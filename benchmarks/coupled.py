"""Joint and individual cuts of a trained ResNet: accuracy and latency, with reconstruction on.

    python benchmarks/coupled.py --weights FOLDER --pictures CIFAR10.npz

Filters are chosen by reconstruction, with shares of their own; 512 images without labels make up for them.
``cifar_nets.py`` says where the weights are from. Latency is that of the deployed cut net (``regrow.deploy``)
as a share of the deployed uncut one's, in turns: for 1 picture and for 32.
"""

from __future__ import annotations

import argparse
import copy
import platform
import warnings
from pathlib import Path

import torch

import regrow
from cifar_nets import RESNETS, accuracy, pictures, trained
from regrow.study.records import environment

HERE = Path(__file__).parent


def main() -> None:
    """Measure, print and write coupled.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", default=["resnet20"], choices=list(RESNETS))
    parser.add_argument("--macs", type=float, nargs="+", default=[0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    arguments = parser.parse_args()
    x, _, test, labels = pictures(arguments.pictures)
    batches = list(x[:512].split(128))
    lines = [
        "# Joint and individual cuts, with reconstruction", "",
        f"`python benchmarks/coupled.py --nets {' '.join(arguments.nets)}`: {len(labels)} test pictures; "
        "latency is that of the deployed cut net by the deployed uncut net's, medians of passes in turns.",
        "",
        f"{environment('cpu', torch.get_num_threads())['processor']}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, regrow {regrow.__version__}.",
        "",
        "| net | multiply-accumulates | cut | accuracy, % | latency, 1 picture | latency, 32 pictures |",
        "|---|--:|---|--:|--:|--:|",
    ]  # fmt: skip
    for name in arguments.nets:
        net = trained(name, arguments.weights)
        for macs in arguments.macs:
            cuts = {}
            for coupled in ("jointly", "individually"):
                cuts[coupled] = copy.deepcopy(net)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    regrow.prune(
                        cuts[coupled], macs=macs, example_inputs=x[:1], calibration=batches, coupled=coupled,
                        round_to=1,
                    )  # fmt: skip
            timed = regrow.compare_latency({"uncut": net, **cuts}, example_inputs=x[:32])
            times = {row["network"]: row["latency"] for row in timed["rows"] if row["deployed"]}
            for coupled, cut in cuts.items():
                shares = [times[coupled][n]["median"] / times["uncut"][n]["median"] for n in ("1", "32")]
                shown = f"{accuracy(cut, test, labels):.1f} | {shares[0]:.2f} | {shares[1]:.2f}"
                lines.append(f"| {name} | {macs:g} | {coupled} | {shown} |")
                print(lines[-1], flush=True)
    (HERE / "coupled.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
