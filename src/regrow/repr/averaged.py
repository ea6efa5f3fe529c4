"""Averaged copies of a model (EMA, SWA), whose entries follow the drops and restores of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from regrow.indexing import Where, clear, on
from regrow.modules import unwrap
from regrow.torch_private import storage_key


class Averaged:
    """An averaged copy, read by the model's own names.

    Args:
        copy: a module whose parameters and buffers have the model's names behind a prefix, such as
            ``module.`` (``AveragedModel``, timm's ``ModelEmaV3``, a deep copy); or a dictionary
            {name: tensor}, whose tensors are written to in place (a ``state_dict()``, the shadow of an EMA).
        model: the user's own module, not a wrapper.

    Raises:
        ValueError: ``copy`` is of another kind, is the model itself, or lacks a parameter that is trained.
    """

    def __init__(self, copy: nn.Module | Mapping[str, Tensor], model: nn.Module) -> None:
        if not isinstance(copy, nn.Module | Mapping):
            raise ValueError(
                f"an averaged copy must be a module or a dictionary of tensors, got {type(copy).__name__}: "
                "pass the module in which the averages are kept, or {name: tensor}."
            )
        if isinstance(copy, nn.Module) and unwrap(copy) is model:
            raise ValueError("this is the model that RePr trains: pass an averaged copy of it.")
        self._copy = copy
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = _tensors(copy)
        first = next(iter(trained), "")
        ending = (key.removesuffix(first) for key in found if key.endswith(first))
        prefixes = sorted({prefix for prefix in ending if not prefix or prefix.endswith(".")}, key=len)
        self._prefix = next(
            (prefix for prefix in prefixes if all(prefix + name in found for name in trained)),
            prefixes[0] if prefixes else "",
        )
        for name, parameter in trained.items():
            theirs = found.get(self._prefix + name)
            if theirs is None or theirs.shape != parameter.shape:
                has = "nothing" if theirs is None else f"shape {list(theirs.shape)}"
                raise ValueError(
                    f"the averaged copy does not fit the model: for {name!r} of shape "
                    f"{list(parameter.shape)} it has {has}. Pass a copy of this very model."
                )
            if theirs.numel() and storage_key(theirs.untyped_storage()) == storage_key(
                parameter.untyped_storage()
            ):
                raise ValueError(
                    f"the averaged copy shares the memory of {name!r} with the model: pass a copy, such as "
                    "copy.deepcopy(model)."
                )

    @torch.no_grad()
    def silence(self, entries: Iterable[tuple[str, Tensor, Where]]) -> None:
        """Set the entries (name, the model's tensor, index of where) to 0."""
        found = _tensors(self._copy)
        for name, _, where in entries:
            theirs = found.get(self._prefix + name)
            if theirs is not None:
                clear(theirs, on(where, theirs.device))

    @torch.no_grad()
    def take(self, entries: Iterable[tuple[str, Tensor, Where]]) -> None:
        """Copy the entries (name, the model's tensor, index of where) from the model."""
        found = _tensors(self._copy)
        for name, tensor, where in entries:
            theirs = found.get(self._prefix + name)
            if theirs is not None:
                theirs[on(where, theirs.device)] = tensor.detach()[where].to(theirs)


def _tensors(copy: Any) -> dict[str, Tensor]:
    if isinstance(copy, nn.Module):
        both = chain(
            copy.named_parameters(remove_duplicate=False), copy.named_buffers(remove_duplicate=False)
        )
        return {name: tensor.detach() for name, tensor in both}
    return {name: value.detach() for name, value in copy.items() if isinstance(value, Tensor)}
