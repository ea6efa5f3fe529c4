"""Search for the cut that meets a budget. The search measures each cut on a small copy of the network."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from regrow.criteria.select import check_selection
from regrow.pruning.accuracy import top1
from regrow.pruning.cost import count_macs, count_parameters
from regrow.pruning.ladder import first_within
from regrow.pruning.latency import as_used, launching, measure_latency
from regrow.pruning.shares import check_shares
from regrow.pruning.trials import Bench, Trial
from regrow.shipping.deploy import Form

Timing = list[dict[str, Any]]
_UNITS = {"macs": "multiply-accumulates", "params": "parameters", "latency": "latency"}
# How far below the budget the result may be, as a share of the cost of the dense network.
_CLOSE = {"macs": 0.005, "params": 0.005, "latency": 0.02, "max_drop": 0.0}
# A search chooses from at most this many fractions, and from fewer fractions than there are filters.
_RUNGS = {"macs": 1000, "params": 1000, "latency": 250, "max_drop": 125}
# How many rungs, from the one found, are cut and measured again until one is still within the budget.
_TRIES = 5
# A latency from this share on has hardly fallen. A GPU waits for the host that needs this share of a pass.
_HARDLY, _WAITS = 0.75, 0.8


def check_target(targets: Mapping[str, Any], scope: str = "layer") -> tuple[str, Any]:
    """Return the target of ``prune`` that is given, as (kind, value): a number, or for ``fraction`` perhaps
    {name: share}.

    Raises:
        ValueError: not exactly one target is given, or it is out of range, or does not go with ``scope``.
    """
    given = {kind: value for kind, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"prune takes exactly one of fraction=, max_drop=, macs=, params= and latency=, got "
            f"{' and '.join(given) or 'none'}. To remove half of the filters write fraction=0.5."
        )
    [(kind, value)] = given.items()
    if kind == "fraction" and isinstance(value, Mapping):
        check_shares(value, scope)
        return kind, {name: float(share) for name, share in value.items()}
    if kind == "fraction":
        check_selection(value, "global", 0.0)
    elif isinstance(value, Mapping):
        raise ValueError(
            f"{kind} is one number for the whole network, got shares of layers. Those are a target of "
            'their own: write fraction={"layer3": 0.6}.'
        )
    elif not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{kind} is a number, got {value!r}.")
    elif kind == "max_drop":
        if not 0 <= value < 100:
            raise ValueError(
                f"max_drop is in points of accuracy, 0 <= max_drop < 100, got {value!r}. For one point, from "
                "92 % to 91 %, write max_drop=1."
            )
    elif not 0 < value < 1:
        raise ValueError(
            f"{kind} is a share of what the network has now, 0 < {kind} < 1, got {value!r}. For half of it "
            f"write {kind}=0.5."
        )
    return kind, float(value)


@dataclass(frozen=True)
class Met:
    """The cut that meets a budget.

    Attributes:
        trial: the cut.
        reached: its value.
        timing: its timing, if the budget was latency.
        tried: the cuts that the search measured, in order: filters (how many are removed), macs (estimated
            share that is left), value (of the budget's kind), accuracy (0 to 1; None but for ``max_drop``).
    """

    trial: Trial
    reached: float
    timing: Timing | None
    tried: list[dict[str, Any]]


@dataclass(frozen=True)
class Search:
    """A search for a cut within a budget.

    Attributes:
        model: the dense network.
        example_inputs: inputs of the passes that count MACs or measure latency.
        bench: makes small copies of ``model``.
        choose: fraction → keep masks; a larger fraction drops all filters that a smaller one drops.
        filters: the number of filters to choose from.
        validation, accuracy: for ``max_drop``: batches, and the dense network's accuracy on them.
        tell: called as ``prune``'s ``progress``.
        form: the form in which networks are timed; None for the form they have.
    """

    model: nn.Module
    example_inputs: Any
    bench: Bench
    choose: Callable[[float], dict[str, Tensor]]
    filters: int
    validation: Iterable[Any]
    accuracy: float
    tell: Callable[[float, str], object]
    form: Form | None = None

    def run(self, kind: str, limit: float) -> Met:
        """Return the smallest cut whose ``kind`` is at most ``limit``; for ``max_drop`` the largest such cut.

        Raises:
            ValueError: no cut meets the limit; the message gives the best value found.
        """
        rungs = self._rungs(kind)
        looks = 2 * math.ceil(math.log2(rungs + 1)) + 2
        known: dict[int, float] = {}
        tried: list[dict[str, Any]] = []

        def choose(rung: int) -> dict[str, Tensor]:
            # The value falls from rung to rung: for a drop, the first rung is the largest cut.
            return self.choose((rungs + 1 - rung if kind == "max_drop" else rung) / (rungs + 1))

        def value(rung: int) -> float:
            keep = choose(rung)
            count = removed(keep)
            if count not in known:
                share = 0.1 + 0.7 * min(1.0, len(known) / looks)
                self.tell(share, f"trying without {count / self.filters:.1%} of the filters")
                known[count] = self._value(kind, keep)
                tried.append(self._row(kind, keep, known[count]))
            return known[count]

        start, guess = math.inf if kind == "max_drop" else 1.0, None
        if kind in ("macs", "params"):
            self.tell(0.1, "estimating how many filters to remove")
            guess = self._guess(kind, limit)
        rung, reached = first_within(value, rungs, limit, start=start, close=_CLOSE[kind], guess=guess)
        if reached > limit or not removed(choose(rung)):
            raise ValueError(self._refusal(kind, limit, known))
        for further in range(rung, min(rung + _TRIES, rungs + 1)):
            self.tell(0.8, "cutting")
            trial = self.bench.cut(choose(further), compensated=True)
            if not trial.gone:
                break
            reached, timing = self._look(kind, trial.model)
            if reached <= limit:
                return Met(trial, reached, timing, tried)
        raise ValueError(
            f"{kind}={limit} was met in the search, but not when measured again ({reached:.3g}): the "
            "measurements vary too much. Stop other work on this machine, or ask for a little less."
        )

    def latency_at(self, macs: float) -> float:
        """Return the share of its latency that the network has when cut to the share ``macs`` of its MACs."""
        fraction = self._guess("macs", macs) / (self._rungs("macs") + 1)
        return self._value("latency", self.choose(fraction))

    def _guess(self, kind: str, limit: float) -> int:
        """Return the first rung at which the estimated ``kind``, MACs or parameters, is within ``limit``."""
        rungs = self._rungs(kind)

        def estimated(rung: int) -> float:
            return self.bench.estimate(self.choose(rung / (rungs + 1)))[kind]

        return first_within(estimated, rungs, limit, start=1.0, close=_CLOSE[kind])[0]

    def _rungs(self, kind: str) -> int:
        return min(_RUNGS[kind], self.filters - 1)

    def _value(self, kind: str, keep: Mapping[str, Tensor]) -> float:
        if not removed(keep):
            return 0.0 if kind == "max_drop" else 1.0
        if kind == "max_drop":
            return self._look(kind, self.bench.masked(keep)[0])[0]
        return self._look(kind, self.bench.cut(keep, compensated=False).model)[0]

    def _row(self, kind: str, keep: Mapping[str, Tensor], value: float) -> dict[str, Any]:
        return {
            "filters": removed(keep),
            "macs": value if kind == "macs" else self.bench.estimate(keep)["macs"],
            "value": value,
            "accuracy": self.accuracy - value / 100 if kind == "max_drop" else None,
        }

    def _look(self, kind: str, small: nn.Module) -> tuple[float, Timing | None]:
        if kind == "max_drop":
            # Round, because 100 · (0.92 - 0.91) is a little more than 1.
            return round(100 * (self.accuracy - top1(small, self.validation)[0]), 9), None
        if kind == "latency":
            used = [self._used, as_used(small, self.example_inputs, self.form)]
            timing = measure_latency(used, self.example_inputs)
            return timing[1]["median"] / timing[0]["median"], timing
        if kind == "params":
            return count_parameters(small) / count_parameters(self.model), None
        return count_macs(small, self.example_inputs) / self._macs, None

    @functools.cached_property
    def _macs(self) -> int:
        return count_macs(self.model, self.example_inputs)

    @functools.cached_property
    def _used(self) -> nn.Module:
        return as_used(self.model, self.example_inputs, self.form)

    def _refusal(self, kind: str, limit: float, known: Mapping[int, float]) -> str:
        tried = {count: found for count, found in known.items() if count}
        if not tried:
            return f"{kind}={limit} cannot be met: floor and round_to leave no filter to remove. Lower them."
        if kind == "max_drop":
            count = min(tried, key=lambda count: (tried[count], count))
            return (
                f"max_drop={limit:g} cannot be met: the best cut tried removes {count} of {self.filters} "
                f"filters ({count / self.filters:.1%}) and costs {tried[count]:.2f} points. Allow that many, "
                "calibrate with more images, or try another criterion or scope."
            )
        least = min(tried.values())
        best = f"{kind}={limit:g} cannot be met: the best cut leaves {least:.1%} of the {_UNITS[kind]}"
        if kind == "latency" and (reason := self._fixed(least)):
            return f"{best}. {reason}"
        return (
            f"{best}, and floor, round_to and exclude allow no larger cut. Lower the floor, exclude fewer "
            f"layers, or ask for {kind}={limit_of(least):g}."
        )

    def _fixed(self, least: float) -> str:
        """Why the time does not fall with the filters, and what to write instead; "" if it does.

        Args:
            least: the share of the latency that the best cut leaves.
        """
        rungs = self._rungs("latency")
        small = self.bench.cut(self.choose(rungs / (rungs + 1)), compensated=False).model
        share = self._look("macs", small)[0]
        if least < _HARDLY or share > least / 2:
            return ""
        launched = launching(as_used(small, self.example_inputs, self.form), self.example_inputs) or 0.0
        why = (
            "on this GPU its passes take as long as the host needs to launch their operations"
            if launched > _WAITS
            else "most of the time is what each operation costs whatever its size"
        )
        as_deployed = (
            "" if self.form else "write deployed=True, to time networks as regrow.deploy makes them, "
        )
        return (
            f"The smallest cut leaves {share:.1%} of the multiply-accumulates: {why}. What helps: "
            f"{as_deployed}give a larger batch as example_inputs, or ask for macs={limit_of(share):g}."
        )


def limit_of(share: float) -> float:
    """``share`` rounded up to a hundredth: a budget that it meets."""
    return math.ceil(100 * share) / 100


def removed(keep: Mapping[str, Tensor]) -> int:
    """Return how many filters ``keep`` drops."""
    return sum(int((~mask).sum()) for mask in keep.values())
