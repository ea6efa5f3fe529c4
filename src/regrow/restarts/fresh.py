"""Values that the parameters and buffers of a model would have if the model were built anew."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from regrow.given import check_module
from regrow.looking.copies import copied
from regrow.modules import filter_dim, filters_first, is_stock, unwrap
from regrow.restarts.seeds import drawing
from regrow.torch_private import own_buffers, own_parameters


@dataclass
class Fresh:
    """New values for tensors of a model.

    Attributes:
        parameters, buffers: (qualified name, the model's tensor, its new values); shared tensors come once.
        left_out: {qualified name of a parameter: why it has no new value}.
    """

    parameters: list[tuple[str, nn.Parameter, Tensor]] = field(default_factory=list)
    buffers: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def fresh_values(
    model: nn.Module, seed: int, fresh: nn.Module | None = None, among: Iterable[nn.Module] | None = None
) -> Fresh:
    """Draw the values by the ``reset_parameters`` of the modules of ``model``, or take them from ``fresh``.

    Args:
        model: the user's own module, not a wrapper. It is only read.
        seed: the same seed draws the same values on every device and in every process.
        fresh: a newly built model of the same structure; None draws.
        among: the modules whose own tensors are asked for; None asks for all.

    Raises:
        ValueError: ``fresh`` has other parameters than ``model``, or shares them with it.
    """
    if fresh is not None:
        fresh = check_fresh(model, fresh)
    found, wanted = Fresh(), None if among is None else set(among)
    able: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        own = {key: p for key, p in own_parameters(module).items() if p is not None}
        if (wanted is not None and module not in wanted) or not (own or own_buffers(module)):
            continue
        trained = [key for key, parameter in own.items() if parameter.requires_grad]
        why = _why_not(module, fresh)
        for key in own:
            if why or key not in trained:
                found.left_out[_join(name, key)] = why or "it is frozen (requires_grad is False)"
        if not why and (trained or not own):
            able[name] = module
    if fresh is None:
        fresh = copied(model).cpu()
        with drawing(seed):
            for name in able:
                twin: Any = fresh.get_submodule(name)
                twin.reset_parameters()
    seen: set[int] = set()
    for name, module in able.items():
        twin = fresh.get_submodule(name)
        new_parameters, new_buffers = own_parameters(twin), own_buffers(twin)
        for key, parameter in own_parameters(module).items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
                found.parameters.append((_join(name, key), parameter, new_parameters[key].detach()))
                seen.add(id(parameter))
        for key, buffer in own_buffers(module).items():
            if buffer is not None and id(buffer) not in seen:
                found.buffers.append((_join(name, key), buffer, new_buffers[key].detach()))
                seen.add(id(buffer))
    return found


def check_fresh(model: nn.Module, fresh: Any) -> nn.Module:
    """``fresh`` without its wrappers. Raises ``ValueError`` unless it has the structure of ``model``."""
    check_module(fresh, "fresh")
    fresh = unwrap(fresh)
    theirs = dict(fresh.named_parameters()) | dict(fresh.named_buffers())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        new = theirs.pop(name, None)
        if new is None or new.shape != tensor.shape:
            has = "no such tensor" if new is None else f"shape {list(new.shape)}"
            raise ValueError(
                f"fresh does not fit the model: for {name!r} of shape {list(tensor.shape)} it has {has}. "
                "Build it as the model was built."
            )
        if new is tensor:
            raise ValueError(f"fresh holds {name!r} of the model itself: build another one.")
    if theirs:
        raise ValueError(f"fresh does not fit the model, which has no {next(iter(theirs))!r}.")
    return fresh


def drawn_rows(layer: nn.Module, count: int, seed: int) -> Tensor:
    """Incoming weights for ``count`` units of a convolution or linear layer, units first, on the CPU, as its
    ``reset_parameters`` draws them."""
    twin: Any = copied(layer, requires_grad=False)
    if is_stock(layer) and filter_dim(layer) == 0:
        # PyTorch's own layers draw each unit alike, so that the others need not be drawn.
        twin.weight, twin.bias = nn.Parameter(twin.weight[:count].clone(), requires_grad=False), None
    twin = twin.cpu()
    with drawing(seed):
        twin.reset_parameters()
        every = filters_first(twin, twin.weight.detach())
        return every[torch.randperm(len(every))[:count]]


def _why_not(module: nn.Module, fresh: nn.Module | None) -> str:
    if parametrize.is_parametrized(module) or isinstance(module, parametrize.ParametrizationList):
        return "a parametrization computes its layer's weight: remove it first"
    if fresh is None and not callable(getattr(module, "reset_parameters", None)):
        return f"{type(module).__name__} has no reset_parameters: pass fresh=, a newly built model"
    return ""


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
