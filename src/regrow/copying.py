"""Copies of a model to try things on, without the time that ``copy.deepcopy`` takes for what is empty."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def copied(model: nn.Module, renew: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """A deep copy of ``model`` whose parameters are new objects of the same memory, or what ``renew`` makes.

    Modules, hooks and buffers are the copy's own, and parameters that were shared are so in it too. Without
    ``renew`` nothing may be written into the parameters of the copy: the model would change.

    Args:
        renew: takes a parameter's values, without its gradient; gives those of the copy's, in any shape.

    Raises:
        Whatever ``copy.deepcopy`` does of a model that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            values = parameter.detach() if renew is None else renew(parameter.detach())
            memo[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
    for module in model.modules():
        for value in vars(module).values():
            # A module has a dozen: deepcopy rebuilds each by way of its pickled form.
            if type(value) in (OrderedDict, dict, set) and not value:
                memo[id(value)] = type(value)()
    return copy.deepcopy(model, memo)
