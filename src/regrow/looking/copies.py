"""Copies of a model to try things on, whose weights take no memory until somebody writes to them."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regrow.log import first_line
from regrow.looking.calls import mapped
from regrow.looking.closures import rebind
from regrow.torch_private import lazy_copy

_CONTAINERS = (dict, set, OrderedDict)


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
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            trained = parameter.requires_grad if requires_grad is None else requires_grad
            memo[id(parameter)] = nn.Parameter(renew(parameter).detach(), trained)
    for module in model.modules():
        # A module has a dozen empty containers, each of which deepcopy would take apart and rebuild.
        empty = [value for value in vars(module).values() if type(value) in _CONTAINERS and not value]
        memo.update({id(value): type(value)() for value in empty})
    try:
        again = copy.deepcopy(model, memo)
        rebind(model, memo)
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

    probe = copied(model, renew, requires_grad=False).eval()
    # Tensors of a subclass went through copy.deepcopy as they were.
    return probe.to(dtype) if dtype is not None and dtypes(probe) - {dtype} else probe


def inputs_as(example_inputs: Any, dtype: torch.dtype | None) -> Any:
    """``example_inputs`` in the numbers of a copy that ``copied_as`` made."""
    return mapped(example_inputs, functools.partial(Tensor.to, dtype=dtype)) if dtype else example_inputs


def dtypes(model: nn.Module) -> set[torch.dtype]:
    """The types of the floating-point parameters and buffers of ``model``."""
    tensors = (*model.parameters(), *model.buffers())
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
