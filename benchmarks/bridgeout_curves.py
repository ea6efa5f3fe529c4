"""Batch Bridgeout and its rivals: accuracy against filters cut, strengths chosen on validation.

    python benchmarks/bridgeout_curves.py runs/curves --jobs 2

Every method gets the same number of trials. A trial trains with one seed that is not used again, and is
judged by the mean validation accuracy over 0 to 50 % of filters zeroed, the published measure. The settings
of the best trial are trained with three other seeds and measured on the test pictures. Finished runs are not
trained again; ``--report-only`` writes the tables from the runs that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

import regrow
from regrow.study import drawing, figures, records
from regrow.study.paired import paired
from regrow.study.pruned import CurveSet, Estimate, curve_sets, to_dict
from regrow.study.words import interval, label, signed

HOME = Path(__file__).resolve().parent
SHARED: dict[str, Any] = {
    "data": "fashion-mnist",
    "image_size": 14,
    "train_size": 20_000,
    "augmentation": "flip",
    "model": "vgg",
    "depth": 7,
    "width": 0.5,
    "epochs": 15,
    "batch_size": 128,
    "threads": 1,
}
# The same number of trials for each; the first is the paper's setting.
TRIALS: dict[str, list[dict[str, Any]]] = {
    "standard": [{"weight_decay": decay} for decay in (5e-4, 5e-3, 1e-2, 2e-2)],
    "dropout": [
        {"p": p, "weight_decay": decay} for p, decay in ((0.3, 5e-4), (0.3, 5e-3), (0.1, 1e-2), (0.1, 2e-2))
    ],
    "targeted-dropout": [
        {"p": p, "weight_decay": decay} for p, decay in ((0.3, 5e-4), (0.3, 5e-3), (0.1, 1e-2), (0.1, 2e-2))
    ],
    "bridgeout": [
        {"p": p, "weight_decay": decay} for p, decay in ((0.3, 5e-4), (0.1, 5e-3), (0.1, 1e-2), (0.03, 2e-2))
    ],
    "targeted-bridgeout": [
        {"p": p, "weight_decay": decay} for p, decay in ((0.3, 5e-4), (0.1, 5e-3), (0.1, 1e-2), (0.03, 2e-2))
    ],
}
CHOICE_SEED, SEEDS = 100, (0, 1, 2)
# Mean accuracy over 0 to 50 % of filters zeroed, CIFAR-10 (arXiv 2009.10893, from the authors' figures).
PUBLISHED = {
    "VGG-16": {"bridgeout": 87.8, "dropout": 42.6, "standard": 49.7},
    "ResNet": {"bridgeout": 70.0, "dropout": 58.0, "standard": 38.7},
    "WRN-28-10": {"bridgeout": 92.0, "dropout": 70.0, "standard": 71.7},
}


def run_all(commands: Iterable[list[str]], jobs: int) -> None:
    """Run ``regrow`` commands, ``jobs`` at a time; the first that fails is an error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(command: list[str]) -> None:
        print("regrow", *command, flush=True)
        subprocess.run([sys.executable, "-m", "regrow", *command], check=True, env=environment)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, commands))


def measure_on_validation(folders: Iterable[Path], jobs: int) -> None:
    how = ["--split", "validation", "--fractions", "0-50"]
    run_all((["curve", str(folder), *how] for folder in folders), jobs)


def train(folder: Path, method: str, settings: Mapping[str, Any], seed: int) -> list[str]:
    """Write the settings of one run beside its folder, and return the command that trains it."""
    file = folder.with_name(folder.name + ".yaml")
    records.write_yaml(file, {**SHARED, **settings, "method": method, "seed": seed})
    return ["train", "--config", str(file), "--out", str(folder)]


def trial_folder(home: Path, method: str, number: int) -> Path:
    return home / "trials" / f"{method}-{number}"


