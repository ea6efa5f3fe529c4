"""Dense-Sparse-Dense training as a method of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regrow.restarts.dense_sparse import DenseSparseDense
from regrow.study.methods.method import Given, Method, event


class Dsd(Method):
    """The smallest weights are 0 in the second third of each round (Han et al. 2017, arXiv 1607.04381)."""

    name = "dsd"

    def __init__(self, given: Given) -> None:
        self._training = DenseSparseDense(given.wrapped, given.optimizer, fraction=given.config.fraction)
        length = given.config.rounds.length
        self._first, self._last = max(1, round(length / 3)), min(length - 1, round(2 * length / 3))
        self._epochs = self._times = 0

    @property
    def phase(self) -> str:
        return "sparse" if self._training.sparse else "full"

    def begin(self, number: int) -> None:
        self._epochs, self._times = 0, number + 1

    def after_epoch(self) -> list[dict[str, Any]]:
        self._epochs += 1
        if self._epochs == self._first:
            done = self._training.sparsify()
        elif self._epochs == self._last:
            done = self._training.densify()
        else:
            return []
        count = sum(done["held"].values())
        held = f"{count:,} weights {'are held' if self._training.sparse else 'were held'} at 0."
        return [event(done["kind"], self._times, notes=[held, *done["notes"]])]

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self._epochs, "training": self._training.state_dict()}

    def check_state_dict(self, state: Mapping[str, Any], epochs: int) -> None:
        if not isinstance(state, Mapping) or {"epochs", "training"} - state.keys():
            raise ValueError("the state of dsd has epochs and training")
        if type(state["epochs"]) is not int or state["epochs"] != epochs:
            raise ValueError(f"dsd has counted other epochs than {epochs}")
        self._training.check_state_dict(state["training"])
        if bool(state["training"]["held"]) != (self._first <= epochs < self._last):
            raise ValueError(f"dsd holds weights in the wrong phase, after {epochs} epochs")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epochs = state["epochs"]
        self._training.load_state_dict(state["training"])
