"""Leave dropped filters out of a model's computation for a while, and keep all its parameters as they are."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from regrow.indexing import Where, index_tensor, on, place, plain_operations, take
from regrow.marks import check_whole
from regrow.modules import channel_dim, filter_dim, input_first, input_name, unwrap
from regrow.repr.batch_norm import batch_norm, norms_innermost
from regrow.repr.joined import Slice
from regrow.repr.parts import Parts
from regrow.repr.passing import Passing, plainly, put_in_front
from regrow.surgery.layers import Layer, layers
from regrow.surgery.plan import CutPlan, NoPlan
from regrow.torch_private import own_buffers, own_parameters


def narrow(
    model: nn.Module,
    plan: CutPlan,
    before: Callable[[bool, Any], None] | None = None,
    dead: Iterable[tuple[nn.Parameter, Where]] = (),
) -> Narrowing:
    """Make ``model`` compute without the filters and channels that ``plan`` cuts, until ``release``.

    In every forward pass the layers in the plan compute with slices of their parameters, which are taken for
    many layers at once (``Parts``). The parameters keep their shape and identity: optimizers, schedulers,
    averaged copies, ``state_dict()`` and DDP see no change, and the entries left out get gradients of 0.
    Running statistics are read and written at the kept channels. A copy of a narrowed model
    (``copy.deepcopy``, pickle) is not narrowed.

    Args:
        model: the module that the plan was made for, in its wrappers or without. With Bridgeout on it, the
            noise is drawn for whole weights and sliced with them.
        plan: from ``plan_cut``.
        before: is called ahead of each pass of ``model``, with True in train mode and with the arguments of
            the call; not in compiled code.
        dead: entries of parameters that are at 0 and shall get gradients of 0, each with an index of where;
            the plan need not leave them out. ``Narrowing.held`` says of which parameters this holds.

    Returns:
        An object that ends the narrowing: call its ``release()``, or use it as a context manager.

    Raises:
        ValueError: the plan does not fit the model, a layer is narrowed already or has a replaced forward
            method, or the model is sharded (FSDP) or in ``nn.DataParallel``. Nothing is changed.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError("the replicas of nn.DataParallel cannot be narrowed: use DistributedDataParallel.")
    model = unwrap(model)
    planned = check_plan(model, plan)
    for layer in planned:
        if isinstance(layer.module, _Narrowed):
            raise ValueError(f"{layer.name!r} is narrowed already: release it first.")
    found: dict[nn.Module, _Slices] = {layer.module: _slices(layer) for layer in planned}
    held = _add_dead(model, found, dead)
    parts = Parts({module: found[module].tensors for module in model.modules() if module in found})
    for module, slices in found.items():
        slices.parts, wide = parts, cast(Any, type(module))
        module._narrow = slices  # type: ignore[assignment]
        module.__class__ = _narrowed(wide, tuple(slices.tensors), tuple(slices.numbers))
    passing = put_in_front(model, parts, before)
    return Narrowing([cast(_Narrowed, module) for module in found], passing, held)


class Narrowing:
    """The narrowed layers of a model; see ``narrow``.

    Attributes:
        held: the parameters whose dead entries get gradients of 0 in every pass. The others belong to layers
            whose forward method was replaced.
    """

    def __init__(
        self, layers: Sequence[_Narrowed], passing: Passing | None, held: Collection[nn.Parameter]
    ) -> None:
        self._layers, self._passing, self.held = list(layers), passing, held

    def release(self) -> None:
        """Make the layers compute with whole parameters again; a second call does nothing."""
        if self._passing is not None:
            self._passing.release()
        for layer in self._layers:
            if _in_front(layer):
                layer.__class__ = layer._wide  # type: ignore[assignment]
                del layer._narrow
            else:  # another class was put in front of _Narrowed and stays; None switches ours off
                layer._narrow = None
        self._layers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def check_plan(model: nn.Module, plan: CutPlan) -> list[Layer]:
    """The layers in ``plan`` with the parts that stay; ``ValueError`` if ``narrow`` cannot carry it out."""
    check_whole(model, "narrow")
    found = layers(model, plan)
    for layer in found:
        if "forward" in vars(layer.module):
            raise NoPlan(
                f"the forward method of {layer.name!r} has been replaced on the layer itself, and regrow "
                "cannot narrow such a layer: wrap the whole model instead."
            )
    return found


