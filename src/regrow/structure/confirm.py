"""Forward passes that confirm which layers read which channels, or take a claim back."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.filters import convolutions, named_parts, parts
from regrow.indexing import index_tensor
from regrow.looking.calls import call, floating
from regrow.structure.readers import Consumer, Norm, Readers, column_mask, per_channel, silence, tied_modules

_DRAWN = 1 << 18


def rule_out(model: nn.Module, readers: Mapping[str, Readers]) -> None:
    """Take back what the layers themselves contradict: those that serve others too, and norms without a
    weight to silence a channel by."""
    tied = tied_modules(model)
    modules = dict(named_parts(model))
    for found in readers.values():
        for norm in list(found.norms):
            if norm in tied or _revives(modules[norm]):
                _lose(found, norm)
        for consumer in tied.intersection(found.consumers):
            found.mixed = found.mixed or f"{consumer!r} shares its weight with another layer"


def _revives(norm: Any) -> bool:
    """Whether a norm turns a channel of 0 into something else and has no weight to prevent it."""
    return not per_channel(norm) and norm.weight is None


def _lose(found: Readers, norm: str) -> None:
    found.norms.pop(norm, None)
    found.unsilenced, found.norm_first = norm, False


def confirm(probe: nn.Module, example_inputs: Any, readers: Mapping[str, Readers]) -> None:
    """Take back whatever forward passes on ``probe`` (which is changed for good) contradict."""
    generator = torch.Generator().manual_seed(0)
    unsettle(probe, generator)
    convs = convolutions(probe)
    some, rest = {}, {}
    for name in readers:
        order = torch.randperm(convs[name].out_channels, generator=generator).tolist()
        some[name], rest[name] = order[: max(1, len(order) // 2)], order[max(1, len(order) // 2) :]
    restore = _restorer(probe)

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
        for name, norm in lost:  # without it other readers may see something: look again
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


def _restorer(probe: nn.Module) -> Callable[[], None]:
    """A function that gives parameters and buffers the values that they have now."""
    saved = [(tensor, tensor.clone()) for tensor in [*probe.parameters(), *probe.buffers()]]

    def restore() -> None:
        for tensor, values in saved:
            tensor.copy_(values)

    return restore


def _apart(readers: Mapping[str, Readers]) -> list[list[str]]:
    """The convolutions in groups, in each of which no two have an index of a reader in common."""
    groups: list[tuple[list[str], set[tuple[str, int]]]] = []
    for name, found in readers.items():
        both = [*found.norms.items(), *found.consumers.items()]
        used = {(reader, index) for reader, reads in both for index in reads.indices}
        for names, taken in groups:
            if taken.isdisjoint(used):
                names.append(name)
                taken.update(used)
                break
        else:
            groups.append(([name], used))
    return [names for names, _ in groups]


def unsettle(probe: nn.Module, generator: torch.Generator) -> None:
    """Give tensors values at which a mistake shows: a fresh norm, or a scale of 0, passes 0 on as 0.

    They are in memory of their own then, so that ``probe`` may share the model's.
    """
    ranges: dict[tuple[float, float], list[Tensor]] = {}
    settled: set[Tensor] = set()

    def uniform(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None and tensor not in settled:
            settled.add(tensor)
            ranges.setdefault((low, high), []).append(tensor)

    modules = parts(probe)
    for module in modules:
        if isinstance(module, Norm):
            uniform(module.weight, 0.5, 1.5)
            uniform(module.bias, 0.2, 0.5)
            # Below 0, so that a norm without a bias makes something of 0 that passes a ReLU, too.
            uniform(getattr(module, "running_mean", None), -0.1, -0.02)
            uniform(getattr(module, "running_var", None), 0.5, 1.5)
        elif isinstance(module, Consumer):
            uniform(module.bias, -0.1, 0.1)
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None or tensor in settled or not tensor.is_floating_point() or not tensor.numel():
                continue
            if _constant(tensor):
                uniform(tensor, 0.5, 1.5)
    for (low, high), tensors in ranges.items():
        values = torch.empty(sum(tensor.numel() for tensor in tensors))
        values.uniform_(low, high, generator=generator)
        for tensor, own in zip(tensors, values.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.data = own.view(tensor.shape).to(tensor)


def _constant(tensor: Tensor) -> bool:
    first, last = (tensor[(at,) * tensor.dim()] for at in (0, -1))
    return bool(first == last) and bool((tensor == first).all())


def _loud(
    probe: nn.Module,
    example_inputs: Any,
    readers: Mapping[str, Readers],
    dropped: Mapping[str, Sequence[int]],
) -> set[tuple[str, str]]:
    """Silence ``dropped`` on ``probe`` and find the (convolution, reader) pairs where a silenced channel is
    not 0: where it reaches the reader, and for a norm where it leaves it too."""
    silence(probe, readers, {name: dropped[name] for name in readers})
    loud = set()

    def watch(name: str, reader: str, indices: Tensor) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not reads_silence(module, inputs, output, indices):
                loud.add((name, reader))

        return hook

    handles = []
    for name, found in readers.items():
        for reader, reads in [*found.norms.items(), *found.consumers.items()]:
            if indices := reads.of(dropped[name]):
                module = probe.get_submodule(reader)
                handles.append(module.register_forward_hook(watch(name, reader, index_tensor(indices))))
    try:
        call(probe, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return loud


class Noise:
    """Random numbers in place of what layers make: of one sign or the other, between which no activation
    stops both, and no sum cancels; or of both signs, some near 0 and some far."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def among(self, output: Tensor, dim: int, silent: Tensor | None, sign: int) -> Tensor:
        """Noise of the shape of ``output``, but for its ``silent`` channels in ``dim``, which stay.

        Args:
            sign: 1, -1, or 0 for both.
        """
        count = output.numel()
        if 2 * count > _DRAWN:
            values = _drawn(count, self._random.getrandbits(60), mixed=not sign)
        else:
            # Read from another place each time, which takes a tenth of drawing anew.
            start = self._random.randrange(_DRAWN - count)
            values = _drawn_once(mixed=not sign)[start : start + count]
        noise = (values * (sign or 1)).view(output.shape).to(output)
        if silent is not None:
            silent = silent.to(output.device)
            noise.index_copy_(dim, silent, output.index_select(dim, silent))
        return noise


