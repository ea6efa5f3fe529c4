"""What happens ahead of and behind every pass of a model.

It is done by a class in front of the model's class, of which copies of the model know nothing; a hook would
be copied with the model.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from regrow.repr.parts import Parts
from regrow.torch_private import backward_node, is_exporting

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
    taken = vars(model).get("_regrow_passing") is not None  # by another cycle
    if isinstance(model, torch.jit.ScriptModule) or parts.has(model) or taken:
        return None
    passing = Passing(model, parts, before)
    model._regrow_passing = passing  # type: ignore[assignment]
    if not isinstance(model, _Passed):  # as a copy is that a ``__deepcopy__`` of the user's made
        model.__class__ = _passed(cast(Any, type(model)))
    return passing


class _Passed(nn.Module):
    """A class put in front of a model's class."""

    _plain: type[nn.Module]

    def __init_subclass__(cls, **_: Any) -> None:
        """Do not tell the user's class, which may ask for arguments or keep a list of its subclasses."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # ``vars(self)`` ends a compiled graph in PyTorch 2.6.
        passing = self.__dict__.get("_regrow_passing")
        # What is exported has to be made of PyTorch's operations.
        if passing is None or is_exporting() or backward_node() is not None:
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
        if not parts.lock.acquire(blocking=False):  # another thread's pass is served: layers serve this one
            return super().forward(*args, **kwargs)
        parts.begin()
        whole = False
        try:
            output = super().forward(*args, **kwargs)
            whole = True
        finally:
            parts.end(whole)
            parts.lock.release()
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        return plainly(reduced, type(self), self._plain, "_regrow_passing") if _in_front(self) else reduced


def plainly(reduced: Any, kind: type, plain: type, attribute: str) -> Any:
    """What ``__reduce_ex__`` of an object of the class ``kind`` returned, for one of the class ``plain``.

    Args:
        attribute: is left out of the state. A class may have a state or a ``__reduce__`` of its own.
    """
    if not isinstance(reduced, tuple):
        return reduced
    make, arguments, *rest = reduced
    if rest and isinstance(rest[0], dict):
        rest[0] = {key: value for key, value in rest[0].items() if key != attribute}
    # pickle compares the class with that of the object where the maker is its own.
    make = _blank if make is copyreg.__newobj__ else make  # type: ignore[attr-defined]
    return make, tuple([plain if each is kind else each for each in arguments]), *rest


def _blank(kind: Any, *arguments: Any) -> Any:
    return kind.__new__(kind, *arguments)


def _in_front(model: nn.Module) -> bool:
    return type(model).__bases__[0] is _Passed


@functools.cache
def _passed(plain: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(cast(Any, plain.forward))
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _Passed.forward(self, *args, **kwargs)  # with the signature of the user's method

    body = {"_plain": plain, "__module__": plain.__module__, "forward": forward}
    return type(plain.__name__, (_Passed, plain), body)
