"""The method of a run from its name, which may join several by ``+``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from regrow.study.methods.continual import Continual
from regrow.study.methods.evolving import Evolving
from regrow.study.methods.method import Given, Method, Several
from regrow.study.methods.noisy import BRIDGEOUTS, Noisy
from regrow.study.methods.penalized import OrthogonalLoss
from regrow.study.methods.regrown import Regrown
from regrow.study.methods.renewed import FromScratch, LastLayers, Redo, Restart, ShrinkAndPerturb
from regrow.study.methods.sparse import Dsd
from regrow.study.methods.teaching import BornAgain, Distillation

# Standard training and dropout need nothing here.
_MAKERS: Mapping[str, Callable[[Given], Method]] = {
    "repr": Regrown,
    **dict.fromkeys(BRIDGEOUTS, Noisy),
    "orthogonal-loss": OrthogonalLoss,
    "distillation": Distillation,
    "dsd": Dsd,
    "ban": BornAgain,
    "shrink-and-perturb": ShrinkAndPerturb,
    "continual-backprop": Continual,
    "later-layer-forgetting": LastLayers,
    "knowledge-evolution": Evolving,
    "restart": Restart,
    "new-head": partial(LastLayers, last=1),
    "last-layers": LastLayers,
    "from-scratch": FromScratch,
    "redo": Redo,
}


def make_method(given: Given) -> Several:
    """The method that ``given.config`` names. Raises ``ValueError`` where it cannot work on the network."""
    names = given.config.method.split("+")
    return Several([_MAKERS[name](given) for name in names if name in _MAKERS])
