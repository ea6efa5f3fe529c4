"""What an optimizer remembers of entries that get new values.

A *slot* is a tensor that an optimizer keeps for a parameter. It lies in ``state[parameter]``, in a list
beside that of the parameters, or in a dictionary under the parameter. Slots of one name form a *family*, and
a family is told by what it holds:

- copies of the weights (schedule-free ``z``, MADGRAD ``x0``, Lookahead's slow weights, ASGD ``ax``): they
  pull the weights back to themselves, so they take the new values;
- magnitudes, which are never negative (Adam's ``exp_avg_sq``): they take the mean of the other entries. At 0
  they would make the next step many times too long, or with Rprop's step sizes hardly move the entry;
- all others (momentum, Adam's first moment) become 0.

A vector over all parameters (LBFGS) cannot be new in part: the optimizer forgets all that lies beside it.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from regrow.torch_private import takes_step_hooks

Pairs = list[tuple[nn.Parameter, Tensor]]
Groups = Sequence[Sequence[nn.Parameter]]
_MAGNITUDES = {"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum", "acc_delta", "step_size"}
_MANY = 64  # entries of which none is negative by chance
_LIKE = 0.5  # see ``likeness``
_NO_MEMORY = {"state", "param_groups", "defaults"}


def parts(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """``optimizer`` and the optimizers that it holds, as SAM, Lookahead or Accelerate's wrapper do."""
    found = [optimizer]
    for part in found:  # grows while it is read
        for value in vars(part).values():
            inner = value.values() if isinstance(value, Mapping) else value
            for one in inner if isinstance(value, Mapping | list | tuple) else [value]:
                if isinstance(one, torch.optim.Optimizer) and all(one is not other for other in found):
                    found.append(one)
    return found


