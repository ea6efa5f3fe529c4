"""How filters leave a network, for good or for a while, layer by layer, and never with a wrong result.

Two steps are right whatever follows a layer: the layer computes its kept filters alone and places them among
zeros, and the next layer picks the channels of its input that are not zero. Where the graph knows all readers
and all writers of a channel, neither step is needed: the channel leaves the tensors in between. Each step
beyond masks is taken only if forward passes on a copy confirm it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from regrow.looking.copies import copied
from regrow.looking.small_inputs import smaller_picture
from regrow.modules import unwrap
from regrow.structure.read import propose_structure
from regrow.structure.readers import Readers
from regrow.surgery.draft import MASKED, OUT, PLACED, PLACED_BEHIND_NORM, Drafting
from regrow.surgery.layers import is_cut
from regrow.surgery.plan import CutPlan, NoPlan
from regrow.surgery.removal import Removal, dropped_filters, plan_removal
from regrow.surgery.verify import Probe


def plan_cut(
    model: nn.Module,
    keep: Mapping[str, Tensor],
    example_inputs: Any,
    *,
    readers: Mapping[str, Readers] | None = None,
    followers: bool = True,
) -> CutPlan:
    """Plan a smaller network that computes the same as ``remove_filters(model, keep)`` would leave.

    Args:
        model: any module; it is only read. Wrappers are looked through.
        keep: {name: BoolTensor[filters]}, True = alive.
        example_inputs: as for ``read_structure``.
        readers: the result of ``read_structure``, where it is known already.
        followers: whether rows of grouped convolutions that read removed channels only are removed too, as
            in ``remove_filters``; otherwise they stay, and only norms behind sums lose channels.

    Returns:
        A plan whose network equals the masked one, confirmed on a copy in eval and train mode, with random
        parameters where the model's own would hide a mistake.

    Raises:
        ValueError: as ``remove_filters``, and NoPlan: the model has been cut before, the data decide which
            layers run, no filter of a layer would be left, or two passes never compute the same.
    """
    return plan_removal_and_cut(model, keep, example_inputs, readers=readers, followers=followers).plan


@dataclass(frozen=True)
class Planned:
    """A removal, and the plan that leaves the same without the removed filters."""

    removal: Removal
    plan: CutPlan


def plan_removal_and_cut(
    model: nn.Module,
    keep: Mapping[str, Tensor],
    example_inputs: Any,
    *,
    readers: Mapping[str, Readers] | None = None,
    followers: bool = True,
) -> Planned:
    """``plan_cut`` with the same arguments and errors; returns the removal too."""
    model = unwrap(model)
    if is_cut(model):
        raise NoPlan("the model has been cut before, and a plan fits uncut models only.")
    if not dropped_filters(model, keep):
        return Planned(Removal({}, {}, {}), CutPlan())
    proposal, large = None, example_inputs
    if readers is None:
        proposal = propose_structure(model, example_inputs)
        readers, example_inputs = proposal.readers, proposal.example_inputs
    else:
        example_inputs = smaller_picture(copied(model).eval(), example_inputs)
    removal = plan_removal(model, keep, example_inputs, readers, followers=followers)
    for quick in (True, False):
        probe = Probe(model, removal, example_inputs, quick=quick)
        if proposal is not None and not probe.confirms_removal:
            # The graph is wrong about these filters, so passes check all of its claims.
            removal = plan_removal(model, keep, example_inputs, proposal.confirmed(), followers=followers)
            proposal = None
            probe = Probe(model, removal, example_inputs, quick=quick)
        if probe.folds and isinstance(large, Tensor) and large.shape != example_inputs.shape:
            probe.look_at(large[: len(example_inputs)])
        search = _Search(removal, probe, Drafting(model, removal, probe))
        if (plan := search.wished()) is not None:
            return Planned(removal, plan)
    return Planned(removal, search.plan())


class _Search:
    """Looks for the plan that leaves least and is confirmed by a probe."""

    def __init__(self, removal: Removal, probe: Probe, drafting: Drafting) -> None:
        self._removal, self._probe, self._drafting = removal, probe, drafting
        self._wishes = {name: self._wish(name) for name in drafting.convolutions}

    def wished(self) -> CutPlan | None:
        """The plan in which every filter leaves as far as the graph allows; None if the probe refutes it."""
        draft = self._drafting.draft(self._wishes)
        return draft.plan if self._probe.refutes(draft.plan, draft.present) is None else None

    def plan(self) -> CutPlan:
        """The best confirmed plan, for a model whose ``wished`` plan is refuted.

        Raises:
            NoPlan: not even masks are confirmed, because the model never computes the same twice.
        """
        convs, wishes = self._drafting.convolutions, self._wishes
        levels = dict.fromkeys(convs, MASKED)
        if self._refuted(levels) is not None:  # a channel that is zero in eval mode only, say
            self._drafting.want_everything()
            if self._refuted(levels) is not None:
                raise NoPlan(
                    "the model does not compute the same twice from the same input and the same random seed, "
                    "or its numbers overflow, so no cut can be confirmed. Does its forward method keep "
                    "something from call to call?"
                )
        for level in (PLACED, PLACED_BEHIND_NORM):
            # A convolution that loses nothing has nothing to place.
            able = [
                name
                for name in convs
                if name in self._removal.gone and wishes[name] >= level and levels[name] == level - 1
            ]
            self._raise(levels, able, level)
        self._raise(levels, [name for name in convs if wishes[name] == OUT], OUT)
        return self._drafting.draft(levels).plan

    def _wish(self, name: str) -> int:
        if name in self._drafting.fixed:
            return MASKED
        known = self._drafting.flows.reached[name] and not self._removal.readers[name].blocked
        sure = known and name in self._probe.exercised and not self._probe.partial
        return OUT if sure else PLACED_BEHIND_NORM

    def _raise(self, levels: dict[str, int], names: list[str], level: int) -> None:
        """Raise as many of ``names``, in order of execution, to ``level`` as the probe confirms."""
        ran = self._refuted(levels | dict.fromkeys(names, level))
        while ran is not None:
            for guess in self._guesses(ran, names, level):
                rest = [name for name in names if name not in guess]
                further = self._refuted(levels | dict.fromkeys(rest, level))
                if further is None or len(further) > len(ran):
                    names, ran = rest, further
                    break
            else:
                number = self._shortest_refuted(levels, names, level)
                levels.update(dict.fromkeys(names[: number - 1], level))
                names = names[number:]
                ran = self._refuted(levels | dict.fromkeys(names, level))
        levels.update(dict.fromkeys(names, level))

    def _guesses(self, ran: list[str], names: list[str], level: int) -> Iterator[set[str]]:
        """Layers among ``names`` that may cause a difference which showed after the layers ``ran``."""
        last = ran[-1:]
        behind = [conv for conv, reached in self._drafting.flows.reached.items() if set(last) & set(reached)]
        recent = [name for name in dict.fromkeys(reversed(ran)) if name in names]
        for blamed in (behind, *([name] for name in recent[:3])):
            # A channel leaves the tensors only if all that write it let it go.
            together = self._drafting.flows.together if level == OUT else {}
            guess = {other for name in blamed for other in together.get(name, {name})}.intersection(names)
            if guess:
                yield guess

    def _shortest_refuted(self, levels: dict[str, int], names: list[str], level: int) -> int:
        """The smallest number of ``names``, from the first, that cannot be at ``level`` together."""
        good, bad = 0, len(names)
        while good + 1 < bad:
            middle = (good + bad) // 2
            if self._refuted(levels | dict.fromkeys(names[:middle], level)) is None:
                good = middle
            else:
                bad = middle
        return bad

    def _refuted(self, levels: Mapping[str, int]) -> list[str] | None:
        draft = self._drafting.draft(levels)
        return self._probe.refutes(draft.plan, draft.present)
