"""Top-1 accuracy of a classifier."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from regrow.looking.calls import evaluating
from regrow.modules import device_of, unwrap
from regrow.shipping.deployed import is_deployed


@torch.no_grad()
def top1(model: nn.Module, batches: Iterable[Any]) -> tuple[float, int]:
    """Return the share of pictures whose highest logit is that of their label, and the number of pictures.

    Args:
        model: inputs → logits [n, classes], in any mode; it is run in evaluation mode. What ``deploy`` made
            runs as deployed, any other compiled network operation by operation.
        batches: pairs of inputs and labels [n], as a DataLoader yields them.

    Raises:
        ValueError: a batch or an output is of another kind, or there is no batch.
    """
    deployed = is_deployed(model)
    model = model if deployed else unwrap(model)
    device = device_of(model)
    correct = seen = 0
    with nullcontext() if deployed else evaluating(model):
        for batch in batches:
            if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)):
                raise ValueError("a validation batch is a pair of inputs and labels, as from a DataLoader.")
            inputs, labels = batch
            logits = model(inputs.to(device))
            if not isinstance(logits, Tensor) or logits.shape[:1] != labels.shape or logits.dim() != 2:
                raise ValueError(
                    "accuracy needs a classifier: logits [n, classes] for labels [n], got "
                    f"{list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__} for "
                    f"{list(labels.shape)}."
                )
            correct += int((logits.argmax(1) == labels.to(device)).sum())
            seen += len(labels)
    if not seen:
        raise ValueError("validation yields no batch: pass a loader of inputs and labels.")
    return correct / seen, seen
