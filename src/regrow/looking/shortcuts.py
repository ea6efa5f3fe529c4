"""Which tensors of a pass are added to another one, such as the shortcut of a residual block."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Size, Tensor
from torch.overrides import TorchFunctionMode

_ADDS = {"add", "add_", "__add__", "__iadd__", "__radd__"}


class Uses(TorchFunctionMode):
    """Watches what the model's own code does with some of its tensors, while the block lasts.

    Args:
        used: called with the key of a tensor and the other summand, ahead of a sum of two tensors of the same
            shape; with the key and None behind any other operation that makes a tensor of it.
    """

    def __init__(self, used: Callable[[Any, Tensor | None], None]) -> None:
        super().__init__()
        self._used = used
        # Holding the tensors keeps their ids from being used again.
        self._noted: dict[int, tuple[Tensor, Any]] = {}

    def note(self, tensor: Tensor, key: Any) -> None:
        """Watch ``tensor`` from here on, under ``key``."""
        self._noted[id(tensor)] = tensor, key

    def forget(self, tensor: Tensor) -> None:
        """Watch ``tensor`` no longer."""
        self._noted.pop(id(tensor), None)

    def held(self) -> list[Any]:
        """The keys of the tensors that something else holds behind the pass; they are watched no longer."""
        left = [(weakref.ref(tensor), key) for tensor, key in self._noted.values()]
        self._noted.clear()
        return [key for tensor, key in left if tensor() is not None]

    def key_of(self, tensor: Tensor) -> Any:
        """The key of a tensor that is watched; None for any other."""
        return self._noted.get(id(tensor), (None, None))[1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = [each for each in _given(args, kwargs) if id(each) in self._noted] if self._noted else []
        keys = [self.key_of(each) for each in found]
        others = [_other_summand(func, args, kwargs, each) for each in found]
        for key, other in zip(keys, others, strict=True):
            if other is not None:  # ahead of the sum, which may write to it
                self._used(key, other)
        result = func(*args, **kwargs)
        if any(other is not None for other in others):
            self.forget(result)  # written to in place, it is the sum from here on
        elif isinstance(result, Tensor | tuple | list) and not isinstance(result, Size):
            for key, other in zip(keys, others, strict=True):
                if other is None:
                    self._used(key, None)
        return result


def _given(args: Any, kwargs: Any) -> list[Tensor]:
    parts = [*args, *kwargs.values()]
    parts += [part for each in parts if isinstance(each, tuple | list) for part in each]
    return [part for part in parts if isinstance(part, Tensor)]


def _other_summand(func: Any, args: Any, kwargs: Any, tensor: Tensor) -> Tensor | None:
    name = getattr(func, "__name__", "")
    if name not in _ADDS or kwargs or len(args) != 2 or not all(isinstance(each, Tensor) for each in args):
        return None
    other: Tensor = args[1] if args[0] is tensor else args[0]
    return other if other is not tensor and other.shape == tensor.shape else None
