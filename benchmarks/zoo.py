"""Cut 30 % of the filters of every model of the zoos by ``ortho``, and compare with the masked network.

    python benchmarks/zoo.py --results zoo.jsonl --table benchmarks/zoo.md

The models are every torchvision classification, detection and segmentation model, and of timm's convolutional
families the smallest model of each name, unless it has more than 200 million weights. They have random
weights, get small pictures, and make one forward and one backward pass in train mode and one forward pass in
eval mode. Each model runs in its own process, with a limit on time and memory; a model that is in the results
already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import re
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import regrow
from regrow.filters import convolutions
from regrow.looking.calls import call, floating
from regrow.looking.dropout import NoDropout
from regrow.looking.noise import unsettle
from regrow.structure.read import read_structure
from regrow.surgery.cut import cut
from regrow.surgery.layers import layers, sliced
from regrow.surgery.plan import CutPlan
from regrow.surgery.removal import plan_removal, unremovable

FRACTION = 0.3
TOLERANCE = 1e-4
IN_DOUBLE = 1e-8
DRAWS, MARGIN = 3, 10  # the differences found are about as large as the network's own movement
LARGEST = 200_000_000  # weights of a timm model; all models of torchvision are run


def kept_by(model: nn.Module, plan: CutPlan) -> dict[nn.Parameter, Mapping[int, Sequence[int]]]:
    """The parameters that ``plan`` makes smaller, each with the indices it keeps of each dimension."""
    return {
        dict(layer.module.named_parameters(recurse=False))[key]: kept
        for layer in layers(model, plan)
        for key, kept in layer.kept.items()
        if key in dict(layer.module.named_parameters(recurse=False))
    }


def torchvision_names(kind: str) -> list[str]:
    import torchvision

    return list(torchvision.models.list_models(module=_home(kind)))


def _home(kind: str) -> Any:
    import torchvision

    return getattr(torchvision.models, kind, torchvision.models)


def timm_names() -> list[str]:
    """The smallest model of each name (``resnet``, ``seresnet``, …) with most weights in convolutions."""
    import timm

    smallest: dict[tuple[str, str], tuple[int, str]] = {}
    for family in timm.list_modules():
        names = timm.list_models(module=family)
        some = [names[0], names[len(names) // 2], names[-1]] if names else []
        if not any(_weights(name)[1] for name in some):  # such as hundreds of transformers
            continue
        for name in names:
            total, convolutional = _weights(name)
            if convolutional and total < LARGEST:
                key = (family, re.match(r"[a-z_]*", name)[0])  # type: ignore[index]
                smallest[key] = min(smallest.get(key, (total, name)), (total, name))
    return sorted(name for _, name in smallest.values())


@functools.cache
def _weights(name: str) -> tuple[int, bool]:
    """How many weights a timm model has, and whether most are those of ungrouped convolutions."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    return total, 2 * sum(c.weight.numel() for c in convolutions(model).values() if c.groups == 1) > total


def every_model() -> list[str]:
    kinds = ("classification", "segmentation", "detection")
    names = [f"{kind}/{name}" for kind in kinds for name in torchvision_names(kind)]
    return names + [f"timm/{name}" for name in timm_names()]


def build(name: str) -> nn.Module:
    kind, bare = name.split("/")
    torch.manual_seed(0)
    if kind == "timm":
        import timm

        return timm.create_model(bare, num_classes=10)
    settings: dict[str, Any] = {}
    if bare in ("inception_v3", "googlenet"):
        settings = {"init_weights": True}
    if kind in ("detection", "segmentation"):
        settings = {"weights_backbone": None}
    if kind == "detection" and not bare.startswith("ssd"):
        settings |= {"min_size": 128, "max_size": 160}
    if bare.startswith("keypoint"):  # its head takes minutes for hundreds of boxes in float64
        settings |= {"box_detections_per_img": 10, "box_batch_size_per_image": 32}
    if kind == "detection":
        settings |= {"num_classes": 5}
    return getattr(_home(kind), bare)(weights=None, **settings)


def inputs_for(name: str, model: nn.Module) -> Any:
    """A batch of four small pictures that the model takes in train mode (two, for a detector)."""
    kind, bare = name.split("/")
    generator = torch.Generator().manual_seed(0)
    if kind == "detection":
        return _detection_inputs(bare, generator)
    native = 224 if kind != "timm" else model.pretrained_cfg["input_size"][-1]
    for size in (64, 96, 128, 192, native, 224, 256, 299):
        pictures = torch.randn(4, 3, size, size, generator=generator)
        try:
            with torch.no_grad():
                copy.deepcopy(model).train()(pictures)
        except Exception:  # too small, or a model of one size
            continue
        return pictures
    raise ValueError("no size of picture up to 299 passes through the model")


