"""Measure accuracy against the fraction of filters cut, without fine-tuning, in the three readings."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow.compensation.compensate import READINGS, read_as
from regrow.criteria.score import DATA_CRITERIA, Criterion, check_criterion, check_pictures, score
from regrow.criteria.select import check_selection, select
from regrow.filters import convolutions, left_out
from regrow.looking.images import check_batches
from regrow.modules import unwrap
from regrow.pruning.accuracy import top1
from regrow.structure.read import read_structure
from regrow.study import records
from regrow.study.config import RunConfig, make_config
from regrow.study.trained import as_trained
from regrow.suggest import nearest

FRACTIONS = tuple(percent / 100 for percent in range(0, 100, 10))
SPLITS = ("test", "validation")


def pruned_accuracies(
    model: nn.Module,
    accuracy: Callable[[nn.Module], float],
    *,
    example_inputs: Any,
    calibration: Iterable[Any] | None = None,
    fractions: Iterable[float] = FRACTIONS,
    readings: Iterable[str] = READINGS,
    criterion: Criterion = "l2",
    scope: str = "layer",
    seed: int | None = None,
    progress: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Measure how accurate a trained model is with more and more of its filters cut.

    Every convolution that ``score`` ranks takes part, the first one too, but never a classifier (a
    convolution whose channels are the network's output) or one whose channels cannot be removed. The
    filters are ranked once and cut from the lowest score on; each layer keeps its best filter, so that 90 %
    of a layer of 4 filters means 3. At the point where nothing is cut, every reading is the network as it is.

    Args:
        model: any trained module; it is not changed.
        accuracy: a function that returns the accuracy, 0 to 1, of the model it is given, a copy in eval
            mode. It is called once for each reading and number of filters cut.
        example_inputs: an input of ``model``; one picture is enough.
        calibration: batches of images for ``"compensated"``, as ``regrow.compensate`` takes them. A criterion
            that reads pictures reads these, with their labels if it takes the loss (the cross entropy).
        fractions: shares of the filters to cut, each 0 ≤ fraction < 1.
        readings: of ``"zeroed"``, ``"removed"``, ``"compensated"``.
        criterion: as ``regrow.score`` takes it.
        scope: ``"layer"`` cuts the same share of each layer, ``"global"`` ranks all filters together.
        seed: for the criterion ``"random"``.
        progress: called after each point.

    Returns:
        layers {name: filters} that take part, left_out {name: why}, points: for each reading and
        ascending fraction {reading, fraction, dropped (the number of filters that are cut), accuracy}.

    Raises:
        ValueError: an argument out of range or unknown, no calibration where it is needed, a model that
            cannot be traced or has no convolution to cut.
    """
    fractions, readings = sorted(set(fractions)), list(dict.fromkeys(readings))
    check_curve(criterion, scope, fractions, readings)
    check_pictures(criterion, calibration, None, "calibration")
    batches: list[Any] = []
    if "compensated" in readings and calibration is None:
        raise ValueError(
            "the reading 'compensated' needs calibration=: batches of a few hundred images in all."
        )
    if calibration is not None and ("compensated" in readings or criterion in DATA_CRITERIA):
        check_batches(calibration, "calibration")
        batches = list(calibration)
    base = copy.deepcopy(unwrap(model)).eval()
    excluded = _left_out(base, example_inputs)
    scores = score(base, criterion, exclude=excluded, seed=seed, batches=batches)
    # The filters cut at one fraction are also cut at the next, so their number says which they are.
    known: dict[tuple[str, int], float] = {}
    points = []
    for reading in readings:
        for fraction in fractions:
            keep = _selected(scores, fraction, scope)
            dropped = sum(int((~mask).sum()) for mask in keep.values())
            which = (reading, dropped) if dropped else ("", 0)
            if which not in known:
                pruned = _pruned(base, keep if dropped else {}, reading, example_inputs, batches)
                known[which] = float(accuracy(pruned.eval()))
            points.append(
                {"reading": reading, "fraction": fraction, "dropped": dropped, "accuracy": known[which]}
            )
            if progress is not None:
                progress()
    return {
        "layers": {name: len(values) for name, values in scores.items()},
        "left_out": excluded,
        "points": points,
    }


