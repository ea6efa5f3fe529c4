"""The pictures that a criterion reads, their loss, and a model that is only read meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.given import kind_of
from regrow.looking.calls import PassFailed, buffers_kept, call, evaluating, undisturbed
from regrow.looking.images import check_batches
from regrow.marks import STATES, states_of
from regrow.torch_private import tree_leaves, tree_map

Loss = Callable[[Any, Any], Tensor]
_PAIR = "a batch is a pair of inputs and labels, as a DataLoader yields them, such as (x, y)"


@dataclass(frozen=True)
class Batch:
    """Inputs of a model with their labels (None where there are none), and how many pictures they are."""

    inputs: Any
    labels: Any
    pictures: int

    def first(self, count: int) -> Batch:
        """The first pictures of the batch, without labels; the whole batch if the tensors in its inputs do
        not all have the pictures in their first dimension."""
        tensors = [leaf for leaf in tree_leaves(self.inputs) if isinstance(leaf, Tensor)]
        if any(not each.dim() or len(each) != self.pictures for each in tensors):
            return self
        return Batch(_of_tensors(self.inputs, lambda each: each[:count]), None, min(count, self.pictures))

    def singles(self) -> Iterator[Batch]:
        """Each picture as a batch of one.

        Raises:
            ValueError: the inputs, or the labels, do not belong to single pictures.
        """
        for inputs, labels in zip(
            _singles(self.inputs, self.pictures, "inputs"),
            _singles(self.labels, self.pictures, "labels"),
            strict=True,
        ):
            yield Batch(inputs, labels, 1)


@contextmanager
def only_read(model: nn.Module) -> Iterator[None]:
    """``model`` runs in evaluation mode, without autocast around it, with or without a gradient; afterwards
    its modes and buffers and the random generators are as they were."""
    state = states_of(model).get("lazy")
    if state is not None:
        says, end = STATES["lazy"]
        raise ValueError(f"score was refused, because the model {says} (see {state!r}). {end}")
    with (
        torch.inference_mode(False),
        evaluating(model),
        undisturbed(model),
        torch.no_grad(),
        buffers_kept(model),
        torch.enable_grad(),
    ):
        yield


def read_batches(batches: Iterable[Any], device: torch.device, *, needs_labels: bool) -> Iterator[Batch]:
    """Yield ``batches`` with all their tensors, those of whole numbers too, on ``device``.

    Args:
        batches: pairs of inputs and labels, or inputs alone, which come with the labels None. Inputs are a
            tensor or a dict of keywords, and in a pair also a tuple of arguments. What stands behind the
            labels is not read.
        needs_labels: whether every batch must have labels, for the cross entropy.

    Raises:
        ValueError: there is no batch, or a batch is of another kind or has no labels.
    """
    check_batches(batches, "batches")

    def there(tensor: Tensor) -> Tensor:
        moved = tensor.to(device)
        # Autograd takes no tensor that was made under torch.inference_mode.
        return moved.clone() if moved.is_inference() and not torch.is_inference_mode_enabled() else moved

    empty = True
    for batch in batches:
        pair = batch if isinstance(batch, tuple | list) else (batch,)
        if needs_labels and len(pair) < 2:
            raise ValueError(
                f"without loss= a criterion of the loss takes the cross entropy, so {_PAIR}; got "
                f"{kind_of(batch)}. For a loss without labels write loss=lambda outputs, _: …"
            )
        given = pair[0] if pair else pair
        tensors = [leaf for leaf in tree_leaves(_plain(given)) if isinstance(leaf, Tensor) and leaf.dim()]
        if not tensors or not isinstance(given, Tensor | Mapping | tuple | list):
            raise ValueError(
                f"{_PAIR}; the inputs are a tensor, a tuple of arguments or a dict of keywords, got "
                f"{kind_of(given)}."
            )
        if not len(tensors[0]):
            raise ValueError("a batch has no picture in it: leave empty batches out.")
        labels = _of_tensors(pair[1], there) if len(pair) > 1 else None
        yield Batch(_of_tensors(given, there), labels, len(tensors[0]))
        empty = False
    if empty:
        raise ValueError(
            "batches yields no batch: pass a few hundred pictures, not an iterator that was used before."
        )


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _of_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with each tensor in its containers changed."""
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, _plain(value))


