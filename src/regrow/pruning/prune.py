"""One call for the engineer: rank filters, choose, cut for good and compensate, within a budget."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regrow.compensation.images import check_calibration, count_images, inputs_of
from regrow.criteria.score import check_criterion, score
from regrow.filters import convolutions, left_out
from regrow.marks import check
from regrow.modules import device_of, unwrap
from regrow.pruning.accuracy import top1
from regrow.pruning.budget import Search, check_target, removed
from regrow.pruning.choosing import (
    COUPLED,
    Choice,
    check_choice,
    choose,
    coupled_filters,
    families_of,
    merged,
    renumbered,
)
from regrow.pruning.cost import activation_bytes, count_macs, count_parameters, measure_latency, weight_bytes
from regrow.pruning.trials import Bench, become, uncut
from regrow.structure.read import read_structure
from regrow.surgery.cut import filter_counts, keep_of_uncut
from regrow.surgery.removal import unremovable

__all__ = ["prune"]

_VERSION = 1
_CALIBRATION_IMAGES = 512


def prune(
    model: nn.Module,
    *,
    example_inputs: Any,
    fraction: float | None = None,
    max_drop: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    calibration: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    criterion: str = "l2",
    scope: str = "layer",
    coupled: str | None = None,
    round_to: int = 1,
    floor: float = 0.1,
    exclude: Iterable[str] = (),
    compensate: bool = True,
    seed: int | None = None,
    progress: Callable[[float, str], object] | None = None,
) -> dict[str, Any]:
    """Make a trained network smaller in one call, in place: score, choose, cut for good, compensate.

    Exactly one target is given. With a budget, the smallest cut that meets it is searched for (the largest
    one for ``max_drop``), on copies; ``model`` changes once, at the end, or not at all. It is not trained.

    Args:
        model: any trained module with convolutions, cut before or not, not inside a data-parallel wrapper.
            Its parameters become new, smaller ones: build optimizers afterwards.
        example_inputs: what ``model`` takes: a tensor, a tuple of arguments or a dict of keywords. MACs,
            latency and memory are those of a pass over it.
        fraction: target: share of the ranked filters to remove, 0 ≤ fraction < 1.
        max_drop: target: remove as many as cost at most this many points of accuracy on ``validation``
            (1.0: from 92.3 % to no less than 91.3 %).
        macs, params, latency: target: share of what it is now, 0 < share < 1. Latency is the median of
            repeated passes on this machine, the dense network in turn with the smaller one.
        calibration: batches of images to compensate with, as ``compensate`` takes them; labels are
            ignored. The first 512 images are used: shuffle, or see to it that they are of all kinds.
        validation: batches of (inputs, labels [n]), to report accuracy, and for ``max_drop``.
        criterion: as ``score`` takes it.
        scope: ``"layer"`` removes the same share of each layer, ``"global"`` ranks all filters together,
            ``"isomorphic"`` ranks within families of layers of the same kind (``choosing.families_of``).
        coupled: filters that are added into the same channel of a residual stream go ``"jointly"``, by their
            mean score, so that the channel leaves the stream, or ``"individually"``, each layer computing
            its kept ones only. None: jointly; for ``latency`` whichever of the two is faster here at the
            same number of multiply-accumulates.
        round_to: layers keep a multiple of this many filters, where they have as many.
        floor: share of each layer that stays.
        exclude: names of convolutions, or of containers of them, to leave alone.
        compensate: False removes the filters without making up for them, and needs no images.
        seed: for the criterion ``"random"``.
        progress: called with how far it is, 0 to 1, and with what it does now.

    Returns:
        JSON-able report: version; target {kind, value, reached}; the settings; filters and fraction that
        went; layers {name: filters before and after}; dropped {name: indices}; left_out and masked {name:
        why}; parameters, macs, latency (seconds: median, lowest, highest), memory (bytes of weights, and of
        activations at their peak), accuracy (0 to 1; None without ``validation``), each before and after;
        compensation (what ``compensate`` did, or None).

    Raises:
        ValueError: not exactly one target, an argument that is unknown, missing or out of range; a model
            that cannot be cut; images that do not fit; a budget that cannot be met: the message says how
            near one gets. Nothing is changed.

    Warns:
        UserWarning: ``floor`` and ``round_to`` leave less to remove than ``fraction`` asks for.
    """
    kind, value = check_target(
        {"fraction": fraction, "max_drop": max_drop, "macs": macs, "params": params, "latency": latency}
    )
    check_criterion(criterion)
    check_choice(scope, floor, round_to, coupled or COUPLED[0])
    check(model, "prune")
    if compensate and calibration is None:
        raise ValueError(
            "to make up for the filters that go, prune needs calibration=: a loader of images (labels are "
            "ignored), or [x] for one batch. To do without, write compensate=False."
        )
    if kind == "max_drop" and validation is None:
        raise ValueError("max_drop needs validation=: a loader of (inputs, labels) to measure accuracy on.")
    user = unwrap(model)
    tell = progress or _silent
    tell(0.0, "reading the structure")
    whole = uncut(user)
    readers = read_structure(whole, example_inputs)
    base = copy.deepcopy(user).eval()
    fixed = {name: reason for name in convolutions(base) if (reason := unremovable(readers, name))}
    names = [exclude] if isinstance(exclude, str) else list(exclude)
    scores = score(base, criterion, exclude=[*names, *fixed], seed=seed)

    def choosing(way: str) -> Callable[[float], dict[str, Tensor]]:
        units = coupled_filters(whole, readers, scores) if way == "jointly" else []
        units = renumbered(units, keep_of_uncut(base, {}, readers), scores)
        choice = Choice(scope, floor, round_to, merged(families_of(whole, readers, scores), units), units)
        return functools.partial(choose, scores, choice=choice)

    images = _first_images(base, calibration) if compensate and calibration is not None else None
    if isinstance(validation, Iterator):  # it yields once, and there are several passes
        validation = list(validation)
    accuracy, pictures = top1(base, validation) if validation is not None else (None, None)
    bench = Bench(base, example_inputs, readers, images)

    def searching(way: str) -> Search:
        labelled = validation or ()
        filters = _count(scores)
        return Search(base, example_inputs, bench, choosing(way), filters, labelled, accuracy or 0.0, tell)

    if coupled is None and kind == "latency":
        tell(0.1, "comparing two ways to cut")
        coupled = min(COUPLED, key=lambda way: searching(way).latency_at(value))
    coupled = coupled or COUPLED[0]
    timing = None
    if kind == "fraction":
        tell(0.1, "cutting")
        keep = choosing(coupled)(value)
        trial, reached = bench.cut(keep, compensated=True), removed(keep) / _count(keep)
        # Rounding to whole filters alone is half a filter a layer at most.
        if reached * _count(keep) < value * _count(keep) - 0.5 * len(keep) - 1e-9:
            warnings.warn(
                f"fewer filters are removed than fraction={value:g} asks for: {removed(keep)} of "
                f"{_count(keep)} ({reached:.1%}), because of floor={floor}, round_to={round_to} or "
                f"coupled={coupled!r}.",
                stacklevel=2,
            )
    else:
        met = searching(coupled).run(kind, value)
        trial, reached, timing = met.trial, met.reached, met.timing
    tell(0.9, "measuring")
    small = trial.model
    left = {name: "excluded" for name in convolutions(base) if name not in scores} | left_out(base) | fixed
    before, after = filter_counts(base), filter_counts(small)
    timing = timing or measure_latency([base, small], example_inputs)
    report: dict[str, Any] = {
        "version": _VERSION,
        "target": {"kind": kind, "value": value, "reached": reached},
        "settings": {
            "criterion": criterion,
            "scope": scope,
            "coupled": coupled,
            "round_to": round_to,
            "floor": floor,
            "exclude": names,
            "compensate": compensate,
            "seed": seed,
        },
        "device": str(device_of(base)),
        "threads": torch.get_num_threads(),
        "filters": _pair(_count(trial.keep), _count(trial.keep) - removed(trial.keep)),
        "fraction": removed(trial.keep) / _count(trial.keep),
        "layers": {name: _pair(before[name], after[name]) for name in before},
        "dropped": dict(trial.gone),
        "left_out": left,
        "masked": dict(trial.plan.masked),
        "parameters": _pair(*map(count_parameters, (base, small))),
        "macs": _pair(*(count_macs(each, example_inputs) for each in (base, small))),
        "latency": _pair(*timing),
        "memory": {
            "weights": _pair(*map(weight_bytes, (base, small))),
            "activations": _pair(*(activation_bytes(each, example_inputs) for each in (base, small))),
        },
        "accuracy": None,
        "compensation": trial.compensation,
    }
    if validation is not None:
        report["accuracy"] = _pair(accuracy, top1(small, validation)[0]) | {"images": pictures}
    become(user, trial)
    tell(1.0, "done")
    return report


def _silent(_share: float, _what: str) -> None:
    pass


def _first_images(model: nn.Module, calibration: Iterable[Any]) -> list[Any]:
    """The first batches, of 512 images in all or a little more. Errors as ``compensate``."""
    check_calibration(calibration)
    batches, images = [], 0
    for inputs in inputs_of(model, calibration):
        batches.append(inputs)
        images += count_images(inputs) or 1
        if images >= _CALIBRATION_IMAGES:
            break
    return batches


def _count(filters: Mapping[str, Tensor]) -> int:
    return sum(map(len, filters.values()))


def _pair(before: Any, after: Any) -> dict[str, Any]:
    return {"before": before, "after": after}
