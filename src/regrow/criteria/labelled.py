"""Batches of pictures with labels, and the loss of a model's outputs for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from regrow.given import kind_of
from regrow.looking.calls import mapped, tensors

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Batch:
    """Inputs of a model with their labels (None where there are none), and how many pictures they are."""

    inputs: Any
    labels: Any
    pictures: int

    def first(self, count: int) -> Batch:
        """The first pictures of the batch; all if its tensors do not have them in their first dimension."""
        if any(not each.dim() or len(each) != self.pictures for each in tensors(self.inputs)):
            return self
        inputs = mapped(self.inputs, lambda each: each[:count])
        return Batch(inputs, None, min(count, self.pictures))


def read_batches(batches: Iterable[Any], device: torch.device, *, needs_labels: bool) -> Iterator[Batch]:
    """Yield ``batches`` of (inputs, labels), or of inputs alone, on ``device``.

    Raises:
        ValueError: there is no batch, or a batch of another kind, or one without labels that needs them.
    """
    if isinstance(batches, Tensor | Mapping | str | nn.Module) or not isinstance(batches, Iterable):
        hint = "For one batch x with labels y write batches=[(x, y)]."
        if isinstance(batches, Dataset):
            hint = "Wrap the data set in a loader: DataLoader(dataset, batch_size=64)."
        raise ValueError(f"batches is an iterable of (inputs, labels), got {kind_of(batches)}. {hint}")
    empty = True
    for batch in batches:
        pair = batch if isinstance(batch, tuple | list) else (batch,)
        if len(pair) not in (1, 2) or not isinstance(pair[0], Tensor | Mapping | tuple | list):
            raise ValueError(
                "a batch is (inputs, labels), where inputs are a tensor, a tuple of arguments or a dict of "
                f"keywords; got {kind_of(batch)}."
            )
        inputs = mapped(pair[0], lambda each: each.to(device))
        labels = mapped(pair[1], lambda each: each.to(device)) if len(pair) == 2 else None
        if labels is None and needs_labels:
            raise ValueError(
                "a batch has no labels, which the cross entropy needs: pass batches of (inputs, labels), or a "
                "loss that needs none."
            )
        found = [each for each in tensors(inputs) if each.dim()]
        if not found or not len(found[0]):
            raise ValueError("a batch holds no picture: leave it out.")
        yield Batch(inputs, labels, len(found[0]))
        empty = False
    if empty:
        raise ValueError("batches yields no batch: pass a loader, not an iterator that was used before.")


def loss_of(loss: Loss, outputs: Any, batch: Batch) -> Tensor:
    """The loss of a model's outputs for a batch, Tensor [].

    Raises:
        ValueError: ``loss`` returns something else.
    """
    value = loss(outputs, batch.labels)
    if not isinstance(value, Tensor) or value.numel() != 1:
        of = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else kind_of(value)
        raise ValueError(
            f"loss(outputs, labels) returns the mean loss of a batch, a tensor of one number; got {of}."
        )
    return value.detach().reshape(())


def mean_loss(losses: Sequence[Tensor], batches: Sequence[Batch]) -> float:
    """The mean over all pictures of the losses of their batches."""
    total = sum(batch.pictures for batch in batches)
    values = torch.stack(list(losses)).tolist()
    return math.fsum(value * batch.pictures / total for value, batch in zip(values, batches, strict=True))


def check_loss(value: float) -> None:
    """Raise ``ValueError`` if the loss of the model with all filters is no finite number."""
    if not math.isfinite(value):
        raise ValueError(
            f"the loss of the model on batches is {value}: check the pictures, labels and model."
        )
