"""The oracle of a network that was taken apart, tried on a few pictures before it is believed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.criteria.bar import Advance
from regrow.criteria.batches import Batch, Loss, loss_of, mean_loss
from regrow.criteria.drop_one import dropped, outputs
from regrow.criteria.following import Following, Pass
from regrow.criteria.small_maps import Quick
from regrow.criteria.taken_apart import NotTakenApart, Parts
from regrow.log import gave_up
from regrow.looking.calls import floating
from regrow.looking.copies import copied
from regrow.structure.readers import Readers
from regrow.torch_private import tree_flatten, tree_unflatten

_TRIED = 8  # pictures on which a layer is tried
_CLOSE = 1e-4  # the difference that is rounding, as a share of the largest output
_NUMBERS = 2**25  # of the tensors that are held for a block of filters


def quick_scores(
    probe: nn.Module,
    readers: Mapping[str, Readers],
    batches: Sequence[Batch],
    loss: Loss,
    advance: Advance,
) -> dict[str, Tensor]:
    """``looped_scores`` of the layers behind which the network can be taken apart, in a part of the time.

    Each layer is tried first: two of its filters are dropped on a few pictures in both ways. The log says
    which layers are left out, and why.
    """
    quick, silent = Quick(), {}
    try:
        parts = Parts(copied(probe, torch.clone), {name: list(readers[name].norms) for name in readers})
        few = batches[0].first(_TRIED)
        trial = Pass(parts, few.inputs, few.pictures)
        _compare(trial.outputs, outputs(probe, few))
    except NotTakenApart as error:
        gave_up("taking the model apart, each filter takes a pass", error)
        return {}
    for name in readers:
        try:
            silent[name] = silent_channels(probe, readers, name)
            _try(probe, readers, name, Following(parts, name, silent[name], trial, quick), trial, few)
        except NotTakenApart as error:
            gave_up(f"following the filters of {name!r} together, each takes a pass", error)
            silent.pop(name, None)
    totals: dict[str, list[list[Tensor]]] = {name: [] for name in silent}
    before = []
    for batch in batches:
        clean = Pass(parts, batch.inputs, batch.pictures)
        before.append(loss_of(loss, clean.outputs, batch))
        for name in silent:
            following = Following(parts, name, silent[name], clean, quick)
            totals[name].append(losses_without(following, clean, batch, loss, following.filters, advance))
    at_all = mean_loss(before, batches) if silent else 0.0
    return {
        name: torch.tensor(
            [mean_loss(each, batches) - at_all for each in zip(*losses, strict=True)], dtype=torch.float64
        )
        for name, losses in totals.items()
    }


def silent_channels(probe: nn.Module, readers: Mapping[str, Readers], name: str) -> dict[str, Tensor]:
    """{layer: the channel in which it is silent without filter i} of a convolution and its norms.

    Raises:
        NotTakenApart: a norm has more than one channel for a filter, or none for some.
    """
    conv: Any = probe.get_submodule(name)
    device = conv.weight.device
    found = {name: torch.arange(conv.out_channels, device=device)}
    for norm, reads in readers[name].norms.items():
        pairs = dict(zip(reads.filters, reads.indices, strict=True))
        if len(pairs) != len(reads.filters) or len(pairs) != conv.out_channels:
            raise NotTakenApart(f"{norm!r} does not read each filter once")
        found[norm] = torch.tensor([pairs[index] for index in range(conv.out_channels)], device=device)
    return found


def _try(
    probe: nn.Module, readers: Mapping[str, Readers], name: str, following: Following, trial: Pass, few: Batch
) -> None:
    """Raise ``NotTakenApart`` if two filters of a layer come out otherwise than in a pass."""
    filters = following.loudest(2)
    for index, made in zip(filters.tolist(), _without(following, trial, filters), strict=True):
        with dropped(probe, readers, name, index):
            _compare(made, outputs(probe, few))


def losses_without(
    following: Following,
    clean: Pass,
    batch: Batch,
    loss: Loss,
    filters: Tensor,
    advance: Advance | None = None,
) -> list[Tensor]:
    """The losses of a batch without each of ``filters`` alone, each a Tensor [].

    Raises:
        NotTakenApart: an operation fails.
    """
    largest = max(sum(leaf.numel() for leaf in floating(clean.outputs)), following.largest)
    losses: list[Tensor] = []
    for some in filters.split(max(1, _NUMBERS // largest)):
        losses += [loss_of(loss, made, batch) for made in _without(following, clean, some)]
        if advance:
            advance(len(some))
    return losses


def _without(following: Following, clean: Pass, filters: Tensor) -> Iterator[Any]:
    """The model's outputs without each of ``filters`` alone, as the model returns them.

    Raises:
        NotTakenApart: an operation fails, or an output does not have the pictures in its first dimension.
    """
    leaves, form = tree_flatten(clean.outputs)
    if not all(clean.is_batched(leaf) for leaf in leaves):
        raise NotTakenApart("an output does not have the pictures in its first dimension")
    every = [leaf.expand(len(filters), *leaf.shape).clone() for leaf in leaves]
    row = torch.empty_like(following.filters)
    row[filters] = torch.arange(len(filters), device=row.device)
    for cases, made in following.outputs(filters):
        for whole, part in zip(every, tree_flatten(made)[0], strict=True):
            if part.shape[1:] != whole.shape[2:] or len(part) != len(cases):
                raise NotTakenApart("an output depends on the number of pictures")
            whole[row[cases.filters], cases.pictures] = part
    for number in range(len(filters)):
        yield tree_unflatten([leaf[number] for leaf in every], form)


def _compare(made: Any, expected: Any) -> None:
    """Raise ``NotTakenApart`` if two outputs differ by more than rounding."""
    ours, theirs = floating(made), floating(expected)
    if [each.shape for each in ours] != [each.shape for each in theirs]:
        raise NotTakenApart("a trial has outputs of another shape")
    for one, other in zip(ours, theirs, strict=True):
        if not torch.allclose(
            one, other, rtol=0, atol=_CLOSE * float(other.abs().max()) if other.numel() else 0
        ):
            raise NotTakenApart("a trial on a few pictures comes out otherwise")
