"""A plan applied to a model: smaller parameters and buffers; and the way back to the former shapes."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.indexing import channels_last, index_tensor, index_tensors
from regrow.modules import Consumer, channels_read, device_of, filter_count, filter_dim, unwrap
from regrow.suggest import nearest
from regrow.surgery.fit import check_kind, check_masked
from regrow.surgery.plan import CutPlan, PlanUnfit, shown
from regrow.surgery.small import Small, make_small, undo_small
from regrow.torch_private import own_buffers, own_parameters

_CHANNEL_COUNTS = ("num_features", "num_channels", "num_groups", "num_parameters")


@dataclass(frozen=True)
class Replaced:
    """A parameter ``old`` and its replacement ``new``.

    After a cut ``new`` holds the indices ``kept`` of ``old`` in each dimension. Before a second cut it is as
    large again as before the first, and holds the values of ``old`` at the indices ``kept``.
    """

    old: nn.Parameter
    new: nn.Parameter
    kept: Mapping[int, Sequence[int]]

    def of(self, slot: Tensor) -> Tensor:
        """The replacement of ``slot``, a tensor of the old parameter's shape, or of 1 in some dimensions."""
        kept = {dim: at for dim, at in self.kept.items() if slot.shape[dim] == self.old.shape[dim]}
        if all(self.new.shape[dim] <= self.old.shape[dim] for dim in kept):
            return sliced(slot, kept)
        shape = [self.new.shape[dim] if dim in kept else size for dim, size in enumerate(slot.shape)]
        return _among(slot, shape, kept, 0)


def apply_plan(model: nn.Module, plan: CutPlan) -> list[Replaced]:
    """Leave of ``model`` what ``plan`` says, in place: smaller parameters and buffers, for good.

    Reads shapes, never values, and needs no forward pass; ``state_dict()`` keys stay. The plan is added
    to the model's list ``_regrow_cuts``, oldest first.

    Raises:
        PlanUnfit: the plan holds something else than names and numbers, or does not fit the model. Nothing is
            changed. Whether what is left of the layers fits each other shows in a forward pass only.
    """
    model = unwrap(model)
    found = layers(model, plan)
    _check_untied(model, found)
    at = _indices(found, device_of(model))
    replaced = [one for layer in found for one in layer.cut(at)]
    model._regrow_cuts = [*cuts(model), plan.to_dict()]  # type: ignore[assignment]
    return replaced


def _indices(found: Sequence[Layer], device: torch.device) -> dict[int, Tensor]:
    """The lists in ``kept`` of layers as int64 on ``device``, by the ``id`` of each."""
    lists = {
        id(indices): indices for layer in found for kept in layer.kept.values() for indices in kept.values()
    }
    return dict(zip(lists, index_tensors(list(lists.values()), device), strict=True))


def cuts(model: nn.Module) -> list[dict[str, Any]]:
    """The plans that were applied to ``model``, oldest first, as plain data."""
    return copy.deepcopy(vars(unwrap(model)).get("_regrow_cuts", []))


def is_cut(model: nn.Module) -> bool:
    """Whether ``apply_plan`` has made a layer of ``model`` smaller."""
    return any("_regrow_left" in vars(module) for module in model.modules())


def widen(model: nn.Module) -> list[Replaced]:
    """Give ``model`` the shapes that it had before its first cut, in place; removed weights are 0.

    It computes the same as before. Removed channels get the running statistics of a new norm.
    """
    replaced = []
    for module in unwrap(model).modules():
        vars(module).pop("_regrow_cuts", None)
        if (left := vars(module).pop("_regrow_left", None)) is not None:
            replaced += _widen_layer(module, left)
    return replaced


def sliced(tensor: Tensor, kept: Mapping[int, Sequence[int] | Tensor]) -> Tensor:
    """``tensor`` with the indices ``kept`` of each dimension named there, in the same memory format."""
    last = channels_last(tensor)
    for dim, indices in kept.items():
        tensor = tensor.index_select(dim, index_tensor(indices, tensor.device))
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if last else tensor


def layers(model: nn.Module, plan: CutPlan) -> list[Layer]:
    """What remains of each layer that ``plan`` names; only shapes are read.

    Raises:
        PlanUnfit: the plan does not fit the model.
    """
    if not isinstance(plan, CutPlan):
        raise PlanUnfit(
            f"a CutPlan is needed, got {shown(plan)}: CutPlan.from_dict reads what a cut records."
        )
    plan.check()
    modules = dict(unwrap(model).named_modules())
    check_masked(plan, modules)
    return [_leave(modules, plan, name) for name in plan.layers()]


