"""Continual backprop as a method of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regrow.restarts.continual import ContinualBackprop
from regrow.study.methods.method import Given, Method, replaced


class Continual(Method):
    """The least useful filters are drawn anew, a few at a time (Dohare et al. 2024, Nature 632)."""

    name = "continual-backprop"

    def __init__(self, given: Given) -> None:
        config = given.config
        self._given = given
        self._replacing = ContinualBackprop(
            given.wrapped,
            given.optimizer,
            example_inputs=given.example_inputs,
            rate=config.replacement_rate,
            maturity=config.maturity,
            seed=given.seed(0),
            fresh=given.fresh(0),
        )
        self._new: dict[str, list[int]] = {}
        self._times = 0

    def after_step(self) -> None:
        for name, indices in self._replacing.step().items():
            self._new.setdefault(name, []).extend(indices)

    def after_epoch(self) -> list[dict[str, Any]]:
        if not self._new:
            return []
        self._times += 1
        new = {name: sorted(set(indices)) for name, indices in self._new.items()}
        self._new = {}
        return [replaced(self._given.model, self._times, new)]

    def finish(self) -> bool:
        self._replacing.remove()
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"times": self._times, "replacing": self._replacing.state_dict()}

    def check_state_dict(self, state: Mapping[str, Any], epochs: int) -> None:  # noqa: ARG002
        if not isinstance(state, Mapping) or {"times", "replacing"} - state.keys():
            raise ValueError("the state of continual backprop has times and replacing")
        if type(state["times"]) is not int or not 0 <= state["times"] < 2**31:
            raise ValueError("times in the state of continual backprop is a count")
        self._replacing.check_state_dict(state["replacing"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._times = state["times"]
        self._replacing.load_state_dict(state["replacing"])
