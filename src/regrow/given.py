"""Checks of what a caller gives: a model, inputs, an optimizer, names, a path. Each says what to pass.

Every public function asks here first: a value of another kind gets no further than that.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from regrow.torch_private import tree_leaves

_SHOWN = 40  # letters of a text that a message repeats
_NO_INPUTS = (
    *(str, bytes, bool, int, float, os.PathLike, set, range, type, Iterator),
    *(nn.Module, torch.optim.Optimizer, torch.Size),
)


def kind_of(value: Any) -> str:
    """What ``value`` is, in a few words: "the text 'resnet18'", "the class Net", "a dict"."""
    if value is None:
        return "None"
    if isinstance(value, str):
        return f"the text {value if len(value) <= _SHOWN else value[: _SHOWN - 1] + '…'!r}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def check_module(model: Any, called: str) -> None:
    """Raise ``ValueError`` unless ``model`` is an ``nn.Module``, and no program of TorchScript."""
    if isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule):
        return
    hint = "Pass the model itself."
    if isinstance(model, torch.jit.ScriptModule):
        hint = "TorchScript fixes the shapes: pass the model that was scripted or traced."
    elif isinstance(model, str | os.PathLike):
        hint = "Build the model first, for example torchvision.models.resnet18(), and pass that."
    elif isinstance(model, type) and issubclass(model, nn.Module):
        hint = f"Pass an instance of it: {model.__name__}(…)."
    elif isinstance(model, Mapping):
        hint = "Build the model, load a state_dict with model.load_state_dict(…), and pass the model."
    elif isinstance(model, list | tuple) and any(isinstance(part, nn.Module) for part in model):
        hint = "Pass nn.Sequential(*layers), or one of the models."
    elif callable(model):
        hint = "Pass the model that it builds."
    raise ValueError(f"{called} takes a model, an nn.Module, and got {kind_of(model)}. {hint}")


def check_inputs(example_inputs: Any, called: str) -> None:
    """Raise ``ValueError`` if ``example_inputs`` are of a kind that no model takes: a loader, an array, …

    Tensors without numbers are refused too: on these, all networks are equal.
    """
    hint = ""
    if isinstance(example_inputs, DataLoader):
        hint = "Pass one batch of it without the labels, such as next(iter(loader))[0][:1]."
    elif isinstance(example_inputs, Dataset):
        hint = "Pass one picture of it as a batch, such as dataset[0][0].unsqueeze(0)."
    elif type(example_inputs).__module__ == "numpy":
        hint = "Pass a tensor, such as torch.from_numpy(array)[:1]."
    elif example_inputs is None or isinstance(example_inputs, _NO_INPUTS):
        hint = "Pass one picture, such as x[:1]."
    elif _are_empty(example_inputs):
        hint = "There are no numbers in it: pass one picture, such as x[:1]."
    if hint:
        raise ValueError(
            f"{called} takes as example_inputs what the model takes: a tensor, a tuple of arguments, a dict "
            f"of keywords, and got {kind_of(example_inputs)}. {hint}"
        )


def _are_empty(inputs: Any) -> bool:
    sizes = [leaf.numel() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return bool(sizes) and not any(sizes)


def check_optimizer(optimizer: Any, called: str) -> None:
    """Raise ``ValueError`` unless ``optimizer`` is a ``torch.optim.Optimizer``."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return
    hint = "Pass the optimizer that trains the model."
    if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
        hint = f"Pass an instance of it: {optimizer.__name__}(model.parameters(), …)."
    raise ValueError(
        f"{called} takes as optimizer a torch.optim.Optimizer, and got {kind_of(optimizer)}. {hint}"
    )


def check_weight(weight: Any, called: str) -> None:
    """Raise ``ValueError`` unless ``weight`` is a tensor."""
    if not isinstance(weight, Tensor):
        layer = isinstance(weight, nn.Module) and isinstance(getattr(weight, "weight", None), Tensor)
        hint = "Pass layer.weight." if layer else "Pass the weight of a convolution, conv.weight."
        raise ValueError(f"{called} takes a weight, a tensor [filters, …], and got {kind_of(weight)}. {hint}")


def check_path(path: Any, called: str) -> None:
    """Raise ``ValueError`` unless ``path`` names a file."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(
            f"{called} takes the path of a file, such as 'small.safetensors', and got {kind_of(path)}."
        )


def check_seed(seed: Any) -> None:
    """Raise ``ValueError`` unless PyTorch's generators take ``seed``."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**64:
        raise ValueError(
            f"seed must be a whole number of at most 64 bits, got {reprlib.repr(seed)}. Try seed=0."
        )


def is_real(value: Any) -> bool:
    """Whether ``value`` is a plain number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_mapping(value: Any, name: str, holds: str) -> None:
    """Raise ``ValueError`` unless ``value``, the argument ``name``, is a mapping from names of layers."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} maps names of convolutions to {holds}, and got {kind_of(value)}.")
    if wrong := [key for key in value if not isinstance(key, str)]:
        raise ValueError(
            f"{name} maps names of convolutions, as model.named_modules() gives them, to {holds}; it has "
            f"{kind_of(wrong[0])} for a name."
        )


def names_given(names: Any, argument: str) -> list[str]:
    """One name or several, as a list. Raises ``ValueError`` where that is something else."""
    if isinstance(names, str):
        return [names]
    every = list(names) if isinstance(names, Iterable) and not isinstance(names, Tensor | nn.Module) else None
    if every is None or any(not isinstance(name, str) for name in every):
        wrong = names if every is None else next(name for name in every if not isinstance(name, str))
        raise ValueError(
            f'{argument} lists names of layers, such as ["layer1.0.conv1"], and got {kind_of(wrong)}.'
        )
    return every


def tensor_given(values: Any, argument: str) -> Tensor:
    """``values``, a tensor, an array or a list of numbers, as a tensor; ``ValueError`` for anything else."""
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{argument} must be a tensor, and got {kind_of(values)}.") from error