@dataclass
class Layer:
    """What remains of one layer.

    Attributes:
        kept: parameter or buffer → dimension → the indices that remain.
        numbers: attribute (``out_channels``, …) → its value after the cut.
        placed, picked: as in the plan.
        spread: (width, positions): the places of the filters or channels that the parameters hold, while the
            layer computes.
    """

    name: str
    module: Any
    kept: dict[str, dict[int, list[int]]]
    numbers: dict[str, int]
    placed: tuple[int, list[int]] | None
    picked: list[int] | None
    spread: tuple[int, list[int]] | None

    def cut(self, at: Mapping[int, Tensor]) -> list[Replaced]:
        """Cut the layer, in place; returns the parameters that were replaced.

        Args:
            at: the lists in ``kept`` as tensors, by the ``id`` of each.
        """
        module, replaced = self.module, []
        own = own_parameters(module) | own_buffers(module)
        before = vars(module).get("_regrow_left", {"kept": {}, "shapes": {}, "numbers": {}})
        module._regrow_left = {
            "kept": before["kept"]
            | {k: _composed(before["kept"].get(k, {}), then) for k, then in self.kept.items()},
            "shapes": {key: list(own[key].shape) for key in self.kept} | before["shapes"],
            "numbers": {key: vars(module)[key] for key in self.numbers} | before["numbers"],
        }
        for key, kept in self.kept.items():
            old = own_parameters(module).get(key)
            quick = {dim: at[id(indices)] for dim, indices in kept.items()}
            if old is None:
                setattr(module, key, sliced(own[key], quick))
            else:
                new = _parameter(old, functools.partial(sliced, kept=quick))
                module.register_parameter(key, new)
                replaced.append(Replaced(old, new, kept))
        for key, number in self.numbers.items():
            setattr(module, key, number)
        if self.placed or self.picked or self.spread:
            names = [key for key in self.kept if key in own_parameters(module)] if self.spread else []
            device = next((t.device for t in own.values() if t is not None), torch.device("cpu"))
            make_small(module, self.picked, self.placed, self.spread, tuple(names), device)
        return replaced


def _composed(
    before: Mapping[int, Sequence[int]], then: Mapping[int, Sequence[int]]
) -> dict[int, Sequence[int]]:
    """The remaining indices of each dimension after two cuts, counted before the first."""
    return dict(before) | {
        dim: [before[dim][i] for i in at] if dim in before else at for dim, at in then.items()
    }


