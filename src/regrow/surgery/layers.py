"""What a cut leaves of each layer, as plain data, and how a model comes to hold no more than that."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from regrow.filters import named_parts, parts, unwrap
from regrow.indexing import channel_dim, channels_last, index_tensor, place, take
from regrow.suggest import nearest

_CHANNEL_COUNTS = ("num_features", "num_channels", "num_groups", "num_parameters")


@dataclass(frozen=True)
class CutPlan:
    """What a cut leaves of each layer: what narrowing computes with for a while and surgery makes permanent.

    Layers go by qualified name; one that is not named stays whole. Indices are ascending.

    Attributes:
        rows: convolution → the filters it goes on computing (rows of its weight).
        columns: convolution or linear layer → the input channels it goes on reading (dim 1 of its
            weight).
        channels: norm or PReLU → the channels that stay of its parameters and statistics.
        groups: grouped convolution → its new number of groups; those of the rows that stay.
        placed: layer → (width, positions): its output, narrow, is put at these channels of a tensor of
            zeros that is that wide.
        picked: layer → the channels it reads of the input that arrives.
        spread: norm or convolution → the channels whose weight and bias stay, where the layer computes
            with all that ``channels`` leaves and the others' are 0.
        masked: convolution → why it goes on computing its dropped filters, which are held at 0.
    """

    rows: dict[str, list[int]] = field(default_factory=dict)
    columns: dict[str, list[int]] = field(default_factory=dict)
    channels: dict[str, list[int]] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    placed: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    picked: dict[str, list[int]] = field(default_factory=dict)
    spread: dict[str, list[int]] = field(default_factory=dict)
    masked: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-able data."""
        data: dict[str, Any] = {part.name: dict(getattr(self, part.name)) for part in fields(self)}
        data["placed"] = {name: [width, list(at)] for name, (width, at) in self.placed.items()}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CutPlan:
        """The plan that ``to_dict`` wrote.

        Raises:
            ValueError: a part is missing or unknown, or holds something else than it should.
        """
        names = [part.name for part in fields(cls)]
        if not isinstance(data, Mapping) or set(data) != set(names):
            raise ValueError(f"a cut plan has the parts {', '.join(names)}; got {_shown(data)}.")
        placed = {}
        for part in names:
            if not isinstance(data[part], Mapping):
                raise ValueError(f"{part!r} of a cut plan maps names to values, got {_shown(data[part])}.")
            for name, value in data[part].items():
                if not isinstance(name, str) or not _KINDS.get(part, _indices)(value):
                    raise ValueError(f"{part!r} of a cut plan cannot hold {_shown(value)} for {name!r}.")
        placed = {name: (width, list(at)) for name, (width, at) in data["placed"].items()}
        return cls(**{**{part: dict(data[part]) for part in names}, "placed": placed})


def _shown(value: Any) -> str:
    text = repr(sorted(map(str, value)) if isinstance(value, Mapping) else value)
    return text if len(text) < 80 else f"{text[:77]}…"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _indices(value: Any) -> bool:
    return isinstance(value, list) and all(map(_whole, value))


_KINDS: dict[str, Callable[[Any], bool]] = {
    "groups": _whole,
    "placed": lambda value: (
        isinstance(value, tuple | list) and len(value) == 2 and _whole(value[0]) and _indices(value[1])
    ),
    "masked": lambda value: isinstance(value, str),
}


@dataclass(frozen=True)
class Replaced:
    """A parameter that another stands for now: smaller, with ``kept`` of it in some dimensions, or, before
    a second cut, as large again as it was, with its values at ``kept``."""

    old: nn.Parameter
    new: nn.Parameter
    kept: Mapping[int, Sequence[int]]

    def of(self, slot: Tensor) -> Tensor:
        """What stands for ``slot``, which has the old parameter's shape, or 1 in some of its dimensions."""
        kept = {dim: at for dim, at in self.kept.items() if slot.shape[dim] == self.old.shape[dim]}
        if all(self.new.shape[dim] <= self.old.shape[dim] for dim in kept):
            return sliced(slot, kept)
        shape = [self.new.shape[dim] if dim in kept else size for dim, size in enumerate(slot.shape)]
        return _among(slot, shape, kept, 0)