def _detection_inputs(bare: str, generator: torch.Generator) -> Any:
    pictures = [torch.rand(3, 128, 128, generator=generator) for _ in range(2)]
    target = {
        "boxes": torch.tensor([[10.0, 10, 60, 70], [40, 30, 120, 110]]),
        "labels": torch.tensor([1, 2]),
    }
    if bare.startswith("mask"):
        target["masks"] = torch.zeros(2, 128, 128, dtype=torch.uint8)
        target["masks"][0, 10:70, 10:60] = target["masks"][1, 30:110, 40:120] = 1
    if bare.startswith("keypoint"):
        target["labels"] = torch.tensor([1, 1])
        target["keypoints"] = torch.tensor([[[30.0, 30, 1]] * 17, [[80.0, 80, 1]] * 17])
    return (pictures, [copy.deepcopy(target) for _ in pictures])


def measure(name: str) -> dict[str, Any]:
    """Cut one model, and compare it with the masked one: the largest difference over the largest value."""
    model = build(name)
    with torch.no_grad():  # norms as after training: one that maps 0 to 0 would hide a mistake
        unsettle(model, torch.Generator().manual_seed(0))
    inputs = inputs_for(name, model)
    example = inputs[:1] if isinstance(inputs, Tensor) else inputs
    started = time.perf_counter()
    readers = read_structure(model, example)
    left_out = {conv: reason for conv in convolutions(model) if (reason := unremovable(readers, conv))}
    if len(left_out) == len(convolutions(model)):
        return nothing_to_cut(model, left_out, time.perf_counter() - started)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keep = regrow.select(regrow.score(model, "ortho", exclude=left_out), FRACTION)
    masked = copy.deepcopy(model)
    plan_removal(masked, keep, example, readers).apply(masked)
    effect = difference(
        outputs(copy.deepcopy(model), inputs, True), outputs(copy.deepcopy(masked), inputs, True)
    )
    began_cut = time.perf_counter()
    record = cut(model, keep, example_inputs=example)
    seconds = time.perf_counter() - began_cut
    plan = CutPlan.from_dict(record["plan"])
    dropped = {conv: int((~mask).sum()) for conv, mask in keep.items() if not mask.all()}
    errors, own = errors_and_own(masked, model, plan, inputs)
    return {
        "filters": sum(conv.out_channels for conv in convolutions(masked).values()),
        "dropped": sum(dropped.values()),
        "masked": sum(dropped.get(conv, 0) for conv in record["masked"]),
        "placed": len(plan.placed),
        "reasons": record["masked"],
        "left_out": left_out,
        "parameters": record["parameters"],
        "errors": errors,
        "own": own,
        "effect": effect,
        "cut_seconds": seconds,
        "seconds": time.perf_counter() - started,
    }


def nothing_to_cut(model: nn.Module, left_out: dict[str, str], seconds: float) -> dict[str, Any]:
    """The result for a model without a removable filter: a transformer with one convolution, say."""
    size = sum(parameter.numel() for parameter in model.parameters())
    return {
        "filters": sum(conv.out_channels for conv in convolutions(model).values()),
        "dropped": 0,
        "masked": 0,
        "placed": 0,
        "reasons": {},
        "left_out": left_out,
        "parameters": {"before": size, "after": size},
        "errors": {"eval": 0.0, "train": 0.0, "gradients": 0.0},
        "own": {},
        "effect": 0.0,
        "cut_seconds": 0.0,
        "seconds": seconds,
    }


def cast_all(inputs: Any, dtype: torch.dtype) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):  # torchvision takes keypoints in float32 alone
        return {key: value if key == "keypoints" else cast_all(value, dtype) for key, value in inputs.items()}
    return type(inputs)(cast_all(value, dtype) for value in inputs)


def errors_and_own(
    masked: nn.Module, small: nn.Module, plan: CutPlan, inputs: Any
) -> tuple[dict[str, float], dict[str, float]]:
    """The result of ``compare`` in float32, with that in float64 (``eval64``, …) if the first is not clear,
    and the result of ``movement`` if neither is. Both networks are changed."""
    before = [[buffer.clone() for buffer in net.buffers()] for net in (masked, small)]
    kept = kept_by(masked, plan)
    errors = compare(computed(masked, inputs, kept), computed(small, inputs, {}))
    if max(errors.values()) <= TOLERANCE:
        return errors, {}
    for net, buffers in zip((masked, small), before, strict=True):
        for buffer, value in zip(net.buffers(), buffers, strict=True):
            buffer.copy_(value)  # the statistics from before the pass in train mode
    in_double = cast_all(inputs, torch.float64)
    try:
        # Convert one after the other, and back: both in float64 would not fit if the network is large.
        whole = computed(masked.double(), in_double, kept)
        masked.float()
        again = compare(whole, computed(small.double(), in_double, {}))
        del whole
    except Exception:  # some models have a dtype written into their code
        return errors | {"double": float("nan")}, {}
    unclear = any(errors[key] > TOLERANCE and again[key] > IN_DOUBLE for key in again)
    errors |= {f"{key}64": value for key, value in again.items()}
    if not unclear:
        return errors, {}
    for buffer, value in zip(masked.buffers(), before[0], strict=True):
        buffer.copy_(value)
    return errors, movement(masked.double(), plan, in_double)


