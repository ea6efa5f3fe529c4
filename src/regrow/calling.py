"""What a model takes and what it gives, in whatever containers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def call(model: nn.Module, example_inputs: Any) -> Any:
    """``model`` applied to a tensor, to a tuple or list of arguments, or to a dict of keywords."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple | list):
        return model(*example_inputs)
    return model(example_inputs)


def floating(output: Any) -> list[Tensor]:
    """The floating tensors in a nested output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, tuple | list):
        return [tensor for part in output for tensor in floating(part)]
    return []


def mapped(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``inputs`` with every floating tensor in it changed."""
    if isinstance(inputs, Tensor):
        return change(inputs.detach()) if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {key: mapped(value, change) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(mapped(value, change) for value in inputs)
    return inputs
