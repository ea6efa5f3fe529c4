"""Analyse trained runs: criteria against the oracle, likeness of layers and runs, filters dropped alone."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regrow.analysis.agreement import agreement
from regrow.analysis.canonical import Directions
from regrow.analysis.drop_one import drop_one_accuracy
from regrow.analysis.layers import correlation, layer_directions, record_of
from regrow.criteria.score import CRITERIA, score
from regrow.filters import convolutions, eligible
from regrow.modules import filters_first
from regrow.pruning.accuracy import top1
from regrow.study import analysed, records
from regrow.study.config import make_config
from regrow.study.records import RunRecord
from regrow.study.trained import Trained, as_trained, load_weights

_BATCH = 128
VARIANCE, GRID = 0.99, 4
ORACLE = "oracle"
Pictures = list[tuple[Tensor, Tensor]]


def work_of(run: RunRecord) -> int:
    """How many parts the analysis of ``run`` has, for a progress bar."""
    return len(moments_of(run)) + 2


def moments_of(run: RunRecord) -> list[tuple[int, Path]]:
    """When criteria are held against the oracle: epochs and the weights after them, the final ones last."""
    last = int(run.epochs[-1]["epoch"]) if run.epochs else 0
    kept = {each.epoch: each.path for each in analysed.snapshots(run.folder) if not each.moment}
    # Of the last epoch there are the final weights, from which a method's noise is taken off.
    return [*((epoch, path) for epoch, path in kept.items() if epoch < last), (last, final_path(run))]


def final_path(run: RunRecord) -> Path:
    return records.weights_path(run.folder)


def analyse_run(
    run: RunRecord, *, pictures: int = 256, rerun: bool = False, progress: Callable[[], object] | None = None
) -> bool:
    """Analyse a finished run, and write ``analysis.json`` into its folder, whole or not at all.

    Validation pictures are used. At each moment of which the weights were kept (setting ``snapshots``), and
    at the end, all criteria are held against the oracle, over the filters that are not dropped then. At the
    end the layers are correlated with each other, and each filter is dropped alone.

    Args:
        run: the run.
        pictures: how many to use, spread evenly over the validation pictures.
        rerun: analyse it again, if the folder holds an analysis of the same weights and pictures.
        progress: called after each of the ``work_of`` parts.

    Returns:
        Whether anything was computed.

    Raises:
        ValueError: ``run`` is unfinished, its weights are missing or do not fit, or its data is missing.
    """
    check_pictures(pictures)
    if run.result is None:
        raise ValueError(
            f"{run.folder} holds an unfinished run, which has no final weights: finish it first."
        )
    done = progress or (lambda: None)
    moments = moments_of(run)
    key = {
        "weights": records.weights_hash(run.folder),
        "asked": pictures,
        "snapshots": [each.path.name for each in analysed.snapshots(run.folder)],
    }
    there = None if rerun else analysed.read_analysis(run.folder)
    if there is not None and all(there.get(name) == value for name, value in key.items()):
        for _ in range(work_of(run)):
            done()
        return False
    begun = time.perf_counter()
    trained = as_trained(run.folder, make_config(run.config))
    model, batches = trained.model, some_pictures(trained, pictures)
    found = []
    for epoch, path in moments:
        load_weights(model, path)
        found.append({"epoch": epoch, **_agreement(model, batches, make_config(run.config).seed)})
        done()
    directions = layer_directions([model], batches, grid=GRID, variance=VARIANCE)[0]
    layers = record_of(directions, directions)
    done()
    dropped = drop_one_accuracy(model, batches, progress=False)
    done()
    record = {
        "version": analysed.VERSION,
        **key,
        "split": "validation",
        "pictures": sum(len(labels) for _, labels in batches),
        "device": str(trained.example.device),
        "accuracy": top1(model, batches)[0],
        "moments": found,
        "layers": layers,
        "drop_one": {name: values.tolist() for name, values in dropped.items()},
        "first_layer": _first_layer(run, model),
        "seconds": time.perf_counter() - begun,
    }
    records.write_json(analysed.analysis_path(run.folder), record)
    return True


def analyse_between(
    runs: Sequence[RunRecord],
    folder: Path,
    *,
    pictures: int = 256,
    rerun: bool = False,
    progress: Callable[[], object] | None = None,
) -> bool:
    """Correlate each layer of each run with the same layer of every other run, on the same pictures.

    Args:
        runs: finished runs of one network on the same data.
        folder: where ``analysis.json`` is written, whole or not at all.
        pictures, rerun: as ``analyse_run`` takes them.
        progress: called after each run.

    Returns:
        Whether anything was computed.

    Raises:
        ValueError: as ``analyse_run``, or the runs have different layers.
    """
    check_pictures(pictures)
    done = progress or (lambda: None)
    named = [{"folder": run.folder.name, "weights": records.weights_hash(run.folder)} for run in runs]
    there = None if rerun else analysed.read_between(folder)
    if there is not None and there["runs"] == named and there.get("asked") == pictures:
        for _ in runs:
            done()
        return False
    found: list[dict[str, Directions | None]] = []
    batches: Pictures = []
    for run in runs:
        trained = as_trained(run.folder, make_config(run.config))
        if not found:
            batches = some_pictures(trained, pictures)
        found += layer_directions([trained.model], batches, grid=GRID, variance=VARIANCE)
        if [*found[-1]] != [*found[0]]:
            raise ValueError(f"{run.folder} and {runs[0].folder} have different layers: analyse them apart.")
        done()
    layers = [*found[0]]
    by_layer = {
        name: [[correlation(one[name], other[name])[0] for other in found] for one in found]
        for name in layers
    }
    mean = [
        [_mean([by_layer[name][row][column] for name in layers]) for column in range(len(runs))]
        for row in range(len(runs))
    ]
    record = {
        "version": analysed.VERSION,
        "runs": named,
        "asked": pictures,
        "pictures": sum(len(labels) for _, labels in batches),
        "layers": layers,
        "mean": mean,
        "by_layer": by_layer,
    }
    records.write_json(analysed.analysis_path(folder), record)
    return True


def check_pictures(pictures: int) -> None:
    """Raise ``ValueError`` unless ``pictures`` is a number of pictures that says something."""
    if not isinstance(pictures, int) or isinstance(pictures, bool) or pictures < 2:
        raise ValueError(f"pictures is a whole number of at least 2, got {pictures!r}. Try 256.")


def some_pictures(trained: Trained, pictures: int) -> Pictures:
    """``pictures`` validation pictures and their labels, spread evenly over all of them, in batches."""
    assert trained.validation is not None
    whole = list(trained.validation)
    images, labels = torch.cat([image for image, _ in whole]), torch.cat([label for _, label in whole])
    count = min(pictures, len(labels))
    chosen = torch.from_numpy(np.linspace(0, len(labels) - 1, count).round().astype(int)).to(labels.device)
    return list(zip(images[chosen].split(_BATCH), labels[chosen].split(_BATCH), strict=True))


def _agreement(model: nn.Module, batches: Pictures, seed: int) -> dict[str, Any]:
    """The agreement of all criteria with the oracle, over the filters that are not dropped."""
    settings: dict[str, Any] = {"seed": seed, "batches": batches}
    oracle = score(model, ORACLE, **settings)
    alive = {
        name: filters_first(conv, conv.weight.detach()).flatten(1).any(1)
        for name, conv in eligible(model).items()
    }
    oracle = {name: values.double().masked_fill(~alive[name], math.nan) for name, values in oracle.items()}
    scores = {name: score(model, name, **settings) for name in CRITERIA if name != ORACLE}
    found = agreement(scores, oracle)
    return {
        "filters": int(sum(mask.sum() for name, mask in alive.items() if name in oracle)),
        "criteria": {
            name: {"pearson": each["pearson"], "spearman": each["spearman"]}
            for name, each in found["criteria"].items()
        },
    }


def _first_layer(run: RunRecord, model: nn.Module) -> dict[str, Any]:
    """The filters of the first convolution before the last drop, after its restore, and at the end.

    Empty where nothing was regrown in that layer, or no weights were kept.
    """
    name = next(iter(convolutions(model)), None)
    regrown = [
        each for each in run.events if each["kind"] in ("restore", "restart") and each["filters"].get(name)
    ]
    if name is None or not regrown:
        return {}
    last = regrown[-1]
    # A restart drops and restores at once.
    drops = [e["epoch"] for e in run.events if e["kind"] == "drop" and e["epoch"] < last["epoch"]]
    before = drops[-1] if last["kind"] == "restore" and drops else last["epoch"]
    steps = [
        ("before the drop", before, analysed.snapshot_path(run.folder, before)),
        ("regrown", last["epoch"], analysed.snapshot_path(run.folder, last["epoch"], last["kind"])),
        ("trained on", run.epochs[-1]["epoch"], final_path(run)),
    ]
    if not all(path.exists() for _, _, path in steps):
        return {}
    moments = []
    conv: Any = model.get_submodule(name)
    for what, epoch, path in steps:  # the last are the weights that the model has had
        load_weights(model, path)
        filters = filters_first(conv, conv.weight.detach()).cpu().float()
        moments.append(
            {
                "moment": what,
                "epoch": epoch,
                "filters": [[round(w, 4) for w in f] for f in filters.flatten(1).tolist()],
            }
        )
    return {
        "name": name,
        "shape": list(filters_first(conv, conv.weight).shape[1:]),
        "regrown": last["filters"][name],
        "moments": moments,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# Runs that agree in these have the same layers and can take the same pictures.
_ALIKE = ("data", "image_size", "split_seed", "model", "depth", "width", "batch_norm", "pooling")


def by_parent(runs: Sequence[RunRecord]) -> list[tuple[Path, list[RunRecord]]]:
    """``runs`` by the folder that they lie in, of folders that hold several runs of one network and data."""
    ordered = sorted(runs, key=lambda run: (str(run.folder.parent), run.method, run.seed))
    groups = itertools.groupby(ordered, key=lambda run: run.folder.parent)
    several = [(parent, found) for parent, each in groups if len(found := list(each)) > 1]
    return [
        (parent, found)
        for parent, found in several
        if all(run.config.get(key) == found[0].config.get(key) for run in found for key in _ALIKE)
    ]