def kept_by(model: nn.Module, plan: CutPlan) -> dict[nn.Parameter, Mapping[int, Sequence[int]]]:
    """The parameters that ``plan`` makes smaller, each with the indices it keeps of each dimension.

    Raises:
        ValueError: the plan does not fit the model.
    """
    return {
        layer.module._parameters[key]: kept
        for layer in layers(unwrap(model), plan)
        for key, kept in layer.kept.items()
        if key in layer.module._parameters
    }


def apply_plan(
    model: nn.Module, plan: CutPlan, weights: Mapping[str, Tensor] = MappingProxyType({})
) -> list[Replaced]:
    """Leave of ``model`` what ``plan`` says, in place: smaller parameters and buffers, for good.

    Reads shapes, never values, and needs no forward pass; ``state_dict()`` keys stay. The plan is added
    to the model's list ``_regrow_cuts``, oldest first.

    Args:
        weights: layer → what the plan leaves of its weight, where somebody has made that already; it
            becomes the model's.

    Raises:
        ValueError: the plan does not fit the model. Nothing is changed.
    """
    model = unwrap(model)
    found = layers(model, plan)
    _check_untied(model, found)
    replaced = [one for layer in found for one in layer.cut(weights.get(layer.name))]
    model._regrow_cuts = [*cuts(model), plan.to_dict()]  # type: ignore[assignment]
    return replaced


def cuts(model: nn.Module) -> list[dict[str, Any]]:
    """The plans that were applied to ``model``, oldest first, as plain data."""
    return list(vars(unwrap(model)).get("_regrow_cuts", []))


def is_cut(model: nn.Module) -> bool:
    """Whether ``apply_plan`` has made a layer of ``model`` smaller."""
    return any("_regrow_left" in vars(module) for module in parts(model))


def widen(model: nn.Module) -> list[Replaced]:
    """Undo the shapes of all cuts of ``model``, in place: what was cut away is there again, and 0.

    It computes what it did before. Statistics of channels that were cut away are those of a new norm.
    """
    replaced = []
    for module in parts(unwrap(model)):
        vars(module).pop("_regrow_cuts", None)
        if (left := vars(module).pop("_regrow_left", None)) is not None:
            replaced += _widen_layer(module, left)
    return replaced


def sliced(tensor: Tensor, kept: Mapping[int, Sequence[int] | Tensor]) -> Tensor:
    """``tensor`` with the ``kept`` indices of each dimension named, in its own memory format."""
    last = channels_last(tensor)
    for dim, indices in kept.items():
        tensor = tensor.index_select(dim, index_tensor(indices, tensor.device))
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if last else tensor


def layers(model: nn.Module, plan: CutPlan) -> list[Layer]:
    """What ``plan`` leaves of each layer it names, from shapes alone.

    Raises:
        ValueError: the plan does not fit the model.
    """
    modules = dict(named_parts(unwrap(model)))
    return [_leave(modules, plan, name) for name in _names(plan)]


def _names(plan: CutPlan) -> list[str]:
    parts = (plan.rows, plan.columns, plan.channels, plan.groups, plan.placed, plan.picked, plan.spread)
    return list(dict.fromkeys(name for part in parts for name in part))


