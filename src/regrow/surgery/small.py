"""The class in front of a cut layer's own: it picks channels of the input and places those of the output."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from regrow.indexing import index_tensor, place, take
from regrow.modules import channel_dim, filter_dim
from regrow.torch_private import own_buffers


class Small(nn.Module):
    """In front of a cut layer's own class: picks channels of the input, and places the output's channels."""

    _regrow_picked: Tensor | None
    _regrow_placed: Tensor | None
    _regrow_spread: Tensor | None
    _regrow_at: Mapping[str, list[int] | None]
    _regrow_widths: tuple[int | None, int | None]
    _regrow_plain: tuple[type[nn.Module], tuple[str, ...]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if (picked := self._regrow_picked) is not None:
            args = (take(args[0], picked, channel_dim(self, args[0])), *args[1:])
        output = super().forward(*args, **kwargs)
        if (placed := self._regrow_placed) is not None:
            output = place(output, placed, channel_dim(self, output), cast(int, self._regrow_widths[0]))
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


@functools.cache
def small_class(plain: Any, spread: tuple[str, ...]) -> type[nn.Module]:
    body: dict[str, Any] = {name: _spread(name) for name in spread}
    return type(
        f"Small{plain.__name__}",
        (Small, plain),
        {"_regrow_plain": (plain, spread), "__module__": __name__, **body},
    )


def _rebuild(plain: type[nn.Module], spread: tuple[str, ...]) -> nn.Module:
    small = small_class(cast(Any, plain), spread)
    return small.__new__(small)


def _spread(name: str) -> property:
    """A parameter that the layer sees at its full size: the remaining values among zeros."""

    def get(self: Small) -> Tensor:
        index, width = cast(Tensor, self._regrow_spread), cast(int, self._regrow_widths[1])
        dim = filter_dim(self) if name == "weight" else 0
        return place(cast(Tensor, nn.Module.__getattr__(self, name)), index, dim, width)

    return property(get)
