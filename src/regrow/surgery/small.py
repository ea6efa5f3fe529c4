"""The class in front of a cut layer's own: it picks channels of the input and places those of the output."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from regrow.indexing import index_tensor, place, place_plainly, take
from regrow.modules import channel_axis, filter_dim, input_first, input_name
from regrow.torch_private import own_buffers


class Small(nn.Module):
    """In front of a cut layer's own class: picks channels of the input, and places the output's channels."""

    if TYPE_CHECKING:  # torch.jit.script reads annotations, and does not know such
        _regrow_picked: Tensor | None
        _regrow_placed: Tensor | None
        _regrow_spread: Tensor | None
        _regrow_at: Mapping[str, list[int] | None]
        _regrow_widths: tuple[int, int]
        _regrow_axis: int
        _regrow_plain: tuple[type[nn.Module], tuple[str, ...]]
        _regrow_input: str
        _regrow_inner: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._regrow_picked is not None:
            args, kwargs = input_first(self._regrow_input, args, kwargs)
            if args:  # else the layer says best what is missing
                args = (self._regrow_pick(args[0]), *args[1:])
        return self._regrow_place(super().forward(*args, **kwargs))

    def _regrow_pick(self, input: Tensor) -> Tensor:
        picked = self._regrow_picked
        if picked is not None:
            if torch.jit.is_scripting():
                input = input.index_select(self._regrow_axis, picked)
            else:
                input = take(input, picked, self._regrow_axis)
        return input

    def _regrow_place(self, output: Tensor) -> Tensor:
        placed = self._regrow_placed
        if placed is not None:
            if torch.jit.is_scripting():
                output = place_plainly(output, placed, self._regrow_axis, self._regrow_widths[0])
            else:
                output = place(output, placed, self._regrow_axis, self._regrow_widths[0])
        return output

    def _index(self, device: torch.device) -> None:
        # A buffer moves with the model; one that is not persistent is not in its state_dict.
        for key, at in self._regrow_at.items():
            self.register_buffer(key, None if at is None else index_tensor(at, device), persistent=False)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        super()._apply(*args, **kwargs)
        # to_empty() leaves buffers without values, and no file holds the indices.
        device = next((tensor.device for tensor in own_buffers(self).values() if tensor is not None), None)
        if device is not None:
            self._index(device)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: pickle finds it by the layer's own class.
        return _rebuild, self._regrow_plain, self.__getstate__()


def make_small(
    module: Any,
    picked: list[int] | None,
    placed: tuple[int, list[int]] | None,
    spread: tuple[int, list[int]] | None,
    names: tuple[str, ...],
    device: torch.device,
) -> None:
    """Put the class in front of a layer's own.

    Args:
        picked, placed, spread: as in ``layers.Layer``.
        names: the parameters that are spread.
        device: of the indices.
    """
    module.__class__ = small_class(cast(Any, type(module)), names)
    module._regrow_widths = (placed[0] if placed else 0, spread[0] if spread else 0)
    module._regrow_axis = channel_axis(module)
    module._regrow_at = {
        "_regrow_picked": picked,
        "_regrow_placed": placed and placed[1],
        "_regrow_spread": spread and spread[1],
    }
    module._index(device)


def undo_small(module: Any) -> None:
    """Give a layer its own class again, with its parameters as they are."""
    plain: Any = type(module)._regrow_plain[0]
    module.__class__ = plain
    for key in (*module._regrow_at, "_regrow_widths", "_regrow_axis", "_regrow_at"):
        delattr(module, key)


@functools.cache
def small_class(plain: Any, spread: tuple[str, ...]) -> type[nn.Module]:
    body: dict[str, Any] = {name: _spread(name) for name in spread}
    if inspect.isfunction(plain.forward) and list(inspect.signature(plain.forward).parameters) == [
        "self",
        "input",
    ]:
        body |= {"forward": _forward, "_regrow_inner": _renamed(plain.forward, "_regrow_inner")}
    # torch.fx looks at the name of the module that a class is in: PyTorch's layers it does not look into.
    body |= {"_regrow_plain": (plain, spread), "__module__": plain.__module__}
    body["_regrow_input"] = input_name(plain)
    return type(f"Small{plain.__name__}", (Small, plain), body)


def _forward(self, input):  # type: ignore[no-untyped-def]
    """``Small.forward`` for a layer that takes its input alone: torch.jit.script compiles no ``*args``."""
    return self._regrow_place(self._regrow_inner(self._regrow_pick(input)))


def _renamed(function: Any, name: str) -> Any:
    """``function`` under the name that its method has: torch.jit.script takes the two for one."""
    twin = types.FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
    twin.__annotations__ = function.__annotations__
    return twin


def _rebuild(plain: type[nn.Module], spread: tuple[str, ...]) -> nn.Module:
    small = small_class(cast(Any, plain), spread)
    return small.__new__(small)


def _spread(name: str) -> property:
    """A parameter that the layer sees at its full size: the remaining values among zeros."""

    def get(self: Small) -> Tensor:
        # torch.jit.script cannot compile this: give it regrow.plain_layers(model).
        index, width = cast(Tensor, self._regrow_spread), self._regrow_widths[1]
        weight = nn.Module.__getattr__(self, name)
        if not isinstance(weight, Tensor):
            # torch.fx would store the wide weight, and place it once more.
            raise ValueError("torch.fx cannot look into this layer: give it regrow.plain_layers(model).")
        return place(weight, index, filter_dim(self) if name == "weight" else 0, width)

    return property(get)
