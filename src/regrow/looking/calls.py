"""How a model is run: what it takes and gives, in whatever containers, and what a run leaves as it was."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regrow.filters import parts


def call(model: nn.Module, example_inputs: Any) -> Any:
    """``model`` applied to a tensor, to a tuple or list of arguments, or to a dict of keywords."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple | list):
        return model(*example_inputs)
    return model(example_inputs)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Random numbers go on as before; autocast, which would not see weights that change, is off."""
    device = _device(model)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
    ):
        yield


def set_mode(model: nn.Module, training: bool) -> None:
    """``model.train(training)``, in a fifth of the time."""
    modules = parts(model)
    if any(type(module).train is not nn.Module.train for module in modules):
        model.train(training)
    else:
        for module in modules:
            vars(module)["training"] = training


def seed(model: nn.Module) -> None:
    """``torch.manual_seed(0)``; for the CPU alone where the model is there: each call keeps a seed for other
    devices too, and a trace of the stack, which takes a millisecond."""
    device = _device(model)
    (torch.default_generator if device.type == "cpu" else torch).manual_seed(0)


def random_state(model: nn.Module) -> Tensor | None:
    """Of the generators that the model's layers draw from; None for those of other devices than CUDA's."""
    device = _device(model)
    if device.type == "cuda":
        return torch.cat([torch.get_rng_state(), torch.cuda.get_rng_state(device)])
    return torch.get_rng_state() if device.type == "cpu" else None


@contextmanager
def garbage_waiting() -> Iterator[None]:
    """Reference cycles are collected afterwards: graphs and copies of a model are so many objects that in
    every few cuts Python would look through all that it holds, for as long as a small network's cut takes."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


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
