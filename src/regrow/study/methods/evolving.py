"""Knowledge Evolution as a method of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regrow.restarts.evolution import KnowledgeEvolution
from regrow.study.methods.method import Given, Method, event


class Evolving(Method):
    """A fixed part of the weights stays, and the rest is drawn anew in each round (Taha et al. 2021,
    arXiv 2103.05152)."""

    name = "knowledge-evolution"

    def __init__(self, given: Given) -> None:
        self._given = given
        self._evolution = KnowledgeEvolution(given.wrapped, split=given.config.fixed, seed=given.seed(0))

    def switch(self, number: int) -> list[dict[str, Any]]:
        given = self._given
        done = self._evolution.evolve(given.optimizer, fresh=given.fresh(number))
        drawn = f"{sum(done['drawn'].values()):,} weights are new."
        return [event("evolve", number, notes=[drawn, *done["notes"]])]

    def state_dict(self) -> dict[str, Any]:
        return self._evolution.state_dict()

    def check_state_dict(self, state: Mapping[str, Any], epochs: int) -> None:  # noqa: ARG002
        self._evolution.check_state_dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._evolution.load_state_dict(state)
