"""The page and the picture of what ``run.py`` found."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot
from scipy import stats
from torch import nn

from run import TRYING, standard_net, test_scenes
from scenes import ANSWERS, GARMENTS, Scenes, read
from tasks import TASKS

NAMES = {"detection": "Faster R-CNN", "segmentation": "LR-ASPP", "questions": "a recurrent question encoder"}
WAYS = {
    "uncut": "uncut",
    "l2": "cut by `l2`, not reconstructed",
    "removed": "cut, not reconstructed",
    "means": "cut, shifts by means",
    "reconstructed": "cut, reconstructed",
}
METHODS = {"standard": "standard", "repr": "RePr"}
SHOWN = 5
Rows = list[dict[str, Any]]
_HERE = re.compile(r"(<!-- results -->\n).*?(<!-- end of results -->)", re.DOTALL)


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation in %, or less where there are fewer values."""
    if not values:
        return ""
    shown = f"{100 * mean(values):.1f}"
    return shown if len(values) == 1 else f"{shown} ± {100 * stdev(values):.1f}"


def interval(differences: Sequence[float]) -> str:
    """The mean of paired differences in points, with its 95 % t interval."""
    if not differences:
        return ""
    middle = 100 * mean(differences)
    if len(differences) < 2:
        return f"{middle:+.1f}"
    half = 100 * stdev(differences) / math.sqrt(len(differences))
    half *= float(stats.t.ppf(0.975, len(differences) - 1))
    return f"{middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}]"


def verdict(differences: Sequence[float]) -> str:
    """What the interval says, in a word or two."""
    if len(differences) < 2:
        return "too few seeds"
    low, high = (float(each) for each in re.findall(r"[+-][\d.]+", interval(differences))[1:])
    return "a gain" if low > 0 else "a loss" if high < 0 else "no gain shown"


def table(cuts: Rows) -> list[str]:
    """A row for each task and way: both methods, over the seeds that both have."""
    lines = [
        "| % on test scenes | standard | RePr | RePr − standard | |",
        "|---|--:|--:|--:|---|",
    ]
    for name, standard, repr_ in compared(cuts):
        for way, words in WAYS.items():
            apart = differences(standard, repr_, way)
            said = verdict(apart) if way == "uncut" else ""
            lines.append(
                f"| {name} ({TASKS[name].metric}), {words} | {spread(values(standard, way))} | "
                f"{spread(values(repr_, way))} | {interval(apart)} | {said} |"
            )
    return lines


def compared(cuts: Rows) -> Iterator[tuple[str, Rows, Rows]]:
    """Each task that has results, with its rows of standard training and of RePr, in order of the seeds.

    The seeds are those that both methods have finished. Where there are none, the rows of standard training
    are all that there are, and RePr has no rows.
    """
    for name in TASKS:
        standard, repr_ = (by_seed(cuts, name, method) for method in METHODS)
        both = sorted(standard.keys() & repr_.keys())
        seeds = both or sorted(standard)
        if seeds:
            yield name, [standard[seed] for seed in seeds], [repr_[seed] for seed in both]


def values(rows: Rows, way: str) -> list[float]:
    """The metric of each row after a cut of one of ``WAYS``."""
    return [row[way] for row in rows]


def differences(standard: Rows, repr_: Rows, way: str) -> list[float]:
    """RePr minus standard, for each seed; none where RePr has no rows."""
    return [b[way] - a[way] for a, b in zip(standard, repr_, strict=bool(repr_))]


def by_seed(cuts: Rows, name: str, method: str) -> dict[int, dict[str, Any]]:
    return {row["seed"]: row for row in cuts if (row["task"], row["method"]) == (name, method)}