def run(model: nn.Module, inputs: Any) -> Any:
    """What ``model`` makes of one batch; ``PassFailed``, a ``ValueError``, if it fails."""
    try:
        return call(model, inputs)
    except PassFailed as error:
        raise PassFailed(
            f"the model's forward pass fails on a batch: {error.__cause__}. Pass inputs that the model takes."
        ) from error.__cause__


def singles(value: Any, count: int) -> list[Any] | None:
    """The inputs, outputs or labels of ``count`` pictures as those of single ones, each a batch of one.

    Tensors with ``count`` entries are taken apart, in whatever containers; all else goes to every picture. A
    list may also hold something for each picture, such as the boxes in it.

    Returns:
        None where nothing could be taken apart.
    """
    if count == 1 or value is None:
        return [value] * count
    each_its_own = isinstance(value, list) and len(value) == count
    if each_its_own and not all(isinstance(each, Tensor) for each in value):
        return [[each] for each in value]
    apart = {
        id(leaf): leaf.split(1)
        for leaf in tree_leaves(value)
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count
    }
    if not apart:
        return [[each] for each in value] if each_its_own else None

    def at(place: int) -> Any:
        return tree_map(lambda leaf: apart[id(leaf)][place] if id(leaf) in apart else leaf, value)

    return [at(place) for place in range(count)]


def _singles(value: Any, count: int, what: str) -> list[Any]:
    parts = singles(value, count)
    if parts is None:
        raise ValueError(
            f"a criterion that takes the loss of each picture needs {what} with one entry for each of the "
            f"{count} pictures, and got {_shown(value)}."
        )
    return parts


def total_loss(outputs: Any, batch: Batch, loss: Loss | None) -> Tensor:
    """The sum of the losses of single pictures, each ``loss`` of a batch of one, with a gradient.

    Args:
        loss: None for the cross entropy.

    Raises:
        ValueError: outputs and labels do not belong to single pictures, or the loss is no number, or has no
            gradient.
    """
    count, labels = batch.pictures, batch.labels
    if loss is None and _are_classes(outputs, labels, count):
        return nn.functional.cross_entropy(outputs, labels, reduction="sum")
    both = zip(_singles(outputs, count, "outputs"), _singles(labels, count, "labels"), strict=True)
    losses = [_checked((loss or cross_entropy)(output, label)) for output, label in both]
    total: Tensor = torch.stack(losses).sum()
    if not total.requires_grad:
        raise ValueError(
            "the loss has no gradient: compute it from the outputs by operations of PyTorch, without "
            "detach(), in a model that does not run under torch.no_grad."
        )
    return total


def loss_of(loss: Loss, outputs: Any, batch: Batch) -> Tensor:
    """The loss of a model's outputs for a whole batch, Tensor [], without a gradient.

    Raises:
        ValueError: ``loss`` returns something else.
    """
    return _checked(loss(outputs, batch.labels)).detach()


def _checked(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"loss(outputs, labels) returns a tensor of one number, the mean loss, and got {kind_of(value)}."
        )
    return value.reshape(())


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


def cross_entropy(outputs: Any, labels: Any) -> Tensor:
    """The cross entropy of logits, the loss where none is given. Raises ``ValueError`` for other outputs."""
    if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor):
        raise ValueError(
            "without loss= the loss is the cross entropy of logits [n, classes, …] and labels, and got "
            f"{kind_of(outputs)} and {kind_of(labels)}. Write loss=lambda outputs, labels: …"
        )
    return nn.functional.cross_entropy(outputs, labels)


def _are_classes(outputs: Any, labels: Any, count: int) -> bool:
    return (
        isinstance(outputs, Tensor)
        and isinstance(labels, Tensor)
        and outputs.dim() == 2
        and outputs.requires_grad
        and labels.shape == outputs.shape[:1] == (count,)
        and not labels.is_floating_point()
        and bool((labels >= 0).all())  # of ignored labels the loss of a single picture is NaN
    )


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return kind_of(value)
    shapes = [list(leaf.shape) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return f"{kind_of(value)} with tensors {shapes}"
