"""The reconstruction error of a filter: what its readers lack without it, once they have made up for it.

The layers that read the filters of a convolution get new weights for what is left, by least squares. Filters
leave one by one, the cheapest first (``least_squares.elimination``), so of two that say the same one costs
nothing, and the other then costs all. The errors are shares of the variance of what the readers' outputs
become, so that all layers can be ranked together.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.criteria.bar import Advance, progress_bar
from regrow.criteria.batches import Batch, only_read, read_batches, run
from regrow.criteria.spread import Spreads
from regrow.criteria.values import wide
from regrow.indexing import index_tensor
from regrow.least_squares.elimination import Reading, eliminate
from regrow.least_squares.moments import Moments
from regrow.least_squares.unfolded import inputs_at, matrix_of, positions, with_batch
from regrow.looking.hooks import hooked
from regrow.modules import Convolution, channels_read, device_of, filter_count, is_depthwise
from regrow.structure.read import read_structure
from regrow.structure.readers import Readers
from regrow.torch_private import own_parameters

_SHARE = 0.25  # of the positions of an output; neighbours say much the same
_MOST_BYTES = 1 << 30  # of the moments that are held at one time
_ROWS = 1 << 24  # numbers in the rows of inputs that are made at one time

# {layer: (filters, the layer's input channels that carry them)}
Ways = dict[str, tuple[list[int], list[int]]]


def reconstruction_scores(
    model: nn.Module, convs: Mapping[str, Convolution], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Score filters by the error that their readers cannot make up for.

    Where only convolutions and linear layers read a layer's channels, a filter's score is the error that its
    removal adds when its turn comes, or that of a filter that goes earlier, if this is larger. Where its
    channels are added to others, or their readers are not known, the score is the variance of the filter's
    output behind its norm, as a share of the variance of the sum, or, without a sum, of the layer's output.

    Args:
        model: without wrappers; it is only read.
        batches: inputs, or pairs of inputs and labels, which are not read. All are held in memory.

    Returns:
        {name: Tensor[filters]}, float64, of the layers that a pass reaches; NaN where the pictures give NaN.
    """
    with only_read(model), torch.no_grad():
        held = list(read_batches(batches, device_of(model), needs_labels=False))
        first = held[0].first(1).inputs
        run(model, first)  # its error is that of a batch
        readers = read_structure(model, first)
        spreads = Spreads(model, first)
        ways = {name: each for name in convs if (each := ways_of(model, readers, name))}
        parts = list(_in_parts(model, ways))
        with progress_bar("scoring filters", len(held) * (1 + len(parts)) + len(ways)) as advance:
            for batch in held:
                spreads.look(batch.inputs)
                advance(1)
            found = {name: spreads.shares(name) for name in convs if name in spreads.made}
            for names in parts:
                layers = list(dict.fromkeys(layer for name in names for layer in ways[name]))
                moments = moments_of(model, layers, held, advance)
                for name in names:
                    if name in found and all(layer in moments for layer in ways[name]):
                        readings = _readings(model, ways[name], moments, spreads)
                        found[name] = _scores(readings, convs[name].out_channels)
                    advance(1)
                del moments  # before the next ones are made
    return {name: values.to(wide(convs[name].weight.new_zeros(()))) for name, values in found.items()}


