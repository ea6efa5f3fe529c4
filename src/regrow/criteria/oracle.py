"""The greedy oracle: how much the loss grows when a filter is dropped alone (RePr, arXiv 1811.07275, §5).

The plain way is one pass of the network for each filter. Here the network is taken apart: what comes ahead of
a layer is computed once, the next layer's output is changed by the one channel that is missing, and what
follows is computed for many filters and pictures at once. It is the same number, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from regrow.criteria.apart import quick_scores
from regrow.criteria.bar import progress_bar
from regrow.criteria.batches import Loss, check_loss, cross_entropy, read_batches
from regrow.criteria.drop_one import looped_scores, plain_loss
from regrow.filters import check_finite, eligible
from regrow.log import first_line
from regrow.looking.calls import PassFailed, switch, undisturbed
from regrow.looking.copies import NotCopied, copied
from regrow.marks import check, strip
from regrow.modules import device_of, unwrap
from regrow.structure.read import read_structure


def oracle_scores(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    exclude: Iterable[str] = (),
    progress: bool = True,
) -> dict[str, Tensor]:
    """The loss of ``model`` without each filter alone, minus its loss with all filters; higher = keep.

    A filter is dropped as RePr drops it: its row and bias are 0, and the norms that read its channel alone
    are silent there, so that the channel is exactly 0. The model is only read; a copy runs in evaluation
    mode. Where a model, or what follows one of its layers, cannot be taken apart (torch.fx cannot trace it,
    or a trial on a few pictures comes out otherwise), the scores come from a pass for each filter, which
    takes much longer; the log ``regrow`` says so (level INFO).

    Args:
        model: any module with convolutions; wrappers are looked through.
        batches: an iterable of (inputs, labels), such as a loader, which is read once. Inputs are a tensor
            with the pictures in its first dimension, a tuple of arguments or a dict of keywords. All batches
            are held in memory, and the activations of one.
        loss: takes the model's outputs and the labels (None where a batch has none) of a batch, and returns
            their mean loss, Tensor []. Cross entropy by default.
        exclude: qualified names of convolutions, or of containers of convolutions, to leave out.
        progress: whether to show a bar, on a terminal and after two seconds.

    Returns:
        {qualified name: Tensor[filters]}, float32, on the device of the weights: the mean over all pictures.
        0 for a layer that the pictures do not reach.

    Raises:
        ValueError: an unknown layer name, no convolution left, ``batches`` empty or of another kind, a loss
            that is no finite number, or a model that cannot be copied or run.
    """
    check(model, "read_as", called="score")
    convs = eligible(model, exclude)
    check_finite(convs)
    held = list(read_batches(batches, device_of(model), needs_labels=loss is None))
    chosen: Loss = loss or cross_entropy
    try:
        whole = copied(unwrap(model), torch.clone, requires_grad=False)
        strip(whole)
        switch(whole, False)
        readers = read_structure(whole, held[0].first(1).inputs)
        readers = {name: readers[name] for name in convs if name in readers}
        steps = sum(conv.out_channels for conv in convs.values()) * len(held)
        with (
            undisturbed(whole),
            torch.no_grad(),
            progress_bar("scoring filters", steps, shown=progress) as advance,
        ):
            before = plain_loss(whole, held, chosen)
            check_loss(before)
            found = quick_scores(whole, readers, held, chosen, advance)
            slow = {name: readers[name] for name in readers if name not in found}
            found |= looped_scores(whole, slow, held, chosen, before, advance)
    except (NotCopied, PassFailed) as error:
        raise ValueError(
            f"the model cannot be copied and run on batches: {first_line(error.__cause__ or error)}. Pass "
            "batches of what the model takes, as your loader gives them."
        ) from error
    return {
        name: found.get(name, torch.zeros(conv.out_channels)).to(conv.weight.device, torch.float32)
        for name, conv in convs.items()
    }
