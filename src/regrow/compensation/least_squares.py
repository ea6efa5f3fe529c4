"""New weights for the layers behind removed filters, by least squares on unlabelled images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regrow.looking.shortcuts import Uses
from regrow.least_squares.moments import Moments, folded, ridge
from regrow.least_squares.unfolded import inputs_at, matrix_of, outputs_at, positions, weight_of
from regrow.looking.calls import evaluating
from regrow.looking.hooks import hooked
from regrow.looking.images import count_images, forward, inputs_of
from regrow.modules import CONSUMER_CLASSES, Norm
from regrow.torch_private import BatchNorm, own_parameters

PENALTY = 1e-3
SHARE = 0.25


class _Done(BaseException):
    """Ends a pass behind the last call that is looked at."""


@dataclass
class Target:
    """A layer whose weights are found anew.

    Attributes:
        name: of the layer.
        norm: the norm that its output goes through and nothing else does, or empty.
        calls: how often a pass calls it.
        added: whether each of its outputs, behind the norm, is a summand and nothing else.
    """

    name: str
    norm: str = ""
    calls: int = 0
    added: bool = False
    partners: set[str] = field(default_factory=set)


def survey(model: nn.Module, norms: Mapping[str, list[str]], inputs: Any) -> dict[str, Target]:
    """The convolutions and linear layers that a pass calls, in order."""
    found: dict[str, Target] = {}
    last: dict[int, str] = {}
    uses: dict[str, list[bool]] = {}
    held = []

    def used(key: int, other: Tensor | None) -> None:
        uses.setdefault(last[key], []).append(other is not None)
        if other is not None and id(other) in last:
            found[last[key]].partners.add(last[id(other)])

    watcher = Uses(used)

    def after(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        held.append(output)
        if isinstance(module, Norm):
            owner = owners.get(name)
            if owner is None:
                return
            name = owner
        else:
            target = found.setdefault(name, Target(name))
            target.calls += 1
            if own := norms.get(name):
                target.norm = own[0] if len(own) == 1 else ""
                return
        last[id(output)] = name
        watcher.note(output)

    owners = {own[0]: name for name, own in norms.items() if len(own) == 1}
    layers = [each for each in model.named_modules() if isinstance(each[1], (*CONSUMER_CLASSES, Norm))]
    with evaluating(model), hooked(layers, after), watcher:
        forward(model, inputs)
    for name, target in found.items():
        plain = not norms.get(name) or (target.norm and isinstance(model.get_submodule(target.norm), BatchNorm))
        target.added = bool(plain) and uses.get(name) == [True] * target.calls
    return found


@dataclass
class _Call:
    chosen: Tensor
    output: Tensor
    inputs: Tensor | None = None
    other: Tensor | None = None


def _watch(model: nn.Module, target: Target, inputs: Any, chosen: list[Tensor] | None, draw: Any) -> list[_Call]:
    """What each call of a layer made, at some positions."""
    calls: list[_Call] = []
    pending: dict[int, _Call] = {}

    def used(key: int, other: Tensor | None) -> None:
        if key in pending and other is not None:
            call = pending.pop(key)
            call.other = outputs_at(layer, other, call.chosen).clone()
            finish()

    watcher = Uses(used)
    layer = model.get_submodule(target.name)

    def finish() -> None:
        if len(calls) == target.calls and not pending:
            raise _Done

    def after(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if name == target.name:
            at = chosen[len(calls)] if chosen is not None else draw(layer, output)
            call = _Call(at, outputs_at(layer, output, at).clone())
            if chosen is not None:
                call.inputs = inputs_at(layer, inputs[0], output, at)
            calls.append(call)
            if target.norm and target.added:
                return
        if target.added:
            pending[id(output)] = calls[-1]
            watcher.note(output)
        finish()

    names = [target.name] + ([target.norm] if target.norm and target.added else [])
    layers = [(name, model.get_submodule(name)) for name in names]
    try:
        with hooked(layers, after), watcher:
            forward(model, inputs)
    except _Done:
        pass
    return calls


def moments_of(
    model: nn.Module, cut: nn.Module, target: Target, batches: Iterable[Any], dead: Sequence[int], share: float,
    shortcut: bool = True,
) -> list[Moments]:
    """Moments of a layer's inputs in ``cut`` and of what its outputs lack against ``model``."""
    layer: Any = cut.get_submodule(target.name)
    groups = getattr(layer, "groups", 1)
    scale = None
    if target.added and target.norm:
        norm: Any = model.get_submodule(target.norm)
        scale = (norm.weight if norm.weight is not None else 1) / (norm.running_var + norm.eps).sqrt()
    generator = torch.Generator().manual_seed(0)

    def draw(layer: nn.Module, output: Tensor) -> Tensor:
        count = positions(layer, output)
        return torch.randperm(count, generator=generator)[: max(1, round(share * count))].to(output.device)

    found: list[Moments | None] = [None, None]
    with evaluating(model), evaluating(cut):
        for number, inputs in enumerate(inputs_of(model, batches)):
            before = _watch(model, target, inputs, None, draw)
            after = _watch(cut, target, inputs, [call.chosen for call in before], draw)
            for old, new in zip(before, after, strict=True):
                lack = old.output - new.output
                if shortcut and old.other is not None and new.other is not None:
                    error = old.other - new.other
                    if scale is not None:
                        error = torch.where(scale.abs() > 1e-6 * scale.abs().max(), error / scale, 0)
                    lack = lack + error
                lack[:, dead] = 0
                lack = lack.unflatten(1, (groups, -1)).movedim(1, 0)
                half = number % 2
                each = Moments.of(new.inputs, lack)
                found[half] = each if found[half] is None else found[half] + each
    return [each for each in found if each is not None]