def compare(whole: dict[str, list[Tensor]], part: dict[str, list[Tensor]]) -> dict[str, float]:
    """Relative differences of what two networks have ``computed``."""
    return {key: difference(whole[key], part[key], together=key == "gradients") for key in whole}


def computed(
    net: nn.Module, inputs: Any, kept: Mapping[nn.Parameter, Mapping[int, Sequence[int]]]
) -> dict[str, list[Tensor]]:
    """Outputs in eval and train mode, and gradients of the part of each parameter that ``kept`` leaves."""
    found = {"eval": outputs(net, inputs, False), "train": outputs(net, inputs, True, gradients=True)}
    sum(tensor.square().mean() for tensor in found["train"] if tensor.requires_grad).backward()
    gradients = []
    for p in net.parameters():
        whole = torch.zeros_like(p) if p.grad is None else p.grad
        gradients.append(sliced(whole, kept.get(p, {})).flatten())
        p.grad = None
    found = {key: [tensor.detach() for tensor in tensors] for key, tensors in found.items()}
    return found | {"gradients": gradients}


def movement(masked: nn.Module, plan: CutPlan, inputs: Any) -> dict[str, float]:
    """How far the values that ``compare`` takes move by themselves when every weight moves by one unit in the
    last place, the largest of some draws: two orders of the same sums cannot agree better than that."""
    kept, state = kept_by(masked, plan), copy.deepcopy(masked.state_dict())
    still = computed(masked, inputs, kept)
    furthest = dict.fromkeys(still, 0.0)
    for seed in range(DRAWS):
        masked.load_state_dict(state)
        nudge(masked, torch.Generator().manual_seed(seed))
        moved = computed(masked, inputs, kept)
        apart = compare(still, moved)
        furthest = {key: max(furthest[key], apart[key]) for key in still}
    return furthest


@torch.no_grad()
def nudge(net: nn.Module, generator: torch.Generator) -> None:
    """Move every parameter to the next number up or down, at random; zeros, of dropped filters, stay."""
    for parameter in net.parameters():
        away = torch.rand(parameter.shape, generator=generator) < 0.5
        parameter.copy_(parameter.nextafter(torch.where(away, 2 * parameter, 0 * parameter)))


def outputs(model: nn.Module, inputs: Any, training: bool, gradients: bool = False) -> list[Tensor]:
    model.train(training)
    torch.manual_seed(1)
    with NoDropout(), torch.set_grad_enabled(gradients):
        return floating(call(model, copy.deepcopy(inputs)))


def difference(expected: list[Tensor], found: list[Tensor], together: bool = False) -> float:
    """The largest difference, in units of the largest value of the same tensor (``together``: of all);
    infinite for other shapes, and where there are no numbers to compare (overflow, or zeros alone)."""
    worst, largest, seen = 0.0, 0.0, False
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape or not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            return float("inf")
        if not a.numel():
            continue
        apart, scale = float((a - b).detach().abs().max()), float(a.detach().abs().max())
        if together:
            worst, largest, seen = max(worst, apart), max(largest, scale), True
        elif scale:
            worst, seen = max(worst, apart / scale), True
        elif apart:
            return float("inf")
    if together and seen:
        return worst / largest if largest else float("inf")
    return worst if seen or all(not a.numel() for a in expected) else float("inf")


def run_alone(name: str, seconds: int, gigabytes: int) -> dict[str, Any]:
    """``measure`` in a process of its own."""
    started = time.perf_counter()
    result: dict[str, Any] = {"model": name}
    command = [sys.executable, __file__, "--one", name, "--memory", str(gigabytes)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return result | {"failed": f"not done in {seconds} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return result | json.loads(lines[-1])
    last = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
    return result | {"failed": last[:300], "seconds": time.perf_counter() - started}


def alone(name: str, gigabytes: int) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30,) * 2)
    warnings.simplefilter("ignore")
    print(json.dumps(measure(name)))


