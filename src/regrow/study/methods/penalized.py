"""Standard training with the overlap of all filters in the loss."""

from __future__ import annotations

from torch import Tensor

from regrow.losses import orthogonal_loss
from regrow.study.methods.method import Given, Method


class OrthogonalLoss(Method):
    """Adds ``orthogonal`` times the overlap of all filters to the loss (RePr, arXiv 1811.07275, eq. 1-2)."""

    name = "orthogonal-loss"

    def __init__(self, given: Given) -> None:
        self._model, self._weight = given.model, given.config.orthogonal

    def penalty(self) -> Tensor | None:
        return self._weight * orthogonal_loss(self._model) if self._weight else None
