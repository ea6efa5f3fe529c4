"""Copies of a model to try things on, whose weights take no memory until somebody writes to them."""

from __future__ import annotations

import copy
import copyreg
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from regrow.log import first_line
from regrow.looking.calls import mapped, switch
from regrow.looking.closures import rebind
from regrow.torch_private import lazy_copy, own_buffers, own_parameters, remember_storage, storage_key

_CONTAINERS = (dict, set, OrderedDict)
# What copy.deepcopy returns as it is.
_SHARED = {type(None), bool, int, float, complex, str, bytes, type, FunctionType, BuiltinFunctionType}


class NotCopied(ValueError):
    """``copy.deepcopy`` failed on the user's model; ``__cause__`` is its error."""


def copied(
    model: nn.Module,
    renew: Callable[[Tensor], Tensor] = lazy_copy,
    *,
    requires_grad: bool | None = None,
) -> nn.Module:
    """A deep copy of ``model``. Parameters that were shared are shared in the copy too, and functions that
    were put on the model, such as a wrapped ``forward``, run the copy.

    Args:
        renew: takes a parameter; gives the values of the copy's parameter. Lazy copies by default.
        requires_grad: of the copy's parameters; None leaves it as it is.

    Raises:
        NotCopied: the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    modules = list(model.modules())
    held = [parameter for module in modules for parameter in own_parameters(module).values()]
    for parameter in held:
        if type(parameter) is nn.Parameter and id(parameter) not in memo:
            trained = parameter.requires_grad if requires_grad is None else requires_grad
            memo[id(parameter)] = nn.Parameter(renew(parameter).detach(), trained)
    try:
        if all(map(_is_plain, map(type, modules))):
            _copy_plain(modules, memo)
        again = copy.deepcopy(model, memo)
        rebind(modules, memo)
        return again
    except Exception as error:  # the user's own __deepcopy__ may raise anything
        raise NotCopied(f"the model cannot be copied: {first_line(error)}") from error


def copied_as(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of ``model`` to change, in evaluation mode, in numbers of ``dtype`` (None: as they are).

    Raises:
        NotCopied: the model cannot be copied.
    """

    def renew(values: Tensor) -> Tensor:
        kept = not values.is_floating_point() or dtype in (None, values.dtype)
        return lazy_copy(values) if kept else values.to(dtype)

    probe = switch(copied(model, renew, requires_grad=False), False)
    # Tensors of a subclass went through copy.deepcopy as they were.
    return probe.to(dtype) if dtype is not None and dtypes(probe) - {dtype} else probe


def inputs_as(example_inputs: Any, dtype: torch.dtype | None) -> Any:
    """``example_inputs`` in the numbers of a copy that ``copied_as`` made."""
    return mapped(example_inputs, functools.partial(Tensor.to, dtype=dtype)) if dtype else example_inputs


def dtypes(model: nn.Module) -> set[torch.dtype]:
    """The types of the floating-point parameters and buffers of ``model``."""
    tensors = (*model.parameters(), *model.buffers())
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


@functools.lru_cache(maxsize=1024)
def _is_plain(kind: Any) -> bool:
    """Whether ``copy.deepcopy`` copies modules of a class attribute by attribute."""
    own = ("__reduce_ex__", "__reduce__", "__new__")
    return (
        not any(hasattr(kind, name) for name in ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__"))
        and all(getattr(kind, name) is getattr(object, name) for name in own)
        and getattr(kind, "__getstate__", None) is getattr(nn.Module, "__getstate__", None)
        and not any(vars(base).get("__slots__") for base in kind.__mro__)
        and kind not in copyreg.dispatch_table
    )


def _copy_plain(modules: Sequence[nn.Module], memo: dict[int, Any]) -> None:
    """Put copies of modules into ``memo``, as ``copy.deepcopy`` would make them, in a tenth of the time.

    A module has two dozen attributes. Most are numbers and containers of parameters, which need not be taken
    apart; ``copy.deepcopy`` sees the others, once all modules have those.
    """
    twins: list[tuple[Any, dict[str, Any], list[str]]] = []
    for module in modules:
        memo[id(module)] = type(module).__new__(type(module))
    memories: set[int] = set()
    for buffer in (buffer for module in modules for buffer in own_buffers(module).values()):
        if buffer is not None and id(buffer) not in memo and _is_whole(buffer):
            place = storage_key(buffer.untyped_storage())
            if place not in memories:  # others there share the copy's memory
                memories.add(place)
                memo[id(buffer)] = copy_of = buffer.detach().clone()
                remember_storage(memo, buffer, copy_of)
    for module in modules:
        twin, state, later = memo[id(module)], dict(module.__getstate__()), []
        for key, value in state.items():
            kind = type(value)
            if kind in _SHARED or (kind is tuple and _SHARED.issuperset(map(type, value))):
                continue
            if id(value) in memo:
                state[key] = memo[id(value)]
            elif kind in _CONTAINERS and not value:
                state[key] = memo[id(value)] = kind()
            elif (again := _copied_quickly(value, memo)) is not None:
                state[key] = memo[id(value)] = again
            else:
                later.append(key)
        vars(twin).update(state)
        twins.append((twin, state, later))
    for twin, state, later in twins:
        for key in later:
            state[key] = copy.deepcopy(state[key], memo)
        twin.__setstate__(state)


def _copied_quickly(value: Any, memo: Mapping[int, Any]) -> Any:
    """A copy of a container that holds numbers, names and objects copied before; None for another object."""
    kind = type(value)
    if kind is set and _SHARED.issuperset(map(type, value)):
        return set(value)
    if kind not in (dict, OrderedDict) or not _SHARED.issuperset(map(type, value)):
        return None
    if not all(id(each) in memo or type(each) in _SHARED for each in value.values()):
        return None
    return kind((name, memo.get(id(each), each)) for name, each in value.items())


def _is_whole(buffer: Tensor) -> bool:
    """Whether a tensor is a plain one that has its memory to itself, and no more memory than it needs."""
    if type(buffer) is not Tensor or buffer.requires_grad or buffer.grad is not None or vars(buffer):
        return False
    if buffer.layout is not torch.strided or buffer.is_quantized or buffer.is_complex() or not buffer.is_leaf:
        return False
    if buffer.device.type not in ("cpu", "cuda") or buffer.is_inference():
        return False
    return buffer.untyped_storage().nbytes() == buffer.numel() * buffer.element_size()
