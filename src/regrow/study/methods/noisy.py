"""Bridgeout and dropout, plain and targeted, as methods of a run."""

from __future__ import annotations

from torch import nn

from regrow.noise.layers import add_bridgeout, remove_bridgeout
from regrow.study.config import RunConfig
from regrow.study.methods.method import Given, Method
from regrow.study.rivals import add_dropout

BRIDGEOUTS = ("bridgeout", "targeted-bridgeout")
_DROPOUTS = ("dropout", "targeted-dropout")


def add_noise(model: nn.Module, config: RunConfig) -> None:
    """Put the noise of ``config``'s method on ``model``, if the method has any."""
    for part in config.method.split("+"):
        targeted = config.target_fraction if part.startswith("targeted-") else 1.0
        if part in BRIDGEOUTS:
            add_bridgeout(model, config.p, config.q, target_fraction=targeted, seed=config.seed)
        elif part in _DROPOUTS:
            add_dropout(model, config.p, targeted)


class Noisy(Method):
    """Batch Bridgeout, which ``add_noise`` has put on the network: it is taken off at the end.

    Its state is in the network's.
    """

    name = "bridgeout"

    def __init__(self, given: Given) -> None:
        self._given = given

    def finish(self) -> bool:
        given = self._given
        remove_bridgeout(given.model, given.calibration() if given.config.reestimate else None)
        return True
