"""Copies of a model to try things on, without the time that ``copy.deepcopy`` takes for what is empty."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from regrow.filters import parts


def copied(
    model: nn.Module,
    renew: Callable[[Tensor], Tensor] | None = None,
    *,
    requires_grad: bool | None = None,
) -> nn.Module:
    """A deep copy of ``model`` whose parameters take no memory until they are written to (see ``lazily``), or
    are what ``renew`` makes. Parameters that were shared are so in it too.

    Args:
        renew: takes a parameter or a buffer; gives the values of the copy's, in any shape.
        requires_grad: of the copy's parameters; None leaves it as it is.

    Raises:
        Whatever ``copy.deepcopy`` does of a model that cannot be copied.
    """
    memo: dict[int, Any] = {}
    modules = parts(model)
    for parameter in {p: None for module in modules for p in module._parameters.values()}:
        if type(parameter) is nn.Parameter:
            values = (renew or lazily)(parameter).detach()
            trained = parameter.requires_grad if requires_grad is None else requires_grad
            memo[id(parameter)] = nn.Parameter(values, trained)
    for buffer in {b: None for module in modules for b in module._buffers.values()}:
        if type(buffer) is Tensor:
            memo[id(buffer)] = (renew or torch.clone)(buffer).detach()
    for module in reversed(modules):  # parts before the whole
        if (plain := _copied_plain(module, memo)) is not None:
            memo[id(module)] = plain
            continue
        for value in vars(module).values():
            # A module has a dozen: deepcopy rebuilds each by way of its pickled form.
            if type(value) in _EMPTY and not value:
                memo[id(value)] = type(value)()
    return copy.deepcopy(model, memo)


def lazily(tensor: Tensor) -> Tensor:
    """A copy that takes memory, and time, when it or ``tensor`` is written to."""
    try:
        return torch._lazy_clone(tensor.detach())
    except (AttributeError, RuntimeError, NotImplementedError):  # numbers in memory that is not PyTorch's own
        return tensor.detach().clone()


def unwritten(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a lazy copy, or was copied so, and nobody has written to it since."""
    return hasattr(torch._C, "_is_cow_tensor") and torch._C._is_cow_tensor(tensor)


_EMPTY = {OrderedDict, dict, set}
_CONSTANT = {bool, int, float, str, type(None), type, FunctionType, BuiltinFunctionType}


def _copied_plain(module: nn.Module, memo: dict[int, Any]) -> nn.Module | None:
    """What ``copy.deepcopy`` makes of a module that holds constants, parameters, buffers and modules that
    were copied; None of one that holds more, or has a way of its own to be copied.

    Args:
        memo: as for ``copy.deepcopy``.
    """
    kind: Any = type(module)
    if not _plainly(kind):
        return None
    state = dict(vars(module))
    state.pop("_compiled_call_impl", None)  # it would call the module that it was made for
    for key, value in state.items():
        of = type(value)
        if of in _CONSTANT:
            continue
        if of in _EMPTY and not value:
            state[key] = of()
        elif key in ("_parameters", "_buffers", "_modules"):
            if any(part is not None and id(part) not in memo for part in value.values()):
                return None
            state[key] = of((name, memo.get(id(part))) for name, part in value.items())
        elif of in (tuple, list) and all(type(part) in _CONSTANT for part in value):
            state[key] = of(value)
        else:
            return None
    made = kind.__new__(kind)
    vars(made).update(state)
    return cast(nn.Module, made)


@functools.cache
def _plainly(kind: Any) -> bool:
    """Whether ``copy.deepcopy`` copies what a module of this class holds, and does nothing else."""
    return not (
        hasattr(kind, "__deepcopy__")
        or kind.__reduce_ex__ is not object.__reduce_ex__
        or kind.__reduce__ is not object.__reduce__
        or kind.__getstate__ is not nn.Module.__getstate__
        # PyTorch's own add what pickles of older versions lack.
        or not kind.__setstate__.__module__.startswith("torch.nn.modules.")
        or kind.__new__ is not object.__new__
    )
