"""Time several networks, as they are and deployed, with the accuracy of each beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.given import check_inputs, kind_of
from regrow.looking.images import check_batches
from regrow.marks import check
from regrow.modules import device_of, unwrap
from regrow.pruning.accuracy import top1
from regrow.pruning.latency import measure_latency
from regrow.shipping.deploy import Form, deploy
from regrow.short import short
from regrow.torch_private import tree_leaves, tree_map

_VERSION = 1


def compare_latency(
    models: Mapping[str, nn.Module],
    *,
    example_inputs: Any,
    batches: Sequence[int] = (1, 32),
    validation: Iterable[Any] | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = True,
    mode: str = "auto",
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Measure what a cut saves in use: each network as it is and as ``deploy`` makes it, batch by batch.

    All passes of one batch size take turns in one process, so their ratios hold where the machine's speed
    varies. Each deployed network is confirmed against the network that it was made of.

    Args:
        models: {name: network}, such as {"uncut": net, "cut": small}, all on one device. They are only read.
        example_inputs: the inputs of all of them: a tensor, a tuple of arguments or a dict of keywords; the
            first dimension of every tensor is the batch. Real ones: outputs are compared on them.
        batches: the sizes to time; ``example_inputs`` are repeated, or cut, to each of them.
        validation: batches of (inputs, labels [n]) for the accuracy; None for none.
        dtype, channels_last, mode, tolerance: as ``deploy`` takes them.

    Returns:
        A JSON-able dict: version; device; threads; form (the options of ``deploy``); batches; rows, one for
        each network as it is, and one for it deployed: network, deployed (whether it is), mode (how
        passes run), latency {batch as text: {median, lowest, highest in seconds, passes}}, accuracy (0 to
        1, or None), difference (the largest one to the network as it is, as ``deploy`` records it; None).

    Raises:
        ValueError: an argument is of another kind; a network cannot be deployed; the pictures do not fit.
    """
    form = Form(dtype, channels_last, mode)
    _check(models, batches, example_inputs)
    if isinstance(validation, Iterator):  # an iterator yields its batches once
        validation = list(validation)
    if validation is not None:
        check_batches(validation, "validation")
    device = device_of(unwrap(next(iter(models.values()))))
    rows: list[dict[str, Any]] = []
    for name in models:
        rows.append({"network": name, "deployed": False, "mode": "eager", "latency": {}, "difference": None})
        rows.append({"network": name, "deployed": True, "mode": "", "latency": {}, "difference": 0.0})
    accuracies: dict[int, float] = {}
    for size in batches:
        inputs = _resized(example_inputs, size)
        runs: list[nn.Module] = []
        for number, model in enumerate(models.values()):
            used, record = deploy(model, example_inputs=inputs, tolerance=tolerance, **vars(form))
            row = rows[2 * number + 1]
            row["mode"] = record["mode"]
            row["difference"] = max(row["difference"], record["difference"])
            runs += [model, used]
        for number, (run, time) in enumerate(zip(runs, measure_latency(runs, inputs), strict=True)):
            rows[number]["latency"][str(size)] = time
            if validation is not None and number not in accuracies:
                accuracies[number] = top1(run, validation)[0]
    for number, row in enumerate(rows):
        row["accuracy"] = accuracies.get(number)
    return {
        "version": _VERSION,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "form": form.record(),
        "batches": list(batches),
        "rows": rows,
    }


def _check(models: Any, batches: Any, example_inputs: Any) -> None:
    called = "compare_latency"
    if not isinstance(models, Mapping) or not models or any(not isinstance(name, str) for name in models):
        raise ValueError(
            f'{called} takes networks by name, such as {{"uncut": net, "cut": small}}, and got '
            f"{kind_of(models)}."
        )
    for model in models.values():
        check(model, "fold_norms", called=called)
    places = {str(device_of(unwrap(model))) for model in models.values()}
    if len(places) > 1:
        raise ValueError(f"the networks are on {' and '.join(sorted(places))}: move them to one device.")
    sizes = list(batches) if isinstance(batches, Sequence) and not isinstance(batches, str) else []
    if not sizes or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in sizes):
        raise ValueError(f"batches lists numbers of pictures, such as [1, 32], and got {short(batches)}.")
    check_inputs(example_inputs, called)
    found = {leaf.shape[:1] for leaf in tree_leaves(_plain(example_inputs)) if isinstance(leaf, Tensor)}
    if len(found) != 1 or not all(shape and shape[0] for shape in found):
        raise ValueError(
            f"{called} needs example_inputs whose tensors all have the batch as first dimension, of one size "
            f"and not empty; got {kind_of(example_inputs)}."
        )


def _plain(inputs: Any) -> Any:
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


def _resized(example_inputs: Any, size: int) -> Any:
    def each(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return torch.cat([leaf] * math.ceil(size / len(leaf)))[:size]

    return tree_map(each, _plain(example_inputs))