def _leave(modules: Mapping[str, nn.Module], plan: CutPlan, name: str) -> Layer:
    if name not in modules:
        raise PlanUnfit(
            f"the plan names {shown(name)}, which the model does not have{nearest(name, modules)}"
        )
    module: Any = modules[name]
    if isinstance(module, Small):
        raise PlanUnfit(
            f"{name!r} has been cut before, and picks or places channels by index: no plan fits it. "
            "regrow.cut can cut it once more."
        )
    tensors = (own_parameters(module) | own_buffers(module)).items()
    own = {k: t for k, t in tensors if t is not None and not nn.parameter.is_lazy(t) and t.dim()}

    def fits(indices: Sequence[int], width: int) -> list[int]:
        indices = list(indices)
        rising = all(map(operator.lt, indices, indices[1:]))
        if not indices or not rising or not 0 <= indices[0] <= indices[-1] < width:
            reason = f"which has {width} channels: {shown(indices)}"
            raise PlanUnfit(f"the plan does not fit {name!r}, {reason}.")
        return indices

    weighted = isinstance(module, Consumer)
    strange: list[Mapping[str, Any]] = [plan.rows, plan.columns, plan.groups, plan.picked]
    if weighted:
        strange = [plan.channels]
    if any(name in part for part in strange):
        raise PlanUnfit(f"the plan does not fit {name!r}, which is a {type(module).__name__}.")
    kept: dict[str, dict[int, list[int]]] = {}
    numbers: dict[str, int] = {}
    spread = None
    reads = emits = 0  # channels, before the cut
    if weighted:
        weight = own_parameters(module).get("weight")
        if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
            raise PlanUnfit(f"the weight of {name!r} is not a plain parameter (a parametrization?).")
        filters, before = filter_count(module, weight), int(getattr(module, "groups", 1))
        columns = weight.shape[0] // before if filter_dim(module) else weight.shape[1]
        emits, reads = filters, columns * before
        groups = plan.groups.get(name, before)
        if before > 1 and filter_dim(module):
            in_groups = {row // (filters // before) for row in plan.rows.get(name, range(filters))}
            if name in plan.columns or name in plan.spread or groups != len(in_groups):
                raise PlanUnfit(f"the plan does not fit {name!r}, a transposed convolution in groups.")
        stays = plan.rows.get(name, plan.spread.get(name))
        if stays is not None:
            rows = fits(stays, filters)
            kept = {key: {0: rows} for key, tensor in own.items() if tensor.shape[0] == filters}
            kept["weight"] = _filters_kept(name, module, rows, filters // before, columns)
            if name in plan.rows:
                filters = len(rows)
            else:
                spread = (filters, rows)
        if name in plan.columns:
            kept.setdefault("weight", {})[1 - filter_dim(module)] = fits(plan.columns[name], columns)
            columns = len(plan.columns[name])
        if not groups or filters % groups:
            raise PlanUnfit(f"{filters} filters of {name!r} do not go into {groups} groups.")
        numbers = {"out_channels": filters, "in_channels": columns * groups, "groups": groups}
        if isinstance(module, nn.Linear):
            numbers = {"out_features": filters, "in_features": columns}
    elif name in plan.channels or name in plan.spread:
        emits = width = next((len(tensor) for tensor in own.values()), channels_read(module) or 0)
        channels = fits(plan.channels.get(name, range(width)), width)
        if name in plan.channels:
            kept = {key: {0: channels} for key, tensor in own.items() if len(tensor) == width}
            numbers = {key: len(channels) for key in _CHANNEL_COUNTS if vars(module).get(key) == width}
        if name in plan.spread:
            stay = fits(plan.spread[name], width)
            kept |= {key: {0: stay} for key in own_parameters(module) if key in own}
            spread = (len(channels), [channels.index(i) for i in stay if i in channels])
            if len(spread[1]) != len(stay):
                raise PlanUnfit(f"the plan spreads channels of {name!r} that it leaves out.")
    placed, picked = plan.placed.get(name), plan.picked.get(name)
    if placed is not None:
        # A width beyond that would have the first forward pass ask for any amount of memory.
        if placed[0] > emits:
            raise PlanUnfit(f"the plan places {name!r} in {placed[0]} channels, and it has {emits}.")
        fits(placed[1], placed[0])
        for count in (numbers.get("out_channels"), len(plan.channels.get(name, ())) or None):
            if count is not None and count != len(placed[1]):
                raise PlanUnfit(f"the plan places {len(placed[1])} channels of {name!r}, which has {count}.")
    if picked is not None:
        fits(picked, reads)
        read = numbers.get("in_channels", numbers.get("in_features", len(picked)))
        if read != len(picked):
            raise PlanUnfit(f"the plan picks {len(picked)} channels for {name!r}, which reads {read}.")
    check_kind(plan, name, module)
    # The layer keeps copies of the plan's lists.
    placed, picked = placed and (placed[0], list(placed[1])), picked and list(picked)
    return Layer(name, module, kept, numbers, placed, picked, spread)


def _filters_kept(
    name: str, module: nn.Module, rows: list[int], filters: int, channels: int
) -> dict[int, list[int]]:
    """What stays of a layer's weight with the filters ``rows``: dimension → indices.

    Args:
        filters, channels: how many a group has, before the cut.
    """
    if not filter_dim(module):
        return {0: rows}
    # A transposed convolution has its groups in dim 0, and each group's filters at the same places of dim 1.
    left = list(dict.fromkeys(row // filters for row in rows))
    places = sorted({row % filters for row in rows})
    if len(left) * len(places) != len(rows):
        raise PlanUnfit(f"the plan leaves other filters in one group of {name!r} than in another.")
    if getattr(module, "groups", 1) == 1:
        return {1: places}
    return {0: [group * channels + i for group in left for i in range(channels)], 1: places}


def filters_left(layer: nn.Module) -> tuple[int, list[int]] | None:
    """How many filters a convolution had before its first cut, and which are left; None if all are."""
    left: dict[str, Any] = vars(layer).get("_regrow_left", {"kept": {}})
    kept = left["kept"].get("weight", {})
    if not filter_dim(layer):
        return (left["shapes"]["weight"][0], list(kept[0])) if 0 in kept else None
    if not kept:
        return None
    groups, (channels, filters) = left["numbers"]["groups"], left["shapes"]["weight"][:2]
    places = kept.get(1, range(filters))
    busy = dict.fromkeys(i // (channels // groups) for i in kept.get(0, range(channels)))
    rows = [group * filters + i for group in busy for i in places]
    return (groups * filters, rows) if len(rows) < groups * filters else None


def _widen_layer(module: Any, left: Mapping[str, Any]) -> list[Replaced]:
    if isinstance(module, Small):
        undo_small(module)
    replaced = []
    for key, kept in left["kept"].items():
        shape = left["shapes"][key]
        old = own_parameters(module).get(key)
        if old is None:
            fill = 1 if key == "running_var" else 0
            setattr(module, key, _among(own_buffers(module)[key], shape, kept, fill))
            continue
        new = _parameter(old, functools.partial(_among, shape=shape, kept=kept, fill=0))
        module.register_parameter(key, new)
        replaced.append(Replaced(old, new, kept))
    for key, number in left["numbers"].items():
        setattr(module, key, number)
    return replaced


def _parameter(old: nn.Parameter, change: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """A copy of ``old`` whose values and gradient ``change`` has changed."""
    new = nn.Parameter(change(old.detach()), requires_grad=old.requires_grad)
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
    for name, module in model.named_modules():
        for parameter in own_parameters(module).values():
            holders.setdefault(id(parameter), []).append(name)
    for layer in layers:
        for key in layer.kept:
            parameter = own_parameters(layer.module).get(key)
            if parameter is not None and len(names := holders[id(parameter)]) > 1:
                raise PlanUnfit(f"{names[0]!r} and {names[1]!r} share a parameter, which cannot be cut.")
