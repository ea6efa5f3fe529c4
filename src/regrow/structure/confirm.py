"""Forward passes that confirm the readers of each convolution, or take a claim back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.filters import convolutions
from regrow.indexing import index_tensor
from regrow.looking.calls import call, floating
from regrow.looking.hooks import hooked
from regrow.looking.noise import unsettle
from regrow.modules import Norm, channel_dim, channel_dims, per_channel, tied_modules
from regrow.numbers import largest_of, numbers
from regrow.structure.readers import Readers, column_mask, silence


def rule_out(model: nn.Module, readers: Mapping[str, Readers]) -> None:
    """Take back claims that the layers themselves contradict: about layers that share their parameters, and
    about norms that have no weight to silence a channel by."""
    tied = tied_modules(model)
    modules = dict(model.named_modules())
    for found in readers.values():
        for norm in list(found.norms):
            if norm in tied or _revives(modules[norm]):
                _lose(found, norm)
        for consumer in tied.intersection(found.consumers):
            found.mixed = found.mixed or f"{consumer!r} shares its weight with another layer"


def _revives(norm: Any) -> bool:
    """Whether a norm turns a channel of 0 into other numbers and has no weight to prevent it."""
    return not per_channel(norm) and norm.weight is None


def _lose(found: Readers, norm: str) -> None:
    found.norms.pop(norm, None)
    found.unsilenced, found.norm_first = norm, False


def confirm(probe: nn.Module, example_inputs: Any, readers: Mapping[str, Readers]) -> None:
    """Take back the claims that forward passes contradict. They run on ``probe``, whose weights change."""
    generator = torch.Generator().manual_seed(0)
    unsettle(probe, generator)
    convs = convolutions(probe)
    some, rest = {}, {}
    for name in readers:
        order = torch.randperm(convs[name].out_channels, generator=generator).tolist()
        some[name], rest[name] = order[: max(1, len(order) // 2)], order[max(1, len(order) // 2) :]
    saved = [(tensor, tensor.clone()) for tensor in [*probe.parameters(), *probe.buffers()]]

    def restore() -> None:
        for tensor, values in saved:
            tensor.copy_(values)

    while True:
        loud = set()
        # Silenced together, layers that share a reader could hide each other's mistakes.
        for group in _apart(readers):
            for dropped in (some, rest):
                loud |= _loud(probe, example_inputs, {name: readers[name] for name in group}, dropped)
                restore()
        lost = [(name, reader) for name, reader in loud if reader in readers[name].norms]
        if not lost:
            break
        for name, norm in lost:  # an unsilenced norm may be heard by other readers: check again
            _lose(readers[name], norm)
    for name, found in readers.items():
        found.noisy = [consumer for consumer in found.consumers if (name, consumer) in loud]
        for consumer in found.noisy:
            found.mixed = found.mixed or f"a silenced channel does not reach {consumer!r} as 0"

    hidden = [name for name, found in readers.items() if not found.mixed]
    for group in [hidden, *([name] for name in hidden)]:
        moved = _moves(probe, example_inputs, readers, {name: some[name] for name in group})
        restore()
        if not moved and group is hidden:
            break
        if moved and group is not hidden:
            readers[group[0]].mixed = "forward passes did not confirm which layers read it"


def _apart(readers: Mapping[str, Readers]) -> list[list[str]]:
    """The convolutions in groups; no two convolutions of a group share an index of a reader."""
    return disjoint_groups(
        {
            name: {
                (reader, index)
                for reader, reads in [*found.norms.items(), *found.consumers.items()]
                for index in reads.indices
            }
            for name, found in readers.items()
        }
    )


def disjoint_groups(used: Mapping[str, set[Any]]) -> list[list[str]]:
    """The names in groups; no two names of a group use the same thing."""
    groups: list[tuple[list[str], set[Any]]] = []
    for name, things in used.items():
        for names, taken in groups:
            if taken.isdisjoint(things):
                names.append(name)
                taken.update(things)
                break
        else:
            groups.append(([name], set(things)))
    return [names for names, _ in groups]


def _loud(
    probe: nn.Module,
    example_inputs: Any,
    readers: Mapping[str, Readers],
    dropped: Mapping[str, Sequence[int]],
) -> set[tuple[str, str]]:
    """Silence ``dropped`` on ``probe``; return the (convolution, reader) pairs in which a silenced channel is
    not 0 in the reader's input, or in a norm's output."""
    silence(probe, readers, {name: dropped[name] for name in readers})
    watched: dict[str, list[tuple[str, Tensor]]] = {}
    for name, found in readers.items():
        for reader, reads in [*found.norms.items(), *found.consumers.items()]:
            if indices := reads.of(dropped[name]):
                watched.setdefault(reader, []).append((name, index_tensor(indices)))
    loud = set()

    def look(reader: str, module: nn.Module, inputs: Any, output: Tensor | None = None) -> None:
        for name, indices in watched[reader]:
            if not reads_silence(module, inputs, output, indices):
                loud.add((name, reader))

    with hooked([(name, probe.get_submodule(name)) for name in watched], after=look, before=look):
        call(probe, example_inputs)
    return loud


def reads_silence(module: nn.Module, inputs: Any, output: Tensor | None, indices: Tensor) -> bool:
    """Whether the channels ``indices`` are 0 in the input of a layer, and in the output of a norm.

    Args:
        output: None before the layer has run.
    """
    return are_silent([loudness_of(module, inputs, output, indices, int(indices.max()))])[0]


def are_silent(loudness: Sequence[Sequence[Sequence[Tensor]]]) -> list[bool]:
    """What ``reads_silence`` says of several calls, from what ``loudness_of`` gave for each."""
    values = iter(numbers([value for call in loudness for largest in call for value in largest]))
    known = [[[next(values) for _ in largest] for largest in call] for call in loudness]
    return [any(not any(largest) for largest in call) for call in known]


def loudness_of(
    module: nn.Module, inputs: Any, output: Tensor | None, indices: Tensor, last: int
) -> list[list[Tensor]]:
    """The largest absolute values in the channels ``indices`` of what ``reads_silence`` looks at, each a
    tensor of one number; one list for each dimension that may hold the channels.

    Where all in one of the lists are 0, the channels are silent.

    Args:
        last: the largest of ``indices``.
    """
    if not inputs or not isinstance(inputs[0], Tensor):
        return []
    seen = [inputs[0], output] if isinstance(module, Norm) and output is not None else [inputs[0]]
    return [
        # abs() and max() take a quarter of the time of any().
        [largest_of(tensor.index_select(dim, indices.to(tensor.device))) for tensor in seen]
        for dim in channel_dims(module, inputs[0])
        if all(dim < tensor.dim() and last < tensor.shape[dim] for tensor in seen)
    ]


def _moves(
    probe: nn.Module,
    example_inputs: Any,
    readers: Mapping[str, Readers],
    dropped: Mapping[str, Sequence[int]],
) -> bool:
    """Whether scrambling the channels ``dropped`` moves the output though their columns are zeroed."""
    for name, indices in dropped.items():
        for consumer, reads in readers[name].consumers.items():
            layer: Any = probe.get_submodule(consumer)
            layer.weight[column_mask(layer, reads.of(indices)).to(layer.weight.device)] = 0
    before = floating(call(probe, example_inputs))
    generator = torch.Generator().manual_seed(1)

    def scramble(name: str, module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        dim = channel_dim(module, output)
        noise = torch.randn(output.shape, generator=generator).to(output)
        index = index_tensor(dropped[name], output.device)
        return output.index_copy(dim, index, noise.index_select(dim, index))

    with hooked([(name, probe.get_submodule(name)) for name in dropped], scramble):
        after = floating(call(probe, example_inputs))
    if not all(bool(torch.isfinite(a).all()) for a in before):
        return True  # nothing can be told from numbers that are not finite
    return not all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max() if a.numel() else 0))
        for a, b in zip(before, after, strict=True)
    )