def half_means(curves: CurveSet) -> dict[tuple[str, str], Estimate]:
    """Mean accuracy over 0 to 50 % cut, {(method, reading): over seeds}."""
    return {(c.method, c.reading): c.mean_0_50 for c in curves.curves if c.mean_0_50 is not None}


def chosen(home: Path) -> dict[str, dict[str, Any]]:
    """For each method, the validation accuracies of its trials, and which trial is best."""
    found = {}
    for method, trials in TRIALS.items():
        scores, uncut = [], []
        for number in range(len(trials)):
            (curves,) = curve_sets(records.find_runs(trial_folder(home, method, number)))
            scores.append({reading: 100 * mean.mean for (_, reading), mean in half_means(curves).items()})
            zeroed = curves.curve(method, "zeroed")
            assert zeroed is not None
            uncut.append(100 * zeroed.points[0].mean)
        best = max(range(len(trials)), key=lambda number: scores[number]["zeroed"])
        found[method] = {"settings": trials[best], "best": best, "scores": scores, "uncut": uncut}
    return found


def at(curves: CurveSet, method: str, fraction: float) -> dict[int, float]:
    """The zeroed accuracy of each seed at ``fraction``, in per cent."""
    curve = curves.curve(method, "zeroed")
    assert curve is not None
    place = curve.fractions.index(fraction)
    return {seed: 100 * values[place] for seed, values in curve.accuracies.items()}


def plain(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in settings.items())


def error(value: Estimate) -> str:
    return f"{100 * value.mean:.1f}" + ("" if value.error is None else f" ± {100 * value.error:.1f}")


