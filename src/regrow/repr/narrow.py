"""Compute as if dropped filters were not there, for a while: parameters keep their shape and identity."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from regrow.indexing import index_tensor, place, take, take_block
from regrow.marks import check_whole
from regrow.modules import channel_dim, unwrap
from regrow.repr.batch_norm import batch_norm, norms_innermost
from regrow.surgery.layers import Layer, layers
from regrow.surgery.plan import CutPlan
from regrow.torch_private import own_buffers, own_parameters


def narrow(model: nn.Module, plan: CutPlan) -> Narrowing:
    """Leave what ``plan`` cuts out of the arithmetic of ``model``, until ``release``.

    The layers in the plan compute with slices of their parameters, taken anew in every forward pass.
    The parameters keep shape and identity: optimizers, schedulers, averaged copies, ``state_dict()`` and
    DDP see no change, and what is left out gets gradients of 0. Running statistics are read and written
    at the channels kept. A copy made meanwhile (``copy.deepcopy``, pickle) is not narrowed.

    Args:
        model: the module the plan was made for; wrappers are looked through. Bridgeout may be on it:
            the noise is drawn for whole weights, and sliced with them.
        plan: from ``plan_cut``.

    Returns:
        What ends it: call ``release()``, or use it as a context manager.

    Raises:
        ValueError: the plan does not fit the model, a layer is narrowed already or has a forward method
            put on the object itself, or the model is sharded (FSDP) or replicated (``nn.DataParallel``).
            Nothing is changed.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError("the replicas of nn.DataParallel cannot be narrowed: use DistributedDataParallel.")
    model = unwrap(model)
    found = check_plan(model, plan)
    for layer in found:
        if isinstance(layer.module, _Narrowed):
            raise ValueError(f"{layer.name!r} is narrowed already: release that first.")
    for layer in found:
        slices, wide = _slices(layer), cast(Any, type(layer.module))
        layer.module._narrow = slices
        layer.module.__class__ = _narrowed(wide, tuple(slices.tensors), tuple(slices.numbers))
    return Narrowing([layer.module for layer in found])


class Narrowing:
    """That layers of a model are narrowed; see ``narrow``."""

    def __init__(self, layers: Sequence[_Narrowed]) -> None:
        self._layers = list(layers)

    def release(self) -> None:
        """Compute with whole parameters again; harmless when called twice."""
        for layer in self._layers:
            if _in_front(layer):
                layer.__class__ = layer._wide  # type: ignore[assignment]
                del layer._narrow
            else:  # the class that was put in front stays, and ours steps aside
                layer._narrow = None
        self._layers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def check_plan(model: nn.Module, plan: CutPlan) -> list[Layer]:
    """What ``plan`` leaves of the layers it names; ``ValueError`` where ``narrow`` could not follow it."""
    check_whole(model, "narrow")
    found = layers(model, plan)
    for layer in found:
        if "forward" in vars(layer.module):
            raise ValueError(
                f"the forward method of {layer.name!r} has been replaced, which no class of ours can reach: "
                "wrap the whole model instead."
            )
    return found


@dataclass(frozen=True, eq=False)
class _Slice:
    """The rows and columns that stay of one tensor (None: all of them), and where the rows go among zeros."""

    rows: Tensor | None
    columns: Tensor | None = None
    spread: tuple[int, Tensor] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        block = take_block(tensor, self.rows, self.columns)
        return block if self.spread is None else place(block, self.spread[1], 0, self.spread[0])


@dataclass(eq=False)
class _Slices:
    """What one layer computes with: tensors and numbers in place of its own, and where channels go.

    ``live`` holds the tensors while the layer's forward method runs: slices of one pass.
    """

    tensors: Mapping[str, _Slice]
    numbers: Mapping[str, int]
    picked: Tensor | None
    placed: tuple[int, Tensor] | None
    live: dict[str, Tensor] | None = None