def results(path: Path) -> dict[str, dict[str, Any]]:
    """{model: its last result}."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["model"]: entry for entry in map(json.loads, lines)}


def verdict(entry: dict[str, Any]) -> str:
    """Empty if the cut network equals the masked one; else what is wrong."""
    if "failed" in entry:
        return str(entry["failed"])
    errors = entry["errors"]
    wrong = [key for key in ("eval", "train", "gradients") if not errors[key] <= TOLERANCE]
    allowed = {key: min(MARGIN * own, TOLERANCE) for key, own in entry.get("own", {}).items()}
    still = [
        key
        for key in wrong
        if not errors.get(f"{key}64", float("inf")) <= max(allowed.get(key, 0.0), IN_DOUBLE)
    ]
    return f"differs ({', '.join(still)})" if still else ""


def _shown(entry: dict[str, Any], key: str) -> str:
    errors = entry["errors"]
    if f"{key}64" not in errors:
        return f"{errors[key]:.0e}"
    needed = errors[key] > TOLERANCE and errors[f"{key}64"] > IN_DOUBLE and key in entry.get("own", {})
    own = f", own {entry['own'][key]:.0e}" if needed else ""
    return f"{errors[key]:.0e} ({errors[f'{key}64']:.0e}{own})"


def table(found: dict[str, dict[str, Any]]) -> str:
    good = {name: entry for name, entry in found.items() if not verdict(entry)}
    shares = [1 - entry["masked"] / entry["dropped"] for entry in good.values() if entry["dropped"]]
    import timm
    import torchvision

    lines = [
        "# The zoo",
        "",
        "30 % of the filters of each model dropped by `ortho`, and cut. *cut*: share of the dropped filters",
        "that the network computes no more; *masked*: share that it goes on computing and holds at 0.",
        "*difference*: the largest between the cut and the masked network, over the largest value (outputs",
        "in eval mode, in train mode, gradients of what is left; float32, one batch of four small pictures).",
        "Where float32 alone is above 1e-4, in nets whose norms see a handful of values, float64 follows in",
        "brackets. Where float64 is above 1e-8, in nets that amplify rounding beyond that, it is followed by",
        "*own*: how far the masked network moves by itself when each of its weights moves by one unit in the",
        f"last place (float64, the largest of {DRAWS} draws). A difference of up to {MARGIN} times that is",
        "rounding, if it is below 1e-4 too. *effect*: how far the masked network is from the whole one, in",
        "these units (train mode). Weights are random, and so are the norms' weights and statistics.",
        "`python benchmarks/zoo.py` makes this page.",
        "",
        f"{len(found)} models, {len(found) - len(good)} failed; in the median model "
        f"{100 * median(shares):.0f} % of the dropped filters are cut "
        f"(mean {100 * sum(shares) / len(shares):.1f} %). torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, timm {timm.__version__}.",
        "",
        "| model | filters | dropped | cut | masked | parameters | difference | effect | seconds | failed |",
        "|---|--:|--:|--:|--:|--:|---|--:|--:|---|",
    ]
    for name, entry in sorted(found.items()):
        if "failed" in entry:
            lines.append(f"| {name} | | | | | | | | | {verdict(entry)} |")
            continue
        dropped, sizes = entry["dropped"], entry["parameters"]
        masked = entry["masked"] / max(dropped, 1)
        shown = ", ".join(_shown(entry, key) for key in ("eval", "train", "gradients"))
        lines.append(
            f"| {name} | {entry['filters']} | {dropped} | {100 * (1 - masked):.0f} % | "
            f"{100 * masked:.0f} % | "
            f"{sizes['after'] / sizes['before']:.2f} × | {shown} | {entry['effect']:.2g} | "
            f"{entry['cut_seconds']:.1f} | "
            f"{verdict(entry)} |"
        )
    reasons = {
        f"- {name}, `{conv}`: {reason}"
        for name, entry in found.items()
        for conv, reason in [*entry.get("reasons", {}).items(), *entry.get("left_out", {}).items()]
    }
    return "\n".join([*lines, "", "Held at 0, or left out of the choice, and why:", "", *sorted(reasons), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("zoo.jsonl"), help="JSON lines, one a model")
    parser.add_argument("--table", type=Path, help="the page to write")
    parser.add_argument("--only", default="", help="names that match this regular expression")
    parser.add_argument("--again", action="store_true", help="run those that failed again")
    parser.add_argument("--seconds", type=int, default=900, help="limit for one model")
    parser.add_argument("--memory", type=int, default=14, help="limit for one model, GiB")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        alone(given.one, given.memory)
        return
    found = results(given.results)
    listed = given.results.with_suffix(".models.json")
    if not listed.exists():  # it takes minutes to build every model once
        listed.write_text(json.dumps(every_model()))
    for name in json.loads(listed.read_text()):
        if not re.search(given.only, name) or (name in found and not (given.again and verdict(found[name]))):
            continue
        entry = run_alone(name, given.seconds, given.memory)
        with given.results.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        found[name] = entry
        print(name, verdict(entry) or "equal", entry.get("errors", ""), flush=True)
        if given.table:
            given.table.write_text(table(found))


if __name__ == "__main__":
    main()