@dataclass(eq=False)
class _Slices:
    """The slices and sizes that one layer computes with in place of its own tensors and numbers."""

    tensors: dict[str, Slice]
    numbers: Mapping[str, int]
    picked: Tensor | None = None  # the input channels that the layer takes
    placed: tuple[int, Tensor] | None = None  # the output's width, and the places of its channels among zeros
    # The tensors sliced so far, while the forward method runs, in each thread.
    live: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    parts: Parts | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()  # a copy computes with its whole tensors


class _Narrowed(nn.Module):
    """A class put in front of a layer's class, so that ``self.weight`` in its forward method is a slice."""

    _narrow: _Slices | None
    _wide: type[nn.Module]
    _input: str
    _maybe_quick: bool  # whether ``batch_norm`` may stand for its forward method

    def __init_subclass__(cls, **_: Any) -> None:
        """Do not tell the layer's class, which may ask for arguments or keep a list of its subclasses."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        slices = self._narrow
        if slices is None:
            return super().forward(*args, **kwargs)
        if not _in_front(self):
            raise ValueError(
                f"{type(self).__name__}: a layer that computes without its dropped filters has got another "
                "class. Add Bridgeout or a parametrization before the drop, or after the restore."
            )
        args, kwargs = input_first(self._input, args, kwargs)
        if slices.picked is not None:
            args = (take(args[0], slices.picked, channel_dim(self, args[0])), *args[1:])
        parts, thread = cast(Parts, slices.parts), _thread()
        made = parts.of(self)
        slices.live[thread] = live = {} if made is None else made
        try:
            if self._maybe_quick and not kwargs and _is_quick(self, args):
                output = batch_norm(self, args[0])
            else:
                output = super().forward(*args, **kwargs)
            if self.training and made is None:
                for name, statistic in live.items():
                    if name in own_buffers(self):
                        # A norm too writes through .data: a graph that holds the buffer stays valid.
                        buffer, channels = own_buffers(self)[name], slices.tensors[name].rows
                        cast(Tensor, buffer).data.index_copy_(0, cast(Tensor, channels), statistic)
            elif self.training:
                parts.changed(self)
        finally:
            del slices.live[thread]
        if slices.placed is not None:
            width, index = slices.placed
            output = place(output, index, channel_dim(self, output), width)
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Nothing would release a narrowed copy, so the copy is a plain layer.
        reduced = super().__reduce_ex__(protocol)
        return plainly(reduced, type(self), self._wide, "_narrow") if _in_front(self) else reduced


def _thread() -> int:
    # A compiler traces one thread, and has no operation for its number.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _is_quick(layer: _Narrowed, args: tuple[Any, ...]) -> bool:
    return len(args) == 1 and not plain_operations(args[0]) and norms_innermost(layer, args[0])


def _in_front(layer: _Narrowed) -> bool:
    """Whether the layer still has the class that ``narrow`` gave it, and no other class in front."""
    return type(layer).__bases__[0] is _Narrowed


@functools.cache
def _narrowed(wide: type[nn.Module], tensors: tuple[str, ...], numbers: tuple[str, ...]) -> type[nn.Module]:
    body: dict[str, Any] = {"_wide": wide, "_input": input_name(cast(Any, wide)), "__module__": __name__}
    body["_maybe_quick"] = wide.forward in (nn.BatchNorm2d.forward, nn.BatchNorm3d.forward)
    body |= {name: _tensor(wide, name) for name in tensors}
    body |= {name: _number(name) for name in numbers}
    return type(f"Narrow{wide.__name__}", (_Narrowed, wide), body)


def _tensor(wide: type[nn.Module], name: str) -> property:
    """A property for a parameter or buffer: the whole tensor, and its slice in the forward method."""
    # Bridgeout's layers have such a property already, and its value w̃ is sliced.
    inherited = getattr(wide, name, None)
    whole = inherited.fget if isinstance(inherited, property) else None

    def get(self: _Narrowed) -> Any:
        tensor: Any = nn.Module.__getattr__(self, name) if whole is None else whole(self)
        slices = self._narrow
        live = None if slices is None else slices.live.get(_thread())
        if slices is None or live is None:
            return tensor
        if name not in live:
            live[name] = slices.tensors[name].of(tensor)
        return live[name]

    return property(get)


def _number(name: str) -> property:
    def get(self: _Narrowed) -> int:
        slices = self._narrow
        if slices is None or _thread() not in slices.live:
            return cast(int, self.__dict__[name])
        return slices.numbers[name]

    def put(self: _Narrowed, value: int) -> None:
        self.__dict__[name] = value

    return property(get, put)


def _slices(layer: Layer) -> _Slices:
    """The slices and sizes for ``layer``, with indices on the layer's device."""
    own = {**own_parameters(layer.module), **own_buffers(layer.module)}
    device = next((tensor.device for tensor in own.values() if tensor is not None), torch.device("cpu"))

    def index(kept: Sequence[int] | None) -> Tensor | None:
        return None if kept is None else index_tensor(kept, device)

    def at(places: tuple[int, list[int]] | None) -> tuple[int, Tensor] | None:
        return None if places is None else (places[0], index_tensor(places[1], device))

    spread, parameters = at(layer.spread), own_parameters(layer.module)
    tensors = {
        key: Slice(
            index(kept.get(0)),
            index(kept.get(1)),
            spread if key in parameters else None,
            filter_dim(layer.module) if key == "weight" else 0,
        )
        for key, kept in layer.kept.items()
    }
    return _Slices(tensors, layer.numbers, index(layer.picked), at(layer.placed))