def short_table(cuts: Rows) -> list[str]:
    """A row for each task, for the documentation."""
    lines = [
        "| % on test scenes | standard | RePr | RePr − standard | standard, cut | … reconstructed |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, standard, repr_ in compared(cuts):
        apart = differences(standard, repr_, "uncut")
        uncut, cut, reconstructed = (
            spread(values(standard, way)) for way in ("uncut", "l2", "reconstructed")
        )
        lines.append(
            f"| {name}: {NAMES[name]}, {TASKS[name].metric} | {uncut} | {spread(values(repr_, 'uncut'))} "
            f"| {interval(apart)} ({verdict(apart)}) | {cut} | {reconstructed} |"
        )
    return lines


def chosen(results: Any) -> list[str]:
    """The learning rates, and what they gave on validation scenes."""
    lines = ["| % on validation scenes, one seed apart | rate | |", "|---|--:|--:|"]
    tried = [row for row in results.rows if row["part"] == "train" and row["seed"] == TRYING]
    for row in sorted(tried, key=lambda row: [*TASKS].index(row["task"])):
        lines.append(
            f"| {row['task']}, {METHODS[row['method']]} | {row['rate']:g} | {100 * row['validation']:.1f} |"
        )
    return lines


def costs(cuts: Rows, results: Any) -> list[str]:
    """What is left of the arithmetic, and how long trainings and cuts took."""
    lines = [
        "| of the standard networks | multiply-accumulates left | parameters left | seconds of `prune` |"
        " of a training | … with RePr |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in TASKS:
        rows = list(by_seed(cuts, name, "standard").values())
        if not rows:
            continue
        shares = [
            f"{mean(row[key]['after'] / row[key]['before'] for row in rows):.2f}"
            for key in ("macs", "parameters")
        ]
        seconds = [
            [row["seconds"] for row in results.rows if is_training(row, name, method)] for method in METHODS
        ]
        shown = [f"{mean(each):.0f}" if each else "" for each in seconds]
        lines.append(
            f"| {name} | {shares[0]} | {shares[1]} | {mean(row['seconds'] for row in rows):.0f} | "
            f"{shown[0]} | {shown[1]} |"
        )
    return lines


def is_training(row: dict[str, Any], name: str, method: str) -> bool:
    return row["part"] == "train" and (row["task"], row["method"]) == (name, method)


def wrapped(text: str) -> list[str]:
    """A paragraph in lines of at most 110 characters."""
    return textwrap.wrap(text, 110, break_long_words=False, break_on_hyphens=False)


def write(path: Path, results: Any, settings: str) -> None:
    """Write the page, its picture beside it, and the small table of docs/tasks.md."""
    cuts = [row for row in results.rows if row["part"] == "cut"]
    machine = next(row for row in results.rows if row["part"] == "machine")
    picture = path.with_suffix(".png")
    draw(picture, results)
    numbers = ", ".join(
        f"{name} {len(by_seed(cuts, name, 'standard'))} and {len(by_seed(cuts, name, 'repr'))}"
        for name in TASKS
    )
    lines = [
        "# Detection, segmentation and questions, on scenes of garments",
        "",
        *wrapped(
            "Scenes of two to four garments of Fashion-MNIST on a canvas of 64×64 "
            "([scenes.py](tasks/scenes.py)). torchvision's Faster R-CNN with a feature pyramid finds the "
            "garments, torchvision's LR-ASPP says what each pixel is, and a network with a recurrent encoder "
            f"answers questions such as *what is left of bag*. {settings}"
        ),
        "",
        *wrapped(
            "Each trained network was cut to 0.7 of its multiply-accumulates. `prune` chose the filters "
            "once, with 512 training pictures without labels; *not reconstructed*, *shifts by means* and "
            "*reconstructed* are the same cut. *By `l2`* is the cut that `prune(compensate=False)` makes. "
            "Nothing was trained after a cut."
        ),
        "",
        *table(cuts),
        "",
        *wrapped(
            "Mean ± standard deviation over the seeds that both methods have finished, or those of standard "
            "training where RePr has none yet (finished trainings, "
            f"standard and RePr: {numbers}; 3 each are wanted), and the paired difference with its 95 % t "
            "interval. *No gain shown* is where the interval holds 0. mAP is the mean over IoU 0.5 to 0.95 "
            "(torchmetrics), mIoU the mean over the kinds and the background, of all pixels."
        ),
        "",
        f"![Scenes with what the networks say]({picture.name})",
        "",
        *wrapped(
            "Test scenes and the first standard networks: the garments that Faster R-CNN finds, the pixels "
            "that LR-ASPP marks, and answers to questions (a wrong one in brackets behind the right one)."
        ),
        "",
        "## Settings",
        "",
        "Each method's learning rate is the better of two on validation scenes:",
        "",
        *chosen(results),
        "",
        *costs(cuts, results),
        "",
        *wrapped(
            f"{machine['processor']}, {machine['threads']} thread beside other work, so that seconds are no "
            f"more than a hint; Python {machine['python']}, torch {machine['torch']}, torchvision "
            f"{machine['torchvision']}, numpy {machine['numpy']}."
        ),
        "",
        "```sh",
        "pip install torchmetrics pycocotools",
        "python benchmarks/tasks/run.py --out runs/tasks",
        "python benchmarks/tasks/run.py --out runs/tasks --table benchmarks/tasks.md",
        "```",
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    document = Path(__file__).parents[2] / "docs" / "tasks.md"
    if document.exists():
        small = "\n".join(["", *short_table(cuts), "", ""])
        text = document.read_text(encoding="utf-8")
        document.write_text(_HERE.sub(lambda found: found[1] + small + found[2], text), encoding="utf-8")


@torch.no_grad()
def draw(path: Path, results: Any) -> None:
    """Some test scenes, with what the first standard networks say."""
    matplotlib.use("agg")
    figure, axes = pyplot.subplots(3, SHOWN, figsize=(1.7 * SHOWN, 5.4), layout="constrained")
    scenes = test_scenes(SHOWN)
    for row, name in zip(axes, TASKS, strict=True):
        for ax in row:
            ax.axis("off")
        net = standard_net(results, name)
        if net is None:
            continue
        for number, ax in enumerate(row):
            ax.imshow(scenes.pictures[number, 0], cmap="gray", vmin=0, vmax=1)
            SAYS[name](ax, net, scenes, number)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def say_boxes(ax: Any, net: nn.Module, scenes: Scenes, number: int) -> None:
    found = net(scenes.pictures[number : number + 1])[0]
    for box, kind, score in zip(*(found[key].tolist() for key in ("boxes", "labels", "scores")), strict=True):
        if score > 0.5:
            left, top, right, bottom = box
            ax.add_patch(pyplot.Rectangle((left, top), right - left, bottom - top, fill=False, color="gold"))
            ax.text(left, top - 1, GARMENTS[kind - 1], color="gold", fontsize=6)


def say_pixels(ax: Any, net: nn.Module, scenes: Scenes, number: int) -> None:
    marked = net(scenes.pictures[number : number + 1])["out"][0].argmax(0)
    shown = torch.where(marked > 0, marked.float(), torch.nan)
    ax.imshow(shown, cmap="tab10", vmin=1, vmax=10, alpha=0.6, interpolation="nearest")
    for kind in marked.unique().tolist():
        if kind and (marked == kind).sum() > 40:
            rows, columns = (marked == kind).nonzero().float().mean(0).tolist()
            ax.text(columns, rows, GARMENTS[kind - 1], color="white", fontsize=6, ha="center")


def say_answer(ax: Any, net: nn.Module, scenes: Scenes, number: int) -> None:
    at = slice(number, number + 1)
    said = int(net(scenes.pictures[at], scenes.questions[at]).argmax())
    right = ANSWERS[scenes.answers[number]]
    shown = right if ANSWERS[said] == right else f"{right} ({ANSWERS[said]})"
    ax.set_title(f"{read(scenes.questions[number])}?\n{shown}", fontsize=7)


SAYS = {"detection": say_boxes, "segmentation": say_pixels, "questions": say_answer}
