"""RePr as a method of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regrow.criteria.score import DATA_CRITERIA
from regrow.repr.cycle import RePr
from regrow.study.config import RunConfig
from regrow.study.methods.method import Given, Method


class Regrown(Method):
    """RePr, whose cycles begin anew in every round."""

    name = "repr"

    def __init__(self, given: Given) -> None:
        self._given = given
        self.cycle: RePr | None = None

    @property
    def phase(self) -> str:
        return "sub" if self._running.phase == "sub" else "full"

    @property
    def dropped(self) -> int:
        return sum(int((~mask).sum()) for mask in self._running.keep.values())

    def begin(self, number: int) -> None:
        if self.cycle is not None:
            self.cycle.remove()
        given = self._given
        self.cycle = make_repr(
            given.wrapped,
            given.optimizer,
            given.config,
            given.example_inputs,
            number,
            batches=pictures_to_rank(given, number),
        )

    def after_epoch(self) -> list[dict[str, Any]]:
        happened = self._running.step()
        return [] if happened is None else [happened.to_dict()]

    def state_dict(self) -> dict[str, Any]:
        return self._running.state_dict()

    def check_state_dict(self, state: Mapping[str, Any], epochs: int) -> None:
        self._running.check_state_dict(state)
        if state["step"] != epochs:
            raise ValueError(f"RePr has counted {state['step']} epochs, and the run {epochs}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._running.load_state_dict(state)

    @property
    def _running(self) -> RePr:
        assert self.cycle is not None
        return self.cycle


def pictures_to_rank(given: Given, number: int) -> list[tuple[Tensor, Tensor]] | None:
    """The pictures of round ``number`` that the criterion of a run looks at; None if it looks at none."""
    return given.pictures(number) if given.config.criterion in DATA_CRITERIA else None


def make_repr(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    example_inputs: torch.Tensor,
    number: int = 0,
    *,
    batches: list[tuple[Tensor, Tensor]] | None = None,
) -> RePr:
    """Build RePr as ``config`` says, for round ``number``. Raises the errors of ``RePr``.

    Args:
        batches: for a criterion that looks at pictures.
    """
    return RePr(
        model,
        optimizer,
        example_inputs=example_inputs,
        fraction=config.fraction,
        full=config.cycle.full,
        sub=config.cycle.sub,
        cycles=config.cycle.cycles,
        criterion=config.criterion,
        batches=batches,
        consumers=config.consumers,
        rows=config.rows,
        scope=config.scope,
        floor=config.floor,
        exclude=config.exclude,
        skip_first=config.skip_first,
        compact=config.compact,
        # Each round draws other rows, and with the criterion "random" drops other filters.
        seed=config.seed + 7919 * number,
    )
