"""Copies of a model to try things on, and passes of them that come out the same each time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from regrow.filters import parts
from regrow.looking.calls import call, mapped, random_state, seed, set_mode, undisturbed
from regrow.looking.copies import copied, lazily
from regrow.noise.layers import remove_bridgeout

_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
}  # fmt: skip


def copied_as(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of ``model`` to change, in evaluation mode, in numbers of ``dtype``, or as they are."""

    def renew(values: Tensor) -> Tensor:
        kept = not values.is_floating_point() or dtype in (None, values.dtype)
        return lazily(values) if kept else values.to(dtype)

    probe = copied(model, renew, requires_grad=False)
    set_mode(probe, False)
    if dtype is not None and dtypes(probe) - {dtype}:
        probe.to(dtype)  # tensors of a class of their own
    return probe


def inputs_as(example_inputs: Any, dtype: torch.dtype | None) -> Any:
    """What a copy that ``copied_as`` made takes."""
    return mapped(example_inputs, functools.partial(Tensor.to, dtype=dtype)) if dtype else example_inputs


def disarm(probe: nn.Module) -> None:
    """Take Bridgeout and dropout away, which make every pass another."""
    for part in parts(probe):
        if "_bridgeout_passes" in vars(part):
            remove_bridgeout(part)
        if isinstance(part, _DropoutNd):
            part.p = 0.0  # see NoDropout


def dtypes(model: nn.Module) -> set[torch.dtype | None]:
    """Of the floating tensors of ``model``."""
    tensors = [t for part in parts(model) for t in (*part._parameters.values(), *part._buffers.values())]
    return {t.dtype for t in tensors if t is not None and t.is_floating_point()}


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Running statistics end as they began."""
    buffers = [buffer for part in parts(model) for buffer in part._buffers.values() if buffer is not None]
    saved = [(buffer, buffer.clone()) for buffer in dict.fromkeys(buffers)]
    try:
        yield
    finally:
        for buffer, values in saved:
            buffer.copy_(values)


def run(model: nn.Module, inputs: Any, training: bool, dropout: NoDropout | None = None) -> tuple[Any, bool]:
    """What ``model`` makes of ``inputs``, and whether it drew random numbers for that."""
    with undisturbed(model), torch.no_grad(), dropout if training and dropout else nullcontext():
        seed(model)
        if model.training != training:
            set_mode(model, training)
        begun = random_state(model)
        output = call(model, copy.deepcopy(inputs))
        ended = random_state(model)
        return output, begun is None or ended is None or not torch.equal(begun, ended)


class NoDropout(TorchFunctionMode):
    """Dropout passes everything on: what it drops depends on the width of the tensor, so two networks of
    other widths would differ by chance. Takes a detour of Python with every call."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _DROPOUTS:
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))


def noise_like(example: Any, repeats: int) -> Any:
    """Random numbers in the range of each floating tensor; ``repeats`` times the batch."""
    generator = torch.Generator().manual_seed(3)

    def change(tensor: Tensor) -> Tensor:
        low, high = (float(tensor.min()), float(tensor.max())) if tensor.numel() else (0.0, 0.0)
        shape = tensor.shape
        if low == high:
            return torch.randn(shape, generator=generator).to(tensor)
        return torch.rand(shape, generator=generator).mul(high - low).add(low).to(tensor)

    def longer(inputs: Any) -> Any:
        if isinstance(inputs, Tensor):
            return inputs.repeat(repeats, *[1] * (inputs.dim() - 1)) if inputs.dim() else inputs
        if isinstance(inputs, Mapping):
            return {key: longer(value) for key, value in inputs.items()}
        return tuple(map(longer, inputs)) if isinstance(inputs, tuple | list) else inputs

    flat = isinstance(example, Tensor) or all(
        not isinstance(part, tuple | list | Mapping)
        for part in (example.values() if isinstance(example, Mapping) else example)
    )
    return mapped(longer(example) if repeats > 1 and flat else example, change)
