"""What a filter is: row i of a convolution's weight, found by the layer's qualified name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import get_args

import torch
from torch import Tensor, nn

from regrow.suggest import nearest

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLUTIONS = get_args(Convolution)  # tuples are tested faster than unions


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside ``torch.compile`` and data-parallel wrappers.

    Names taken from it carry no ``module.`` or ``_orig_mod.`` prefix, so what is saved under a
    wrapper loads without one.
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def rows(weight: Tensor) -> Tensor:
    """``weight`` [filters, channels, *kernel] as a matrix [filters, channels · kernel]."""
    return weight.flatten(1) if weight.dim() > 1 else weight.unsqueeze(1)


def unit_rows(matrix: Tensor) -> Tensor:
    """``matrix`` [n, D] with every row scaled to length 1; a row of zeros stays one."""
    # Scaling by the largest entry first keeps the squares of very small or very large rows in range.
    largest = matrix.abs().amax(1, keepdim=True)
    return nn.functional.normalize(matrix / torch.where(largest > 0, largest, 1), dim=1)


def convolutions(model: nn.Module) -> dict[str, Convolution]:
    """Every Conv1d, Conv2d and Conv3d of ``model`` by qualified name, in order of registration."""
    return {name: module for name, module in named_parts(unwrap(model)) if isinstance(module, _CONVOLUTIONS)}


def named_parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What ``model.named_modules()`` yields, in a third of the time: without a generator a level."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[nn.Module] = set()
    left: list[tuple[str, nn.Module]] = [("", model)]
    while left:
        name, module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        found.append((name, module))
        if module._modules:
            prefix = f"{name}." if name else ""
            children = reversed(module._modules.items())
            left += [(prefix + key, child) for key, child in children if child is not None]
    return found


def parts(model: nn.Module) -> list[nn.Module]:
    """``named_parts`` without the names."""
    found: dict[nn.Module, None] = {}
    left = [model]
    while left:
        module = left.pop()
        if module not in found:
            found[module] = None
            if module._modules:
                left += [child for child in reversed(module._modules.values()) if child is not None]
    return list(found)


def left_out(model: nn.Module) -> dict[str, str]:
    """The convolutions whose filters are not comparable or not ours to change: {name: reason}."""
    seen: dict[int, str] = {}
    reasons: dict[str, str] = {}
    for name, conv in convolutions(model).items():
        weight = conv._parameters.get("weight")
        if weight is None:
            reasons[name] = "its weight is computed from other parameters (a parametrization)"
        elif isinstance(weight, nn.parameter.UninitializedParameter):
            reasons[name] = "its weight is not there before a first forward pass (a lazy layer)"
        elif conv.groups > 1:
            reasons[name] = "grouped: its filters read different channels, so their overlap means nothing"
        elif conv.out_channels < 2:
            reasons[name] = "it has a single filter"
        elif id(weight) in seen:
            reasons[name] = reasons[seen[id(weight)]] = f"it shares its weight with {seen[id(weight)]!r}"
            reasons[seen[id(weight)]] = f"it shares its weight with {name!r}"
        elif not weight.requires_grad:
            reasons[name] = "its weight is frozen (requires_grad is False)"
        else:
            seen[id(weight)] = name
    return reasons


def eligible(model: nn.Module, exclude: Iterable[str] = ()) -> dict[str, Convolution]:
    """The convolutions whose filters can be scored, cut and regrown, without those in ``exclude``.

    Args:
        model: any module; wrappers are looked through.
        exclude: qualified names of convolutions to leave alone. The name of a container leaves out
            every convolution inside it.

    Raises:
        ValueError: a name in ``exclude`` matches no convolution, none is left, or the model is sharded
            (FSDP): its filters are spread over processes.
    """
    # fully_shard puts FSDPModule among the bases of the model, or of some of its parts.
    bases = {base.__name__ for kind in set(map(type, parts(model))) for base in kind.__mro__}
    if bases & {"FullyShardedDataParallel", "FSDPModule"}:
        raise ValueError("regrow needs whole filters on every process: use DDP instead of FSDP.")
    every = convolutions(model)
    unknown = left_out(model)
    dropped = excluded(exclude, every)
    found = {name: conv for name, conv in every.items() if name not in dropped and name not in unknown}
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in unknown.items() if name not in dropped)
        raise ValueError(
            f"no convolution is left to work on: the model has {len(every)}, {len(dropped)} are excluded"
            + (f", and these cannot be used: {reasons}" if reasons else "")
            + ". Exclude fewer layers, or pass a model with Conv1d, Conv2d or Conv3d layers of two or more "
            "filters."
        )
    return found


def excluded(exclude: Iterable[str], names: Iterable[str]) -> set[str]:
    """Those of ``names`` that are in ``exclude`` (one name or several), or inside a container that is.

    Raises:
        ValueError: an entry of ``exclude`` matches none; the nearest names are suggested.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        matching = {name for name in names if name == pattern or name.startswith(f"{pattern}.")}
        if not matching:
            raise ValueError(f"no convolution is named {pattern!r}{nearest(str(pattern), names)}")
        found |= matching
    return found


def check_finite(convs: Mapping[str, Convolution]) -> None:
    """Raise ``ValueError`` naming the first layer that holds NaN or infinite weights."""
    for name, conv in convs.items():
        weight = conv.weight.detach()
        # A sum is quicker than a test of each number, and only numbers have one that is finite.
        if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
            raise ValueError(
                f"{name!r} holds NaN or infinite weights, so its filters have no score. Go back to the last "
                "good state, and train with a lower rate or with gradient clipping."
            )


def check_keep(model: nn.Module, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``keep`` checked against ``model``: known names, boolean masks of the right length, one filter alive.

    Returns:
        {name: BoolTensor[filters]} on the CPU.

    Raises:
        ValueError: with the name of the layer, what is wrong and what it should be.
    """
    convs = convolutions(model)
    checked = {}
    for name, mask in keep.items():
        if name not in convs:
            raise ValueError(f"no convolution is named {name!r}{nearest(name, convs)}")
        mask = torch.as_tensor(mask).cpu()
        filters = convs[name].out_channels
        if mask.dtype != torch.bool or mask.shape != (filters,):
            raise ValueError(
                f"keep[{name!r}] must be a boolean mask of {filters} filters, got {mask.dtype} of shape "
                f"{list(mask.shape)}."
            )
        if not mask.any():
            raise ValueError(f"keep[{name!r}] leaves no filter alive: keep at least one.")
        checked[name] = mask
    return checked
