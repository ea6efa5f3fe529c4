"""Random numbers for probes: in place of inputs, of outputs of layers, and of weights that hide mistakes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.looking.calls import PassFailed, mapped
from regrow.modules import Consumer, Norm
from regrow.numbers import numbers
from regrow.torch_private import own_buffers, own_parameters, tree_map

# Prime numbers: no two channels, and no two layers, get the same noise.
_LENGTH, _STEP = 131_071, 40_009


@functools.lru_cache(maxsize=8)
def noise_values(seed: int, signed: bool) -> Tensor:
    """Random numbers for ``Stream``, shared by all callers: of both signs, or of sizes from 0.5 to 1.5."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.empty(_LENGTH, dtype=torch.float64).uniform_(0.5, 1.5, generator=draw)
    if signed:
        values *= torch.randn(_LENGTH, dtype=torch.float64, generator=draw)
    return values.repeat(2)


class Stream:
    """Noise for the outputs of layers, call by call, out of few ``values``: drawing each number takes longer.

    Args:
        values: from ``noise_values``.
        start: where to begin in them.
    """

    def __init__(self, values: Tensor, start: int = 0) -> None:
        self._drawn, self._start = values, start
        self._values = {(values.device, values.dtype): values}

    def like(self, output: Tensor) -> Tensor:
        """The next numbers, in new memory, as a tensor of the shape, type and device of ``output``."""
        self._start = (self._start + _STEP) % _LENGTH
        kind = output.device, output.dtype
        if kind not in self._values:
            # In this order: some devices have no double precision.
            self._values[kind] = self._drawn.to(output.dtype).to(output.device)
        count = output.numel()
        values = self._values[kind][self._start : self._start + min(count, _LENGTH)]
        values = values.clone() if count <= _LENGTH else values.repeat(-(-count // _LENGTH))[:count]
        return values.view(output.shape)


class Noise:
    """Random numbers in place of the outputs of layers.

    They have one sign in one pass and the other in the next, so that no activation stops both and no sum
    cancels; or both signs at once, some near 0 and some far.
    """

    def __init__(self, seed: int) -> None:
        self._streams = {signed: Stream(noise_values(seed, signed)) for signed in (False, True)}

    def among(self, output: Tensor, dim: int, silent: Tensor | None, sign: int) -> Tensor:
        """Noise of the shape of ``output``, whose ``silent`` channels in ``dim`` are copied from it.

        Args:
            sign: 1, -1, or 0 for both.

        Raises:
            PassFailed: ``output`` has no such channels, because a layer of the user's own made it.
        """
        if silent is not None and (dim >= output.dim() or int(silent.max()) >= output.shape[dim]):
            raise PassFailed(f"a layer makes a tensor {list(output.shape)} without a channel for each filter")
        noise = self._streams[not sign].like(output)
        if sign < 0:
            noise.neg_()
        if silent is not None:
            silent = silent.to(output.device)
            noise.index_copy_(dim, silent, output.index_select(dim, silent))
        return noise


def unsettle(probe: nn.Module, generator: torch.Generator) -> None:
    """Give norms, biases and constant tensors random values, which show mistakes: a new norm returns 0 for 0.

    The values lie in new memory, so that ``probe`` may share the rest with the model.
    """
    ranges: dict[tuple[float, float], list[Tensor]] = {}
    settled: set[int] = set()

    def uniform(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None and id(tensor) not in settled:
            settled.add(id(tensor))
            ranges.setdefault((low, high), []).append(tensor)

    modules = list(probe.modules())
    for module in modules:
        if isinstance(module, Norm):
            uniform(module.weight, 0.5, 1.5)
            uniform(module.bias, 0.2, 0.5)
            # Below 0, so that a norm without a bias turns 0 into a number that passes a ReLU.
            uniform(getattr(module, "running_mean", None), -0.1, -0.02)
            uniform(getattr(module, "running_var", None), 0.5, 1.5)
        elif isinstance(module, Consumer):
            uniform(module.bias, -0.1, 0.1)
    others = [
        tensor
        for module in modules
        for tensor in (*own_parameters(module).values(), *own_buffers(module).values())
        if tensor is not None and id(tensor) not in settled and tensor.is_floating_point() and tensor.numel()
    ]
    for tensor in _constant(others):
        uniform(tensor, 0.5, 1.5)
    for (low, high), tensors in ranges.items():
        for device in dict.fromkeys(tensor.device for tensor in tensors):
            there = [tensor for tensor in tensors if tensor.device == device]
            sizes = [tensor.numel() for tensor in there]
            values = torch.empty(sum(sizes)).uniform_(low, high, generator=generator).to(device)
            for tensor, own in zip(there, values.split(sizes), strict=True):
                tensor.data = own.view(tensor.shape).to(tensor)


def _constant(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors among ``tensors`` in which all numbers are the same."""
    corners = [tensor[(at,) * tensor.dim()] for tensor in tensors for at in (0, -1)]
    values = iter(numbers(corners))
    alike = [tensor for tensor in tensors if next(values) == next(values)]
    same = numbers([(tensor == tensor[(0,) * tensor.dim()]).all() for tensor in alike])
    return [tensor for tensor, one in zip(alike, same, strict=True) if one]


def noise_like(example: Any, repeats: int) -> Any:
    """``example`` as random numbers in the range of each floating tensor; ``repeats`` times the batch.

    Infinite numbers, as in a mask that is added, stay. Nested inputs are not repeated.
    """
    generator = torch.Generator().manual_seed(3)

    def change(tensor: Tensor) -> Tensor:
        finite = tensor[tensor.isfinite()]
        low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
        if low == high:
            noise = torch.randn(tensor.shape, generator=generator)
        else:
            noise = torch.rand(tensor.shape, generator=generator).mul(high - low).add(low)
        return torch.where(tensor.isfinite(), noise.to(tensor), tensor)

    def longer(leaf: Any) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.dim()
        return leaf.repeat(repeats, *[1] * (leaf.dim() - 1)) if batched else leaf

    parts = tuple(example.values()) if isinstance(example, Mapping) else example
    flat = isinstance(parts, Tensor) or not any(isinstance(part, tuple | list | Mapping) for part in parts)
    return mapped(tree_map(longer, example) if repeats > 1 and flat else example, change)