def stepping(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers among ``parts`` that run hooks after their steps.

    A wrapper that skips ``Optimizer.__init__`` runs none, even where it takes them.
    """
    return [
        part
        for part in parts(optimizer)
        if takes_step_hooks(part) and getattr(type(part).step, "hooked", False)
    ]


def keeps_tensors(part: torch.optim.Optimizer) -> bool:
    """Whether attributes of an optimizer hold tensors, as Lookahead's slow weights may."""
    attributes = {name: value for name, value in vars(part).items() if name not in _NO_MEMORY}
    return any(True for _ in _walk(attributes, "", None, [], {}))


def capturing() -> bool:
    """Whether operations are captured in a CUDA graph now."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def readable() -> bool:
    """Whether the numbers in tensors can be read now: not in compiled or traced code, nor in a CUDA graph."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or capturing())


@dataclass
class Memory:
    """All that an optimizer remembers.

    Attributes:
        families: {name, with the optimizer's class: (parameter, slot) pairs}. The shape of a slot is that of
            its parameter, or that of a sum over some of its dimensions.
        joint: {the optimizer's class: states that hold a vector over all parameters}.
    """

    families: dict[str, Pairs] = field(default_factory=dict)
    joint: dict[str, list[Any]] = field(default_factory=dict)


def memory_of(optimizer: torch.optim.Optimizer) -> Memory:
    """The memory of ``optimizer`` and of the optimizers that it holds; the slots are no copies."""
    memory, seen = Memory(), set[int]()
    for part in parts(optimizer):
        kind = type(part).__name__
        groups: Groups = [list(group["params"]) for group in part.param_groups]
        parameters = [parameter for group in groups for parameter in group]
        known = {id(parameter): parameter for parameter in parameters}
        total = sum(parameter.numel() for parameter in parameters)
        for key, held in _sources(part):
            owner = known.get(key if isinstance(key, int) else id(key))
            if owner is None and isinstance(key, Tensor):
                continue  # what is left of a parameter that the optimizer trains no more
            path = "" if owner is not None else str(key)
            slots = [
                (name, parameter, slot)
                for name, parameter, slot in _walk(held, path, owner, groups, known)
                if slot.is_floating_point() and id(slot) not in known and id(slot) not in seen
            ]
            seen.update(id(slot) for *_, slot in slots)
            if owner is not None and any(_is_joint(slot, parameter, total) for _, parameter, slot in slots):
                memory.joint.setdefault(kind, []).append(held)
                continue
            for name, parameter, slot in slots:
                found = [] if parameter is None or not _fits(slot, parameter) else [(parameter, slot)]
                if _is_joint(slot, parameter, total):
                    pieces = slot.split([each.numel() for each in parameters])
                    found = [(p, piece.view_as(p)) for p, piece in zip(parameters, pieces, strict=True)]
                memory.families.setdefault(f"{kind}.{name}", []).extend(found)
    return memory


def _sources(part: torch.optim.Optimizer) -> Iterator[tuple[Any, Any]]:
    """Where one optimizer may keep its memory: attributes, settings of its groups, the state by its keys."""
    yield "", {name: value for name, value in vars(part).items() if name not in _NO_MEMORY}
    names = {name for group in part.param_groups for name in group} - {"params"}
    yield "", {name: [group.get(name) for group in part.param_groups] for name in names}
    yield from getattr(part, "state", {}).items()


class Copies:
    """Which families of an optimizer's slots hold copies of the weights.

    Each family is judged once, when it first holds anything: a copy equals the weights best when it was made.
    The weights may be far from MADGRAD's x0 later, and a momentum becomes like the weights if their decay is
    strong.

    Attributes:
        known: {family: whether it holds copies}, of the families judged so far.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, known: Mapping[str, bool] = MappingProxyType({})
    ) -> None:
        self._optimizer = optimizer
        self.known = dict(known)
        self._watch: Any = None

    def watch(self) -> None:
        """Look once behind the next step of the optimizer, unless ``release`` comes first; call it then.

        The hook is PyTorch's for all optimizers: the optimizer itself gets none before filters are dropped.
        """
        watch = register_optimizer_step_post_hook(functools.partial(_see, weakref.ref(self)))
        self._watch = weakref.finalize(self, watch.remove)

    def release(self) -> None:
        """End ``watch``."""
        if self._watch is not None:
            self._watch()
        self._watch = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_watch": None}

    def look(self) -> None:
        """Judge the families that hold something and are not known yet."""
        for name, pairs in memory_of(self._optimizer).families.items():
            if name not in self.known and any(slot.any() for _, slot in pairs):
                self.known[name] = are_copies(pairs)


def _see(watching: weakref.ref[Copies], stepped: torch.optim.Optimizer, *_: Any) -> None:
    copies = watching()
    if copies is None or copies.known or not readable():
        return
    if any(stepped is part for part in parts(copies._optimizer)):
        copies.look()


def are_copies(pairs: Pairs) -> bool:
    """Whether slots hold copies of their weights: the mean of their ``likeness`` is above 1/2.

    One layer whose slot equals its weight by chance does not decide for the others. Biases and norms tell
    little: they start at 0 or 1, as many slots do. So they count only where there are no weights.
    """
    same = [(parameter, slot) for parameter, slot in pairs if parameter.shape == slot.shape]
    telling = [pair for pair in same if pair[0].dim() > 1] or same
    values = [value for pair in telling if (value := likeness(*pair)) is not None]
    return bool(values) and sum(values) / len(values) > _LIKE


@torch.no_grad()
def likeness(parameter: Tensor, slot: Tensor) -> float | None:
    """2⟨s, w⟩ / (⟨s, s⟩ + ⟨w, w⟩): 1 if the slot s equals the weight w, near 0 if it has another direction or
    another size; None where both are 0."""
    weight, slot = parameter.detach().to(slot.device, torch.float64), slot.detach().double()
    both = float(weight.square().sum() + slot.square().sum())
    return 2 * float((weight * slot).sum()) / both if both else None


@torch.no_grad()
def refresh_slots(
    optimizer: torch.optim.Optimizer,
    fresh: Mapping[nn.Parameter, Tensor],
    copies: Mapping[str, bool] = MappingProxyType({}),
) -> list[str]:
    """Bring the memory of those entries of parameters up to date that have new values.

    Args:
        optimizer: if it has no slot for a parameter, nothing is done.
        fresh: {parameter: BoolTensor over the leading dimensions of the parameter, True = new value}.
        copies: the families that hold copies of the weights, from ``Copies``.

    Returns:
        One sentence for each family of copies, and for each optimizer that forgot more than these entries.
    """
    fresh = {parameter: mask for parameter, mask in fresh.items() if mask.any()}
    if not fresh:
        return []
    memory, notes = memory_of(optimizer), []
    for name, pairs in memory.families.items():
        known = copies.get(name, False)
        magnitudes = not known and _are_magnitudes(name, pairs)
        for parameter, slot in pairs:
            mask = _entries(fresh[parameter], parameter, slot) if parameter in fresh else None
            if mask is None:
                continue
            mask = mask.to(slot.device)
            settled = slot[~mask]
            if known and slot.shape == parameter.shape:
                slot[mask] = parameter.detach().to(slot)[mask]
            else:
                slot[mask] = settled.mean() if magnitudes and settled.numel() else 0
        if known:
            notes.append(f"{name} holds copies of the weights, which took the values of these filters.")
    for kind, states in memory.joint.items():
        for state in states:
            state.clear()
        notes.append(f"{kind} starts anew, because it remembers all weights in one vector.")
    return notes


def _walk(
    held: Any, path: str, owner: nn.Parameter | None, groups: Groups, known: Mapping[int, nn.Parameter]
) -> Iterator[tuple[str, nn.Parameter | None, Tensor]]:
    """The tensors in containers inside each other: (name, the parameter that each belongs to, tensor)."""
    if isinstance(held, Tensor):
        yield path, owner, held
    elif isinstance(held, Mapping):
        for key, inner in held.items():
            theirs = known.get(key if isinstance(key, int) else id(key)) if owner is None else None
            if theirs is not None:
                yield from _walk(inner, path, theirs, groups, known)
            elif not isinstance(key, Tensor):
                yield from _walk(inner, f"{path}.{key}".lstrip("."), owner, groups, known)
    elif isinstance(held, list | tuple | deque):
        beside = _beside(held, groups) if owner is None else []
        for place, inner in enumerate(held):
            theirs = beside[place] if beside else owner
            inside = [groups[place]] if len(held) == len(groups) else groups
            yield from _walk(inner, path, theirs, inside, known)


def _beside(held: Collection[Any], groups: Groups) -> Sequence[nn.Parameter]:
    """The parameters, of a group or of all, to which the tensors of a list belong; empty for other lists."""
    for parameters in (*groups, [parameter for group in groups for parameter in group]):
        if len(held) == len(parameters) and all(
            isinstance(one, Tensor) and one.shape == parameter.shape
            for one, parameter in zip(held, parameters, strict=True)
        ):
            return parameters
    return []


def _is_joint(slot: Tensor, parameter: nn.Parameter | None, total: int) -> bool:
    """Whether ``slot`` is a vector over all parameters."""
    own = parameter is not None and slot.shape == parameter.shape
    return slot.dim() == 1 and slot.numel() == total and not own


def _fits(slot: Tensor, parameter: nn.Parameter) -> bool:
    """Whether ``slot`` has a number for each entry of its parameter, or for each row, as Adafactor does."""
    if slot.dim() == parameter.dim() > 0:
        return slot.shape[0] == parameter.shape[0] and all(
            one in (1, all_) for one, all_ in zip(slot.shape, parameter.shape, strict=True)
        )
    square = slot.dim() == 1 and parameter.dim() > 1 and parameter.shape[0] == parameter.shape[1]
    return 0 < slot.dim() < parameter.dim() and slot.shape == parameter.shape[: slot.dim()] and not square


def _entries(fresh: Tensor, parameter: nn.Parameter, slot: Tensor) -> Tensor | None:
    """Where ``slot`` is new: a sum is new where everything in it is; None if nowhere."""
    if slot.shape != parameter.shape:
        while fresh.dim() > slot.dim():
            fresh = fresh.all(-1)
        for dim in range(fresh.dim()):
            fresh = fresh if slot.shape[dim] == parameter.shape[dim] else fresh.all(dim, keepdim=True)
    return fresh if fresh.any() else None


def _are_magnitudes(name: str, pairs: Pairs) -> bool:
    if name.rpartition(".")[2] in _MAGNITUDES:
        return True
    count = sum(slot.numel() for _, slot in pairs)
    return count >= _MANY and all((slot >= 0).all() for _, slot in pairs) and any(s.any() for _, s in pairs)
