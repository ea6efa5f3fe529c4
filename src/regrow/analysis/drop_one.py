"""The accuracy of a network when each of its filters is dropped alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from regrow.criteria.batches import read_batches
from regrow.criteria.oracle import oracle_scores
from regrow.filters import eligible
from regrow.given import kind_of
from regrow.looking.calls import call, evaluating, undisturbed
from regrow.marks import check_whole
from regrow.modules import device_of, unwrap


def drop_one_accuracy(
    model: nn.Module, batches: Iterable[Any], *, exclude: Iterable[str] = (), progress: bool = True
) -> dict[str, Tensor]:
    """The accuracy of a classifier when each filter is dropped alone (RePr, arXiv 1811.07275).

    The filters are dropped as ``score(model, "oracle", …)`` drops them, and as quickly; the accuracy stands
    in for the loss.

    Args:
        model: any module with convolutions whose output is logits [batch, classes]; it is not changed.
        batches: (inputs, labels [batch]), all of which are kept in memory: a few hundred pictures.
        exclude: qualified names of convolutions, or of containers of convolutions, to leave out.
        progress: whether to show a bar, on a terminal and after two seconds.

    Returns:
        {qualified name: Tensor[filters]}, float64 on the CPU, each in [0, 1], of all convolutions that
        ``score`` ranks.

    Raises:
        ValueError: no convolution left, no batch, or outputs that are no logits of the labels.
    """
    check_whole(model, "drop_one_accuracy")
    eligible(model, exclude)
    held = list(read_batches(batches, device_of(model), needs_labels=False))
    with evaluating(model), undisturbed(model), torch.no_grad():
        wrong = [error_rate(call(unwrap(model), each.inputs), each.labels) for each in held]
    pictures = sum(each.pictures for each in held)
    whole = 1 - sum(float(rate) * each.pictures for rate, each in zip(wrong, held, strict=True)) / pictures
    pairs = [(each.inputs, each.labels) for each in held]
    scores = oracle_scores(model, pairs, error_rate, exclude=exclude, progress=progress)
    # Accuracies are whole numbers of pictures, which the scores give but for rounding.
    return {
        name: ((whole - values.cpu().double()) * pictures).round() / pictures
        for name, values in scores.items()
    }


def error_rate(outputs: Any, labels: Any) -> Tensor:
    """The share of pictures whose largest logit is not that of the label, Tensor [].

    Raises:
        ValueError: these are no logits [batch, classes] and labels [batch].
    """
    fits = isinstance(outputs, Tensor) and outputs.dim() == 2 and isinstance(labels, Tensor)
    if not fits or labels.shape != outputs.shape[:1]:
        raise ValueError(
            "accuracy takes batches of (inputs, labels [batch]) and a model that gives logits "
            f"[batch, classes], and got {kind_of(outputs)} for labels {kind_of(labels)}."
        )
    return (outputs.argmax(1) != labels.to(outputs.device)).float().mean()