@dataclass
class Layer:
    """What is to be left of one layer.

    Attributes:
        kept: parameter or buffer → dimension → the indices that stay.
        numbers: attribute (``out_channels``, …) → what it will say.
        placed, picked: as in the plan.
        spread: (width, positions): the parameters' places in dim 0 while the layer computes.
    """

    name: str
    module: Any
    kept: dict[str, dict[int, list[int]]]
    numbers: dict[str, int]
    placed: tuple[int, list[int]] | None
    picked: list[int] | None
    spread: tuple[int, list[int]] | None

    def cut(self, weight: Tensor | None = None) -> list[Replaced]:
        """Leave it so, with ``weight`` if that is made already; what smaller parameters stand for."""
        module, replaced = self.module, []
        own = module._parameters | module._buffers
        before = vars(module).get("_regrow_left", {"kept": {}, "shapes": {}, "numbers": {}})
        attributes = vars(module)  # a module's own way to set one takes ten times as long
        attributes["_regrow_left"] = {
            "kept": before["kept"]
            | {k: _composed(before["kept"].get(k, {}), at) for k, at in self.kept.items()},
            "shapes": {key: list(own[key].shape) for key in self.kept} | before["shapes"],
            "numbers": {key: attributes[key] for key in self.numbers} | before["numbers"],
        }
        device = next((t.device for t in own.values() if t is not None), torch.device("cpu"))
        names = []
        # Weight, bias and statistics share one list.
        lists = {id(at): at for kept in self.kept.values() for at in kept.values()}
        tensors = {number: index_tensor(at, device) for number, at in lists.items()}
        for key, kept in self.kept.items():
            old = module._parameters.get(key)
            stay = {dim: tensors[id(at)] for dim, at in kept.items()}
            if old is None:
                module._buffers[key] = sliced(module._buffers[key], stay)
                continue
            new = _parameter(old, functools.partial(sliced, kept=stay), weight if key == "weight" else None)
            module._parameters[key] = new
            replaced.append(Replaced(old, new, kept))
            names.append(key)
        attributes.update(self.numbers)
        if self.placed or self.picked or self.spread:
            module.__class__ = _small(cast(Any, type(module)), tuple(names) if self.spread else ())
            attributes["_regrow_widths"] = (self.placed and self.placed[0], self.spread and self.spread[0])
            attributes["_regrow_at"] = indices = {
                "_regrow_picked": self.picked,
                "_regrow_placed": self.placed and self.placed[1],
                "_regrow_spread": self.spread and self.spread[1],
            }
            # A buffer moves with the model; one that is not persistent is not in its state_dict.
            module._buffers.update(dict.fromkeys(indices))
            module._non_persistent_buffers_set.update(indices)
            module._index(device)
        return replaced


def _composed(
    before: Mapping[int, Sequence[int]], then: Mapping[int, Sequence[int]]
) -> dict[int, Sequence[int]]:
    """What is left, per dimension, of what was left before."""
    return dict(before) | {
        dim: [before[dim][i] for i in at] if dim in before else at for dim, at in then.items()
    }


