"""What the callbacks for Lightning need to know of a trainer and its module."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from regrow.modules import CONVOLUTION_CLASSES

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def callback_bases() -> tuple[type, ...]:
    """The ``Callback`` classes of the packages that the user has imported, or of the one that is there.

    Lightning is published under two names, and neither takes a callback of the other.

    Raises:
        ImportError: neither package is installed.
    """
    imported = [sys.modules[name] for name in _PACKAGES if name in sys.modules]
    if not imported:
        imported = [_first_installed()]
    return tuple(module.Callback for module in imported)


def _first_installed() -> Any:
    for name in _PACKAGES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    raise ImportError("regrow.integrations.lightning needs Lightning: pip install 'regrow[lightning]'.")


def network_name(module: nn.Module) -> str:
    """The name of the only child of ``module`` that has trained convolutions; empty if there is not one.

    A ``training_step`` may call ``self(x)`` or ``self.net(x)``: in both cases the child is called, and in the
    second the module itself is not.
    """
    names = [name for name, child in module.named_children() if _trains_convolutions(child)]
    never_called = (nn.ModuleList, nn.ModuleDict)
    if len(names) != 1 or isinstance(module.get_submodule(names[0]), (*CONVOLUTION_CLASSES, *never_called)):
        return ""
    return names[0]


def _trains_convolutions(module: nn.Module) -> bool:
    layers = (layer for layer in module.modules() if isinstance(layer, CONVOLUTION_CLASSES))
    return any(parameter.requires_grad for layer in layers for parameter in layer.parameters(recurse=False))


def check_part(module: nn.Module, name: str) -> None:
    """Raise ``ValueError`` unless ``name`` is a part of the user's module."""
    if name not in (parts := dict(module.named_modules())):
        shown = ", ".join(repr(each) for each in parts if each.count(".") == 0 and each)
        raise ValueError(f"module={name!r} is no part of {type(module).__name__}, which has {shown}.")


def optimizer_of(net: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """The one of ``optimizers`` that trains ``net``.

    Raises:
        ValueError: none does, or several do.
    """
    ours = {id(parameter) for parameter in net.parameters()}
    found = [
        optimizer
        for optimizer in optimizers
        if any(id(each) in ours for group in optimizer.param_groups for each in group["params"])
    ]
    if len(found) != 1:
        raise ValueError(
            f"RePr works on what one optimizer trains, and {len(found)} of {len(optimizers)} optimizers "
            f"train {type(net).__name__}: name another part by module=."
        )
    return found[0]


def averaged_copies(callbacks: Iterable[Any], name: str) -> list[nn.Module]:
    """The averaged copies of the part ``name`` that Lightning's own callbacks keep.

    ``WeightAveraging``, ``EMAWeightAveraging`` and ``StochasticWeightAveraging`` have it under a private
    name. A test fails when one of them has another; the user can then call ``callback.cycle.follow``.
    """
    copies = (getattr(callback, "_average_model", None) for callback in callbacks)
    inner = (
        copy.module if isinstance(copy, torch.optim.swa_utils.AveragedModel) else copy for copy in copies
    )
    return [copy.get_submodule(name) for copy in inner if isinstance(copy, nn.Module)]
