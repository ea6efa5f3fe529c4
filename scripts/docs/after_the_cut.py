"""Draw docs/after-the-cut.svg from benchmarks/reconstruction.json; it takes no arguments."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
NET = "resnet20"
# {(which filters, how they are made up for): name and color}
LINES = {
    ("reconstruction, own shares, jointly", "least-squares"): ("regrow.prune", "#00796b"),
    ("Torch-Pruning, isomorphic, inner channels", "re-estimated"): (
        "Torch-Pruning, isomorphic,\nnorms re-estimated",
        "#9e9e9e",
    ),
    ("Torch-Pruning, magnitude, inner channels", "re-estimated"): (
        "Torch-Pruning, magnitude,\nnorms re-estimated",
        "#616161",
    ),
}


def main() -> None:
    found = json.loads((ROOT / "benchmarks" / "reconstruction.json").read_text(encoding="utf-8"))["rows"]
    rows = [row for row in found if row["net"] == NET and row["images"] == 512]
    (uncut,) = (row["accuracy"] for row in rows if row["how"] == "uncut")
    plt.rcParams.update(
        {"svg.hashsalt": NET, "font.size": 10, "font.family": "sans-serif", "svg.fonttype": "path"}
    )
    figure, axes = plt.subplots(figsize=(6.6, 3.1))
    axes.axhline(uncut, color="black", linewidth=0.8, linestyle=":")
    axes.text(0.36, uncut + 2, f"uncut {uncut:.1f}")
    for (choice, how), (name, color) in LINES.items():
        line = sorted(
            (row["macs"], row["accuracy"]) for row in rows if (row["choice"], row["how"]) == (choice, how)
        )
        axes.plot(*zip(*line, strict=True), "o-", color=color, label=name, markersize=4)
    axes.set(xlim=(0.82, 0.28), ylim=(0, 100))
    axes.set_xlabel("share of the multiply-accumulates that is left")
    axes.set_title("ResNet-20, CIFAR-10: test accuracy in % right after the cut", loc="left", fontsize=10)
    axes.legend(loc="lower left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "after-the-cut.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
