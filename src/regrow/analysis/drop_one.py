"""The accuracy of a network when each of its filters is dropped alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regrow.filters import eligible
from regrow.given import kind_of
from regrow.looking.calls import call, undisturbed
from regrow.looking.copies import copied
from regrow.looking.images import check_batches, inputs_of
from regrow.marks import check_whole, strip
from regrow.modules import unwrap
from regrow.structure.read import read_structure
from regrow.surgery.removal import Removal, plan_removal, unremovable


@torch.no_grad()
def drop_one_accuracy(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    exclude: Iterable[str] = (),
    progress: Callable[[], object] | None = None,
) -> dict[str, Tensor]:
    """The accuracy of a classifier when each filter is dropped alone (RePr, arXiv 1811.07275).

    A dropped filter emits exactly 0, behind its norm too. The model computes in evaluation mode.

    Args:
        model: any module with convolutions whose output is logits [batch, classes]; it is not changed.
        batches: (inputs, labels [batch]), all of which are kept in memory: a few hundred pictures.
        exclude: qualified names of convolutions, or of containers of convolutions, to leave out.
        progress: called after each filter.

    Returns:
        {qualified name: Tensor[filters]}, float64 on the CPU, each in [0, 1], of all convolutions that
        ``score`` ranks and whose filters can be dropped.

    Raises:
        ValueError: no convolution left, no batch, or outputs that are no logits of the labels.
    """
    check_whole(model, "drop_one_accuracy")
    check_batches(batches, "batches")
    names = list(eligible(model, exclude))
    probe = copied(unwrap(model), requires_grad=False)
    strip(probe)
    pictures = list(_with_labels(probe.eval(), batches))
    example = pictures[0][0]
    readers = read_structure(unwrap(model), _first(example))
    found = {}
    for name in names:
        if unremovable(readers, name):
            continue
        filters = probe.get_submodule(name).out_channels
        accuracies = torch.zeros(int(filters), dtype=torch.float64)  # type: ignore[arg-type]
        for index in range(len(accuracies)):
            keep = torch.ones(len(accuracies), dtype=torch.bool)
            keep[index] = False
            removal = plan_removal(probe, {name: keep}, None, readers, norms=False)
            with _dropped(probe, removal):
                accuracies[index] = _accuracy(probe, pictures)
            if progress is not None:
                progress()
        found[name] = accuracies
    return found


def _first(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[:1]
    return {key: value[:1] if isinstance(value, Tensor) else value for key, value in inputs.items()}


def _with_labels(model: nn.Module, batches: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
    empty = True
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) < 2 or not isinstance(batch[1], Tensor):
            raise ValueError(f"batches must yield (inputs, labels), and one is {kind_of(batch)}.")
        inputs = next(inputs_of(model, [batch]))
        yield inputs, batch[1].cpu()
        empty = False
    if empty:
        raise ValueError("batches yields no batch: pass a few hundred pictures, not an iterator used before.")


@contextmanager
def _dropped(model: nn.Module, removal: Removal) -> Iterator[None]:
    """The filters of ``removal`` are silent in ``model``; afterwards all values are as before."""
    touched = [model.get_submodule(name) for name in {*removal.gone, *removal.norms}]
    tensors = [
        tensor
        for module in touched
        for key in ("weight", "bias", "running_mean")
        if isinstance(tensor := getattr(module, key, None), Tensor)
    ]
    saved = [tensor.detach().clone() for tensor in tensors]
    removal.apply(model)
    try:
        yield
    finally:
        for tensor, values in zip(tensors, saved, strict=True):
            tensor.detach().copy_(values)


def _accuracy(model: nn.Module, pictures: list[tuple[Any, Tensor]]) -> float:
    right = count = 0
    for inputs, labels in pictures:
        with undisturbed(model):
            outputs = call(model, inputs)
        if not isinstance(outputs, Tensor) or outputs.dim() != 2 or labels.shape != outputs.shape[:1]:
            raise ValueError(
                f"accuracy is that of logits [batch, classes] against labels [batch]; the model gives "
                f"{kind_of(outputs)} for labels {list(labels.shape)}."
            )
        right += int((outputs.argmax(1).cpu() == labels).sum())
        count += len(labels)
    return right / count
