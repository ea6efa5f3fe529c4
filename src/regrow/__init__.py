"""Train better convolutional filters, and remove the ones a network does not need.

The names below are imported on first use, so that ``import regrow`` stays quick and
``regrow --help`` never waits for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from regrow.analysis.agreement import criteria_against_oracle
    from regrow.analysis.canonical import canonical_correlation
    from regrow.analysis.drop_one import drop_one_accuracy
    from regrow.analysis.gradients import GradientWatch
    from regrow.analysis.layers import layer_correlations
    from regrow.analysis.off_map import off_map
    from regrow.compensation.compensate import compensate, read_as
    from regrow.compensation.norms import match_norms, reestimate_norms
    from regrow.criteria.masks import keep_of_masks
    from regrow.criteria.score import overlap, score
    from regrow.criteria.select import select
    from regrow.losses import distillation_loss, orthogonal_loss
    from regrow.noise.layers import add_bridgeout, bridgeout_state, load_bridgeout_state, remove_bridgeout
    from regrow.noise.perturbation import bridgeout
    from regrow.pruning.prune import prune
    from regrow.pruning.side_by_side import compare_latency
    from regrow.repr.cycle import RePr, release
    from regrow.repr.events import Event
    from regrow.repr.restart import restart
    from regrow.restarts.continual import ContinualBackprop
    from regrow.restarts.dense_sparse import DenseSparseDense
    from regrow.restarts.evolution import KnowledgeEvolution
    from regrow.restarts.perturb import reinitialize, shrink_and_perturb
    from regrow.restarts.redo import redo
    from regrow.shipping.checkpoint import load, save
    from regrow.shipping.deploy import deploy
    from regrow.shipping.fold import fold_norms
    from regrow.shipping.onnx import export_onnx
    from regrow.shipping.plain import plain_layers
    from regrow.study.load_run import load_run
    from regrow.surgery.cut import cut

_HOMES = {
    "ContinualBackprop": "regrow.restarts.continual",
    "DenseSparseDense": "regrow.restarts.dense_sparse",
    "Event": "regrow.repr.events",
    "GradientWatch": "regrow.analysis.gradients",
    "KnowledgeEvolution": "regrow.restarts.evolution",
    "RePr": "regrow.repr.cycle",
    "add_bridgeout": "regrow.noise.layers",
    "bridgeout": "regrow.noise.perturbation",
    "bridgeout_state": "regrow.noise.layers",
    "canonical_correlation": "regrow.analysis.canonical",
    "compare_latency": "regrow.pruning.side_by_side",
    "compensate": "regrow.compensation.compensate",
    "criteria_against_oracle": "regrow.analysis.agreement",
    "cut": "regrow.surgery.cut",
    "deploy": "regrow.shipping.deploy",
    "distillation_loss": "regrow.losses",
    "drop_one_accuracy": "regrow.analysis.drop_one",
    "export_onnx": "regrow.shipping.onnx",
    "fold_norms": "regrow.shipping.fold",
    "keep_of_masks": "regrow.criteria.masks",
    "layer_correlations": "regrow.analysis.layers",
    "load": "regrow.shipping.checkpoint",
    "load_bridgeout_state": "regrow.noise.layers",
    "load_run": "regrow.study.load_run",
    "match_norms": "regrow.compensation.norms",
    "off_map": "regrow.analysis.off_map",
    "orthogonal_loss": "regrow.losses",
    "overlap": "regrow.criteria.score",
    "plain_layers": "regrow.shipping.plain",
    "prune": "regrow.pruning.prune",
    "read_as": "regrow.compensation.compensate",
    "redo": "regrow.restarts.redo",
    "reinitialize": "regrow.restarts.perturb",
    "release": "regrow.repr.cycle",
    "reestimate_norms": "regrow.compensation.norms",
    "remove_bridgeout": "regrow.noise.layers",
    "restart": "regrow.repr.restart",
    "save": "regrow.shipping.checkpoint",
    "score": "regrow.criteria.score",
    "select": "regrow.criteria.select",
    "shrink_and_perturb": "regrow.restarts.perturb",
}

__all__ = [
    "ContinualBackprop",
    "DenseSparseDense",
    "Event",
    "GradientWatch",
    "KnowledgeEvolution",
    "RePr",
    "add_bridgeout",
    "bridgeout",
    "bridgeout_state",
    "canonical_correlation",
    "compare_latency",
    "compensate",
    "criteria_against_oracle",
    "cut",
    "deploy",
    "distillation_loss",
    "drop_one_accuracy",
    "export_onnx",
    "fold_norms",
    "keep_of_masks",
    "layer_correlations",
    "load",
    "load_bridgeout_state",
    "load_run",
    "match_norms",
    "off_map",
    "orthogonal_loss",
    "overlap",
    "plain_layers",
    "prune",
    "read_as",
    "redo",
    "reestimate_norms",
    "reinitialize",
    "release",
    "remove_bridgeout",
    "restart",
    "save",
    "score",
    "select",
    "shrink_and_perturb",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'regrow' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