def tables(curves: CurveSet, choice: Mapping[str, Mapping[str, Any]], hours: float, runs: int) -> str:
    """The text of bridgeout_curves.md."""
    where = records.environment("cpu", 1)
    lines = [
        "# Accuracy against filters cut: Batch Bridgeout and its rivals",
        "",
        "`python benchmarks/bridgeout_curves.py runs/curves --jobs 2`: "
        f"{hours:.1f} hours of training in all, {runs} runs, one thread each. {where['processor']}, "
        f"{where['cores']} cores; Python {platform.python_version()}, torch {torch.__version__}, regrow "
        f"{regrow.__version__}.",
        "",
        f"Settings of all: {', '.join(f'{key} {value}' for key, value in SHARED.items())}; SGD with Nesterov "
        "momentum at 0.1, held for 70 % of the steps and annealed. Strengths are chosen by one training "
        f"with seed {CHOICE_SEED} for each of {len(next(iter(TRIALS.values())))} settings a method, on "
        "validation pictures, by the mean accuracy over 0 to 50 % of filters `zeroed`; what follows is on "
        f"test pictures, seeds {', '.join(map(str, SEEDS))} (n = {len(SEEDS)}), mean ± standard error (ddof "
        "1). The same "
        "fraction of every convolution's filters is cut, those of smallest L2 norm, without fine-tuning.",
        "",
    ]
    for reading in curves.readings:
        shown = [curve for curve in curves.curves if curve.reading == reading]
        heads = [f"{100 * fraction:.0f} %" for fraction in shown[0].fractions]
        lines += [f"## {reading}", "", f"| | {' | '.join(heads)} | mean, 0–50 % |"]
        lines.append("|---|" + "---|" * (len(heads) + 1))
        for curve in shown:
            cells = [error(point) for point in curve.points] + [error(curve.mean_0_50)]  # type: ignore[arg-type]
            lines.append(f"| {label(curve.method)} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## Margins", "", "Mean accuracy over 0–50 % cut, Bridgeout less a rival, points, paired over "]
    lines[-1] += "seeds, with the 95 % t interval."
    lines += ["", f"| | over | {' | '.join(curves.readings)} |", "|---|---|" + "---|" * len(curves.readings)]
    for method in ("bridgeout", "targeted-bridgeout"):
        for over in ("standard", "dropout", "targeted-dropout"):
            margins = [curves.margin(method, reading, over) for reading in curves.readings]
            cells = [
                "—" if m is None or m.low is None or m.high is None
                else f"{signed(m.mean, 1)} [{signed(m.low, 1)}, {signed(m.high, 1)}]"
                for m in margins
            ]  # fmt: skip
            lines.append(f"| {label(method)} | {label(over)} | {' | '.join(cells)} |")
    lines += [
        "",
        "Beyond the half, where the choice of strengths did not look: `zeroed` accuracy at 60 % cut, points.",
    ]
    lines += ["", "| | over | at 60 % |", "|---|---|---|"]
    for method in ("bridgeout", "targeted-bridgeout"):
        for over in ("standard", "dropout", "targeted-dropout"):
            margin = paired(*(at(curves, name, 0.6) for name in (over, method)))
            lines.append(
                f"| {label(method)} | {label(over)} | {signed(margin.mean, 1)} {interval(margin, 1)} |"
            )
    lines += ["", "Published, CIFAR-10, `zeroed`, mean over 0–50 %:", ""]
    lines += ["| net | Bridgeout | dropout | backprop | margin over the better |", "|---|---|---|---|---|"]
    for net, means in PUBLISHED.items():
        margin = means["bridgeout"] - max(means["dropout"], means["standard"])
        row = f"{means['bridgeout']} | {means['dropout']} | {means['standard']} | {signed(margin, 1)}"
        lines.append(f"| {net} | {row} |")
    lines += ["", "## The choice, on validation pictures", ""]
    lines.append(
        "Mean accuracy over 0–50 % cut, one seed; `uncut` is the network as trained. The chosen one in bold,"
    )
    lines.append("the paper's setting first.")
    lines += ["", "| | strength | uncut | zeroed | removed | compensated |", "|---|---|---|---|---|---|"]
    for method, each in choice.items():
        for number, (settings, scores) in enumerate(zip(TRIALS[method], each["scores"], strict=True)):
            mark = "**" if number == each["best"] else ""
            means = " | ".join(f"{scores[r]:.1f}" for r in ("zeroed", "removed", "compensated"))
            lines.append(
                f"| {label(method)} | {mark}{plain(settings)}{mark} | {each['uncut'][number]:.1f} | {means} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("home", type=Path, help="folder for the runs")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each")
    parser.add_argument("--report-only", action="store_true", help="write the tables from what is there")
    arguments = parser.parse_args()
    home = arguments.home
    trials = {
        trial_folder(home, method, number): (method, settings, CHOICE_SEED)
        for method, many in TRIALS.items()
        for number, settings in enumerate(many)
    }
    if not arguments.report_only:
        run_all((train(folder, *what) for folder, what in trials.items()), arguments.jobs)
        measure_on_validation(trials, arguments.jobs)
    choice = chosen(home)
    final = {
        records.run_folder(home / "final", method, seed): (method, each["settings"], seed)
        for method, each in choice.items()
        for seed in SEEDS
    }
    if not arguments.report_only:
        run_all((train(folder, *what) for folder, what in final.items()), arguments.jobs)
        run_all((["curve", str(folder)] for folder in final), arguments.jobs)
    (curves,) = curve_sets(records.find_runs(*final))
    every = records.find_runs(home)
    hours = sum(run.result["seconds"] for run in every if run.result) / 3600
    out = HOME / "bridgeout_curves"
    records.write_text(out.with_suffix(".md"), tables(curves, choice, hours, len(every)))
    records.write_json(out.with_suffix(".json"), {"shared": SHARED, "choice": choice, **to_dict(curves)})
    draw = partial(figures.pruned_curves, curves, drawing.styles(curves.methods), key=True)
    records.write_bytes(out.with_suffix(".png"), drawing.png(draw, drawing.WIDE))
    print(yaml.safe_dump({method: each["settings"] for method, each in choice.items()}))
    print(json.dumps({f"{m} {r}": error(v) for (m, r), v in half_means(curves).items()}, indent=1))


if __name__ == "__main__":
    main()
