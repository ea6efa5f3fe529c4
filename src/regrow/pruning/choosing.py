"""Choose the filters that ``prune`` drops: rank them, drop coupled ones together, round the widths."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regrow.criteria.score import NEGATIVE_CRITERIA, Criterion
from regrow.criteria.select import check_selection, select
from regrow.structure.flows import Flows, components
from regrow.structure.readers import Readers
from regrow.suggest import nearest

SCOPES = ("layer", "global", "isomorphic", "balanced")
COUPLED = ("jointly", "individually")  # the default first
# Vector units work on multiples of 8. In a layer of 64 filters the nearest multiple is at most 4 filters, a
# sixteenth, away from the number that the ranking gives; in narrower layers it is a larger share.
_STEP, _WIDE = 8, 64

Unit = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Choice:
    """How filters are chosen.

    Attributes:
        scope, floor, round_to: as ``prune`` takes them.
        families: the layers that are ranked together if the scope is ``"isomorphic"``.
        units: groups of filters that are dropped together or not at all.
        added: whether the score of a unit is the sum of its filters' scores, not the mean.
        costs: for the scope ``"balanced"``, {name: Tensor[filters]}: what the removal of each filter saves.
    """

    scope: str = "layer"
    floor: float = 0.1
    round_to: int | None = None
    families: Sequence[Sequence[str]] = ()
    units: Sequence[Unit] = ()
    added: bool = False
    costs: Mapping[str, Tensor] = field(default_factory=dict)

    def step(self, filters: int) -> int:
        """The number of which a layer of ``filters`` keeps a multiple."""
        return (_STEP if filters >= _WIDE else 1) if self.round_to is None else self.round_to


def check_choice(scope: str, floor: float, round_to: int | None, coupled: str) -> None:
    """Raise ``ValueError`` for an unknown name or a number out of range."""
    for name, known, what in ((scope, SCOPES, "scope"), (coupled, COUPLED, "way to cut coupled filters")):
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}{nearest(str(name), known)}")
    check_selection(0, "global", floor)
    if round_to is not None and (not isinstance(round_to, int) or isinstance(round_to, bool) or round_to < 1):
        raise ValueError(
            f"round_to is a whole number from 1 that divides every width, got {round_to!r}. For multiples "
            "of 8 write round_to=8, for any width round_to=1."
        )


def settled(
    criterion: Criterion | None, scope: str | None, *, reconstructs: bool, shares: bool
) -> tuple[Criterion, str]:
    """The criterion and the scope of ``prune``, also where they are left open.

    Args:
        reconstructs: whether there are images, and the layers behind removed filters are adapted to them.
        shares: whether the target is a share for each layer.

    Raises:
        ValueError: the criterion has no scores that could be divided by what filters cost.
    """
    if criterion is None:
        criterion = "reconstruction" if reconstructs else "l2"
    if scope is None:
        scope = "balanced" if criterion == "reconstruction" and not shares else "layer"
    if scope == "balanced" and criterion in NEGATIVE_CRITERIA:
        raise ValueError(
            f"scope 'balanced' divides scores by the work that filters save, and the scores of {criterion!r} "
            "are below 0: write scope='layer', or another criterion, such as 'l2'."
        )
    return criterion, scope


def choose(
    scores: Mapping[str, Tensor], fraction: float | Mapping[str, float], choice: Choice
) -> dict[str, Tensor]:
    """Return keep masks that drop about ``fraction`` of the filters.

    The count that a layer keeps is rounded to the nearest multiple of ``Choice.step`` (a half goes up), but
    to no less than one step, and up if the floor or a unit asks for more. A layer with fewer filters than
    that stays whole; so does, if ``round_to`` is None, a layer that loses none. A larger fraction drops all
    filters that a smaller one drops.

    Args:
        scores: {name: Tensor[filters]}, higher = keep.
        fraction: as ``select`` takes it, of the filters that have scores; or {name: fraction} for each layer.

    Returns:
        {name: BoolTensor[filters]} on the CPU, True = alive.
    """
    scores = {name: torch.as_tensor(values).detach().double().cpu() for name, values in scores.items()}
    numbers = _unit_numbers(scores, choice.units)
    flat = _unit_sums(torch.cat(list(scores.values())), numbers)
    if choice.scope == "balanced":
        # What a unit costs is all that its filters cost, and it saves all that they save.
        costs = torch.cat([choice.costs[name].double() for name in scores])
        flat = flat / _unit_sums(costs, numbers)
    elif not choice.added:
        flat = flat / torch.bincount(numbers, minlength=len(flat))[numbers]
    scores = _by_layer(flat, scores)
    groups = [list(scores)]
    if isinstance(fraction, Mapping):
        groups = [[name] for name in scores]
    elif choice.scope == "isomorphic":
        groups = [list(names) for names in choice.families]
    keep: dict[str, Tensor] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="floor=", category=UserWarning)
        for names in groups:
            ranked = {name: scores[name] for name in names}
            scope = "layer" if choice.scope == "layer" else "global"
            share = fraction[names[0]] if isinstance(fraction, Mapping) else fraction
            keep |= select(ranked, share, scope=scope, floor=choice.floor)
    keep = {name: keep[name] for name in scores}
    for name, mask in keep.items():
        if choice.round_to is None and mask.all():
            continue
        step = choice.step(len(mask))
        least = max(step, math.ceil(choice.floor * len(mask) - 1e-9))
        near = math.floor(int(mask.sum()) / step + 0.5) * step
        keep[name] = _best(scores[name], near if near >= least else _up(least, step))
    before = -1
    while (alive := sum(int(mask.sum()) for mask in keep.values())) != before:
        before = alive
        flat = torch.cat(list(keep.values()))
        stays = torch.zeros(len(flat), dtype=torch.bool)
        stays[numbers[flat]] = True
        keep = _by_layer(stays[numbers], keep)
        for name, mask in keep.items():
            count = _up(int(mask.sum()), choice.step(len(mask)))
            keep[name] = mask | _best(scores[name].masked_fill(mask, math.inf), count)
    return keep


def falls_short(keep: Mapping[str, Tensor], fraction: float, choice: Choice) -> bool:
    """Return whether ``keep`` drops fewer filters than ``fraction`` asks for, by more than rounding explains:
    half a filter per layer, or half a step of the default; or whether it drops none at all."""
    filters = sum(map(len, keep.values()))
    dropped = filters - sum(int(mask.sum()) for mask in keep.values())
    steps = [choice.step(len(mask)) if choice.round_to is None else 1 for mask in keep.values()]
    short = fraction * filters - dropped
    return short > 0.5 * sum(steps) + 1e-9 or (not dropped and short > 0.5 * len(keep) + 1e-9)


def families_of(model: nn.Module, readers: Mapping[str, Readers], names: Iterable[str]) -> list[list[str]]:
    """Return the layers ``names`` in families of similar layers, whatever their widths.

    Two convolutions are similar if they have the same class, kernel, stride and dilation, the same kinds of
    norms behind them, the same kinds of layers that read their channels, and if both or neither are mixed
    with other channels on the way there (a residual sum). This is a simple form of the isomorphic groups of
    Fang et al. 2024.
    """
    found: defaultdict[Any, list[str]] = defaultdict(list)
    for name in names:
        behind = frozenset(_kind(model.get_submodule(norm)) for norm in readers[name].norms)
        reading = frozenset(_kind(model.get_submodule(consumer)) for consumer in readers[name].consumers)
        found[_kind(model.get_submodule(name)), behind, reading, bool(readers[name].mixed)].append(name)
    return list(found.values())


def merged(families: Sequence[Sequence[str]], units: Sequence[Unit]) -> list[list[str]]:
    """Return ``families``, with all families merged whose layers have filters in the same unit."""
    number = {name: at for at, family in enumerate(families) for name in family}
    linked = [(number[next(iter(unit))], number[name]) for unit in units for name in unit]
    ends = torch.tensor(linked, dtype=torch.int64).view(-1, 2)
    labels = components(len(families), ends[:, 0], ends[:, 1]).tolist()
    found: defaultdict[int, list[str]] = defaultdict(list)
    for label, family in zip(labels, families, strict=True):
        found[label] += family
    return list(found.values())


def coupled_filters(
    model: nn.Module, readers: Mapping[str, Readers], names: Iterable[str]
) -> list[dict[str, list[int]]]:
    """Return the units of ``Flows.coupled``, reduced to the filters of the layers ``names``."""
    wanted = set(names)
    units = (
        {name: indices for name, indices in unit.items() if name in wanted}
        for unit in Flows(model, readers).coupled(model)
    )
    return [unit for unit in units if sum(map(len, unit.values())) > 1]


def renumbered(
    units: Iterable[Unit], left: Mapping[str, Tensor], scores: Mapping[str, Tensor]
) -> list[dict[str, list[int]]]:
    """Return the ``units`` of an uncut model in the numbering of the filters that are left after its cuts.

    Args:
        left: layer → BoolTensor[filters before the first cut], True = left. A layer not listed has them all.
        scores: {name: Tensor[filters]} for the filters that each layer has now.
    """
    found = []
    for unit in units:
        now: dict[str, list[int]] = {}
        for name, indices in unit.items():
            mask = left.get(name)
            # A layer that holds filters at zero still numbers all its filters.
            if mask is not None and len(scores[name]) < len(mask):
                indices = [int(mask[:i].sum()) for i in indices if mask[i]]
            if indices:
                now[name] = list(indices)
        if sum(map(len, now.values())) > 1:
            found.append(now)
    return found


def _kind(module: Any) -> tuple[Any, ...]:
    details = ("kernel_size", "stride", "dilation")
    grouped = getattr(module, "groups", 1) > 1
    return (type(module).__name__, grouped, *(getattr(module, detail, None) for detail in details))


def _unit_numbers(scores: Mapping[str, Tensor], units: Sequence[Unit]) -> Tensor:
    """Return the number of each filter's unit, layer after layer; an uncoupled filter is a unit by itself."""
    starts, count = {}, 0
    for name, values in scores.items():
        starts[name] = count
        count += len(values)
    numbers = torch.arange(count)
    for unit in units:
        members = [starts[name] + index for name, indices in unit.items() for index in indices]
        numbers[torch.tensor(members)] = members[0]
    return numbers


def _unit_sums(flat: Tensor, numbers: Tensor) -> Tensor:
    """Return ``flat``, a number of each filter, each replaced by the sum over the filter's unit."""
    return torch.zeros_like(flat).index_add(0, numbers, flat)[numbers]


def _by_layer(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = flat.split([len(values) for values in like.values()])
    return {name: part.clone() for name, part in zip(like, parts, strict=True)}


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _best(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the ``count`` highest scores. Equal scores are dropped in order, as in ``select``."""
    keep = torch.ones(len(scores), dtype=torch.bool)
    keep[scores.argsort(stable=True)[: max(0, len(scores) - count)]] = False
    return keep