def _leave(modules: Mapping[str, nn.Module], plan: CutPlan, name: str) -> Layer:
    if name not in modules:
        raise ValueError(f"the plan names {name!r}, which the model does not have{nearest(name, modules)}")
    module: Any = modules[name]
    if isinstance(module, Small):
        raise ValueError(
            f"{name!r} has been cut before, and picks or places channels by index: no plan fits it. "
            "regrow.cut can cut it once more."
        )
    own = {k: t for k, t in (module._parameters | module._buffers).items() if t is not None and t.dim()}

    def fits(indices: Sequence[int], width: int) -> list[int]:
        indices = list(indices)
        rising = all(map(operator.lt, indices, indices[1:]))
        if not indices or not rising or not 0 <= indices[0] <= indices[-1] < width:
            raise ValueError(f"the plan does not fit {name!r}, which has {width} channels: {indices}.")
        return indices

    weighted = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
    strange: list[Mapping[str, Any]] = [plan.rows, plan.columns, plan.groups, plan.picked]
    if weighted:
        strange = [plan.channels]
    if any(name in part for part in strange):
        raise ValueError(f"the plan does not fit {name!r}, which is a {type(module).__name__}.")
    kept: dict[str, dict[int, list[int]]] = {}
    numbers: dict[str, int] = {}
    spread = None
    reads = emits = 0  # channels, before the cut
    if weighted:
        weight = module._parameters.get("weight")
        if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"the weight of {name!r} is not a plain parameter (a parametrization?).")
        filters, columns = weight.shape[:2]
        emits, reads = filters, columns * getattr(module, "groups", 1)
        groups = plan.groups.get(name, getattr(module, "groups", 1))
        if name in plan.rows:
            rows = fits(plan.rows[name], filters)
            kept = {key: {0: rows} for key, tensor in own.items() if tensor.shape[0] == filters}
            filters = len(rows)
        elif name in plan.spread:
            rows = fits(plan.spread[name], filters)
            kept = {key: {0: rows} for key, tensor in own.items() if tensor.shape[0] == filters}
            spread = (filters, rows)
        if name in plan.columns:
            kept.setdefault("weight", {})[1] = fits(plan.columns[name], columns)
            columns = len(plan.columns[name])
        if not groups or filters % groups:
            raise ValueError(f"{filters} filters of {name!r} do not go into {groups} groups.")
        numbers = {"out_channels": filters, "in_channels": columns * groups, "groups": groups}
        if isinstance(module, nn.Linear):
            numbers = {"out_features": filters, "in_features": columns}
    elif name in plan.channels or name in plan.spread:
        emits = width = next((len(tensor) for tensor in own.values()), getattr(module, "num_features", 0))
        channels = fits(plan.channels.get(name, range(width)), width)
        if name in plan.channels:
            kept = {key: {0: channels} for key, tensor in own.items() if len(tensor) == width}
            numbers = {key: len(channels) for key in _CHANNEL_COUNTS if vars(module).get(key) == width}
        if name in plan.spread:
            stay = fits(plan.spread[name], width)
            kept |= {key: {0: stay} for key in module._parameters if key in own}
            spread = (len(channels), [channels.index(i) for i in stay if i in channels])
            if len(spread[1]) != len(stay):
                raise ValueError(f"the plan spreads channels of {name!r} that it leaves out.")
    placed, picked = plan.placed.get(name), plan.picked.get(name)
    if placed is not None:
        # A width beyond that would have the first forward pass ask for any amount of memory.
        if placed[0] > emits:
            raise ValueError(f"the plan places {name!r} in {placed[0]} channels, and it has {emits}.")
        fits(placed[1], placed[0])
        for count in (numbers.get("out_channels"), len(plan.channels.get(name, ())) or None):
            if count is not None and count != len(placed[1]):
                raise ValueError(f"the plan places {len(placed[1])} channels of {name!r}, which has {count}.")
    if picked is not None:
        fits(picked, reads)
        read = numbers.get("in_channels", numbers.get("in_features", len(picked)))
        if read != len(picked):
            raise ValueError(f"the plan picks {len(picked)} channels for {name!r}, which reads {read}.")
    return Layer(name, module, kept, numbers, placed, picked, spread)


def _widen_layer(module: Any, left: Mapping[str, Any]) -> list[Replaced]:
    if isinstance(module, Small):
        plain: Any = type(module)._regrow_plain[0]
        module.__class__ = plain
        for key in module._regrow_at:
            del module._buffers[key]
            module._non_persistent_buffers_set.discard(key)
        del module._regrow_widths, module._regrow_at
    replaced = []
    for key, kept in left["kept"].items():
        shape = left["shapes"][key]
        old = module._parameters.get(key)
        if old is None:
            fill = 1 if key == "running_var" else 0
            module._buffers[key] = _among(module._buffers[key], shape, kept, fill)
            continue
        new = _parameter(old, functools.partial(_among, shape=shape, kept=kept, fill=0))
        module._parameters[key] = new
        replaced.append(Replaced(old, new, kept))
    vars(module).update(left["numbers"])
    return replaced


