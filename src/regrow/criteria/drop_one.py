"""The loss of a network without one filter, the plain way: silence it, run the network, and put it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regrow.criteria.bar import Advance
from regrow.criteria.batches import Batch, Loss, loss_of, mean_loss
from regrow.looking.calls import call
from regrow.modules import device_of
from regrow.structure.readers import Readers, silent_entries


def looped_scores(
    probe: nn.Module,
    readers: Mapping[str, Readers],
    batches: Sequence[Batch],
    loss: Loss,
    before: float,
    advance: Advance | None = None,
) -> dict[str, Tensor]:
    """``oracle_scores`` of the layers in ``readers`` by one pass for each filter.

    Args:
        probe: a copy of the model in evaluation mode; its filters are silent for a moment, one at a time.
        readers: from the result of ``read_structure``, those of the layers that are wanted.
        before: the loss with all filters.
        advance: is told the batches that are done.

    Returns:
        {name: Tensor[filters]}, float64, on the CPU.

    Raises:
        PassFailed: the model's forward pass fails.
    """
    found = {}
    for name in readers:
        conv: Any = probe.get_submodule(name)
        scores = []
        for index in range(conv.out_channels):
            with dropped(probe, readers, name, index):
                scores.append(plain_loss(probe, batches, loss) - before)
            if advance:
                advance(len(batches))
        found[name] = torch.tensor(scores, dtype=torch.float64)
    return found


def plain_loss(probe: nn.Module, batches: Sequence[Batch], loss: Loss) -> float:
    """The mean loss of a model over all pictures, by one pass for each batch.

    Raises:
        PassFailed: the model's forward pass fails.
    """
    return mean_loss([loss_of(loss, outputs(probe, batch), batch) for batch in batches], batches)


def outputs(probe: nn.Module, batch: Batch) -> Any:
    """The outputs of one pass, with the same random numbers each time, should the model draw any.

    Raises:
        PassFailed: the model's forward pass fails.
    """
    # torch.manual_seed would reset the generators of every GPU.
    (torch.default_generator if device_of(probe).type == "cpu" else torch).manual_seed(0)
    return call(probe, batch.inputs)


@contextmanager
def dropped(probe: nn.Module, readers: Mapping[str, Readers], layer: str, index: int) -> Iterator[None]:
    """``probe`` without filter ``index`` of a convolution, silent behind its norms too."""
    entries = silent_entries(probe, readers, {layer: [index]})
    saved = [(parameter, where, parameter[where].clone()) for parameter, where in entries]
    try:
        for parameter, where in entries:
            parameter[where] = 0
        yield
    finally:
        for parameter, where, values in saved:
            parameter[where] = values
