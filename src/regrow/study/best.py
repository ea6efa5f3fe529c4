"""The weights of the epoch that validates best: kept while a run trains, tested once at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from regrow.study.feeding import Batches
from regrow.study.ranks import Ranks
from regrow.study.steps import evaluate, state_of_weights

Best = dict[str, Any]


def better(best: Best | None, epoch: int, accuracy: float, weights: Mapping[str, Tensor]) -> Best | None:
    """The best of ``best`` and the epoch that has just ended; of two equal ones the earlier.

    Args:
        best: what this function returned for the epoch before; {} before the first epoch, and None in a run
            of several tasks, or one that a version of regrow began that did not keep the best weights.
        epoch: its number, from 1.
        accuracy: of its validation, a fraction.
        weights: the state of the model after it.
    """
    if best is None or (best and accuracy <= best["accuracy"]):
        return best
    return {"epoch": epoch, "accuracy": accuracy, "weights": dict(weights)}


def measured_best(model: nn.Module, best: Best | None, test: Batches, ranks: Ranks) -> dict[str, Any]:
    """The entries of ``result.json`` about the best epoch; all are None if it is not known.

    The weights of that epoch are tested in ``model`` as they were validated, with the batch-norm statistics
    of that epoch; ``model`` has its own weights again afterwards.
    """
    if not best:
        return {"best_epoch": None, "best_validation_accuracy": None, "best_test_accuracy": None}
    last = state_of_weights(model)
    model.load_state_dict(best["weights"])
    accuracy = evaluate(model, test, ranks)["accuracy"]
    model.load_state_dict(last)
    return {
        "best_epoch": best["epoch"],
        "best_validation_accuracy": best["accuracy"],
        "best_test_accuracy": accuracy,
    }