def ways_of(model: nn.Module, readers: Mapping[str, Readers], name: str) -> Ways | None:
    """The layers whose weights read the filters of a convolution, if these are all that sees them.

    Depthwise layers are looked through: what they make of a channel goes with it.

    Returns:
        None if something else sees the channels, or may see them.
    """
    found = readers.get(name)
    if found is None or not found.consumers or found.mixed or found.noisy or found.output:
        return None
    ways: Ways = {}
    for consumer, reads in found.consumers.items():
        layer: Any = model.get_submodule(consumer)
        if "_regrow_at" in vars(layer):  # a cut layer that picks its channels, or places them among zeros
            return None
        if not is_depthwise(layer):
            _append(ways, consumer, list(reads.filters), list(reads.indices))
            continue
        behind = ways_of(model, readers, consumer)
        if behind is None:
            return None
        rows = layer.out_channels // layer.groups
        filter_of = dict(zip(reads.indices, reads.filters, strict=True))
        for each, (filters, indices) in behind.items():
            pairs = [(row // rows, at) for row, at in zip(filters, indices, strict=True)]
            pairs = [(filter_of[row], at) for row, at in pairs if row in filter_of]
            _append(ways, each, [filter for filter, _ in pairs], [at for _, at in pairs])
    return ways


def _append(ways: Ways, layer: str, filters: list[int], indices: list[int]) -> None:
    before = ways.get(layer, ([], []))
    ways[layer] = before[0] + filters, before[1] + indices


def moments_of(
    model: nn.Module, layers: Sequence[str], batches: Sequence[Batch], advance: Advance = lambda _: None
) -> dict[str, Moments]:
    """The moments of what ``layers`` read, at a quarter of the positions of their outputs, without outputs.

    Args:
        advance: called with 1 behind each batch.

    Returns:
        {layer: Moments} of the layers that a pass calls with an input that fits their weights.
    """
    found: dict[str, Moments] = {}

    def after(number: int, name: str, layer: Any, inputs: Any, output: Tensor) -> None:
        x, output = with_batch(layer, inputs[0]), with_batch(layer, output)
        count = positions(layer, output)
        generator = torch.Generator().manual_seed(number)  # a layer's positions do not depend on the others
        chosen = torch.randperm(count, generator=generator)[: max(1, round(_SHARE * count))].to(x.device)
        each = max(1, _ROWS // (len(chosen) * layer.weight[:1].numel() * getattr(layer, "groups", 1)))
        for some, made in zip(x.split(each), output.split(each), strict=True):
            rows = inputs_at(layer, some, made, chosen)
            now = Moments.of(rows, rows[..., :0])
            found[name] = found[name] + now if name in found else now

    hooks = [(name, model.get_submodule(name)) for name in layers]
    for number, batch in enumerate(batches):
        with hooked(hooks, functools.partial(after, number)):
            run(model, batch.inputs)
        advance(1)
    return found


def _in_parts(model: nn.Module, ways: Mapping[str, Ways]) -> Iterator[list[str]]:
    """The names of ``ways`` in parts whose readers have moments of a bounded size, or one name in a part."""
    part: list[str] = []
    layers: set[str] = set()
    for name, readers in ways.items():
        if part and sum(_bytes(model.get_submodule(each)) for each in layers | set(readers)) > _MOST_BYTES:
            yield part
            part, layers = [], set()
        part.append(name)
        layers |= set(readers)
    if part:
        yield part


def _bytes(layer: Any) -> int:
    columns = layer.weight.numel() // filter_count(layer, layer.weight)
    return int(8 * getattr(layer, "groups", 1) * columns**2)


def _readings(
    model: nn.Module, ways: Ways, moments: Mapping[str, Moments], spreads: Spreads
) -> list[Reading]:
    """The systems of all readers, their outputs in shares of what they become."""
    found = []
    for name, (filters, indices) in ways.items():
        layer: Any = model.get_submodule(name)
        total = spreads.total(name)
        if total == 0:  # not where it is NaN
            continue
        owner = torch.full((channels_read(layer) or 0,), -1, dtype=torch.int64)
        owner[index_tensor(indices)] = index_tensor(filters)
        groups = moments[name].xx.shape[0]
        weights = matrix_of(layer, layer.weight.detach()).cpu().double()
        weights = weights * spreads.scale(name).view(groups, 1, -1) / total**0.5
        owner = owner.view(groups, -1).repeat_interleave(weights.shape[1] * groups // len(owner), 1)
        has_shift = own_parameters(layer).get("bias") is not None or name in spreads.normed
        xx = (moments[name].about_means()[0] if has_shift else moments[name].xx) / moments[name].count
        found += [Reading(*parts) for parts in zip(xx, weights, owner, strict=True) if (parts[2] >= 0).any()]
    return found


def _scores(readings: Sequence[Reading], filters: int) -> Tensor:
    """The errors at which filters are eliminated, none below that of a filter that goes earlier."""
    if not all(bool(part.isfinite().all()) for each in readings for part in (each.xx, each.weights)):
        return torch.full((filters,), torch.nan, dtype=torch.float64)
    order, errors = eliminate(readings, filters)
    scores, last = torch.zeros(filters, dtype=torch.float64), 0.0
    for index, error in zip(order.tolist(), errors.tolist(), strict=True):
        last = max(error, last * (1 + 1e-12))  # a little more, so that a ranking keeps the order
        scores[index] = last
    return scores
