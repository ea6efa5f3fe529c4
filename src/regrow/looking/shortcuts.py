"""Which outputs of layers are added to another branch, such as the shortcut of a residual block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Size, Tensor
from torch.overrides import TorchFunctionMode

_ADDS = {"add", "add_", "__add__", "__iadd__", "__radd__"}


class Uses(TorchFunctionMode):
    """Watches what the model's code does with some tensors.

    Args:
        used: called with a tensor that was noted and the other summand, or None where the operation is
            something else than the sum of two tensors of the same shape.
    """

    def __init__(self, used: Callable[[int, Tensor | None], None]) -> None:
        super().__init__()
        self._used = used
        self._noted: dict[int, Tensor] = {}

    def note(self, tensor: Tensor) -> None:
        """Watch ``tensor`` from here on."""
        self._noted[id(tensor)] = tensor

    def forget(self, tensor: Tensor) -> None:
        """Watch ``tensor`` no longer, and hold it no longer."""
        self._noted.pop(id(tensor), None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = (
            [each for each in _given(args, kwargs) if self._noted.get(id(each)) is each]
            if self._noted
            else []
        )
        others = [_other(func, args, kwargs, each) for each in found]
        for each, other in zip(found, others, strict=True):
            if other is not None:  # before the sum, which may write to it
                self._used(id(each), other)
        result = func(*args, **kwargs)
        for each, other in zip(found, others, strict=True):
            if other is None and (isinstance(result, Tensor | tuple | list) and type(result) is not Size):
                self._used(id(each), None)
        return result


def _given(args: Any, kwargs: Any) -> list[Tensor]:
    parts = [*args, *kwargs.values()]
    parts += [part for each in parts if isinstance(each, tuple | list) for part in each]
    return [part for part in parts if isinstance(part, Tensor)]


def _other(func: Any, args: Any, kwargs: Any, tensor: Tensor) -> Tensor | None:
    name = getattr(func, "__name__", "")
    if name not in _ADDS or kwargs or len(args) != 2 or not all(isinstance(each, Tensor) for each in args):
        return None
    other = args[1] if args[0] is tensor else args[0]
    return other if other is not tensor and other.shape == tensor.shape else None
