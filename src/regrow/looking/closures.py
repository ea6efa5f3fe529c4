"""Functions on a copied module that would still run the module they were made for."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

_KINDS = (FunctionType, MethodType, functools.partial)


def rebind(modules: Iterable[nn.Module], memo: Mapping[int, Any]) -> None:
    """Make the functions among the attributes of a copy of a model use the copy.

    ``copy.deepcopy`` does not copy functions. After ``model.forward = torch.autocast("cuda")(model.forward)``
    the copy's forward method would run the layers of the model.

    Args:
        modules: the modules of the model that was copied.
        memo: of ``copy.deepcopy``: {id of an object of the model: its copy}.
    """
    rebound = _Rebound(memo)
    for module in modules:
        copied = memo.get(id(module))
        for name, value in vars(module).items():
            if isinstance(value, _KINDS) and isinstance(copied, nn.Module) and name in vars(copied):
                vars(copied)[name] = rebound.of(value)


class _Rebound:
    """Values that use the copies in ``memo`` in place of what was copied."""

    def __init__(self, memo: Mapping[int, Any]) -> None:
        self._memo = memo
        self._made: dict[int, Any] = {}  # functions may hold each other

    def of(self, value: Any) -> Any:
        if isinstance(value, nn.Module | Tensor):
            return self._memo.get(id(value), value)
        if id(value) in self._made:
            return self._made[id(value)]
        if isinstance(value, MethodType):
            return MethodType(self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, functools.partial):
            function, *arguments = map(self.of, (value.func, *value.args))
            again = functools.partial(function, *arguments, **self._values(value.keywords))
            return self._attributes(value, again)
        if type(value) is tuple:
            return tuple(map(self.of, value))
        # An object of a wrapper, such as Accelerate's ConvertOutputsToFp32.
        if callable(value) and isinstance(type(value).__call__, FunctionType) and hasattr(value, "__dict__"):
            return self._object(value)
        return value

    def _values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self.of(value) for key, value in values.items()}

    def _attributes(self, value: Any, again: Any) -> Any:
        vars(again).update(self._values(vars(value)))
        return again

    def _function(self, function: FunctionType) -> FunctionType:
        theirs = function.__closure__ or ()
        if not theirs and not function.__defaults__ and not function.__kwdefaults__:
            return function
        cells = tuple(CellType() for _ in theirs)
        again = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
        self._made[id(function)] = again
        for cell, their in zip(cells, theirs, strict=True):
            try:
                contents = their.cell_contents
            except ValueError:  # a name that the function around it has not bound yet
                continue
            cell.cell_contents = self.of(contents)
        again.__defaults__ = self.of(function.__defaults__)
        again.__kwdefaults__ = function.__kwdefaults__ and self._values(function.__kwdefaults__)
        again.__qualname__, again.__doc__ = function.__qualname__, function.__doc__
        return self._attributes(function, again)

    def _object(self, value: Any) -> Any:
        self._made[id(value)] = value
        values = self._values(vars(value))
        if all(values[key] is mine for key, mine in vars(value).items()):
            return value
        self._made[id(value)] = again = _twin(value)
        vars(again).update(values)
        return again


def _twin(value: Any) -> Any:
    """A second object with the attributes of ``value``, which may refuse to be copied, as Accelerate's."""
    kind = type(value)
    if kind.__new__ is not object.__new__ or any(vars(base).get("__slots__") for base in kind.__mro__):
        return copy.copy(value)
    again = object.__new__(kind)
    vars(again).update(vars(value))
    return again