def _add_dead(
    model: nn.Module, found: dict[nn.Module, _Slices], dead: Iterable[tuple[nn.Parameter, Where]]
) -> set[nn.Parameter]:
    """Add to ``found`` where parameters are dead.

    Returns:
        The parameters whose owners are all in ``found`` then.
    """
    entries: dict[int, tuple[nn.Parameter, list[Where]]] = {}
    for parameter, where in dead:
        entries.setdefault(id(parameter), (parameter, []))[1].append(where)
    held = {parameter for parameter, _ in entries.values()}
    for module in model.modules():
        for key, own in own_parameters(module).items():
            if own is None or id(own) not in entries:
                continue
            if module not in found and ("forward" in vars(module) or isinstance(module, _Narrowed)):
                held.discard(own)
                continue
            one = found[module].tensors.get(key, Slice()) if module in found else Slice()
            where = _joined(entries[id(own)][1], own)
            if _stays(where, one.rows):
                slices = found.setdefault(module, _Slices({}, {}))
                slices.tensors[key] = replace(one, dead=where)
    return held


def _joined(places: Sequence[Where], parameter: Tensor) -> Where:
    """One index for several of them."""
    if all(isinstance(where, Tensor) for where in places):
        return torch.cat([cast(Tensor, where).to(parameter.device) for where in places]).unique()
    mask = torch.zeros(parameter.shape[:2], dtype=torch.bool, device=parameter.device)
    for where in places:
        mask[on(where, parameter.device)] = True
    first, second = mask.nonzero(as_tuple=True)
    return first, second


def _stays(where: Where, rows: Tensor | None) -> bool:
    """Whether a slice of ``rows`` has an entry at ``where``."""
    return rows is None or not isinstance(where, Tensor) or bool(torch.isin(where, rows).any())