@torch.no_grad()
def reconstruct(
    model: nn.Module, cut: nn.Module, gone: Mapping[str, Sequence[int]], batches: Sequence[Any],
    norms: Mapping[str, list[str]], only=None, penalty: float = PENALTY, share: float = SHARE, shortcut=True, log=None, last=None,
) -> None:
    first = next(iter(inputs_of(model, batches)))
    targets = survey(model, norms, first)
    # ahead: a shortcut's own layer first
    order = list(targets)
    for name in list(order):
        for partner in targets[name].partners:
            if targets[name].added and order.index(partner) > order.index(name):
                order.remove(name); order.insert(order.index(partner) + 1, name)
    for name in order:
        if only is not None and name not in only:
            continue
        target = targets[name]
        layer: Any = cut.get_submodule(name)
        halves = moments_of(model, cut, target, batches, list(gone.get(name, ())), share, shortcut)
        total = halves[0] if len(halves) == 1 else halves[0] + halves[1]
        if not total.rr.any():
            continue
        own = own_parameters(layer).get("bias")
        bias = own is not None or bool(target.norm) and isinstance(cut.get_submodule(target.norm), BatchNorm)
        if isinstance(penalty, (list, tuple)):
            if len(halves) == 2:
                best = None
                for p in penalty:
                    e = sum(float(halves[1 - i].error(*ridge(halves[i], p, bias)).sum()) for i in (0, 1))
                    if best is None or e < best[0]: best = (e, p)
                used = best[1]
                fold = sum(float(halves[1 - i].error(*folded(halves[i], bias)).sum()) for i in (0, 1))
            else: used = penalty[0]
        else:
            used = penalty
        change, shift = ridge(total, used, bias)
        if log is not None:
            z = torch.zeros_like
            log.append((name, used, target.added, total.count, float(total.error(*(z(change), z(shift))).sum()), float(total.error(*folded(total, bias)).sum()), float(total.error(change, shift).sum())))
        layer.weight.add_(weight_of(layer, change).to(layer.weight))
        shift = shift.flatten()
        if own is not None: own.add_(shift.to(own))
        elif bias:
            mean = cut.get_submodule(target.norm).running_mean
            mean.sub_(shift.to(mean))