def measure_run(
    folder: str | Path,
    *,
    fractions: Iterable[float] = FRACTIONS,
    readings: Iterable[str] = READINGS,
    criterion: str = "l2",
    scope: str = "layer",
    split: str = "test",
    rerun: bool = False,
    progress: Callable[[], object] | None = None,
) -> bool:
    """Measure ``pruned_accuracies`` of a finished run and write them into its folder, as a curve record.

    Images for ``compensated`` are the first 512 training pictures (stratified by class and fixed by
    split_seed), without augmentation and labels, in batches of 128. Points that the folder already
    holds for the same weights (their SHA-256 is in the record) are not measured again, and they stay when
    other fractions or readings are added.

    Args:
        folder: the run folder.
        fractions, readings, criterion, scope: as ``pruned_accuracies``; ``"random"`` takes the run's seed.
        split: the pictures to measure the accuracy on: ``"test"``, or ``"validation"`` for choosing settings.
        rerun: measure existing points again, and replace them.
        progress: called once for each reading and fraction asked for.

    Returns:
        Whether anything was measured.

    Raises:
        ValueError: ``folder`` is not that of a finished run, its weights are missing or do not fit, or as
            ``pruned_accuracies``.
    """
    fractions, readings = sorted(set(fractions)), list(dict.fromkeys(readings))
    check_curve(criterion, scope, fractions, readings, split)
    run = records.read_run(folder)
    if run.result is None:
        raise ValueError(f"{folder} holds an unfinished run, which has no final weights: finish it first.")
    config = make_config(run.config)
    header = {
        "version": records.VERSION,
        "split": split,
        "criterion": criterion,
        "scope": scope,
        "seed": config.seed if criterion == "random" else None,
        "weights": records.weights_hash(folder),
    }
    path = records.curve_path(folder, split, criterion, scope)
    there = [] if rerun else _points_there(path, header)
    have = {_place(point) for point in there}
    missing = [place for place in product(readings, fractions) if place not in have]
    new_fractions = {fraction for _, fraction in missing}
    new_readings = [reading for reading in readings if reading in {each for each, _ in missing}]
    if progress is not None:
        for _ in range(len(readings) * len(fractions) - len(new_readings) * len(new_fractions)):
            progress()
    if not missing:
        return False
    found = _measure(
        Path(folder),
        config,
        split,
        progress,
        criterion=criterion,
        scope=scope,
        seed=header["seed"],
        fractions=new_fractions,
        readings=new_readings,
    )
    new = {_place(point) for point in found["points"]}
    kept = [point for point in there if _place(point) not in new]
    points = sorted(
        [*kept, *found["points"]], key=lambda point: (READINGS.index(point["reading"]), point["fraction"])
    )
    records.write_json(path, {**header, **found, "points": points})
    return True


def check_curve(
    criterion: Criterion, scope: str, fractions: Sequence[float], readings: Sequence[str], split: str = "test"
) -> None:
    """Raise ``ValueError`` unless the arguments of ``measure_run`` are known and in range."""
    check_criterion(criterion)
    if not fractions or not readings:
        raise ValueError("a curve needs at least one fraction and one reading.")
    for fraction in fractions:
        check_selection(fraction, scope, 0.0)
    for name, known, what in (
        *((reading, READINGS, "reading") for reading in readings),
        (split, SPLITS, "split"),
    ):
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}{nearest(str(name), known)}")


def _left_out(model: nn.Module, example_inputs: Any) -> dict[str, str]:
    """The convolutions that are not cut: {name: reason}."""
    readers = read_structure(model, example_inputs)
    reasons = left_out(model)
    for name in convolutions(model):
        if name not in readers:
            reasons.setdefault(name, "example_inputs do not reach it")
        elif readers[name].output:
            reasons.setdefault(name, "its filters are the network's output, like a classifier's")
        elif norm := readers[name].unsilenced:
            reasons.setdefault(name, f"{norm!r} behind it cannot be silenced for its channels alone")
    return reasons


def _selected(scores: Mapping[str, Tensor], fraction: float, scope: str) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        # A layer that would lose all of its filters keeps one; "dropped" counts the filters really cut.
        warnings.filterwarnings("ignore", message="floor=", category=UserWarning)
        return select(scores, fraction, scope=scope, floor=0.0)


def _pruned(
    base: nn.Module, keep: Mapping[str, Tensor], reading: str, example_inputs: Any, calibration: list[Any]
) -> nn.Module:
    """A copy of ``base``, pruned in the sense of ``reading``; an empty ``keep`` cuts nothing."""
    pruned = copy.deepcopy(base)
    if keep:
        read_as(pruned, keep, reading, example_inputs=example_inputs, calibration=calibration)
    return pruned


def _points_there(path: Path, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points that were measured before, if they belong to the same weights."""
    if not path.exists():
        return []
    record = records.read_curve(path)
    if any(record[key] != value for key, value in header.items()):
        return []
    return [point for point in record["points"] if point["reading"] in READINGS]


def _place(point: Mapping[str, Any]) -> tuple[str, float]:
    return point["reading"], point["fraction"]


def _measure(
    folder: Path, config: RunConfig, split: str, progress: Callable[[], object] | None, **settings: Any
) -> dict[str, Any]:
    trained = as_trained(folder, config)
    judged = trained.test if split == "test" else trained.validation
    assert judged is not None
    assert trained.calibration is not None
    with torch.no_grad():
        classes = trained.model(trained.example).shape[-1]
    begun = time.perf_counter()
    found = pruned_accuracies(
        trained.model.to(memory_format=torch.channels_last),
        lambda pruned: top1(pruned, judged)[0],
        example_inputs=trained.example,
        calibration=trained.labelled or trained.calibration,
        progress=progress,
        **settings,
    )
    return {
        "classes": classes,
        "images": len(judged),
        "calibration_images": sum(map(len, trained.calibration)),
        "device": str(trained.example.device),
        "seconds": time.perf_counter() - begun,
        **found,
    }
