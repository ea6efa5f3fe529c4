"""The layers of a network in the order in which least squares finds their weights, and where they add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from regrow.looking.calls import evaluating, tensors
from regrow.looking.hooks import hooked
from regrow.looking.images import output_of
from regrow.looking.shortcuts import Uses
from regrow.marks import borrowed_weight, marks_on
from regrow.modules import Norm, is_stock, tied_modules
from regrow.torch_private import BatchNorm, ConvNd, own_parameters


@dataclass(frozen=True)
class _Ahead:
    """Marks an output of a layer that its norm has yet to read, or has read."""

    layer: str


@dataclass
class Target:
    """A convolution or linear layer, as a pass over the uncut network shows it.

    Attributes:
        name: its qualified name.
        norm: the batch norm that its output goes through, and nothing else does; or empty.
        calls: how often a pass calls it.
        added: whether each of its outputs, behind the norm, is a summand of a sum of two and nothing else.
            Nothing but the norm reads what is ahead of it.
        partners: the layers whose outputs are the other summands at once.
        why: empty, or why its weights stay.
    """

    name: str
    norm: str = ""
    calls: int = 0
    added: bool = False
    partners: set[str] = field(default_factory=set)
    why: str = ""


def survey(
    model: nn.Module, norms: Mapping[str, Sequence[str]], gone: Mapping[str, Any], inputs: Any
) -> list[Target]:
    """The layers that may compute something else once filters are gone, in the order of their calls.

    A layer that is added to the output of another one comes behind that one, so that it can make up for it.

    Args:
        model: the uncut network; it is only read.
        norms: the norms that each layer has for itself (``own_norms``).
        gone: the removed filters, {convolution: indices}.
        inputs: of one pass.

    Raises:
        PassFailed: the model's forward pass fails.
    """
    owners = {own[0]: name for name, own in norms.items() if len(own) == 1}
    found: dict[str, Target] = {}
    uses: dict[str, list[bool]] = {}
    ahead: set[str] = set()  # layers whose outputs something reads beside their norm
    affected: list[str] = []

    def used(key: str | _Ahead, other: Tensor | None) -> None:
        if isinstance(key, _Ahead):
            ahead.add(key.layer)
            return
        name = key
        uses.setdefault(name, []).append(other is not None)
        partner = watcher.key_of(other) if other is not None else None
        if isinstance(partner, str):
            found[name].partners.add(partner)

    def before(name: str, _module: nn.Module, inputs: Any) -> None:
        if name in owners:
            watcher.forget(inputs[0])

    def after(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if isinstance(module, Norm):
            if name in owners:
                watcher.note(inputs[0], _Ahead(owners[name]))
                watcher.note(output, owners[name])
            return
        target = found.setdefault(name, Target(name))
        target.calls += 1
        if name not in affected and (affected or name in gone):
            affected.append(name)
        watcher.note(output, _Ahead(name) if name in norms else name)

    watcher = Uses(used)
    with evaluating(model), hooked(_layers(model), after, before), watcher:
        output = output_of(model, inputs)
    given = [watcher.key_of(each) for each in tensors(output)]
    del output  # it may hold a graph that holds all tensors
    for key in (*given, *watcher.held()):  # what the network gives out is no summand alone
        if key is not None:
            used(key, None)
    modules = dict(model.named_modules())
    tied = tied_modules(model)
    for name, target in found.items():
        own = norms.get(name, ())
        if len(own) == 1 and isinstance(modules[own[0]], BatchNorm):
            target.norm = own[0]
        target.added = (not own or bool(target.norm)) and uses.get(name) == [True] * target.calls
        target.added = target.added and name not in ahead
        if not _computes_by_weight(modules[name]) or borrowed_weight(modules[name]):
            target.why = "it is no layer of PyTorch with a weight of its own"
        elif name in tied:
            target.why = "it shares its weight with another layer"
    order = list(affected)
    for number, name in enumerate(affected):
        later = [each for each in affected[number + 1 :] if each in found[name].partners]
        if found[name].added and later:
            order.remove(name)
            order.insert(order.index(later[-1]) + 1, name)
            for each in later:  # one of two summands makes up for the other
                found[each].added = False
    return [found[name] for name in order]


def shift_holders(
    model: nn.Module, norms: Mapping[str, Sequence[str]], name: str, channels: int
) -> list[tuple[Tensor, int]]:
    """The tensors to which a shift of a layer's outputs is added, each with the sign; none if there is none.

    It is the layer's bias, if no other layer shares it, else the running means of the norms behind the layer.
    """
    bias = own_parameters(model.get_submodule(name)).get("bias")
    if bias is not None:
        holders = Counter(id(p) for module in model.modules() for p in own_parameters(module).values())
        if holders[id(bias)] == 1 and bias.shape == (channels,):
            return [(bias, 1)]
    behind: list[Any] = [model.get_submodule(norm) for norm in norms.get(name, ())]
    if all(isinstance(norm, BatchNorm) and norm.running_mean is not None for norm in behind):
        return [(norm.running_mean, -1) for norm in behind]
    return []


def _computes_by_weight(layer: nn.Module) -> bool:
    """Whether a layer in evaluation mode computes what PyTorch's layer of its class does: Bridgeout does."""
    bridged = any(module is layer and mark.state() == "bridgeout" for _, module, mark in marks_on(layer))
    return bridged or is_stock(layer)


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [each for each in model.named_modules() if isinstance(each[1], ConvNd | nn.Linear | Norm)]
