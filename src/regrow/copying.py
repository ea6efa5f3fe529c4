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
        if (plain := _copied_layer(module, memo)) is not None:
            memo[id(module)] = plain
            continue
        for value in vars(module).values():
            # A module has a dozen: deepcopy rebuilds each by way of its pickled form.
            if type(value) in _EMPTY and not value:
                memo[id(value)] = type(value)()
    return copy.deepcopy(model, memo)


_EMPTY = (OrderedDict, dict, set)
_CONSTANT = (bool, int, float, str, type(None))


def _copied_layer(module: nn.Module, memo: dict[int, Any]) -> nn.Module | None:
    """A copy of one of PyTorch's own layers; None where it holds more than numbers, parameters and buffers.

    Args:
        memo: as for ``copy.deepcopy``; parameters are in it already, buffers are added.
    """
    kind = type(module)
    if not kind.__module__.startswith("torch.nn.modules.") or kind.__setstate__ is not nn.Module.__setstate__:
        return None
    state: dict[str, Any] = {}
    for key, value in vars(module).items():
        if key == "_parameters" and all(p is None or id(p) in memo for p in value.values()):
            state[key] = type(value)((name, p if p is None else memo[id(p)]) for name, p in value.items())
        elif key == "_buffers" and all(b is None or type(b) is Tensor for b in value.values()):
            for buffer in value.values():
                if buffer is not None and id(buffer) not in memo:
                    memo[id(buffer)] = buffer.detach().clone()
            state[key] = type(value)((name, b if b is None else memo[id(b)]) for name, b in value.items())
        elif type(value) in _EMPTY and not value:
            state[key] = type(value)()
        elif type(value) in _CONSTANT or (
            type(value) is tuple and all(type(part) in _CONSTANT for part in value)
        ):
            state[key] = value
        else:
            return None
    made = kind.__new__(kind)
    vars(made).update(state)
    return made
