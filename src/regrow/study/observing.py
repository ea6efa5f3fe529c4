"""What a run keeps for an analysis: weights now and then, and the gradients of regrown rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from regrow.analysis.gradients import GradientWatch
from regrow.study import records
from regrow.study.analysed import gradients_path, snapshot_path
from regrow.study.ranks import Ranks
from regrow.study.run_folder import save_weights, writing
from regrow.study.steps import state_of_weights

# Events that begin or end a record of gradients, and around which weights are kept.
_WATCHED = ("drop", "restore", "restart")


class Observer:
    """Keeps weights and gradients of a run in its folder; the training does not depend on it.

    Args:
        model: the model that trains, without a data-parallel wrapper.
        folder: of the run.
        every: after how many epochs weights are kept; None keeps none.
        ranks: the processes that train together, of which the first writes.
    """

    def __init__(self, model: nn.Module, folder: Path, every: int | None, ranks: Ranks) -> None:
        self._model, self._folder, self._every, self._ranks = model, folder, every, ranks
        self._watch = GradientWatch(model)
        self.step = self._watch.step  # to be called after each training step

    def begin(self) -> None:
        """To be called before the first epoch of a run that is not resumed."""
        if self._every is not None:
            self._save(0, "", state_of_weights(self._model))

    def after_epoch(
        self, epoch: int, before: Mapping[str, Tensor], events: Sequence[Mapping[str, Any]]
    ) -> None:
        """To be called after each epoch, when its drop or restore has happened.

        Args:
            before: the weights before ``events``.
            events: what the method did to the network after this epoch.
        """
        regrown = [event for event in events if event["kind"] in _WATCHED]
        for event in regrown:
            self._watch.note({**event, "epoch": epoch})
        if regrown:
            self.write_gradients()
        if self._every is None:
            return
        if regrown or epoch % self._every == 0:
            self._save(epoch, "", before)
        if regrown:
            self._save(epoch, regrown[-1]["kind"], state_of_weights(self._model))

    def write_gradients(self) -> None:
        """Write ``gradients.jsonl``, if there is anything to write; to be called once more at the end."""

        def write() -> None:
            with writing(self._folder):
                records.write_lines(gradients_path(self._folder), self._watch.records)

        if self._watch.records:
            self._ranks.first(write)

    def _save(self, epoch: int, moment: str, weights: Mapping[str, Tensor]) -> None:
        path = snapshot_path(self._folder, epoch, moment)

        def write() -> None:
            with writing(self._folder):
                save_weights(dict(weights), path)

        self._ranks.first(write)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on after a resume."""
        return self._watch.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from ``state``; None, in a checkpoint of an earlier version, changes nothing."""
        if state is not None:
            self._watch.load_state_dict(state)