def _parameter(
    old: nn.Parameter, change: Callable[[Tensor], Tensor], values: Tensor | None = None
) -> nn.Parameter:
    """A parameter with the values and the gradient of ``old``, changed, and all else as it was.

    Args:
        values: the changed values, where they are known.
    """
    values = change(old.detach()) if values is None else values
    new = nn.Parameter(values, requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    if old.grad is not None:
        new.grad = change(old.grad)
    return new


def _among(tensor: Tensor, shape: Sequence[int], kept: Mapping[int, Sequence[int]], fill: float) -> Tensor:
    """``tensor`` at the places ``kept`` of a larger one."""
    last = channels_last(tensor)
    whole = tensor.new_full(tuple(shape), fill)
    places = [index_tensor(kept.get(dim, range(size)), tensor.device) for dim, size in enumerate(shape)]
    whole[torch.meshgrid(*places, indexing="ij")] = tensor
    return whole.movedim(1, -1).contiguous().movedim(-1, 1) if last else whole


def _check_untied(model: nn.Module, layers: Sequence[Layer]) -> None:
    holders: dict[int, list[str]] = {}
    for name, module in named_parts(model):
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), []).append(name)
    for layer in layers:
        for key in layer.kept:
            parameter = layer.module._parameters.get(key)
            if parameter is not None and len(names := holders[id(parameter)]) > 1:
                raise ValueError(f"{names[0]!r} and {names[1]!r} share a parameter, which cannot be cut.")


class Small(nn.Module):
    """In front of a cut layer's own class: reads some channels of its input, places its output by index."""

    _regrow_picked: Tensor | None
    _regrow_placed: Tensor | None
    _regrow_spread: Tensor | None
    _regrow_at: Mapping[str, list[int] | None]
    _regrow_widths: tuple[int | None, int | None]
    _regrow_plain: tuple[type[nn.Module], tuple[str, ...]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if (picked := self._regrow_picked) is not None:
            args = (_picked(args[0], picked, channel_dim(self, args[0])), *args[1:])
        output = super().forward(*args, **kwargs)
        if (placed := self._regrow_placed) is not None:
            output = _placed(output, placed, channel_dim(self, output), cast(int, self._regrow_widths[0]))
        return output

    def _index(self, device: torch.device) -> None:
        for key, at in self._regrow_at.items():
            self._buffers[key] = None if at is None else index_tensor(at, device)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        super()._apply(*args, **kwargs)
        # to_empty() leaves a buffer without values, and the indices are in no file to load them from.
        device = next((tensor.device for tensor in self._buffers.values() if tensor is not None), None)
        if device is not None:
            self._index(device)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made on the fly: pickle finds it through the layer's own.
        return _rebuild, self._regrow_plain, self.__getstate__()


# A compiler makes its own kernels, and an exported graph knows nothing of other derivatives.
def _picked(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    return tensor.index_select(dim, index) if torch.compiler.is_compiling() else take(tensor, index, dim)


def _placed(tensor: Tensor, index: Tensor, dim: int, width: int) -> Tensor:
    if not torch.compiler.is_compiling():
        return place(tensor, index, dim, width)
    shape = [width if each == dim else size for each, size in enumerate(tensor.shape)]
    return tensor.new_zeros(shape).index_copy(dim, index, tensor)


@functools.cache
def _small(plain: Any, spread: tuple[str, ...]) -> type[nn.Module]:
    body: dict[str, Any] = {name: _spread(name) for name in spread}
    return type(
        f"Small{plain.__name__}",
        (Small, plain),
        {"_regrow_plain": (plain, spread), "__module__": __name__, **body},
    )


def _rebuild(plain: type[nn.Module], spread: tuple[str, ...]) -> nn.Module:
    small = _small(cast(Any, plain), spread)
    return small.__new__(small)


def _spread(name: str) -> property:
    """A parameter as the layer computes with it: what is left, among zeros."""

    def get(self: Small) -> Tensor:
        index, width = cast(Tensor, self._regrow_spread), cast(int, self._regrow_widths[1])
        return _placed(cast(Tensor, nn.Module.__getattr__(self, name)), index, 0, width)

    return property(get)
