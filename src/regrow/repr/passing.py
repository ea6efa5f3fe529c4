"""What happens ahead of and behind every pass of a model.

It is done by a class in front of the model's class, of which copies of the model know nothing; a hook would
be copied with the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from regrow.repr.parts import Parts
from regrow.torch_private import backward_node

Before = Callable[[bool, Any], None]


class Passing:
    """Tells ``parts`` of the passes of ``model`` until ``release``."""

    def __init__(self, model: nn.Module, parts: Parts, before: Before | None) -> None:
        self.model, self.parts, self.before = model, parts, before

    def release(self) -> None:
        """Give the model its own class again; a second call does nothing."""
        if vars(self.model).pop("_regrow_passing", None) is None or not _in_front(self.model):
            return  # another class in front stays; without the attribute ours does nothing
        self.model.__class__ = cast(_Passed, self.model)._plain

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()  # nothing would end the passes of a copy


def put_in_front(model: nn.Module, parts: Parts, before: Before | None) -> Passing | None:
    """Have ``parts`` know of every pass of ``model``; None where its class cannot be changed once more.

    Args:
        before: see ``narrow``.
    """
    if isinstance(model, torch.jit.ScriptModule) or parts.has(model):
        return None
    passing = Passing(model, parts, before)
    model._regrow_passing = passing  # type: ignore[assignment]
    model.__class__ = _passed(cast(Any, type(model)))
    return passing


class _Passed(nn.Module):
    """A class put in front of a model's class."""

    _plain: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        passing = vars(self).get("_regrow_passing")
        # What is exported has to be made of PyTorch's operations.
        if passing is None or torch.compiler.is_exporting() or backward_node() is not None:
            return super().forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            passing.parts.begin_compiled()
            try:
                return super().forward(*args, **kwargs)
            finally:
                passing.parts.end_compiled()
        if passing.before is not None:
            passing.before(self.training, (args, kwargs))
        # What ``before`` decides may have put another object in place of this one.
        parts = vars(self)["_regrow_passing"].parts
        parts.begin()
        whole = False
        try:
            output = super().forward(*args, **kwargs)
            whole = True
        finally:
            parts.end(whole)
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if not _in_front(self):
            return reduced
        _, _, state, *rest = cast(tuple[Any, ...], reduced)
        state = {key: value for key, value in state.items() if key != "_regrow_passing"}
        return (_blank, (self._plain,), state, *rest)


def _blank(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def _in_front(model: nn.Module) -> bool:
    return type(model).__bases__[0] is _Passed


@functools.cache
def _passed(plain: type[nn.Module]) -> type[nn.Module]:
    return type(plain.__name__, (_Passed, plain), {"_plain": plain, "__module__": plain.__module__})
