"""Methods that draw layers or filters anew where a round begins, and remember nothing themselves."""

from __future__ import annotations

from typing import Any

from regrow.repr.layers import usable_layers
from regrow.repr.restart import restart
from regrow.restarts.perturb import reinitialize, shrink_and_perturb
from regrow.restarts.redo import redo
from regrow.restarts.units import find_units
from regrow.study.methods.method import Given, Method, event, replaced
from regrow.study.methods.regrown import pictures_to_rank


class _Renewing(Method):
    def __init__(self, given: Given) -> None:
        self._given = given


class ShrinkAndPerturb(_Renewing):
    """All weights shrink, and new ones are added to them (Ash & Adams 2020, arXiv 1910.08475)."""

    name = "shrink-and-perturb"

    def switch(self, number: int) -> list[dict[str, Any]]:
        given, config = self._given, self._given.config
        done = shrink_and_perturb(
            given.wrapped,
            given.optimizer,
            shrink=config.shrink,
            perturb=config.perturb,
            fresh=given.fresh(number),
        )
        return [event("shrink", number, notes=done["notes"])]


class FromScratch(_Renewing):
    """All weights are drawn anew."""

    name = "from-scratch"

    def switch(self, number: int) -> list[dict[str, Any]]:
        given = self._given
        done = reinitialize(given.wrapped, given.optimizer, fresh=given.fresh(number))
        return [event("fresh", number, notes=done["notes"])]


class LastLayers(_Renewing):
    """The last layers are drawn anew, as in later-layer forgetting (Zhou et al. 2022, arXiv 2202.00155)."""

    name = "last-layers"

    def __init__(self, given: Given, last: int | None = None) -> None:
        super().__init__(given)
        self._last = given.config.last if last is None else last
        reinitialize(given.fresh(0), last=self._last)  # refuses more layers than there are

    def switch(self, number: int) -> list[dict[str, Any]]:
        given = self._given
        done = reinitialize(given.wrapped, given.optimizer, last=self._last, fresh=given.fresh(number))
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in done["parameters"]))
        return [event("reset", number, notes=[f"New layers: {', '.join(layers)}.", *done["notes"]])]


class Restart(_Renewing):
    """The weakest filters start anew, by ``regrow.restart``."""

    name = "restart"

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        config = given.config
        usable_layers(given.wrapped, given.optimizer, given.example_inputs, config.exclude, config.skip_first)

    def switch(self, number: int) -> list[dict[str, Any]]:
        given, config = self._given, self._given.config
        done = restart(
            given.wrapped,
            given.optimizer,
            example_inputs=given.example_inputs,
            fraction=config.fraction,
            criterion=config.criterion,
            batches=pictures_to_rank(given, number),
            consumers=config.consumers,
            rows=config.rows,
            scope=config.scope,
            floor=config.floor,
            exclude=config.exclude,
            skip_first=config.skip_first,
            seed=given.seed(number),
        )
        happened = event("restart", number, filters=done["filters"], notes=done["notes"])
        happened["least_covered"] = done["least_covered"]
        return [happened]


class Redo(_Renewing):
    """Dormant filters are drawn anew (ReDo, Sokar et al. 2023, arXiv 2302.12902)."""

    name = "redo"

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        find_units(given.model, given.example_inputs)  # refuses a network without any layer to work on

    def switch(self, number: int) -> list[dict[str, Any]]:
        given = self._given
        done = redo(
            given.wrapped,
            given.optimizer,
            batches=given.pictures(number),
            example_inputs=given.example_inputs,
            threshold=given.config.dormant,
            seed=given.seed(number),
            fresh=given.fresh(number),
        )
        return [replaced(given.model, number, done["dormant"], done["notes"])]
