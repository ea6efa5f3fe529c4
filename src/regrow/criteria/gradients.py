"""Criteria of the loss's slope: gradient, Taylor expansion, and the diagonal of the Hessian.

All take the loss of each single picture, ``loss`` of a batch of one, in evaluation mode. So the scores do
not depend on how the pictures are divided into batches. The weights of a filter are its row; its bias and
the norm behind it do not count, as in the criteria of weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from regrow.criteria.batches import Batch, Loss, only_read, read_batches, run, total_loss
from regrow.criteria.per_picture import add_gradients
from regrow.criteria.values import channel_sums, of_filters, watching, wide
from regrow.indexing import index_tensor
from regrow.looking.precision import without_tf32
from regrow.modules import Convolution, device_of, filters_first
from regrow.torch_private import own_parameters

LOSS_CRITERIA = ("gradient", "taylor", "hessian")


def loss_scores(
    model: nn.Module,
    convs: Mapping[str, Convolution],
    batches: Iterable[Any],
    criterion: str,
    loss: Loss | None,
) -> dict[str, Tensor]:
    """Score filters by how the loss L of a picture depends on them; means are over all pictures.

    - ``"gradient"``: the mean of |∂L/∂w| over pictures and over the filter's weights w.
    - ``"taylor"``: the mean of |Σ a · ∂L/∂a|, where the sum is over the positions of the filter's value a
      (see ``values``). This is how far the loss changes, to first order, where a becomes 0. Molchanov et al.
      2017 (arXiv 1611.06440, eq. 8) divide the sum by the number of positions, so their scores have another
      scale in each layer, and the same order within a layer.
    - ``"hessian"``: ½ Σ w² · mean (∂L/∂w)². The mean square of the gradient, the diagonal of the Fisher
      matrix, stands for that of the Hessian (LeCun et al. 1990, Optimal Brain Damage; Theis et al. 2018,
      arXiv 1801.05787).

    Returns:
        {name: Tensor[filters]}. For ``"taylor"``, of the layers that a pass reached.
    """
    with only_read(model), without_tf32():
        read = read_batches(batches, device_of(model), needs_labels=loss is None)
        if criterion == "taylor":
            return _taylor(model, convs, read, loss)
        return _of_weights(model, convs, read, loss, criterion)


def _of_weights(
    model: nn.Module,
    convs: Mapping[str, Convolution],
    batches: Iterable[Batch],
    loss: Loss | None,
    criterion: str,
) -> dict[str, Tensor]:
    add, shape = (_add_sizes, _filters) if criterion == "gradient" else (_add_squares, _weights)
    totals: dict[str, Tensor] = {}
    pictures = 0
    for batch in batches:
        pictures += batch.pictures
        sums = add_gradients(model, convs, batch, loss, add, shape)
        for name, part in sums.items():
            totals[name] = totals.get(name, 0) + wide(part)
    scores = {}
    for name, conv in convs.items():
        values = totals[name] / pictures
        if criterion == "hessian":
            weight = filters_first(conv, own_parameters(conv)["weight"].detach()).flatten(1)
            values = 0.5 * (weight.to(values.dtype).square() * values).sum(1)
        scores[name] = _spread(conv, values)
    return scores


def _filters(conv: Convolution) -> tuple[int, ...]:
    return _weights(conv)[:1]


def _weights(conv: Convolution) -> tuple[int, ...]:
    return tuple(filters_first(conv, own_parameters(conv)["weight"]).flatten(1).shape)


def _add_sizes(total: Tensor, gradients: Tensor) -> None:
    total.add_(gradients.abs_().mean(2).sum(0))


def _add_squares(total: Tensor, gradients: Tensor) -> None:
    if len(gradients) == 1:
        total.addcmul_(gradients[0], gradients[0])
    else:
        total.add_(gradients.square_().sum(0))


def _spread(conv: Convolution, values: Tensor) -> Tensor:
    """The scores of all filters of a layer that computes with its weight among zeros, as a cut may leave."""
    at = vars(conv).get("_regrow_at", {}).get("_regrow_spread")
    if at is None:
        return values
    whole = values.new_zeros(conv.out_channels)
    whole[index_tensor(at, values.device)] = values
    return whole


class _Seen:
    """A value of a pass, and where its gradient arrives."""

    def __init__(self, tensor: Tensor) -> None:
        self.edge: GradientEdge | None = get_gradient_edge(tensor) if tensor.requires_grad else None
        self.value, self._mine = tensor.detach(), False

    def keep(self) -> None:
        if not self._mine:
            self.value, self._mine = self.value.clone(), True


def _taylor(
    model: nn.Module, convs: Mapping[str, Convolution], batches: Iterable[Batch], loss: Loss | None
) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    pictures = 0
    for batch in batches:
        pictures += batch.pictures
        found = [_changes(model, convs, batch, loss)]
        if found[0] is None:  # numbers of several pictures, or several of one, share a first entry
            found = [_changes(model, convs, single, loss) for single in batch.singles()]
        for changes in found:
            for name, change in (changes or {}).items():
                part = change.abs().sum(0)
                totals[name] = totals.get(name, 0) + part
    return {name: of_filters(convs[name], total / pictures) for name, total in totals.items()}


def _changes(
    model: nn.Module, convs: Mapping[str, Convolution], batch: Batch, loss: Loss | None
) -> dict[str, Tensor] | None:
    """Σ a · ∂L/∂a for each layer: Tensor[pictures, channels]; None where pictures cannot be told apart."""
    count = batch.pictures
    with watching(model, convs, lambda _name, tensor: _Seen(tensor), _Seen.keep) as watch:
        outputs = run(model, watch.inputs(batch.inputs))
    calls = [(name, seen) for name, every in watch.take(outputs).items() for seen in every]
    if count > 1 and any(len(seen.value) != count or _is_single(convs[n], seen.value) for n, seen in calls):
        return None
    total = total_loss(outputs, batch, loss)
    edges = [seen.edge for _, seen in calls if seen.edge is not None]
    gradients = iter(torch.autograd.grad(total, edges, allow_unused=True))
    found: dict[str, Tensor] = {}
    for name, seen in calls:
        gradient = next(gradients) if seen.edge is not None else None
        # What takes no part in the loss does not change it.
        product = torch.zeros_like(seen.value) if gradient is None else seen.value * gradient
        change = channel_sums(convs[name], product, batch=count > 1)
        change = change if count > 1 else change.unsqueeze(0)
        found[name] = found[name] + change if name in found else change
    return found


def _is_single(conv: Any, tensor: Tensor) -> bool:
    """Whether a convolution put out ``tensor`` for one picture without a batch dimension."""
    return tensor.dim() == len(conv.kernel_size) + 1
