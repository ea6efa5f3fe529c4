"""Start a network anew in part: all weights shrunk towards new ones, or whole layers drawn again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.given import check_optimizer, check_seed, is_real, names_given
from regrow.interrupts import uninterrupted
from regrow.marks import check
from regrow.modules import Norm, unwrap
from regrow.repr.ranks import copy_from_first, group_of
from regrow.restarts.fresh import Fresh, fresh_values
from regrow.restarts.memory import Memory
from regrow.restarts.saved import VERSION
from regrow.short import by_reason
from regrow.suggest import nearest
from regrow.torch_private import own_parameters


def shrink_and_perturb(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    shrink: float = 0.4,
    perturb: float = 0.1,
    seed: int = 0,
    fresh: nn.Module | None = None,
) -> dict[str, Any]:
    """Set every parameter to ``shrink · old + perturb · new`` (Ash & Adams 2020, arXiv 1910.08475, §5).

    Call it when the data change or grow, and train on. Norms take part with weight and bias; their running
    statistics begin anew. The optimizer forgets all that it remembers of these parameters.

    Args:
        model: any module, also in wrappers. With DDP, give the wrapper, in every process.
        optimizer: the optimizer that trains ``model``; None if it is built anew.
        shrink, perturb: the shares of the old values and of the new ones.
        seed: of the new values, which each module's ``reset_parameters`` draws.
        fresh: a newly built model of the same structure, whose values are taken instead.

    Returns:
        A JSON-able record: version, shrink, perturb, parameters (names), left_out {name: reason}, notes.

    Raises:
        ValueError: an argument out of range, ``fresh`` does not fit, a state in which this is refused.
            Nothing is changed.
    """
    check(model, "shrink_and_perturb")
    for name, value in (("shrink", shrink), ("perturb", perturb)):
        if not is_real(value) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}.")
    _check_common(optimizer, "shrink_and_perturb", seed)
    found = fresh_values(unwrap(model), seed, fresh)
    if not found.parameters:
        raise ValueError(_nothing(found))
    notes = _write(model, optimizer, found, float(shrink), float(perturb))
    return {
        "version": VERSION, "shrink": float(shrink), "perturb": float(perturb), **_told(found, notes),
    }  # fmt: skip


def reinitialize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    layers: Iterable[str] | None = None,
    last: int | None = None,
    seed: int = 0,
    fresh: nn.Module | None = None,
) -> dict[str, Any]:
    """Draw whole layers anew, with the norms behind them and what the optimizer remembers.

    ``last=1`` gives a new head; ``last=n`` the last layers (later-layer forgetting, Zhou et al. 2022, arXiv
    2202.00155, draws them anew in every generation); with neither, the model starts from scratch. "Last" and
    "behind" go by the order in which the model registers its modules.

    Args:
        model: any module, also in wrappers. With DDP, give the wrapper, in every process.
        optimizer: the optimizer that trains ``model``; None if it is built anew.
        layers: qualified names of modules, or of containers of modules. The norms between a layer and the
            next layer with weights are drawn anew with it.
        last: how many of the last layers with weights (convolutions, linear layers, …), and what follows.
        seed: of the new values, which each module's ``reset_parameters`` draws.
        fresh: a newly built model of the same structure, whose values are taken instead.

    Returns:
        A JSON-able record: version, parameters (names), left_out {name: reason}, notes.

    Raises:
        ValueError: an unknown name, ``last`` out of range, both ``layers`` and ``last``, nothing to draw,
            ``fresh`` does not fit, a state in which this is refused. Nothing is changed.
    """
    check(model, "reinitialize")
    _check_common(optimizer, "reinitialize", seed)
    if layers is not None and last is not None:
        raise ValueError("reinitialize takes layers= or last=, not both.")
    inner = unwrap(model)
    ordered = _in_order(inner)
    weighted = [place for place, (_, module) in enumerate(ordered) if _has_weight(module)]
    among = None
    if last is not None:
        if not isinstance(last, int) or isinstance(last, bool) or not 1 <= last <= len(weighted):
            raise ValueError(f"last must be a whole number from 1 to {len(weighted)}, got {last!r}.")
        among = [module for _, module in ordered[weighted[-last] :]]
    elif layers is not None:
        among = _named(ordered, names_given(layers, "layers"))
    found = fresh_values(inner, seed, fresh, among)
    if not found.parameters:
        raise ValueError(_nothing(found))
    notes = _write(model, optimizer, found, 0.0, 1.0)
    return {"version": VERSION, **_told(found, notes)}


def _check_common(optimizer: Any, called: str, seed: Any) -> None:
    if optimizer is not None:
        check_optimizer(optimizer, called)
    check_seed(seed)


def _in_order(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules with parameters or buffers of their own, as the model registers them."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if own_parameters(module) or any(True for _ in module.buffers(recurse=False))
    ]


def _has_weight(module: nn.Module) -> bool:
    return not isinstance(module, Norm) and any(
        parameter is not None and parameter.dim() > 1 for parameter in own_parameters(module).values()
    )


def _named(ordered: Sequence[tuple[str, nn.Module]], names: Sequence[str]) -> list[nn.Module]:
    """The modules that ``names`` list, or that lie in containers they list, and the norms behind each."""
    found: list[nn.Module] = []
    for pattern in names:
        inside = [
            place
            for place, (name, _) in enumerate(ordered)
            if not pattern or name == pattern or name.startswith(f"{pattern}.")
        ]
        if not inside:
            known = [name for name, _ in ordered]
            raise ValueError(f"no layer is named {pattern!r}{nearest(str(pattern), known)}")
        for place in inside:
            found.append(ordered[place][1])
            for _, behind in ordered[place + 1 :]:
                if not isinstance(behind, Norm):
                    break
                found.append(behind)
    return found


@torch.no_grad()
def _write(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, found: Fresh, old: float, new: float
) -> list[str]:
    """Set parameters to ``old`` · their values + ``new`` · the drawn ones; buffers and memory begin anew."""
    memory, group = Memory(optimizer), group_of(model)
    masks: dict[nn.Parameter, Tensor] = {}
    with uninterrupted():
        for _, parameter, values in found.parameters:
            values = values.to(parameter)
            if old:
                values = parameter * old + values * new
            elif new != 1:
                values = values * new
            parameter.copy_(values)
            masks[parameter] = torch.ones(parameter.shape[:1], dtype=torch.bool, device=parameter.device)
        for _, buffer, values in found.buffers:
            buffer.copy_(values)
        if group is not None:
            copy_from_first([tensor for _, tensor, _ in (*found.parameters, *found.buffers)], group)
        return memory.clear(masks)


def _told(found: Fresh, notes: list[str]) -> dict[str, Any]:
    return {
        "parameters": [name for name, *_ in found.parameters],
        "left_out": dict(found.left_out),
        "notes": notes,
    }


def _nothing(found: Fresh) -> str:
    reasons = by_reason(found.left_out)
    return f"no parameter is left to draw anew{f' ({reasons})' if reasons else ''}."