class _Narrowed(nn.Module):
    """In front of a layer's own class: its forward method reads slices where it says ``self.weight``."""

    _narrow: _Slices | None
    _wide: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        slices = self._narrow
        if slices is None:
            return super().forward(*args, **kwargs)
        if not _in_front(self):
            raise ValueError(
                f"{type(self).__name__}: a layer that computes without its dropped filters has got another "
                "class (by Bridgeout, or a parametrization). Do that before or after, not meanwhile."
            )
        if slices.picked is not None:
            args = (take(args[0], slices.picked, channel_dim(self, args[0])), *args[1:])
        slices.live = {}
        try:
            if not torch.compiler.is_compiling() and _quick_norm(self, args):
                output = batch_norm(self, args[0])
            else:
                output = super().forward(*args, **kwargs)
            if self.training:
                for name, statistic in slices.live.items():
                    if name in own_buffers(self):
                        # Through .data, as a norm writes them: a graph that holds the buffer stays valid.
                        buffer, channels = own_buffers(self)[name], slices.tensors[name].rows
                        cast(Tensor, buffer).data.index_copy_(0, cast(Tensor, channels), statistic)
        finally:
            slices.live = None
        if slices.placed is not None:
            width, index = slices.placed
            output = place(output, index, channel_dim(self, output), width)
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy outlives the phase, and nothing would release it: it is a plain layer.
        reduced = super().__reduce_ex__(protocol)
        if not _in_front(self):
            return reduced
        _, _, state, *rest = cast(tuple[Any, ...], reduced)
        state = {key: value for key, value in state.items() if key != "_narrow"}
        return (_blank, (self._wide,), state, *rest)


def _quick_norm(layer: _Narrowed, args: tuple[Any, ...]) -> bool:
    plain = layer._wide.forward in (nn.BatchNorm2d.forward, nn.BatchNorm3d.forward)
    return plain and len(args) == 1 and norms_innermost(layer, args[0])


def _blank(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def _in_front(layer: _Narrowed) -> bool:
    """Whether nothing has been put in front of the class that ``narrow`` gave the layer."""
    return type(layer).__bases__[0] is _Narrowed


@functools.cache
def _narrowed(wide: type[nn.Module], tensors: tuple[str, ...], numbers: tuple[str, ...]) -> type[nn.Module]:
    body: dict[str, Any] = {"_wide": wide, "__module__": __name__}
    body |= {name: _tensor(wide, name) for name in tensors}
    body |= {name: _number(name) for name in numbers}
    return type(f"Narrow{wide.__name__}", (_Narrowed, wide), body)


def _tensor(wide: type[nn.Module], name: str) -> property:
    """A parameter or buffer: the whole one, and its slice while the forward method runs."""
    # Bridgeout's layers have such a property of their own: w̃ first, then the slice.
    inherited = getattr(wide, name, None)
    whole = inherited.fget if isinstance(inherited, property) else None

    def get(self: _Narrowed) -> Any:
        tensor: Any = nn.Module.__getattr__(self, name) if whole is None else whole(self)
        slices = self._narrow
        if slices is None or slices.live is None:
            return tensor
        if name not in slices.live:
            slices.live[name] = slices.tensors[name].of(tensor)
        return slices.live[name]

    return property(get)


def _number(name: str) -> property:
    def get(self: _Narrowed) -> int:
        slices = self._narrow
        if slices is None or slices.live is None:
            return cast(int, self.__dict__[name])
        return slices.numbers[name]

    def put(self: _Narrowed, value: int) -> None:
        self.__dict__[name] = value

    return property(get, put)


def _slices(layer: Layer) -> _Slices:
    """What a layer is to compute with, on the device where it is."""
    own = {**own_parameters(layer.module), **own_buffers(layer.module)}
    device = next((tensor.device for tensor in own.values() if tensor is not None), torch.device("cpu"))

    def index(kept: Sequence[int] | None) -> Tensor | None:
        return None if kept is None else index_tensor(kept, device)

    def at(places: tuple[int, list[int]] | None) -> tuple[int, Tensor] | None:
        return None if places is None else (places[0], index_tensor(places[1], device))

    spread = at(layer.spread)
    tensors = {
        key: _Slice(
            index(kept.get(0)), index(kept.get(1)), spread if key in own_parameters(layer.module) else None
        )
        for key, kept in layer.kept.items()
    }
    return _Slices(tensors, layer.numbers, index(layer.picked), at(layer.placed))