def _drawn(count: int, seed: int, *, mixed: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(count).uniform_(0.5, 1.5, generator=generator)
    return values * torch.randn(count, generator=generator) if mixed else values


@functools.cache
def _drawn_once(*, mixed: bool) -> Tensor:
    return _drawn(_DRAWN, 0, mixed=mixed)


def reads_silence(module: nn.Module, inputs: Any, output: Any, indices: Tensor) -> bool:
    """Whether the channels ``indices`` are 0 in what a layer is called with, and behind a norm too."""
    if not inputs:
        return False
    seen = [inputs[0], output] if isinstance(module, Norm) else [inputs[0]]
    return any(
        all(_is_silent(tensor, dim, indices) for tensor in seen) for dim in _channel_dims(module, inputs[0])
    )


def _channel_dims(module: nn.Module, seen: Tensor) -> list[int]:
    """Where ``module`` may expect the channels of its input: layer norms come in two layouts."""
    if isinstance(module, nn.Linear):
        return [seen.dim() - 1]
    if isinstance(module, nn.LayerNorm):
        return [seen.dim() - 1, 1]
    if isinstance(module, Consumer):
        return [seen.dim() - module.weight.dim() + 1]
    return [1]


def _is_silent(tensor: Tensor, dim: int, indices: Tensor) -> bool:
    if dim >= tensor.dim() or indices.max() >= tensor.shape[dim]:
        return False
    those = tensor.index_select(dim, indices.to(tensor.device))
    return not those.numel() or not those.abs().max()  # a quarter of the time that any() takes


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
            layer.weight[column_mask(layer, reads.of(indices))] = 0
    before = floating(call(probe, example_inputs))
    generator = torch.Generator().manual_seed(1)

    def scramble(indices: Sequence[int]) -> Callable[..., Tensor]:
        def hook(module: Any, _inputs: Any, output: Tensor) -> Tensor:
            dim = output.dim() - module.weight.dim() + 1
            noise = torch.randn(output.shape, generator=generator).to(output)
            index = index_tensor(indices, output.device)
            return output.index_copy(dim, index, noise.index_select(dim, index))

        return hook

    handles = [probe.get_submodule(n).register_forward_hook(scramble(i)) for n, i in dropped.items()]
    try:
        after = floating(call(probe, example_inputs))
    finally:
        for handle in handles:
            handle.remove()
    if not all(bool(torch.isfinite(a).all()) for a in before):
        return True  # for all that can be told
    return not all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max() if a.numel() else 0))
        for a, b in zip(before, after, strict=True)
    )
