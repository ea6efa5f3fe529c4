"""The weakest filters of a model start anew, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from regrow.callers import warn
from regrow.criteria.score import Criterion
from regrow.criteria.select import check_selection
from regrow.given import check_inputs, check_optimizer, check_seed, names_given
from regrow.interrupts import uninterrupted
from regrow.marks import check
from regrow.modules import device_of, unwrap
from regrow.repr.jumps import jump, largest_outputs
from regrow.repr.layers import usable_layers
from regrow.repr.ranks import copy_from_first, first_decides, group_of
from regrow.repr.restoring import Filters, check_restoring, restart_filters
from regrow.repr.slots import Copies
from regrow.repr.weakest import Batches, Weakest
from regrow.torch_private import tree_map_only

VERSION = 1


def restart(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    example_inputs: Any,
    fraction: float = 0.1,
    criterion: Criterion | None = None,
    batches: Batches | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    consumers: str = "zero",
    rows: str = "orthogonal",
    scope: str = "global",
    floor: float = 0.1,
    exclude: Iterable[str] = (),
    skip_first: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Have the weakest filters of ``model`` start anew, in place: a drop and a restore of RePr at once.

    Call it between two optimizer steps of your own loop, for example where the data or the labels change.
    The filters with the lowest scores get new rows and a bias of 0, the norms behind them weight 1, bias 0
    and statistics 0 and 1, the layers that read them the weights that ``consumers`` says, and the optimizer
    forgets what it knew of all of these. ``RePr(…, sub=0)`` does the same by a schedule.

    Args:
        model: any module, also in a DDP or ``torch.compile`` wrapper. With DDP, give the wrapper and call
            ``restart`` in every process: the first process decides for all.
        optimizer: the optimizer that trains ``model`` from now on.
        example_inputs: an input of ``model`` (a tensor, a tuple of arguments, a dict of keywords); one
            picture is enough.
        fraction: share of the ranked filters that start anew, 0 ≤ fraction < 1.
        criterion, batches, loss: as in ``RePr``; ``batches`` are read once. None: ``"utility"`` where there
            are ``batches``, and ``"l2"`` without. Filters chosen by how much they are used gained most in
            benchmarks/repr_study, and those chosen by ``"ortho"`` nothing.
        consumers: the weights by which other layers read a new filter. ``"zero"``: 0, so that the network
            computes as it would without these filters. ``"keep"``: the weights that are there. ``"init"``:
            newly drawn weights.
        rows: ``"orthogonal"``: directions that no other filter of the layer uses, with the mean length of
            the kept rows. ``"init"``: drawn as PyTorch draws a new layer, uniform in ±1/√(inputs of a
            filter).
        scope: ``"global"`` ranks all filters together, ``"layer"`` takes the same share of every layer.
        floor: share of every layer that always keeps its values.
        exclude: qualified names of convolutions, or of containers of convolutions, to leave alone.
        skip_first: leave out the first convolution that the input reaches.
        seed: with equal weights, the same seed gives the same choices and the same new rows. Give each call
            of a run a seed of its own.

    Returns:
        A JSON-able record: version; kind, as in ``Event``; settings; filters {qualified name: indices of the
        filters that started anew}; least_covered, the layers whose null space was too small for orthogonal
        rows; left_out {qualified name: why the convolution was left alone}; notes, one sentence for each
        thing that could not be done as asked, and for what was done to the optimizer.

    Raises:
        ValueError: an argument out of range, an unknown name, no convolution left, an optimizer that does
            not hold the model's parameters, NaN weights, a state of the model that forbids it. Nothing is
            changed.

    Warns:
        UserWarning: the floor leaves fewer filters than ``fraction`` asks for, or the largest output on
            ``example_inputs`` is more than ten times as large afterwards.
    """
    check(model, "restart")
    check_optimizer(optimizer, "restart")
    check_inputs(example_inputs, "restart")
    check_selection(fraction, scope, floor)
    if criterion is None:
        criterion = "l2" if batches is None else "utility"
    weakest = Weakest(criterion, batches, loss)
    check_restoring(consumers, rows)
    check_seed(seed)
    exclude = names_given(exclude, "exclude")
    settings = {
        "fraction": float(fraction), "criterion": weakest.name, "consumers": consumers, "rows": rows,
        "scope": scope, "floor": float(floor), "exclude": exclude, "skip_first": bool(skip_first),
        "seed": seed,
    }  # fmt: skip
    layers = usable_layers(model, optimizer, example_inputs, exclude, skip_first)
    inner, group = unwrap(model), group_of(model)
    device = device_of(inner)
    inputs = tree_map_only(Tensor, lambda tensor: tensor.to(device), example_inputs)

    def agree() -> None:
        if group is not None:
            copy_from_first([*inner.parameters(), *inner.buffers()], group)

    filters, said = first_decides(
        lambda: weakest.of(inner, settings, exclude=layers.left_out, seed=seed), group, device
    )
    for warning in said:
        warn(warning)
    agree()
    before = largest_outputs(inner, inputs)
    generator = torch.Generator().manual_seed(seed % 2**63)
    with uninterrupted():
        least_covered, notes = restart_filters(
            Filters(inner, layers.usable, filters),
            optimizer,
            Copies(optimizer),
            consumers=consumers,
            new_rows=rows,
            generator=generator,
            agree=agree,
        )
    if warning := jump(before, largest_outputs(inner, inputs), consumers, "restart", "call restart"):
        warn(warning)
    return {
        "version": VERSION,
        "kind": "restart",
        "settings": settings,
        "filters": filters,
        "least_covered": least_covered,
        "left_out": dict(layers.left_out),
        "notes": said + notes,
    }
