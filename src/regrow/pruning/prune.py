"""Rank filters, choose some, cut them for good and compensate, within a budget, in one call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regrow.callers import warn
from regrow.criteria.batches import Loss
from regrow.criteria.score import (
    DATA_CRITERIA,
    Criterion,
    check_criterion,
    check_pictures,
    criterion_name,
    score,
)
from regrow.filters import convolutions, excluded, left_out
from regrow.given import check_inputs, kind_of, names_given
from regrow.interrupts import uninterrupted
from regrow.looking.copies import copied
from regrow.looking.images import check_batches, count_images, inputs_of, of_one_class, parted
from regrow.marks import check
from regrow.modules import device_of, unwrap
from regrow.pruning import choosing
from regrow.pruning.accuracy import top1
from regrow.pruning.budget import Search, check_target, removed
from regrow.pruning.cost import activation_bytes, count_macs, count_parameters, weight_bytes
from regrow.pruning.latency import as_used, measure_latency
from regrow.pruning.report import Report
from regrow.pruning.shares import check_reach, layer_shares
from regrow.pruning.trials import Bench, become, uncut
from regrow.shipping.deploy import form_of
from regrow.structure.read import read_structure
from regrow.surgery.cut import filter_counts, keep_of_uncut
from regrow.surgery.removal import unremovable

_VERSION = 1
_CALIBRATION_IMAGES = 512


def prune(
    model: nn.Module,
    *,
    example_inputs: Any,
    fraction: float | Mapping[str, float] | None = None,
    max_drop: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    calibration: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    criterion: Criterion | None = None,
    loss: Loss | None = None,
    scope: str | None = None,
    coupled: str | None = None,
    round_to: int | None = None,
    floor: float = 0.1,
    exclude: Iterable[str] = (),
    compensate: bool = True,
    deployed: bool | Mapping[str, Any] = False,
    seed: int | None = None,
    progress: Callable[[float, str], object] | None = None,
) -> Report:
    """Make a trained network smaller in one call, in place: score, choose, cut for good, compensate.

    Give exactly one target. For a budget, ``prune`` searches on copies for the smallest cut that meets it
    (for ``max_drop``, the largest). ``model`` changes once, at the end, or not at all. It is not trained.

    Args:
        model: any trained module with convolutions, cut before or not, not inside a data-parallel wrapper.
            Its parameters become new, smaller ones: build optimizers afterwards.
        example_inputs: the inputs of ``model``: a tensor, a tuple of arguments or a dict of keywords. MACs,
            latency and memory are measured in a pass over it.
        fraction: target: share of the ranked filters to remove, 0 ≤ fraction < 1; or a share for each of some
            layers, {"layer3": 0.6, "layer3.0": 0.2}: names of convolutions or of containers of them, of which
            the longest counts. Layers not named stay whole. Such shares need the scope ``"layer"``.
        max_drop: target: remove as many as cost at most this many points of accuracy on ``validation``
            (1.0: from 92.3 % to no less than 91.3 %).
        macs, params, latency: target: share of the present value to leave, 0 < share < 1. Latency is the
            median of repeated passes on this machine; the dense and the smaller network take turns.
        calibration: batches of images to compensate with, as ``compensate`` takes them; labels are
            ignored there. The first 512 images are used: they must be of all kinds, so shuffle. A criterion
            that reads pictures reads these.
        validation: batches of (inputs, labels [n]), to report accuracy, and for ``max_drop``.
        criterion, loss: as ``score`` takes them. Where the criterion takes the loss, ``calibration`` must
            have labels. None: ``"reconstruction"`` where removed filters are made up for, else ``"l2"``.
        scope: ``"layer"`` removes the same share of each layer, ``"global"`` ranks all filters together,
            ``"isomorphic"`` ranks within families of layers of the same kind (``choosing.families_of``),
            ``"balanced"`` ranks all by their score for each multiply-accumulate that their removal saves, or
            for ``params`` each parameter. None: ``"balanced"`` for the criterion ``"reconstruction"``, unless
            each layer has its share; else ``"layer"``.
        coupled: filters that are added into the same channel of a residual stream are dropped
            ``"jointly"``, by their mean score (for ``"reconstruction"``, where scores are errors, their
            sum), so that the channel leaves the stream, or ``"individually"``, so that each layer computes
            only the filters it keeps. None: jointly; for ``latency`` the way that is faster here at the same
            number of multiply-accumulates.
        round_to: a layer keeps a multiple of this many filters; a layer with fewer filters stays whole.
            None: a multiple of 8 in layers of 64 filters or more that lose some, any number in narrower
            ones. 1: any number in all.
        floor: share of each layer that stays.
        exclude: names of convolutions, or of containers of them, to leave alone.
        compensate: False removes the filters without making up for them, and needs no images.
        deployed: True measures latency, also a budget of it, with both networks in the form that ``deploy``
            gives them; {"dtype": torch.float16, "mode": "graph"} with such options of ``deploy``. False: with
            the networks as they are, operation by operation.
        seed: for the criterion ``"random"``.
        progress: called with the share done, 0 to 1, and the name of the present step.

    Returns:
        JSON-able report, which prints as tables: version; target {kind, value, reached}; settings, device
        and threads; filters (before and after) and fraction removed; layers {name: filters before and
        after}; dropped {name: indices}; left_out and masked {name: why}; parameters, macs, latency (seconds:
        median, lowest, highest), memory (bytes of weights, peak bytes of activations), accuracy (0 to 1;
        None without ``validation``), each before and after; compensation (what ``compensate`` did, or None);
        tried (the cuts that the search for a budget measured: filters removed, estimated share of MACs left,
        value, and for ``max_drop`` accuracy).

    Raises:
        ValueError: not exactly one target is given; an argument is unknown, missing or out of range; the
            model cannot be cut; the images do not fit; the budget cannot be met (the message gives the best
            value found). The model is unchanged then.

    Warns:
        UserWarning: ``floor``, ``round_to`` or ``coupled`` leave less to remove than ``fraction`` asks for.
    """
    check(model, "prune")
    check_inputs(example_inputs, "prune")
    if criterion is not None:
        check_criterion(criterion)
    ranking, within = choosing.settled(
        criterion,
        scope,
        reconstructs=compensate and calibration is not None,
        shares=isinstance(fraction, Mapping),
    )
    kind, value = check_target(
        {"fraction": fraction, "max_drop": max_drop, "macs": macs, "params": params, "latency": latency},
        within,
    )
    check_pictures(ranking, calibration, loss, "calibration")
    choosing.check_choice(within, floor, round_to, coupled or choosing.COUPLED[0])
    form = form_of(deployed)
    if form is not None:
        form.check(device_of(unwrap(model)))
    if progress is not None and not callable(progress):
        raise ValueError(f"progress is a function of a share and a text, and got {kind_of(progress)}.")
    if compensate and calibration is None:
        raise ValueError(
            "to make up for removed filters, prune needs calibration=: a loader of images (labels are "
            "ignored), or [x] for one batch. To prune without it, write compensate=False."
        )
    if kind == "max_drop" and validation is None:
        raise ValueError("max_drop needs validation=: a loader of (inputs, labels) to measure accuracy on.")
    if validation is not None:
        check_batches(validation, "validation")
    user = unwrap(model)
    every = list(convolutions(user))
    shares = layer_shares(value, every) if isinstance(value, Mapping) else dict.fromkeys(every, value)
    tell = progress or (lambda _share, _step: None)
    tell(0.0, "reading the structure")
    whole = uncut(user)
    readers = read_structure(whole, example_inputs)
    base = copied(user, torch.clone).eval()
    fixed = {name: reason for name in convolutions(base) if (reason := unremovable(readers, name))}
    names = names_given(exclude, "exclude")
    left = (
        {name: "the fraction gives no share for it" for name in every if name not in shares}
        | dict.fromkeys(excluded(names, every), "excluded")
        | left_out(base)
        | fixed
    )
    if isinstance(value, Mapping):
        check_reach(value, every, left)
    unnamed = {name: left[name] for name in every if name not in shares}
    batches = None
    if calibration is not None and (compensate or ranking in DATA_CRITERIA):
        batches = _first_batches(base, calibration, example_inputs)
        if compensate and (warning := of_one_class(batches, None)):
            warn(warning)
    scores = score(
        base,
        ranking,
        exclude=unnamed | dict.fromkeys(names, "excluded by name") | fixed,
        seed=seed,
        batches=batches,
        loss=loss,
    )

    def choices(way: str) -> choosing.Choice:
        units = choosing.coupled_filters(whole, readers, scores) if way == "jointly" else []
        units = choosing.renumbered(units, keep_of_uncut(base, {}, readers), scores)
        families = choosing.merged(choosing.families_of(whole, readers, scores), units)
        counts = {name: len(values) for name, values in scores.items()}
        saves = "params" if kind == "params" else "macs"
        costs = bench.savings(saves, counts, units) if within == "balanced" else {}
        # Errors of filters add up. Other scores are not of a kind that would.
        added = ranking == "reconstruction"
        return choosing.Choice(within, floor, round_to, families, units, added, costs)

    images = list(inputs_of(base, batches)) if compensate and batches is not None else None
    if isinstance(validation, Iterator):  # an iterator yields its batches once; they are needed again
        validation = list(validation)
    accuracy, pictures = top1(base, validation) if validation is not None else (None, None)
    bench = Bench(base, example_inputs, readers, images)

    def searching(way: str) -> Search:
        filters, labelled = _count(scores), validation or ()
        choose = functools.partial(choosing.choose, scores, choice=choices(way))
        return Search(base, example_inputs, bench, choose, filters, labelled, accuracy or 0.0, tell, form)

    if coupled is None and kind == "latency":
        tell(0.1, "comparing two ways to cut")
        coupled = min(choosing.COUPLED, key=lambda way: searching(way).latency_at(value))
    coupled = coupled or choosing.COUPLED[0]
    timing, tried = None, []
    if kind == "fraction":
        tell(0.1, "cutting")
        choice = choices(coupled)
        rounding = "multiples of 8 (round_to=1 prevents that)" if round_to is None else f"round_to={round_to}"
        keep = choosing.choose(scores, shares if isinstance(value, Mapping) else value, choice)
        trial, reached = bench.cut(keep, compensated=True), removed(keep) / _count(keep)
        _warn_if_short(keep, shares, value, choice, f"floor={floor}, {rounding} or coupled={coupled!r}")
    else:
        met = searching(coupled).run(kind, value)
        trial, reached, timing, tried = met.trial, met.reached, met.timing, met.tried
    tell(0.9, "measuring")
    small = trial.model
    before, after = filter_counts(base), filter_counts(small)
    if timing is None:
        used = [as_used(each, example_inputs, form) for each in (base, small)]
        timing = measure_latency(used, example_inputs)
    report = Report(
        {
            "version": _VERSION,
            "target": {"kind": kind, "value": value, "reached": reached},
            "settings": {
                "criterion": criterion_name(ranking),
                "scope": within,
                "coupled": coupled,
                "round_to": round_to,
                "floor": floor,
                "exclude": names,
                "compensate": compensate,
                "deployed": form and form.record(),
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
            "tried": tried,
        }
    )
    if validation is not None:
        report["accuracy"] = _pair(accuracy, top1(small, validation)[0]) | {"images": pictures}
    with uninterrupted():
        become(user, trial)
    tell(1.0, "done")
    return report


def _warn_if_short(
    keep: Mapping[str, Tensor], shares: Mapping[str, float], value: Any, choice: choosing.Choice, reasons: str
) -> None:
    if isinstance(value, Mapping):
        short = [name for name in keep if choosing.falls_short({name: keep[name]}, shares[name], choice)]
        asked = f"fraction= asks for in {', '.join(map(repr, short[:3]))}{', …' if len(short) > 3 else ''}"
    else:
        short = list(keep) if choosing.falls_short(keep, value, choice) else []
        asked = f"fraction={value:g} asks for"
    if short:
        gone, count = removed({name: keep[name] for name in short}), sum(len(keep[name]) for name in short)
        warn(
            f"fewer filters are removed than {asked}: {gone} of {count} ({gone / count:.1%}), because of "
            f"{reasons}."
        )


def _first_batches(model: nn.Module, calibration: Iterable[Any], example_inputs: Any) -> list[Any]:
    """Return the first batches, with 512 images in all or a few more. Raises the errors of ``compensate``.

    Args:
        example_inputs: if the model takes several arguments, or a list of pictures, the arguments are a tuple
            at the head of each batch that is returned.
    """
    check_batches(calibration, "calibration")
    batches: list[Any] = []
    images = 0

    def remembered() -> Iterator[Any]:
        for batch in calibration:
            inputs, labels = parted(batch, example_inputs)
            if isinstance(inputs, tuple | list):
                batch = (inputs,) if labels is None else (inputs, labels)
            batches.append(batch)
            yield batch

    for inputs in inputs_of(model, remembered()):
        images += count_images(inputs) or 1
        if images >= _CALIBRATION_IMAGES:
            break
    return batches


def _count(filters: Mapping[str, Tensor]) -> int:
    return sum(map(len, filters.values()))


def _pair(before: Any, after: Any) -> dict[str, Any]:
    return {"before": before, "after": after}
