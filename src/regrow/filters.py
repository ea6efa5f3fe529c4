"""Filters: what makes output channel i of a convolution. A layer is known by its qualified name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from regrow.given import check_mapping, names_given, tensor_given
from regrow.marks import borrowed_weight, check_whole
from regrow.modules import CONVOLUTION_CLASSES, Convolution, unwrap
from regrow.numbers import at_least_float32, numbers
from regrow.short import by_reason
from regrow.suggest import nearest
from regrow.torch_private import own_parameters


def rows(weight: Tensor) -> Tensor:
    """Return ``weight`` [filters, channels, *kernel] as a matrix [filters, channels · kernel]."""
    return weight.flatten(1) if weight.dim() > 1 else weight.unsqueeze(1)


def unit_rows(matrix: Tensor) -> Tensor:
    """Return ``matrix`` [n, D] with every row scaled to length 1; a row of zeros stays a row of zeros."""
    return nn.functional.normalize(_scaled(matrix)[1], dim=1)


_SAFE = (1e-12, 1e12)  # the squares of such lengths are in the range of float32


def row_lengths(matrix: Tensor, order: int = 2) -> Tensor:
    """Return the length of each row of ``matrix`` [n, D]: its L2 norm, or for ``order`` 1 its L1 norm.

    Returns:
        Tensor[n], float64 (float32 on devices without it), in which 1e±30 in place of each weight changes
        neither the order of the rows nor makes lengths 0 or infinite.
    """
    matrix = at_least_float32(matrix)
    wide = matrix.dtype if matrix.device.type == "mps" else torch.float64
    lengths = torch.linalg.vector_norm(matrix, order, dim=1)
    if bool(((lengths > _SAFE[0]) & (lengths < _SAFE[1])).all()):
        return lengths.to(wide)
    largest, scaled = _scaled(matrix)
    lengths = torch.linalg.vector_norm(scaled, order, dim=1)
    return largest.flatten().to(wide) * lengths.to(wide)


def _scaled(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The largest absolute value of each row, [n, 1], and the rows divided by it: the squares of very small
    and very large rows would be out of range."""
    largest = torch.linalg.vector_norm(matrix, math.inf, dim=1, keepdim=True)
    return largest, matrix / torch.where(largest > 0, largest, 1)


def convolutions(model: nn.Module) -> dict[str, Convolution]:
    """Return every convolution of ``model``, transposed ones too, by qualified name, in order of
    registration."""
    modules = unwrap(model).named_modules()
    return {name: module for name, module in modules if isinstance(module, CONVOLUTION_CLASSES)}


def left_out(model: nn.Module) -> dict[str, str]:
    """Return the convolutions whose filters cannot be compared or must not be changed: {name: reason}."""
    seen: dict[int, str] = {}
    reasons: dict[str, str] = {}
    for name, conv in convolutions(model).items():
        weight = own_parameters(conv).get("weight")
        if weight is None:
            reasons[name] = borrowed_weight(conv)
        elif isinstance(weight, nn.parameter.UninitializedParameter):
            reasons[name] = "it has no weight before a first forward pass (a lazy layer)"
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
    """Return the convolutions whose filters can be scored, cut and regrown, except those in ``exclude``.

    Args:
        model: any module; wrappers are looked through.
        exclude: names of convolutions to leave alone, or of containers of such convolutions; with the
            reasons, {name: reason}, for a message to name.

    Raises:
        ValueError: a name in ``exclude`` matches no convolution, no convolution is left, or the model is
            sharded (FSDP): its filters are spread over processes.
    """
    check_whole(model, "score")
    every = convolutions(model)
    unusable = left_out(model)
    dropped = excluded(exclude, every)
    known = exclude if isinstance(exclude, Mapping) else {}
    found = {name: conv for name, conv in every.items() if name not in dropped and name not in unusable}
    for name, conv in found.items():
        if conv.weight.is_complex():
            raise ValueError(
                f"{name!r} has complex weights ({conv.weight.dtype}), and filters are scored by real ones: "
                "exclude that layer."
            )
    if not found:
        why = {name: reason for name, reason in unusable.items() if name not in dropped}
        reasons = by_reason({**why, **known})
        raise ValueError(
            f"no convolution is left to work on: the model has {len(every)}, {len(dropped)} are excluded"
            + (f", and these cannot be used: {reasons}" if reasons else "")
            + ". Exclude fewer layers, unfreeze some (requires_grad_(True)), or pass a model with "
            "convolutions (Conv1d to Conv3d, ConvTranspose1d to ConvTranspose3d) of two or more filters."
        )
    return found


def excluded(exclude: Iterable[str], names: Iterable[str]) -> set[str]:
    """Return the ``names`` that ``exclude`` (one name or several) lists, or that lie in a container it lists.

    Raises:
        ValueError: an entry of ``exclude`` matches no name; the message suggests the nearest names.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in names_given(exclude, "exclude"):
        matching = {name for name in names if name == pattern or name.startswith(f"{pattern}.")}
        if not matching:
            parents = {name[:at] for name in names for at, letter in enumerate(name) if letter == "."}
            known = [*names, *sorted(parents.difference(names))]
            raise ValueError(f"no convolution is named {pattern!r}{nearest(str(pattern), known)}")
        found |= matching
    return found


def check_finite(convs: Mapping[str, Convolution]) -> None:
    """Raise ``ValueError`` naming the first layer that holds NaN or infinite weights."""
    # A finite sum proves that every weight is finite, and is quicker than a test of each weight.
    sums = numbers([conv.weight.detach().sum() for conv in convs.values()])
    for (name, conv), total in zip(convs.items(), sums, strict=True):
        if not math.isfinite(total) and not torch.isfinite(conv.weight.detach()).all():
            raise ValueError(
                f"{name!r} holds NaN or infinite weights, so its filters have no score. Go back to the last "
                "good state, and train with a lower rate or with gradient clipping."
            )


def check_keep(model: nn.Module, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``keep`` as {name: BoolTensor[filters]} on the CPU, checked against ``model``.

    Raises:
        ValueError: no convolution has the name, the mask is not boolean or has the wrong length, or it
            keeps no filter. The message names the layer, the error and what the mask should be.
    """
    check_mapping(keep, "keep", "boolean masks of their filters")
    convs = convolutions(model)
    checked = {}
    for name, mask in keep.items():
        if name not in convs:
            raise ValueError(f"no convolution is named {name!r}{nearest(name, convs)}")
        mask = tensor_given(mask, f"keep[{name!r}]").cpu()
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
